"""The script for a machine with a GPU, whole, on a processor and toy models, in time that is counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import clockwork

from compress.cost.latency_table import FORM_SEPARATOR, Table
from compress.pipeline import job

TOOLS = Path(__file__).parents[2] / "tools"
WORDS = ("--device", "cpu", "--quick", "--target", "v100", "--precision", "fp32", "--speedup", "1.2")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, as a compilation of its models finds it; nothing it sets stays."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESS_GPU_QUICK", "0")
    monkeypatch.setattr(job, "backend_for", job.backend_for)
    import gpu

    monkeypatch.setattr(gpu, "QUICK", False)
    monkeypatch.setattr(gpu.site_timing, "CYCLE_LIMITS", gpu.site_timing.CYCLE_LIMITS)
    clockwork.wind(monkeypatch)
    return gpu


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_part_runs_and_leaves_its_figures(script, tmp_path):
    file = tmp_path / "try.json"
    assert script.main([*WORDS, "--out", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["device"], found["gpu"], found["target"]) == ("cpu", None, "v100")
    assert "no figure here says anything of a GPU" in found["title"]
    assert [(row["model"], row["moves"]) for row in found["compile"]] == [
        (model, moves) for model in ("bert-base", "vit-b") for moves in ("structure", "forms")
    ]
    for row in found["compile"]:
        assert "error" not in row, row
        assert (row["asked"], row["status"]) == (1.2, "met")
        assert row["measured"]["speedup"] >= 1.2
        assert row["predicted"] == pytest.approx(row["measured"]["speedup"], rel=0.15)
        assert any("is the torch model in fp32 (torch-cpu), not the ONNX" in line for line in row["warnings"])
        assert (row["environment"]["gpu"], row["environment"]["runtime"]) == ("cpu", "torch-cpu")
        blocks = any(option.startswith("block:64x64@") for option in row["options"])
        assert blocks == (row["moves"] == "forms")  # a V100 multiplies neither 2:4 nor int8 nor fp8
    table = Table.model_validate(found["table"])
    assert (table.runtime, table.precision) == ("torch-cpu", "fp32")
    shapes = {shape for row in found["tables"] for shape in row["shapes"]}
    assert len(shapes) == 4  # heads and feed-forward of both models
    assert {key for key in table.rows if FORM_SEPARATOR not in key} == shapes
    assert {key.partition(FORM_SEPARATOR)[2] for key in table.rows} == {
        "",
        "block:64x64@0.5",
        "block:64x64@0.25",
    }
    assert all(row["untimed"] == [] for row in found["tables"])
    assert all(ms > 0 for row in table.rows.values() for ms in row.values())
    for row in found["layers"]:
        assert set(row["speedup"]) == {"2:4", "int8-dynamic", "fp8", "block:64x64@0.5"}, row
    assert {row["batch"] for row in found["models"]} == {1, 4}
    assert all(row["energy"] == "no counter" for row in found["energy"])
    dense, half, token = found["decode"]
    assert half["cache_mb"] == pytest.approx(dense["cache_mb"] / 2)
    assert half["parameters"] < dense["parameters"]
    assert token["speedup"]["half"][0] > 1
    assert {row["provider"] for row in found["files"]} == {"CPUExecutionProvider"}


def test_parts_of_several_calls_stand_in_one_file(script, tmp_path):
    file = tmp_path / "try.json"
    for part in ("layers", "energy"):
        assert script.main([*WORDS, "--part", part, "--out", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {"layers", "energy"} <= set(found)
    assert "compile" not in found
    # Counted, fp8 takes a quarter of a product, and zeros that nothing skips take what they took.
    large = next(row for row in found["layers"] if row["rows"] == 64)
    assert large["speedup"]["fp8"][0] > 1.2
    assert large["speedup"]["2:4"][0] == pytest.approx(1.0, abs=0.02)


def test_a_provider_that_does_not_start_is_said_and_fails_nothing(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.onnxruntime, "provider_starts", lambda provider: False)
    file = tmp_path / "try.json"
    assert script.main([*WORDS, "--part", "files", "--out", str(file)]) == 0
    (row,) = json.loads(file.read_text())["files"]
    assert row["not"] == "onnxruntime here does not have it, or cannot start it"


def test_without_a_gpu_the_script_says_how_to_try_it(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOLS / "gpu.py"), "--out", str(tmp_path / "x.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 2
    assert "--device cpu --quick tries the script" in done.stderr
