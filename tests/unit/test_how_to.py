"""The keys that the how-to pages name exist. Their commands are run elsewhere, as printed."""

import re
from pathlib import Path

import pytest

from shared.experiment import Experiment

FILES = {"model.keras"}  # look like keys


@pytest.mark.parametrize("page", ["federation", "cluster-silo", "data", "models"])
def test_the_keys_that_a_page_names_exist(project: Path, page: str) -> None:
    known = set(Experiment().to_flat())
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    text = (project / "docs" / f"how-to-{page}.md").read_text(encoding="utf-8")
    keys = set(re.findall(rf"`((?:{sections})\.\w+)\b", text)) - FILES
    assert keys
    assert keys <= known, keys - known
