"""The gate itself: a gate that checks less than it says lets everything through."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def check():
    spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_types_are_checked_on_every_module_that_ships(check, tmp_path):
    (tmp_path / "typed").mkdir()
    (tmp_path / "typed" / "stale.py").touch()
    check.lay_out(tmp_path / "typed")
    found = {str(path.relative_to(tmp_path / "typed")) for path in (tmp_path / "typed").rglob("*.py")}
    expected = set()
    for folder, place in (("compress", ""), ("export", "export/"), ("profiles", "profiles/")):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"compress/{place}{path.relative_to(ROOT / folder)}")
    assert found == expected
    assert (tmp_path / "typed" / "compress" / "py.typed").is_file()


def test_the_steps_are_format_lint_types_and_tests(check):
    names = [name for name, _, _ in check.steps(whole=False)]
    assert names == ["format", "lint", "types", "tests"]
    assert "slow" not in str(check.steps(whole=False))
    assert check.steps(whole=True)[-1][1][-2:] == ["-m", "not gpu"]
    assert all(command[0] == sys.executable for _, command, _ in check.steps(whole=True))


@pytest.mark.parametrize(("codes", "expected"), [([0, 0], 0), ([0, 3, 0], 3), ([1, 0], 1)])
def test_the_first_failure_ends_the_gate_with_its_code(check, monkeypatch, capsys, codes, expected):
    done = []

    def run(command, cwd, check):
        done.append(command)
        return subprocess.CompletedProcess(command, codes[len(done) - 1])

    monkeypatch.setattr(check, "lay_out", lambda: None)
    monkeypatch.setattr(check, "steps", lambda whole: [(f"s{i}", ["x"], ROOT) for i in range(len(codes))])
    monkeypatch.setattr(check.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["check.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check.main() == expected
    assert len(done) == (codes.index(expected) + 1 if expected else len(codes))
    out = capsys.readouterr().out
    assert ("FAILED" in out) is bool(expected)
