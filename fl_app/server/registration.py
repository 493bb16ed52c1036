"""The roll call: which silos take part in a run, and the schema that they share.

In the field's words it is the registration of clients: every silo says its name, its schema and how
many training examples it has. Whoever fails at it is reported and left out.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Never

from fl_app.border import printable_line
from fl_app.exchange import Exchange
from fl_app.failures import FederationError
from fl_app.messages import INFORM, SiloEntry, Task
from shared.data import Schema
from shared.data.schema import check_same_kind, merge_schemas
from shared.experiment import FederationSection
from shared.polling import AdaptiveWait

MISFITS_S = 10.0  # for others to come, when too few of those that are there fit
INFORM_S = 30.0
MAX_SHARE = 2**20  # of the sums' 2^44 steps as many as a float32's fraction has are left
STRAGGLERS_S = 30.0  # for those that are connected and have not answered when enough others have


def call_roll(
    exchange: Exchange, settings: FederationSection, own: Schema | None = None
) -> dict[str, SiloEntry]:
    """Waits until `min_silos` that fit have introduced themselves; returns all that have, by name.

    `own`: the schema of the server's test data. A run begins with all that are connected: those
    that have yet to answer then get another half minute. Silos that do not fit are told and left
    out, see `misfits`. Raises FederationError if too few answer within `silo_timeout_s`, ValueError
    if too few fit.
    """
    wait = AdaptiveWait()
    started = time.monotonic()
    enough_since = started
    told: dict[str, str] = {}
    before = (-1, -1)  # silos that fit, and connected ones, at the last poll
    changed_at = started
    while True:
        roster = exchange.silos()
        reasons = misfits(roster.entries, own)
        leave_out(exchange, {name: r for name, r in reasons.items() if told.get(name) != r})
        told = reasons
        fitting = {n: entry for n, entry in sorted(roster.entries.items()) if n not in reasons}

        # Enough, and nobody left to wait for?
        now = time.monotonic()
        has_enough = len(fitting) >= settings.min_silos
        num_connected = len(roster.entries) + roster.num_pending
        if not has_enough:
            enough_since = now
        elif roster.num_pending == 0 or now - enough_since > STRAGGLERS_S:
            break

        # Too few: say who is missing, and give up in the end.
        if (len(fitting), num_connected) != before:
            before = (len(fitting), num_connected)
            changed_at = now
            wait.happened()
            if num_connected < settings.min_silos:
                print(
                    f"waiting for silos: {num_connected} of {settings.min_silos} connected",
                    flush=True,
                )
        do_not_fit = not has_enough and len(roster.entries) >= settings.min_silos
        if do_not_fit and now - changed_at > MISFITS_S:
            _raise_misfits(roster.entries, own, reasons, settings.min_silos)
        if not has_enough and now - started > settings.silo_timeout_s:
            raise FederationError(
                f"The federation needs {settings.min_silos} silos (federation.min_silos);"
                f" {len(fitting)} answered the roll call within"
                f" {settings.silo_timeout_s:g} s. Start more silos, or lower federation.min_silos."
            )
        wait.wait()

    listed = ", ".join(f"{e.name} ({e.num_examples} examples)" for e in fitting.values())
    print(f"roll call: {len(fitting)} silos: {listed}", flush=True)
    return fitting


def misfits(entries: Mapping[str, SiloEntry], own: Schema | None) -> dict[str, str]:
    """The silos that a run must go without, by name, each with the reason.

    | a silo that | would |
    |---|---|
    | claims more than 2^20 times the examples of the one in the middle | round all others away |
    | has another kind of examples than the server, or than most silos | need another model |

    Where no kind has a majority nobody can be blamed: then `common_schema` says who has what.
    """
    if not entries:
        return {}
    sizes = sorted(entry.num_examples for entry in entries.values())
    middle = sizes[(len(sizes) - 1) // 2]
    reasons = {
        name: f"it claims {entry.num_examples} examples, more than {MAX_SHARE} times those of the"
        f" silo in the middle ({middle}): the others would no longer count"
        for name, entry in entries.items()
        if entry.num_examples > MAX_SHARE * middle
    }

    kinds = Counter(entry.schema.kind for entry in entries.values())
    (kind, count), *others = kinds.most_common()
    if own:
        kind, count = own.kind, kinds[own.kind]
    elif others and others[0][1] == count:
        return reasons
    if count == 0:
        return reasons
    for name, entry in entries.items():
        if entry.schema.kind != kind:
            reasons[name] = f"it holds other examples than the rest: {entry.schema}"
    return reasons


def leave_out(exchange: Exchange, reasons: Mapping[str, str]) -> None:
    """Reports the silos that a run goes on without, and tells each of them why."""
    for silo, reason in sorted(reasons.items()):
        print(f"silo {silo!r} is left out: {printable_line(reason)}", flush=True)
    if reasons:
        tasks = {silo: Task(INFORM, body={"reason": r}) for silo, r in reasons.items()}
        exchange.post(tasks, INFORM_S)  # nobody waits for the replies


def _raise_misfits(
    entries: Mapping[str, SiloEntry], own: Schema | None, reasons: Mapping[str, str], needed: int
) -> Never:
    common_schema([*entries.values()], own)  # of two kinds: lists who has what
    raise FederationError(
        f"The federation needs {needed} silos (federation.min_silos); of {len(entries)} that"
        f" answered the roll call {len(reasons)} cannot take part:"
        f" {'; '.join(f'silo {silo!r}: {reason}' for silo, reason in sorted(reasons.items()))}."
        " Mend these, or lower federation.min_silos."
    )


def select_silos(
    exchange: Exchange,
    settings: FederationSection,
    members: Sequence[str],
    entries: Mapping[str, SiloEntry],
) -> dict[str, SiloEntry]:
    """The silos of a run: all that answered the roll call, or, of a resumed run, its `members`.

    Newcomers to a resumed run are reported and left out. Raises FederationError if members are
    missing and the run needs all of them, ValueError if it needs more results than there are silos.
    """
    newcomers = sorted(set(entries) - set(members)) if members else []
    missing = sorted(set(members) - set(entries))
    if missing and not settings.min_replies:
        raise FederationError(
            f"A run is resumed by the silos that began it; missing: {missing}, new: {newcomers}."
            f" Set federation.min_silos = {len(members)} to wait for all, or federation.min_replies"
            " to go on without those that are missing, and stop the new ones."
        )
    if missing:
        print(f"the run goes on without {', '.join(missing)}, who began it", flush=True)
    leave_out(exchange, dict.fromkeys(newcomers, "it did not begin the run that is resumed"))

    silos = {name: entry for name, entry in entries.items() if name not in newcomers}
    if settings.min_replies > len(silos):
        raise ValueError(
            "federation.min_replies cannot exceed the silos that take part; received"
            f" {settings.min_replies} with {len(silos)}. Lower it, or raise federation.min_silos."
        )
    return silos


def common_schema(silos: Sequence[SiloEntry], own: Schema | None) -> Schema:
    """The schema of the silos' training examples together. `own`: of the server's test data.

    Numbered classes go up to the highest of any party's. Raises ValueError if the silos', or the
    server's test data, are of different kinds, and says who has what.
    """
    schemas = {f"silo {entry.name!r}": entry.schema for entry in silos}
    if own is None:
        return merge_schemas(schemas)

    check_same_kind({**schemas, "the server's test data": own})
    schema = merge_schemas(schemas)
    if schema.columns or schema.classes:
        return schema
    return replace(schema, num_classes=max(schema.num_classes, own.num_classes))
