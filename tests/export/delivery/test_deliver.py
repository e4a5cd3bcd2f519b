import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support.outputs import write_model, write_output

from compress.cli import main
from compress.errors import CompressError
from compress.export import ort_format
from compress.export.backends import onnxruntime, tensorrt
from compress.export.delivery import deliver
from compress.export.edge import bundle
from compress.report import schema

FAKE = Path(__file__).parents[2] / "support" / "fake_tensorrt.py"


@pytest.fixture
def out(tmp_path):
    write_output(tmp_path / "out")
    return tmp_path / "out"


def test_onnx_is_the_file_that_was_proven(out, tmp_path):
    (written,) = deliver.deliver(out, "onnx", tmp_path / "a" / "b")
    assert written == tmp_path / "a" / "b" / "model.onnx"
    assert onnxruntime.sha256(written) == onnxruntime.sha256(out / "model.onnx")


def test_ort_loads_in_onnxruntime(out):
    (written,) = deliver.deliver(out, "ort")
    assert written.read_bytes()[4:8] == b"ORTM"
    with onnxruntime.OrtRunner(written, threads=1) as runner:
        assert set(runner.inputs()) == {"input_ids", "attention_mask"}


def test_a_file_that_is_no_model_cannot_become_ort(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(CompressError, match=r"m.onnx cannot be written as .ort"):
        ort_format.convert(tmp_path / "m.onnx", tmp_path / "m.ort")


def test_an_earlier_export_is_replaced_and_anything_else_is_not(out, tmp_path):
    place = tmp_path / "there"
    deliver.deliver(out, "edge", place)
    (place / "measured.json").write_text("old")
    deliver.deliver(out, "onnx", place)
    assert {path.name for path in place.iterdir()} == {"model.onnx", deliver.MARK}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(CompressError, match="mine holds something else"):
        deliver.deliver(out, "onnx", tmp_path / "mine")
    with pytest.raises(CompressError, match=r"thesis.tex is a file; .*--archive"):
        deliver.deliver(out, "onnx", tmp_path / "mine" / "thesis.tex")
    with pytest.raises(CompressError, match=r"name a file that ends in .tar.gz"):
        deliver.deliver(out, "onnx", tmp_path / "mine" / "thesis.tex", archive=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["model.onnx", "compression/work/dense.onnx"])
def test_a_file_that_changed_after_the_report_is_refused(out, capfd, name):
    write_model(out / name, 8, 1)
    assert main.perform(["export", str(out), "--to", "edge"]) == 2
    assert "is not the file that the report is about" in capfd.readouterr().err
    (out / name).unlink()
    assert main.perform(["export", str(out), "--to", "edge"]) == 2
    err = capfd.readouterr().err
    assert "does not exist" in err
    assert f"run compress with --out {out} again" in err


def test_bad_words_get_one_message(out, tmp_path, capfd):
    for words, message in (
        (["export", str(out), "--to", "egde"], "--to 'egde' is no format; did you mean 'edge'"),
        (["export", str(out)], "--to"),
        (["export", str(tmp_path / "nothing"), "--to", "edge"], "cannot be read"),
    ):
        assert main.perform(words) == 2
        err = capfd.readouterr().err
        assert message in err
        assert "Traceback" not in err


@pytest.fixture
def gpu(out, tmp_path, monkeypatch):
    """The double of TensorRT and CUDA of test_tensorrt.py, and a file that the double computes."""
    spec = importlib.util.spec_from_file_location("fake_tensorrt", FAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt, "DEVICE", "cpu")
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None, wait_stream=lambda other: None)
    doubles = {
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda: (9, 0),
        "current_stream": lambda: stream,
        "Stream": lambda: stream,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    module.IExecutionContext.set_input_shape = lambda self, name, shape: setattr(self, "shape", shape) or True
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", 4]) for name in ("x", "y")
    )
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    file = out / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    folder = out / "compression"
    document = json.loads((folder / "report.json").read_text())
    document["inputs"]["file_sha256"] = onnxruntime.sha256(file)
    document["sites"][0]["option"]["pattern"] = "2:4"
    (folder / "report.json").write_text(json.dumps(document))
    return module


def test_an_engine_is_built_for_the_recipes_shapes_and_checked_against_the_file(gpu, out, tmp_path, capfd):
    assert main.perform(["export", str(out), "--to", "tensorrt", "--json"]) == 0
    files = json.loads(capfd.readouterr().out)["files"]
    assert [file.rpartition("/")[2] for file in files] == ["model.onnx", "model.engine", "model.engine.json"]
    config = gpu.Builder.last
    assert config.profiles[0].shapes == {"x": ((1, 1, 4), (1, 16, 4), (3, 16, 4))}
    assert config.flags_set == {"SPARSE_WEIGHTS"}
    assert (tmp_path / "cache" / "tensorrt").read_bytes() == b"timings"
    assert (out / "tensorrt" / "model.engine").read_bytes() == b"engine"
    found = schema.read(out).engine
    assert (found.device, found.sparse) == ("NVIDIA H100 80GB HBM3", True)
    assert (found.eligible, found.picked) == (("up", "down"), ("up",))
    assert main.perform(["report", str(out)]) in (0, 1, 3)
    words = "may use 2:4 kernels in 2 layers (up, down) and does in 1 layer (up)."
    for name in ("report.md", "report.html"):
        assert words in (out / "compression" / name).read_text()
    assert main.perform(["export", str(out), "--to", "tensorrt"]) == 0  # the report stays that of the files


def test_a_plan_without_24_builds_an_engine_without_its_kernels_and_the_report_says_so(gpu, out):
    folder = out / "compression"
    document = json.loads((folder / "report.json").read_text())
    document["sites"][0]["option"]["pattern"] = "dense"
    (folder / "report.json").write_text(json.dumps(document))
    assert main.perform(["export", str(out), "--to", "tensorrt"]) == 0
    assert gpu.Builder.last.flags_set == set()
    assert schema.read(out).engine.sparse is False
    assert "was built without 2:4 kernels: the plan has no 2:4 zeros." in (folder / "report.md").read_text()


def test_for_a_target_in_fp16_the_engine_is_built_from_the_file_in_fp16(gpu, out, capfd):
    file, folder = out / "model.onnx", out / "compression"
    model = onnx.load(file)
    twice = numpy_helper.from_array(2 * np.eye(4, dtype=np.float32), "w")  # as the double does
    model.graph.initializer.append(twice)
    model.graph.node[0].CopyFrom(helper.make_node("MatMul", ["x", "w"], ["y"]))
    onnx.save(model, file)
    document = json.loads((folder / "report.json").read_text())
    document["inputs"]["file_sha256"] = onnxruntime.sha256(file)
    document["target"] |= {"name": "h100", "precision": "fp16"}
    (folder / "report.json").write_text(json.dumps(document))
    assert main.perform(["export", str(out), "--to", "tensorrt"]) == 0
    built = out / "tensorrt" / "model.onnx"
    assert bundle.precision_of(built) == "fp16"
    stamp = json.loads((out / "tensorrt" / "model.engine.json").read_text())
    assert stamp["onnx_sha256"] == onnxruntime.sha256(built) != onnxruntime.sha256(file)
    found = schema.read(out)
    assert found.engine is not None
    assert (found.half.halved, found.half.file_bytes) == (1, built.stat().st_size)
    # For any other target it is built from the file that was proven.
    document["target"] |= {"name": "rpi5", "precision": "fp32"}
    (folder / "report.json").write_text(json.dumps(document))
    assert main.perform(["export", str(out), "--to", "tensorrt"]) == 0
    assert onnxruntime.sha256(built) == onnxruntime.sha256(file)
    assert schema.read(out).half is None


def test_an_engine_that_answers_with_other_numbers_is_not_delivered(gpu, out, capfd):
    start = gpu.IExecutionContext.execute_async_v3

    def wrong(self, stream_handle):
        start(self, stream_handle)
        (ctypes.c_float * 1).from_address(self.addresses["y"])[0] += 0.1
        return True

    gpu.IExecutionContext.execute_async_v3 = wrong
    assert main.perform(["export", str(out), "--to", "tensorrt"]) == 2
    message = capfd.readouterr().err
    assert "output 'y' of the engine differs from" in message
    assert "by 0.1 (tolerance" in message
    assert schema.read(out).engine is None
    assert not (out / "tensorrt").exists()


def test_without_tensorrt_the_message_says_what_to_install_and_what_serves_instead(out, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main.perform(["export", str(out), "--to", "tensorrt"]) == 2
    err = capfd.readouterr().err
    assert "pip install tensorrt-cu13" in err
    assert f"{out / 'model.onnx'} stands ready instead: it runs in onnxruntime" in err
    assert "Traceback" not in err
    assert not (out / "tensorrt").exists()
