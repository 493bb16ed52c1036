"""The pages: whatever they link to is there."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fl_app.messages import DESCRIBE, TRAIN, SiloEntry, Task, TrainingRequest, refusal_header
from fl_app.silo.handlers import Site, handle
from fl_app.silo.policy import OPEN, SiloSettings
from fl_app.silo.workbench import Workbench
from shared.experiment import experiment_from_flat
from shared.zoo import build_model

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """The headings of a page as its links name them."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{target}#{anchor}"


# --- what leaves a silo


def keys_in(value: object, metrics: tuple[str, ...] = ("train", "validation")) -> set[str]:
    """The names of all fields in JSON values; metrics go by names of the model's."""
    if isinstance(value, list):
        return set().union(*map(keys_in, value))
    if not isinstance(value, dict):
        return set()
    inner = [keys_in(child) for key, child in value.items() if key not in metrics]
    return set(value).union(*inner)


def fields_listed(message: str) -> set[str]:
    text = (ROOT / "docs" / "how-to-federation.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {message} |")]
    return set(re.findall(r"`(\w+)`", row))


def test_the_page_lists_every_field_that_leaves_a_silo(tmp_path: Path):
    """Of a silo with all that a schema can hold, asked by the real handlers."""
    frame = pd.DataFrame(
        {"age": np.arange(40) / 2, "sex": ["f", "m"] * 20, "score": [0.5, 1.25] * 20}
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = {"label": "score", "categorical": "sex"}
    flat = {"model.name": "linear", **{f"data.{key}": value for key, value in data.items()}}
    experiment = experiment_from_flat(flat)
    site = Site(SiloSettings("a", str(tmp_path / "a.csv"), policy=OPEN), experiment, Workbench())

    entry = handle(Task(DESCRIBE), site)
    assert keys_in(entry.body) == fields_listed("answer to the roll call")

    schema = SiloEntry.from_answer(entry).schema
    weights = build_model(experiment.model, schema, seed=0).get_weights()
    task = Task(TRAIN, "r", 1, 0, TrainingRequest(schema, True).to_body(), weights)
    assert keys_in(handle(task, site).body) == fields_listed("result of a task")
    assert set(refusal_header("a", "no.")) == fields_listed("refusal")
