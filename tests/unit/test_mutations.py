"""The planted mistakes stay plantable: each patch applies to the code as it is, and names a test
that exists.
"""

import subprocess
from pathlib import Path

import pytest

from tests.mutations.run import FOLDER, ROOT, named_test


@pytest.mark.parametrize("patch", sorted(FOLDER.glob("*.patch")), ids=lambda patch: patch.stem)
def test_patch_applies_and_its_test_exists(patch: Path) -> None:
    done = subprocess.run(
        ["git", "apply", "--check", str(patch)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{patch.name} no longer applies; make it anew: {done.stderr}"
    path, *function = named_test(patch).partition("[")[0].split("::")
    assert all(f"def {name}(" in (ROOT / path).read_text() for name in function)
