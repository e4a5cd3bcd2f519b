"""A model whose products run in the forms of a plan in torch answers as the plan was judged to."""

import numpy as np
import pytest
import torch
from support import clockwork
from support.classifier import wide
from torch import nn

from compress import profiles
from compress.calibration import activation_statistics
from compress.errors import CompressError
from compress.export.backends import torch_kernels
from compress.export.backends.onnx_file import OnnxFile, OnnxRuntimeCpu
from compress.export.backends.torch_cuda import CudaRunner
from compress.export.backends.torch_module import TorchCuda
from compress.ir import Option
from compress.methods import apply, candidate_store, quantized_layers, torch_layers
from compress.pipeline import compilation, job
from compress.recipe import Recipe
from compress.report.progress import Quiet
from compress.sites import prune
from compress.sites.prune import Removal

H100 = profiles.load("h100")
GPU, CPU = TorchCuda(H100, 1), OnnxRuntimeCpu(profiles.load("cpu"), 1)
FORMS = ("2:4", "int8-dynamic", "fp8", "block:32x32@0.5", "rank:16")
KINDS = {
    "2:4": torch_kernels.SparseLinear,
    "int8-dynamic": torch_kernels.Int8Linear,
    "fp8": torch_kernels.Fp8Linear,
    "block:32x32@0.5": torch_kernels.BlockLinear,
    "rank:16": torch_kernels.LowRankLinear,
}


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    task, sites = wide()
    activation_statistics.collect(task, sites, list(task.batches("calibration", 16)), folder, readers=True)
    return folder


def planned(statistics, folder, form):
    """Half the neurons and all heads of the model in a form: its sites, the shrunk model, the removals."""
    task, sites = wide()
    units = {site.name: 64 if site.kind == "ffn" else None for site in sites}
    options = {site.name: [Option.of(form, units[site.name])] for site in sites}
    candidate_store.build(task.model, sites, statistics, options, folder)
    removals = {
        site.name: candidate_store.removal(folder, index, options[site.name][0])
        for index, site in enumerate(sites)
    }
    return sites, prune.shrink(task.model, sites, removals), removals


@pytest.mark.parametrize("form", FORMS)
def test_the_model_in_its_form_answers_as_the_one_that_was_judged(statistics, tmp_path, form):
    task, _ = wide()
    sites, shrunk, removals = planned(statistics, tmp_path, form)
    shaped = torch_layers.with_placeholders(shrunk, sites, removals)
    assert sum(p.numel() for p in shaped.parameters()) == sum(p.numel() for p in shrunk.parameters())
    reference = quantized_layers.emulated(shrunk, sites, removals)
    batch = next(iter(task.batches("calibration", 16))).inputs
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    with torch.no_grad():
        expected = reference(**batch).logits.numpy()
        dense = task.model(**batch).logits.numpy()
    runner = CudaRunner(
        shaped, task.output_tensors, device="cpu", precision="fp32", change=torch_layers.deploy_kernels
    )
    with runner:
        found = runner.infer(arrays)["logits"]
        counted = sum(isinstance(module, KINDS[form]) for module in runner.model.modules())
    assert counted == 12  # query, key, value, output, up and down of two layers
    size = np.abs(expected).max()
    # A value between two codes may fall to either side: rarely, but then it moves its row.
    assert float(np.quantile(np.abs(found - expected), 0.9)) < 1e-4 * size
    assert np.abs(found - expected).max() < 3e-2 * size
    assert np.abs(found - dense).max() > 1e-3 * size  # a control: the form is no identity


def test_a_half_precision_model_keeps_the_codes_and_steps_of_its_products(statistics, tmp_path):
    sites, shrunk, removals = planned(statistics, tmp_path, "int8-dynamic")
    settled = torch_layers.deploy_kernels(
        torch_layers.with_placeholders(shrunk, sites, removals).to(torch.float16)
    )
    name = sites[0].writer
    layer = settled.get_submodule(name.rpartition(".")[0])
    assert torch.equal(layer.codes, removals[sites[0].name].codes[name].codes)
    assert torch.equal(layer.step, removals[sites[0].name].codes[name].step[:, 0])


def test_what_has_no_form_stays_and_the_given_model_is_not_touched(statistics, tmp_path):
    sites, shrunk, removals = planned(statistics, tmp_path, "2:4")
    one = {sites[0].name: removals[sites[0].name], sites[1].name: Removal(torch.arange(sites[1].units))}
    shaped = torch_layers.with_placeholders(shrunk, sites, one)
    assert sum(isinstance(module, torch_layers.KernelPlaceholder) for module in shaped.modules()) == 4
    assert not any(isinstance(module, torch_layers.KernelPlaceholder) for module in shrunk.modules())
    gone = {sites[0].name: Removal(torch.arange(0), form="2:4")}
    assert not any(
        isinstance(m, torch_layers.KernelPlaceholder)
        for m in torch_layers.with_placeholders(shrunk, sites, gone).modules()
    )


def test_a_matrix_that_is_no_linear_layer_is_refused(statistics, tmp_path):
    sites, shrunk, removals = planned(statistics, tmp_path, "2:4")
    shrunk.set_submodule(sites[0].writer.rpartition(".")[0], nn.Identity())
    with pytest.raises(CompressError, match=r"belongs to a Identity; torch runs 2:4 only in an nn.Linear"):
        torch_layers.with_placeholders(shrunk, sites, removals)


def test_forms_offered_in_torch_are_those_that_the_gpu_has():
    _, sites = wide()

    def offered(moves, profile):
        return apply.offered_forms(sites[1], moves, TorchCuda(profile, 1))

    moves = ["structure", "int8", "fp8", "2:4", "block", "lowrank"]
    assert set(offered(moves, H100)) == {
        "int8-dynamic", "fp8", "2:4", *TorchCuda.block_patterns, "rank:16", "rank:8",
    }  # fmt: skip
    assert set(offered(moves, profiles.load("a100"))) == set(offered(moves, H100)) - {"fp8"}
    assert set(offered(moves, profiles.load("v100"))) == {*TorchCuda.block_patterns, "rank:16", "rank:8"}
    assert set(apply.offered_forms(sites[1], moves, OnnxFile(H100))) == {
        "fp8",
        "2:4",
        "rank:16",
        "rank:8",
    }  # in a file
    assert "fp8" not in apply.offered_forms(sites[1], moves, CPU)
    across = sites[1].model_copy(
        update={"slices": tuple(part.model_copy(update={"dim": 1 - part.dim}) for part in sites[1].slices)}
    )
    assert apply.offered_forms(across, moves, GPU) == ()


def test_levels_in_torch_lie_where_its_kernels_fit():
    _, sites = wide()
    ffn = next(site for site in sites if site.kind == "ffn")
    assert apply.levels(ffn, "2:4", [128, 100, 30, 5], GPU) == [128, 64]
    assert apply.levels(ffn, "fp8", [128, 100, 30, 5], GPU) == [128, 96, 32, 16]
    assert apply.levels(ffn, "2:4", [128, 100], CPU) == [128, 104]
    # A quarter of a single block of 64 inputs is none; half of one is rounded to it.
    assert apply.levels(ffn, "block:64x64@0.25", [128, 64], GPU) == []
    assert apply.levels(ffn, "block:64x64@0.5", [128, 64], GPU) == [128, 64]
    assert apply.levels(ffn, "block:64x32@0.25", [128], CPU) == [128]
    assert apply.levels(ffn, "block:64x64@0.25", [128], CPU) == []


def compiled(monkeypatch, folder, moves, speedup, **more):
    """A whole compilation for an H100 whose torch is that of this processor, in time that is counted."""
    monkeypatch.setenv("COMPRESS_CACHE", str(folder / "cache"))
    clockwork.wind(monkeypatch)
    backend = TorchCuda(H100, 1, device="cpu", graphs=False)
    monkeypatch.setattr(job, "backend_for", lambda profile, threads: backend)
    recipe = {
        "model": "support.classifier:wider",
        "target": "h100",
        "budget": {"speedup": speedup},
        "out": str(folder / "out"),
        "shapes": {"tokens": 9},
        "options": {"moves": moves},
        "calibration": {"samples": 48, "batch": 16},
        "search": {"samples": 16, "generations": 1, "offspring": 2},
        "bench": {"blocks": 30, "rounds": 3},
    }
    return compilation.run(Recipe.model_validate(recipe | more), Quiet())


@pytest.mark.slow
def test_a_form_that_pays_in_torch_is_chosen_built_and_keeps_the_promise(monkeypatch, tmp_path):
    found = compiled(monkeypatch, tmp_path, ["fp8", "int8", "2:4", "block"], 1.5)
    assert found.verdict.status == "met"
    assert found.verdict.measured.speedup >= 1.5
    assert (found.target.runtime, found.target.precision) == ("torch-cpu", "fp16")
    assert {site.source for site in found.sites} == {"measured"}
    chosen = {site.option.precision for site in found.sites} | {site.option.pattern for site in found.sites}
    assert chosen & {"fp8", "int8-dynamic"}
    assert all(site.option.units == site.option.units_total for site in found.sites)  # nothing was removed
    words = "\n".join((*found.attribution, *found.warnings, *found.notes))
    assert "2:4: 1.00x on a whole site; not chosen: it saves no time here." in words
    assert "What was timed is the torch model in fp16 (torch-cpu), not the ONNX file" in words
    assert found.compressed.weight_bytes < found.baseline.weight_bytes


@pytest.mark.slow
def test_the_same_request_without_forms_removes_units(monkeypatch, tmp_path):
    found = compiled(monkeypatch, tmp_path, ["structure"], 1.5)
    assert found.verdict.status == "met"
    assert any(site.option.units < site.option.units_total for site in found.sites)
    assert {(site.option.pattern, site.option.precision) for site in found.sites} == {("dense", "fp32")}


@pytest.mark.slow
def test_a_form_that_cannot_be_timed_is_not_offered_and_the_report_says_so(monkeypatch, tmp_path):
    def without(self, x):
        raise NotImplementedError("no such product")

    monkeypatch.setattr(torch_kernels.Fp8Linear, "forward", without)
    found = compiled(monkeypatch, tmp_path, ["structure", "fp8"], 1.5)
    assert found.verdict.status == "met"
    assert "fp8: not offered, since no site could be timed in it here." in found.attribution
    assert {site.option.precision for site in found.sites} == {"fp32"}
