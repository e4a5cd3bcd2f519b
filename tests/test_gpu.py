"""The script for a machine with a GPU, whole, on a processor and toy models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compress.cost import Table

SCRIPT = Path(__file__).parent.parent / "tools" / "gpu.py"


def run(*words):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False, timeout=900
    )


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_part_runs_and_leaves_its_figures(tmp_path):
    file = tmp_path / "try.json"
    words = ("--device", "cpu", "--quick", "--target", "v100", "--precision", "fp32", "--speedup", "1.2")
    done = run(*words, "--out", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert (found["device"], found["gpu"], found["target"]) == ("cpu", None, "v100")
    assert "no figure here says anything of a GPU" in found["title"]
    for row in found["compile"]:
        assert row["asked"] == 1.2
        if "error" in row:  # a busy machine may find the smallest toy too slow
            assert "out of reach" in row["error"]
            continue
        assert row["predicted"] > 1
        low, high = row["measured"]["interval95"]
        assert low <= row["measured"]["speedup"] <= high
        assert any("is the torch model in fp32 (torch-cpu), not the ONNX" in line for line in row["warnings"])
        assert (row["environment"]["gpu"], row["environment"]["runtime"]) == ("cpu", "torch-cpu")
    table = Table.model_validate(found["table"])
    assert table.runtime == "torch-cpu"
    assert {shape for row in found["tables"] for shape in row["shapes"]} == set(table.rows)
    assert len(table.rows) == 4  # heads and feed-forward of both models
    assert all(ms > 0 for row in table.rows.values() for ms in row.values())
    for row in found["layers"]:
        assert set(row["speedup"]) | set(row["not"]) >= {"2:4", "int8-dynamic", "fp8"}, row
    assert {row["batch"] for row in found["models"]} == {1, 4}
    assert all(row["energy"] == "no counter" for row in found["energy"])
    assert (table.precision, found["compile"][0]["precision"]) == ("fp32", "fp32")
    dense, half = found["decode"]
    assert half["cache_mb"] == pytest.approx(dense["cache_mb"] / 2)
    assert half["parameters"] < dense["parameters"]


def test_without_a_gpu_the_script_says_how_to_try_it(tmp_path):
    done = run("--out", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert "--device cpu --quick tries the script" in done.stderr
