"""The torch runner on a CPU and on a double of torch.cuda: answers, graphs, events, and what is refused."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import families
from torch import nn
from transformers.cache_utils import Cache

from compress import profiles
from compress.errors import CompressError
from compress.export.backends import torch_cuda, torch_kernels
from compress.export.backends.torch_cuda import CudaRunner
from compress.measure import timing


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x, rows):
        return self.down(torch.relu(self.up(x)))[rows]


X = {"x": np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32), "rows": np.array([2, 0])}


def runner(**options):
    return CudaRunner(Model(), lambda found: {"y": found}, device="cpu", **options)


def expected():
    model = Model()
    with torch.no_grad():
        return model(torch.from_numpy(X["x"]), torch.from_numpy(X["rows"])).numpy()


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-6), ("bf16", 3e-2), ("fp16", 4e-3)])
def test_answers_are_the_models_up_to_its_precision(precision, apart):
    with runner(precision=precision) as found:
        answer = found.infer(X)["y"]
    assert answer.dtype == np.float32
    assert np.allclose(answer, expected(), atol=apart)
    if precision != "fp32":
        assert not np.allclose(answer, expected(), atol=1e-6)


def test_the_users_model_is_not_touched():
    model = Model().train()
    with CudaRunner(model, lambda found: {"logits": found}, device="cpu", precision="bf16") as found:
        found.infer(X)
    assert model.training
    assert model.up.weight.dtype == torch.float32


def test_a_change_is_applied_on_the_device_to_the_copy():
    model = Model()

    def change(copy):
        assert copy.up.weight.dtype == torch.bfloat16
        torch_kernels.convert(copy, "int8-dynamic", ["up"])
        return copy

    with CudaRunner(
        model, lambda found: {"y": found}, device="cpu", precision="bf16", change=change
    ) as found:
        assert isinstance(found.model.up, torch_kernels.Int8Linear)
        assert np.allclose(found.infer(X)["y"], expected(), atol=0.05)
    assert isinstance(model.up, nn.Linear)


def test_two_runners_are_compared_like_any_others():
    class Slow(Model):
        def forward(self, x, rows):
            for _ in range(40):
                super().forward(x, rows)
            return super().forward(x, rows)

    with (
        runner(precision="fp32") as quick,
        CudaRunner(Slow(), lambda found: {"logits": found}, device="cpu", precision="fp32") as slow,
    ):
        calls = {"slow": slow.timed(X), "quick": quick.timed(X)}
        assert timing.compare(calls, blocks=30, block_ms=2.0).ratio("quick").interval.low > 4
        assert (slow.device_ms(X, 5) > 0).all()
        assert quick.device_ms(X, 7).shape == (7,)
        assert quick.peak_mb(X) is None


def test_facts_name_the_runtime_precision_and_graphs():
    with runner(precision="bf16") as found:
        facts = found.facts()
    assert facts == {
        "runtime": "torch",
        "version": torch.__version__,
        "provider": "cpu",
        "precision": "bf16",
        "cuda_graph": "off",
    }


def test_what_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CompressError, match="sees no CUDA device"):
        CudaRunner(Model(), lambda found: {"y": found})
    with pytest.raises(CompressError, match="fp32, fp16, bf16 here, not in 'int8'"):
        runner(precision="int8")
    found = runner(precision="fp32")
    with found:
        pass
    with pytest.raises(CompressError, match="closed"):
        found.infer(X)


def decoder_of(precision):
    model, example = families.build("gpt2")
    inputs = {name: value.numpy() for name, value in example.items() if name != "position_ids"}
    return inputs, CudaRunner(
        model, lambda found: {"logits": found.logits}, device="cpu", precision=precision
    )


def test_a_token_after_a_prompt_is_timed_with_its_cache_held(monkeypatch):
    inputs, loaded = decoder_of("bf16")
    waits, seen = [], []
    monkeypatch.setattr(torch_cuda, "wait", lambda device: waits.append(device))
    with loaded as found:
        call = found.timed_step(inputs)
        found.model.register_forward_pre_hook(
            lambda model, args, kwargs: seen.append(
                (
                    kwargs["input_ids"].shape[1],
                    next(v for v in kwargs.values() if isinstance(v, Cache)).get_seq_length(),
                )
            ),
            with_kwargs=True,
        )
        call()
        call()
    assert waits == ["cpu"] * 2
    assert seen == [(1, inputs["input_ids"].shape[1])] * 2


def test_a_step_is_captured_like_any_run(monkeypatch):
    inputs, loaded = decoder_of("fp32")
    recorder = Recorder(monkeypatch)
    with loaded as found:
        found.graphs = True
        call = found.timed_step(inputs)
        assert recorder.log.count("capture") == 1
        recorder.log.clear()
        call()
        assert recorder.log == ["replay"]


class Recorder:
    """The parts of torch.cuda that the runner uses, writing down what happens in which order."""

    def __init__(self, monkeypatch, fault=None):
        self.log, self.now = [], 0.0
        recorder = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                recorder.now += 1.5
                self.at = recorder.now
                recorder.log.append("event")

            def elapsed_time(self, after):
                return after.at - self.at

        class Graph:
            def replay(self):
                recorder.log.append("replay")

        class Stream:
            def wait_stream(self, other):
                recorder.log.append("join")

        @contextlib.contextmanager
        def graph(graph):
            recorder.log.append("capture")
            if fault:
                raise RuntimeError(fault)
            yield
            recorder.log.append("captured")

        doubles = {
            "is_available": lambda: True,
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": graph,
            "synchronize": lambda: self.log.append("wait"),
        }
        for name, double in doubles.items():
            monkeypatch.setattr(torch.cuda, name, double)


def test_a_graph_is_captured_after_a_warm_up_and_replayed_for_every_run(monkeypatch):
    recorder = Recorder(monkeypatch)
    replay = torch_cuda.capture_graph(lambda: recorder.log.append("forward"))
    assert recorder.log == [
        "join",
        *["forward"] * torch_cuda.WARM_UP,
        "join",
        "capture",
        "forward",
        "captured",
    ]
    recorder.log.clear()
    replay()
    replay()
    assert recorder.log == ["replay", "replay"]


def test_a_model_that_cannot_be_captured_is_told_apart(monkeypatch):
    Recorder(monkeypatch, fault="operation not permitted\nwhen stream is capturing")
    with pytest.raises(CompressError, match=r"(?s)operation not permitted when stream.*graphs off"):
        torch_cuda.capture_graph(lambda: None)


def test_events_stand_around_every_run_and_are_read_after_all_of_them(monkeypatch):
    recorder = Recorder(monkeypatch)
    found = torch_cuda.events_ms(lambda: recorder.log.append("run"), 3, "cuda")
    assert found.tolist() == [1.5] * 3
    assert recorder.log == [*["run"] * torch_cuda.WARM_UP, "wait", *["event", "run", "event"] * 3, "wait"]


def test_a_timed_call_waits_for_the_device(monkeypatch):
    recorder = Recorder(monkeypatch)
    found = runner(precision="fp32")
    found.on_gpu = True
    monkeypatch.setattr(torch_cuda, "wait", lambda device: recorder.log.append(f"wait {device}"))
    call = found.timed(X)
    recorder.log.clear()
    call()
    assert recorder.log == ["wait cpu"]


def gpu_called(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=132, total_memory=8e10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)


@pytest.mark.parametrize(
    ("name", "board", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "", "h100"),
        ("NVIDIA H200", "", "h200"),
        ("NVIDIA A100-SXM4-80GB", "", "a100"),
        ("NVIDIA GeForce RTX 4090", "", "rtx4090"),
        ("NVIDIA L4", "", "l4"),
        ("NVIDIA L40S", "", None),
        ("Tesla T4", "", "t4"),
        ("Tesla V100-SXM2-16GB", "", "v100"),
        ("Orin", "NVIDIA Jetson AGX Orin Developer Kit", "orin-agx"),
        ("Orin", "NVIDIA Jetson Orin Nano Developer Kit", "orin-nano"),
        ("NVIDIA GeForce RTX 5090", "", None),
    ],
)
def test_the_gpu_at_hand_is_known_by_its_name(monkeypatch, tmp_path, name, board, target):
    gpu_called(monkeypatch, name)
    (tmp_path / "model").write_text(board + "\x00")
    monkeypatch.setattr(torch_cuda, "MODEL", tmp_path / "model")
    found = torch_cuda.local_target()
    assert (None if found is None else found.name) == target
    here = [one for one in profiles.names() if torch_cuda.is_local_gpu(profiles.load(one))]
    assert here == ([] if target is None else [target])


def test_without_a_gpu_no_gpu_target_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_cuda.gpu() is None
    assert torch_cuda.local_target() is None
    assert not torch_cuda.is_local_gpu(profiles.load("h100"))


def test_conditions_are_the_drivers_without_the_name():
    meter = SimpleNamespace(
        facts=lambda: {"gpu": "H100", "driver": "580.1", "gpu_mhz": 1980, "gpu_temperature_c": None}
    )
    assert torch_cuda.conditions(meter) == {"driver": "580.1", "gpu_mhz": 1980}
