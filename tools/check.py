"""The one gate: format, lint, types of what ships, tests. It stops at the first step that fails.

.venv/bin/python tools/check.py          everything but the slow tests
.venv/bin/python tools/check.py --all    everything
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPED = ROOT / "build" / "typed"
# One process a core, each file in one of them; torch is kept from using all cores in each.
SPREAD = ("-n", "logical", "--dist", "loadfile")
PLACES = ("compress", "export", "profiles", "tests", "tools")


def lay_out(target: Path = TYPED) -> None:
    """Copy the packages to where they are installed; type checkers do not see the mapping of folders.

    From the root, mypy would miss `compress.export` and `compress.profiles` and still say success.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    mapping = project["package-dir"]
    shutil.rmtree(target, ignore_errors=True)
    for package in project["packages"]:
        root = max((name for name in mapping if f"{package}.".startswith(f"{name}.")), key=len)
        inner = package.removeprefix(root).lstrip(".").replace(".", "/")
        folder = target / package.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / mapping[root] / inner).iterdir():
            if path.suffix == ".py" or path.name == "py.typed":
                shutil.copy2(path, folder)


def steps(*, whole: bool) -> list[tuple[str, list[str], Path]]:
    """What is run, in order: name, command, and where."""
    python = sys.executable
    types = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    return [
        ("format", [python, "-m", "ruff", "format", "--check", *PLACES], ROOT),
        ("lint", [python, "-m", "ruff", "check", *PLACES], ROOT),
        ("types", [python, "-m", "mypy", *types, "--strict", "-p", "compress"], TYPED),
        ("tests", [python, "-m", "pytest", "-q", *SPREAD, *(["-m", "not gpu"] if whole else [])], ROOT),
    ]


def main() -> int:
    """Run every step; the exit code of the first that fails, else 0."""
    parser = argparse.ArgumentParser(description="format, lint, types and tests")
    parser.add_argument("--all", action="store_true", help="also the slow tests")
    lay_out()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, command, place in steps(whole=parser.parse_args().all):
        began = time.perf_counter()
        code = subprocess.run(command, cwd=place, check=False).returncode
        print(
            f"{name}: {'ok' if code == 0 else 'FAILED'} in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
