"""Learning in the forms of a plan, on a small classifier: what is tuned is what ships."""

import copy
import dataclasses
import itertools

import pytest
import torch
from onnx import load
from support.classifier import padded
from support.jobs import job
from support.trainable_forms import Bare, away, candidates, equal  # noqa: F401 - a fixture
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.core import lowrank
from compress.export.backends import onnxruntime
from compress.export.onnx import writer
from compress.methods import lower as in_files
from compress.methods import quantized_layers, training_layers
from compress.methods.quantized_parity import LayerwiseParityRunner
from compress.methods.training_layers import FactoredLinear
from compress.pipeline import recovery
from compress.sites import prune

BOTH = "block:4x4@0.5+rank:2"
FORMS = (
    *("block:4x4@0.5", "2:4", "rank:4", BOTH, "int8-dynamic", "int8-static", "int4"),
    "2:4+int8-dynamic",
)
QUICK = ("block:4x4@0.5", "int8-dynamic")


@pytest.mark.parametrize("form", FORMS)
def test_before_anything_is_learned_nothing_changes(candidates, form):
    _, sites = padded()
    model, removals = candidates(form)
    before = copy.deepcopy(model.state_dict())
    reference = quantized_layers.emulated(model, sites, removals)
    training_layers.insert(model, sites, removals)
    batch = next(iter(padded()[0].batches("test", 16)))
    with torch.no_grad():
        assert torch.allclose(
            model(**batch.inputs).logits, reference(**batch.inputs).logits, atol=1e-4, rtol=1e-4
        )
    equal(training_layers.finalize(model, sites, removals), removals)
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-5)
    assert not any(
        isinstance(layer, (FactoredLinear, quantized_layers.QuantizedLinear)) for layer in model.modules()
    )


@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_what_is_tuned_is_what_the_file_computes(candidates, tmp_path, form):
    task, sites = padded()
    model, removals = candidates(form)
    one = job(tmp_path / "out", rate=1e-3)
    one = dataclasses.replace(one, sites=sites)
    learned, notes = recovery.recover(one, model, removals)
    assert f"learning in {form}" in notes[0]
    reference = quantized_layers.emulated(model, sites, learned)
    # The weights that were judged best are those that are left: the note says how far they are.
    assert recovery.Validator(one).format_score(recovery.Validator(one)(reference)) in notes[0]
    file = tmp_path / "model.onnx"
    batches = list(task.batches("calibration", 16))
    writer.export(
        model,
        batches[0].inputs,
        file,
        outputs=("logits",),
        lower=lambda graph: in_files.lower(graph, sites, learned),
    )
    # Products that round are compared one by one: a last bit that tips a byte is nobody's mistake.
    with (
        onnxruntime.OrtRunner(file, threads=1) as runner,
        LayerwiseParityRunner(reference, file, task.output_tensors, threads=1) as led,
    ):
        for batch in batches:
            inputs = {name: value.numpy() for name, value in batch.inputs.items()}
            found, expected = (torch.from_numpy(one.infer(inputs)["logits"]) for one in (runner, led))
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    # Products of one input still share its bytes: one tensor for the readers of a site, one for the writer.
    operators = [node.op_type for node in load(file).graph.node]
    assert operators.count("QuantizeLinear") == (2 * len(sites) if form == "int8-static" else 0)


@pytest.mark.parametrize("form", ["block:4x4@0.5", "2:4", BOTH, "2:4+int8-dynamic"])
def test_zeros_of_a_pattern_are_exact_after_every_step_and_the_rest_moves(
    candidates, tmp_path, form, monkeypatch
):
    _, sites = padded()
    model, removals = candidates(form)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    advance = recovery.TrainingRun.advance

    def step(run, number, batch):
        advance(run, number, batch)
        for site in sites:
            for name in (site.writer, *prune.readers(site)):
                layer = run.model.get_submodule(name.removesuffix(".weight"))
                if isinstance(layer, quantized_layers.QuantizedLinear):
                    value = layer.quantized().codes
                else:
                    value = layer.sparse if form == BOTH else layer.weight
                if form.startswith("2:4"):
                    kept = (value != 0).reshape(len(value), -1, 4).sum(2)
                    assert int(kept.max()) <= 2
                else:
                    tiles = value.reshape(value.shape[0] // 4, 4, -1, 4).abs().sum((1, 3)) > 0
                    assert ((tiles.sum(1) - tiles.shape[1] / 2).abs() <= 0.5).all()
                seen.append(name)

    monkeypatch.setattr(recovery.TrainingRun, "advance", step)
    one = dataclasses.replace(job(tmp_path / "out", decay=0.5), sites=sites)
    recovery.recover(one, model, removals)
    steps = 18 if form != "2:4+int8-dynamic" else 18 + 12  # integers learn after their floats
    assert len(seen) == steps * len({name for site in sites for name in (site.writer, *prune.readers(site))})
    after = model.state_dict()
    assert all(not torch.equal(after[site.writer], before[site.writer]) for site in sites)


@pytest.mark.parametrize("form", [BOTH, "int4", "int8-static", "2:4+int8-dynamic"])
def test_a_rate_of_zero_moves_neither_weights_nor_steps_nor_factors(candidates, tmp_path, form):
    _, sites = padded()
    model, removals = candidates(form)
    before = copy.deepcopy(model.state_dict())
    one = dataclasses.replace(job(tmp_path / "out", rate=0.0, decay=0.5, staged=False), sites=sites)
    learned, _ = recovery.recover(one, model, removals)
    equal(learned, removals)
    rounded = 0.0 if not next(iter(removals.values())).factors else 1e-5
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], atol=rounded, rtol=0)


@pytest.mark.parametrize(("form", "share"), [("rank:4", 0.5), ("int4", 0.5), ("int4", 1.0)])
def test_learning_through_the_form_brings_answers_nearer_without_labels(candidates, tmp_path, form, share):
    task, sites = Bare(), padded()[1]
    model, removals = candidates(form, share)
    before = away(task, quantized_layers.emulated(model, sites, removals))
    one = dataclasses.replace(job(tmp_path / "out", task, epochs=6), sites=sites)
    learned, _ = recovery.recover(one, model, removals)
    after = away(task, quantized_layers.emulated(model, sites, learned))
    assert after < 0.6 * before
    # Codes that were rounded once and tuned around would not have moved.
    pairs = [
        (found, learned[name].codes[key])
        for name, removal in removals.items()
        for key, found in removal.codes.items()
    ]
    assert all(not torch.equal(found.step, other.step) for found, other in pairs)
    assert len(pairs) == 0 or any(not torch.equal(found.codes, other.codes) for found, other in pairs)


def test_another_step_factor_or_form_is_another_start(candidates):
    """What was learned from other codes or factors must never be taken up again."""
    changes = {"int8-static": ("step", "input_step"), "rank:4": ("left", "right")}
    for form, parts in changes.items():
        _, removals = candidates(form)
        known = [training_layers.fingerprint(removals)]
        name, one = next(iter(removals.items()))
        for part in parts:
            if form == "rank:4":
                key, (left, right) = next(iter(one.factors.items()))
                pair = (2 * left, right) if part == "left" else (left, 2 * right)
                other = dataclasses.replace(one, factors={**one.factors, key: pair})
            else:
                key, codes = next(iter(one.codes.items()))
                changed = dataclasses.replace(codes, **{part: 2 * getattr(codes, part)})
                other = dataclasses.replace(one, codes={**one.codes, key: changed})
            known.append(training_layers.fingerprint({**removals, name: other}))
        known.append(training_layers.fingerprint({**removals, name: dataclasses.replace(one, form="dense")}))
        assert all(first != second for first, second in itertools.combinations(known, 2))
        assert known[0] == training_layers.fingerprint(copy.deepcopy(removals))


def test_a_layer_that_stores_its_weight_the_other_way_round_is_factored_as_it_stands():
    torch.manual_seed(0)
    dense = Conv1D(6, 10)
    nn.init.normal_(dense.bias)
    left, right = torch.randn(6, 2), torch.randn(2, 10)
    with torch.no_grad():
        dense.weight.copy_((left @ right).T)
        dense.weight[3, 4] += 2.0
    x = torch.randn(2, 3, 10)
    made = FactoredLinear(dense, (left, right), across=True, sparse=True)
    assert made.sparse.count_nonzero() == 1
    assert made.sparse[4, 3].item() == pytest.approx(2.0, abs=1e-5)
    assert torch.allclose(made(x), dense(x), atol=1e-5)
    assert made.bias is dense.bias
    with torch.no_grad():
        made.left.mul_(2)
    expected = made(x)
    assert made.finalized() is dense
    assert torch.allclose(dense(x), expected, atol=1e-5)


def test_what_a_sum_rounds_away_is_no_sparse_part():
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=random) for shape in ((64, 24), (24, 96)))
    sparse = torch.randn(64, 96, generator=random) * (torch.rand(64, 96, generator=random) < 0.3)
    found = lowrank.apart((sparse.double() + left.double() @ right.double()).float(), left, right)
    assert not bool(found[sparse == 0].any())
    assert bool(((found != 0) | (sparse.abs() < 1e-3)).all())
    assert torch.allclose(found, sparse, atol=1e-4)
