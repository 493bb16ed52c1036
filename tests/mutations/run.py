"""make test-mutations: plants the mistakes of this folder one by one; the test that each names must
fail.

A mistake is a patch file whose first line says `must fail: TEST`, a pytest node. It is applied to a
copy of the tree. Before that, all the named tests must pass on a copy without mistakes. Each line
of the report says which suite finds the mistake: `make test`, or only `make test-slow`. Arguments:
names of mistakes (default: all).
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
        print(
            f"error: no such mistake; received {list(names)}. There are:"
            f" {', '.join(known_names())}",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        tests = sorted({named_test(patch) for patch in patches})
        plain = copy_tree(Path(scratch) / "plain")
        done = run_tests(plain, tests)
        if done.returncode != 0:
            print(done.stdout[-5000:], file=sys.stderr)
            print(
                f"error: without any mistake these must pass, and do not: {' '.join(tests)}",
                file=sys.stderr,
            )
            return 2
        quick = quick_tests(plain, tests)
        survivors = [
            patch.stem
            for patch in patches
            if not is_found(patch, Path(scratch) / patch.stem, suite_of(named_test(patch), quick))
        ]
    found = len(patches) - len(survivors)
    print(
        f"{found} of {len(patches)} mistakes found"
        + (f"; not: {', '.join(survivors)}" if survivors else "")
    )
    return 1 if survivors else 0


def is_found(patch: Path, folder: Path, suite: str) -> bool:
    """Whether the named test, of this suite, fails on a copy with the mistake in it."""
    started = time.monotonic()
    copy = copy_tree(folder)
    subprocess.run(["git", "apply", "--whitespace=nowarn", str(patch)], cwd=copy, check=True)
    status = run_tests(copy, [named_test(patch)]).returncode
    shutil.rmtree(copy)
    verdict = "found" if status == TESTS_FAILED else f"NOT FOUND (pytest status {status})"
    seconds = f"{time.monotonic() - started:5.0f} s"
    print(f"{patch.stem:34} {verdict:30} {seconds}   {suite:9}   {named_test(patch)}", flush=True)
    return status == TESTS_FAILED


def known_names() -> list[str]:
    return [path.stem for path in sorted(FOLDER.glob("*.patch"))]


def named_test(patch: Path) -> str:
    first_line = patch.read_text(encoding="utf-8").partition("\n")[0]
    return first_line.removeprefix("must fail: ").strip()


def quick_tests(copy: Path, tests: Sequence[str]) -> list[str]:
    """The ids of those among these tests that `make test` runs."""
    listed = run_tests(copy, ["--collect-only", "-m", "not slow", *tests]).stdout
    return [line for line in listed.splitlines() if "::" in line]


def suite_of(test: str, quick: Sequence[str]) -> str:
    """The quickest suite that runs a test; one that is named by its file or function is many."""
    is_quick = any(node == test or node.startswith((f"{test}::", f"{test}[")) for node in quick)
    return "test" if is_quick else "test-slow"


def copy_tree(target: Path) -> Path:
    """The files of the project as they are now, committed or not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run_tests(copy: Path, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    # the copy's packages, before the installed ones
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *arguments],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
