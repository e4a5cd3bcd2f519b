"""Engines: what the builder is told, what is refused, and a runner's arithmetic, on a double of the API."""

import contextlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress.errors import CompressError
from compress.export.backends import tensorrt
from compress.export.backends.tensorrt_engine import EngineOptions, stamp_path

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


class Stream:
    cuda_stream = 7

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass


class Event:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        Event.clock += 2.5
        self.at = Event.clock

    def elapsed_time(self, after):
        return after.at - self.at


@pytest.fixture
def fake(monkeypatch):
    path = Path(__file__).parents[2] / "support" / "fake_tensorrt.py"
    spec = importlib.util.spec_from_file_location("fake_tensorrt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    graphs = SimpleNamespace(replays=0)

    class Graph:
        def replay(self):
            graphs.replays += 1

    doubles = {
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda: (9, 0),
        "current_stream": Stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(tensorrt, "DEVICE", "cpu")
    module.graphs = graphs
    return module


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"onnx")
    return path


def built(file, **options):
    engine = file.with_suffix(".engine")
    return engine, tensorrt.build(file, engine, EngineOptions(**options))


def test_the_builder_is_told_what_was_asked(fake, file):
    built(file, batch=(1, 2, 4), tokens=(8, 16, 32), sparse=True, hardware="ampere_plus", workspace_mb=3)
    config = fake.Builder.last
    assert fake.Builder.flags == 2
    assert config.flags_set == {"SPARSE_WEIGHTS"}
    assert config.profiles[0].shapes == {"x": ((1, 8, 4), (2, 16, 4), (4, 32, 4))}
    assert config.limits == {"WORKSPACE": 3 * 2**20}
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert config.profiling_verbosity.name == "DETAILED"


def test_nothing_is_asked_that_was_not(fake, file):
    built(file)
    assert (fake.Builder.last.flags_set, fake.Builder.last.limits) == (set(), {})
    assert fake.Builder.last.hardware_compatibility_level.name == "NONE"
    assert fake.Runtime.last.engine_host_code_allowed is False
    built(file, version_compatible=True)
    assert fake.Builder.last.flags_set == {"VERSION_COMPATIBLE"}
    assert fake.Runtime.last.engine_host_code_allowed is True


def test_sparse_layers_are_listed_as_eligible_and_picked(fake, file):
    found = built(file, sparse=True)[1].sparsity
    assert (found.eligible, found.picked) == (("up", "down"), ("up",))


def test_timings_of_another_machine_are_set_aside(fake, file, tmp_path):
    cache = tmp_path / "timings"
    for content, tried in ((b"foreign", [b"foreign", b""]), (b"ours", [b"ours"])):
        cache.write_bytes(content)
        tensorrt.build(file, tmp_path / "e", EngineOptions(), cache)
        assert fake.Builder.last.caches == tried
        assert cache.read_bytes() == b"timings"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("No importer registered for op: Foo", "keep the ONNX"),
        ("Requested amount of GPU memory: out of memory", "too little free memory"),
        ("Could not find any implementation for node up", "workspace_mb"),
        ("Network has dynamic shape inputs but no optimization profile", "min <= opt <= max"),
        ("Something else", "still runs in onnxruntime"),
    ],
)
def test_errors_of_parser_and_builder_are_translated(fake, file, words, advice):
    for place in (fake.Builder, fake.OnnxParser):
        place.fault = words
        with pytest.raises(CompressError, match=words.split(":")[0]) as caught:
            built(file)
        place.fault = None
        assert advice in str(caught.value)
    assert not file.with_suffix(".engine").exists()


@pytest.mark.parametrize("graphs", [False, True])
def test_a_runner_answers_and_is_timed(fake, file, graphs):
    engine, _ = built(file)
    with tensorrt.TensorRTRunner(engine, graphs=graphs) as runner:
        assert np.array_equal(runner.infer({"x": X, "unused": X})["y"], 2 * X)
        call = runner.timed({"x": X})
        before = (fake.IExecutionContext.runs, fake.graphs.replays)
        call()
        after = (fake.IExecutionContext.runs, fake.graphs.replays)
        assert np.subtract(after, before).tolist() == ([0, 1] if graphs else [1, 0])
        assert runner.device_ms({"x": X}, 3).tolist() == [2.5] * 3
        facts = runner.facts()
    assert (facts["runtime"], facts["cuda_graph"], facts["sparse_layers"]) == (
        "tensorrt",
        "on" if graphs else "off",
        1,
    )
    with pytest.raises(CompressError, match="closed"):
        runner.infer({"x": X})


def test_wrong_inputs_are_told(fake, file):
    engine, _ = built(file)
    with tensorrt.TensorRTRunner(engine) as runner:
        with pytest.raises(CompressError, match="needs input x"):
            runner.infer({})
        with pytest.raises(CompressError, match=r"from \(1, 2, 4\) to \(2, 8, 4\), not \(3, 3, 4\)"):
            runner.infer({"x": np.zeros((3, 3, 4), np.float32)})
        fake.IExecutionContext.works = False
        with pytest.raises(CompressError, match="could not start"):
            runner.infer({"x": X})


def test_missing_and_damaged_files_are_refused(fake, file, tmp_path):
    with pytest.raises(CompressError, match="does not exist"):
        tensorrt.build(tmp_path / "none.onnx", tmp_path / "e", EngineOptions())
    with pytest.raises(CompressError, match="does not exist"):
        tensorrt.TensorRTRunner(tmp_path / "none.engine")
    engine, _ = built(file)
    engine.write_bytes(b"enginf")
    with pytest.raises(CompressError, match="not what its stamp describes"):
        tensorrt.TensorRTRunner(engine)
    stamp_path(engine).write_text("{")
    with pytest.raises(CompressError, match="damaged"):
        tensorrt.TensorRTRunner(engine)


def test_another_machine_is_refused(fake, file, monkeypatch):
    engine, _ = built(file)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(CompressError, match=r"H100.*here NVIDIA A100"):
        tensorrt.TensorRTRunner(engine)


def test_without_tensorrt_or_gpu_the_error_says_what_to_do(fake, file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CompressError, match="no CUDA device"):
        built(file)
    fake.__version__ = "9.3.0"
    with pytest.raises(CompressError, match=r"10\.x and 11\.x"):
        built(file)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(CompressError, match="pip install tensorrt-cu13") as caught:
        built(file)
    assert str(file) in str(caught.value)
