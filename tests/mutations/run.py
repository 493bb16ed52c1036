"""make test-mutations: plants the mistakes of this folder one by one; the test that each names must fail.

A mistake is a patch file whose first line says `must fail: TEST`, a pytest node. It is applied to a copy of the tree.
Before that, all the named tests must pass on a copy without mistakes. Arguments: names of mistakes (default: all).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
TESTS_FAILED = 1  # pytest's exit status; others mean that it could not run the test at all


def main(names: Sequence[str]) -> int:
    patches = [path for path in sorted(FOLDER.glob("*.patch")) if not names or path.stem in names]
    if not patches:
        print(f"error: no such mistake; received {list(names)}. There are: {', '.join(known_names())}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        tests = sorted({named_test(patch) for patch in patches})
        done = run_tests(copy_tree(Path(scratch) / "plain"), tests)
        if done.returncode != 0:
            print(done.stdout[-5000:], file=sys.stderr)
            print(f"error: without any mistake these must pass, and do not: {' '.join(tests)}", file=sys.stderr)
            return 2
        survivors = [patch.stem for patch in patches if not is_found(patch, Path(scratch) / patch.stem)]
    found = len(patches) - len(survivors)
    print(f"{found} of {len(patches)} mistakes found" + (f"; not: {', '.join(survivors)}" if survivors else ""))
    return 1 if survivors else 0


def is_found(patch: Path, folder: Path) -> bool:
    """Whether the named test fails on a copy with the mistake in it."""
    started = time.monotonic()
    copy = copy_tree(folder)
    subprocess.run(["git", "apply", "--whitespace=nowarn", str(patch)], cwd=copy, check=True)
    status = run_tests(copy, [named_test(patch)]).returncode
    shutil.rmtree(copy)
    verdict = "found" if status == TESTS_FAILED else f"NOT FOUND (pytest status {status})"
    print(f"{patch.stem:32} {verdict:32} {time.monotonic() - started:5.0f} s   {named_test(patch)}", flush=True)
    return status == TESTS_FAILED


def known_names() -> list[str]:
    return [path.stem for path in sorted(FOLDER.glob("*.patch"))]


def named_test(patch: Path) -> str:
    first_line = patch.read_text(encoding="utf-8").partition("\n")[0]
    return first_line.removeprefix("must fail: ").strip()


def copy_tree(target: Path) -> Path:
    """The files of the project as they are now, committed or not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run_tests(copy: Path, tests: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(copy)}  # the copy's packages, before the installed ones
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
