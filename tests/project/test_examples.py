"""The programs in tools/examples are short, use the public API alone, and run from end to end."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress.report import schema

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "tools" / "examples").glob("*.py"))
MOST_LINES = 60
PRINTS = {
    "classifier": r"^(met|missed) .*\nclass: (good|bad)$",
    "decoder": r"^met \d+ bytes\ntext: once there was ",
    "device_bundle": r"^not_measured \(estimated \d\.\d\dx\)\n[^$]*^edge/verify\.py$",
    "embeddings": r"^met \d+ bytes\ncosine: -?\d\.\d+$",
    "own_module": r"^met \d+ bytes\nsame class for \d+ % of the signals$",
}


def test_there_is_one_example_for_each_use():
    assert [path.stem for path in EXAMPLES] == sorted(PRINTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_the_public_api(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    tree = ast.parse(text)
    assert f"python tools/examples/{path.name}" in ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != "compress"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("compress.") for alias in node.names)
    used = set(re.findall(r"\bcompress\.([a-zA-Z_]+)\(?", text)) - {"compress"}
    assert used - {"json"} <= set(compress.__all__)
    assert "compile" in used


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    words = [sys.executable, str(path), "--out", str(tmp_path / "out")]
    place = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COMPRESS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | place
    )
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTS[path.stem], done.stdout, re.MULTILINE), done.stdout
    report = schema.read(tmp_path / "out")
    assert done.stdout.startswith(report.verdict.status)
    assert (tmp_path / "out" / "model.onnx").is_file()
