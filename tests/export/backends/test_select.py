"""Which backend runs a target here, and what the backends for files and torch models do."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from support.classifier import wide
from support.outputs import write_model
from support.sites import ffn, heads
from torch import nn

from compress import profiles
from compress.cost import latency_table
from compress.cost.energy import Rapl
from compress.errors import CompressError
from compress.export.backends import onnxruntime as ort_backend
from compress.export.backends import torch_cuda, torch_kernels, torch_module
from compress.export.backends.backend import VERSIONS
from compress.export.backends.onnx_file import OnnxRuntimeCpu, OnnxRuntimeCuda
from compress.export.backends.select import backend_for
from compress.export.backends.torch_cuda import CudaRunner
from compress.export.backends.torch_module import TorchCuda
from compress.export.microbench import site_timing
from compress.measure.verify_on_device import Nvml

H100 = profiles.load("h100")


def on_a(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=132, total_memory=8e10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch_cuda, "conditions", lambda: {"driver": "580.1", "gpu_mhz": 1980})


@pytest.fixture
def with_cuda(monkeypatch):
    """onnxruntime as if its CUDA provider were installed; what it is given runs on this processor."""
    real, made = onnxruntime.InferenceSession, []

    class Session:
        own = ("CUDAExecutionProvider", "CPUExecutionProvider")

        def __init__(self, file, options, providers):
            made.append(providers)
            self.real = real(file, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return list(self.own)

        def io_binding(self):
            return Binding(self.real.io_binding())

        def run_with_iobinding(self, binding):
            self.real.run_with_iobinding(binding.real)

        def __getattr__(self, name):
            return getattr(self.real, name)

    class Binding:
        def __init__(self, found):
            self.real, self.waits = found, 0

        def bind_ortvalue_input(self, name, value):
            self.real.bind_ortvalue_input(name, value)

        def bind_output(self, name, device):
            assert device == "cuda"
            self.real.bind_output(name, "cpu")

        def synchronize_outputs(self):
            waits.append(1)

    waits = []
    place_value = onnxruntime.OrtValue.ortvalue_from_numpy

    def value(array, device, number):
        assert device == "cuda"
        return place_value(array, "cpu", number)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(Session.own))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "OrtValue", SimpleNamespace(ortvalue_from_numpy=value))
    return SimpleNamespace(made=made, waits=waits, session=Session)


def test_a_gpu_is_timed_in_onnxruntime_where_its_cuda_provider_starts(monkeypatch, with_cuda):
    on_a(monkeypatch, "NVIDIA H100 80GB HBM3")
    found = backend_for(H100, 1)
    assert found == OnnxRuntimeCuda(H100, 1)
    assert (found.runtime, found.provider) == ("onnxruntime", "CUDAExecutionProvider")
    assert with_cuda.made == [["CUDAExecutionProvider"]]
    assert (found.precision, replace(found, profile=profiles.load("t4")).precision) == ("tf32", "fp32")
    facts = found.facts()
    assert (facts["provider"], facts["gpu"]) == ("CUDAExecutionProvider", "NVIDIA H100 80GB HBM3")
    assert found.environment()["provider"] == "CUDAExecutionProvider"
    assert isinstance(found.meter(), Nvml)
    table = found.empty_table()
    assert (table.runtime, table.precision, table.versions["gpu"]) == (
        "onnxruntime",
        "tf32",
        "NVIDIA H100 80GB HBM3",
    )
    torch_there = TorchCuda(H100, 1)
    assert table.fingerprint != torch_there.empty_table().fingerprint
    assert backend_for(profiles.load("cpu"), 1).provider == "CPUExecutionProvider"


def test_a_provider_that_is_named_but_does_not_start_leaves_the_gpu_to_torch(monkeypatch, with_cuda):
    on_a(monkeypatch, "NVIDIA H100 80GB HBM3")
    with_cuda.session.own = ("CPUExecutionProvider",)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert backend_for(H100, 1).runtime == "torch-cuda"
    assert not ort_backend.provider_starts("CUDAExecutionProvider")


def test_a_file_on_a_gpu_is_bound_there_and_every_run_is_waited_for(monkeypatch, with_cuda, tmp_path):
    on_a(monkeypatch, "NVIDIA H100 80GB HBM3")
    file = tmp_path / "m.onnx"
    write_model(file, 8, 1)
    ids = np.ones((1, 4), dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": ids}
    with backend_for(H100, 1).open(None, file, None) as runner:
        assert runner.facts()["provider"] == "CUDAExecutionProvider"
        call = runner.timed(feed)
        before = len(with_cuda.waits)
        call()
        assert len(with_cuda.waits) == before + 1
    with_cuda.session.own = ("CPUExecutionProvider",)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(CompressError, match="names CUDAExecutionProvider but could not start it"):
        ort_backend.OrtRunner(file, threads=1, provider="CUDAExecutionProvider")


def test_chains_on_a_gpu_in_onnxruntime_are_files_that_its_provider_runs(monkeypatch, with_cuda):
    on_a(monkeypatch, "NVIDIA H100 80GB HBM3")
    rig = backend_for(H100, 1).rig()
    assert rig.least_mb > 0
    with_cuda.made.clear()
    rows = site_timing.measure([ffn()], {ffn().shape: [6]}, seconds=0.0, rig=rig)
    assert set(rows[ffn().shape]) == {12, 6}
    assert with_cuda.made == 3 * [["CUDAExecutionProvider"]]
    assert with_cuda.waits


def tried():
    """The backend for a GPU, on the processor."""
    return TorchCuda(H100, 1, device="cpu", graphs=False)


def test_a_target_is_here_when_it_is_this_processor_or_this_gpu(monkeypatch):
    assert backend_for(profiles.load("cpu"), 2) == OnnxRuntimeCpu(profiles.load("cpu"), 2)
    assert backend_for(H100, 1) is None
    on_a(monkeypatch, "NVIDIA H100 80GB HBM3")
    found = backend_for(H100, 1)
    assert found == TorchCuda(H100, 1)
    assert (found.runtime, found.device, found.precision) == ("torch-cuda", "cuda", "fp16")
    assert backend_for(profiles.load("a100"), 1) is None


def test_a_table_names_the_gpu_the_versions_and_the_precision(monkeypatch):
    on_a(monkeypatch, "NVIDIA H100 80GB HBM3")
    here = backend_for(H100, 1)
    table = here.empty_table()
    assert (table.runtime, table.precision, table.rows) == ("torch-cuda", "fp16", {})
    assert table.versions["provider"] == "NVIDIA H100 80GB HBM3"
    assert table.versions["driver"] == "580.1"
    assert table.versions["version"] == torch.__version__
    first = table.fingerprint
    monkeypatch.setattr(torch_cuda, "conditions", lambda: {"driver": "590.2"})
    assert here.empty_table().fingerprint != first
    assert latency_table.cache_path(table) != latency_table.cache_path(
        backend_for(profiles.load("cpu"), 1).empty_table()
    )


def test_each_backend_has_its_own_counter():
    assert isinstance(backend_for(profiles.load("cpu"), 1).meter(), Rapl)
    assert isinstance(tried().meter(), Nvml)


def test_the_model_is_timed_on_a_gpu_in_the_targets_precision_and_no_file_is_read(tmp_path):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    x = {"x": np.array([[0.1]], dtype=np.float32)}
    with tried().open(Double(), tmp_path / "none.onnx", lambda found: {"y": found}) as runner:
        assert isinstance(runner, CudaRunner)
        assert runner.infer(x)["y"][0, 0] == np.float32(2 * np.float16(0.1))


@pytest.mark.parametrize("site", [ffn(), heads(causal=True)])
def test_chains_of_a_site_are_timed_in_torch(site):
    rows = site_timing.measure([site], {site.shape: [2]}, seconds=0.0, rig=tried().rig())
    assert set(rows[site.shape]) == {site.units, 2}
    assert all(ms > 0 for ms in rows[site.shape].values())


@pytest.mark.parametrize(
    "form",
    [
        "fp8",
        "rank:8",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("int8-dynamic", "2:4", "block:64x64@0.5")),
    ],
)
def test_chains_of_a_form_are_timed_in_torch_where_it_fits(form):
    _, sites = wide()
    for site in sites[:2]:
        key = latency_table.row_key(site, form)
        rows = site_timing.measure([site], {key: [site.units]}, seconds=0.0, rig=tried().rig())
        assert set(rows[key]) == {site.units}
        assert rows[key][site.units] > 0
    assert (
        site_timing.measure(
            [ffn()], {latency_table.row_key(ffn(), "2:4"): [12]}, seconds=0.0, rig=tried().rig()
        )
        == {}
    )


def test_every_product_of_a_chain_runs_in_the_form(monkeypatch):
    _, sites = wide()
    converted = []
    convert = torch_kernels.convert
    monkeypatch.setattr(
        torch_kernels, "convert", lambda chain, form: converted.append(form) or convert(chain, form)
    )
    seen = []
    forward = torch_kernels.Int8Linear.forward
    monkeypatch.setattr(
        torch_kernels.Int8Linear, "forward", lambda self, x: seen.append(x.shape) or forward(self, x)
    )
    site = next(site for site in sites if site.kind == "ffn")
    tried().rig().make(site, 64, 3, "int8-dynamic")()
    assert converted == ["int8-dynamic"]
    assert seen == 2 * 6 * [(9, 64)]  # once to load kernels and once timed: up and down of three copies
    tried().rig().make(site, 0, 3, "int8-dynamic")()
    tried().rig().make(site, 64, 3, "dense")()
    assert converted == ["int8-dynamic"]


def test_a_product_that_torch_does_not_have_is_told_with_its_words(monkeypatch):
    _, sites = wide()

    def without(self, x):
        raise NotImplementedError("no kernel for this GPU\nand a long story")

    monkeypatch.setattr(torch_kernels.Int8Linear, "forward", without)
    with pytest.raises(CompressError, match=r"torch cannot run int8-dynamic here: no kernel for this GPU$"):
        tried().rig().make(sites[0], 2, 1, "int8-dynamic")


def test_a_gpus_chains_do_not_fit_into_its_cache():
    site = ffn()
    rig = tried().rig()
    copies = site_timing._copies(site, rig.least_mb)
    assert copies == site_timing.MAX_COPIES  # a tiny site: as many as there may be
    wide = site.model_copy(
        update={"matmuls": tuple(m.model_copy(update={"out": 3072, "inner": 3072, "out_per_unit": 0,
                                                       "inner_per_unit": 0}) for m in site.matmuls)}
    )  # fmt: skip
    copies = site_timing._copies(wide, rig.least_mb)
    half_mb = copies * site_timing.weights_mb(wide, wide.units) / 2
    assert 2 * H100.cache_mb <= half_mb <= 3 * H100.cache_mb


def test_a_shape_that_cannot_be_timed_alone_is_left_to_the_estimate():
    odd = heads().model_copy(update={"tokens": 3})
    assert site_timing.measure([odd], {odd.shape: [2]}, seconds=0.0, rig=tried().rig()) == {}


def test_facts_of_a_gpu_say_how_it_ran(monkeypatch):
    on_a(monkeypatch, "NVIDIA H100 80GB HBM3")
    facts = backend_for(H100, 1).facts()
    assert facts["provider"] == "NVIDIA H100 80GB HBM3"
    assert (facts["cuda_graph"], facts["driver"], facts["gpu_mhz"]) == ("on", "580.1", 1980)
    assert VERSIONS[0] in facts
    assert tried().facts()["provider"] == "cpu"


def test_a_model_that_cannot_be_captured_is_timed_without_graphs_and_so_is_all_else(monkeypatch):
    backend = TorchCuda(H100, 1)

    class Runner:
        def __init__(self, *words, graphs, **more):
            self.graphs = graphs

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def timed(self, inputs):
            if self.graphs and inputs["x"]:
                raise CompressError("cannot be captured")

    monkeypatch.setattr(torch_module, "CudaRunner", Runner)
    assert backend.adapted(nn.Identity(), None, {"x": 0}) == backend
    assert backend.adapted(nn.Identity(), None, {"x": 1}) == replace(backend, graphs=False)
    here = backend_for(profiles.load("cpu"), 1)
    assert here.adapted(nn.Identity(), None, {"x": 1}) == here
