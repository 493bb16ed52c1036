"""The page: one file with inline CSS and SVG, no script, nothing fetched.

The same runs give the same page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from shared.report import tables
from shared.report.plots import DARK, LIGHT, plots
from shared.report.runs import Run, read_runs

LIGHT_COLOURS = {
    "page": "#ffffff",
    "text": "#1d2733",
    "faint": "#4a5562",
    "line": "#dde2e8",
    "strong": "#8a94a0",
    "hover": "#f1f5f9",
    "best": "#dff3ea",
    "on-best": "#00523b",
    "differs": "#fdf0c8",
    "on-differs": "#5b3d00",
    "depth": "#b9dcf2",
    "link": "#005ea2",
    "shade": "#1d273340",
}
DARK_COLOURS = {
    "page": "#14181d",
    "text": "#e4e9ee",
    "faint": "#aab4bf",
    "line": "#2e3640",
    "strong": "#6d7884",
    "hover": "#1c232b",
    "best": "#0d3b2b",
    "on-best": "#86e6bf",
    "differs": "#413106",
    "on-differs": "#ffdd80",
    "depth": "#1d4a68",
    "link": "#7cc0f5",
    "shade": "#e4e9ee59",
}
CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem); max-width: 88rem; color: var(--text);
       background: var(--page); 
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .6rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
p, small, caption, figcaption { color: var(--faint); }
p { margin: .3rem 0; overflow-wrap: anywhere; }
small { display: block; font-weight: 400; } a { color: var(--link); }
nav a { display: inline-block; padding: .2rem .9rem .2rem 0; }
.wide { overflow-x: auto; position: relative; margin: 0 0 1.2rem; } .wide, pre { max-width: 100%; }
/* A shade at the right edge where a table goes on there: its cover is at the end of the table. */
.wide { background: linear-gradient(to left, var(--page) 50%, transparent) right / 3rem 100% local,
                    linear-gradient(to left, var(--shade), transparent) right / 1.5rem 100% scroll;
        background-repeat: no-repeat; }
.key { padding: .05rem .5rem; margin-right: .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
caption span { position: sticky; left: 0; display: inline-block;
               max-width: min(100%, calc(100vw - 2.5rem)); }
th, td { padding: .45rem .55rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
@media (max-width: 40rem) {
  th:first-child { max-width: 42vw; white-space: normal; overflow-wrap: anywhere; }
}
tbody tr:hover { background: var(--hover); }
thead th { vertical-align: bottom; white-space: normal; font-size: .88rem;
           border-bottom: 2px solid var(--strong); }
.long { white-space: pre-line; min-width: 14rem; max-width: 22rem; overflow-wrap: anywhere; }
.side-by-side { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.best, .differs { font-weight: 700; }
.best { background: var(--best); color: var(--on-best); }
.differs { background: var(--differs); color: var(--on-differs); }
.share { background: color-mix(in srgb, var(--depth) var(--share), transparent); }
.unfinished { font-size: .8rem; padding: .05rem .5rem; border-radius: 1rem;
              background: var(--differs);
              color: var(--on-differs); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.legend { position: sticky; top: 0; padding: .4rem 0; background: var(--page); }
.legend span { display: inline-block; margin-right: 1rem; }
.plots { display: grid; gap: 1.4rem 2rem;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; }
svg { width: 100%; max-width: 36rem; height: auto; overflow: visible; }
svg text { font-family: inherit !important; } summary { cursor: pointer; color: var(--link); }
pre { padding: .8rem 1rem; border: 1px solid var(--line); overflow-x: auto; white-space: pre-wrap;
      overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
@media print { .legend { position: static; } }
"""


def _variables(colours: dict[str, str], run_colours: Sequence[str]) -> str:
    """The colours as CSS variables: --page, --text, ..., --run0, --run1, ..."""
    variables = dict(colours)
    for i, colour in enumerate(run_colours):
        variables[f"run{i}"] = colour
    return "".join(f"--{name}:{value};" for name, value in variables.items())


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Writes the page, whole or not at all.

    Raises ValueError, with the rule, what was received and the remedy, if a run cannot be read or
    the page cannot be written.
    """
    page = _page(read_runs(run_dirs))
    temporary = Path(f"{output}.partial")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ValueError(
            "The page must be a file in a directory that exists and may be written to; received"
            f" {output} ({error.strerror}). Choose another one with -o."
        ) from None


def _title(runs: Sequence[Run]) -> str:
    """The experiments and the day on which the last of the runs finished."""
    names = ", ".join(dict.fromkeys(str(run.settings["name"]) for run in runs))
    day = max(run.day for run in runs)
    return f"{names}, {day}" if day else names


def _page(runs: Sequence[Run]) -> str:
    sections = {
        "Results": tables.results(runs),
        "Curves and costs": plots(runs),
        "Silos": tables.silos(runs),
        "Classes": tables.confusions(runs),
        "Text": tables.samples(runs),
        "Settings that differ": tables.settings(runs),
        "Versions": tables.versions(runs),
    }

    # Links to the sections that have something to show, and these sections.
    links = ""
    body = ""
    for name, html in sections.items():
        if html:
            anchor = name.lower().replace(" ", "-")
            links += f'<a href="#{anchor}">{name}</a>'
            body += (
                f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{name}</h2>\n'
                f"{html}</section>\n"
            )

    title = escape(_title(runs))
    light = _variables(LIGHT_COLOURS, LIGHT)
    dark = _variables(DARK_COLOURS, DARK)
    css = (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{CSS}"
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: runs side by side (Archipelago)</title>
<link rel="icon" href="data:,"><style>{css}</style></head><body>
<header><h1>{title}</h1><p>Runs side by side</p><nav aria-label="Sections">{links}</nav></header>
<main>
{body}</main>
</body></html>
"""
