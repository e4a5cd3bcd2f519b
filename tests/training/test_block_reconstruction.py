import copy
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support import families
from support.classifier import padded
from torch import nn

from compress.calibration import activation_statistics
from compress.core import lowrank
from compress.core.support import prepare
from compress.ir import Budget, Option
from compress.methods import apply
from compress.pipeline import compilation
from compress.recipe import Recipe
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.loading import Batch
from compress.training import block_reconstruction, distillation, sltrain_layers
from compress.training.block_reconstruction import BlockExample
from compress.training.distillation import HiddenState

pytestmark = pytest.mark.slow

MIXED = "block:4x4@0.5+rank:2"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A task, its sites, its data, and all of them split: the first layer mixed, the second by rank alone."""
    folder = tmp_path_factory.mktemp("statistics")
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    activation_statistics.collect(task, sites, batches, folder, readers=True)
    removals = {}
    for index, site in enumerate(sites):
        form = MIXED if ".0." in site.writer else "rank:4"
        bias = task.model.get_parameter(site.bias).detach().clone()
        uncut = Removal(torch.arange(site.units), prune.writer_columns(task.model, site).clone(), bias)
        found = activation_statistics.read(folder, index)
        removals[site.name], _ = apply.apply_option(
            task.model, site, Option.of(form, None), uncut, found, 1e-2
        )
    return task, sites, batches, removals


@pytest.fixture(scope="module")
def matched(split):
    task, sites, batches, removals = split
    return block_reconstruction.reconstruct(task.model, sites, removals, batches)


def away(split, removals):
    """How far every layer's output is from the dense one: whole models, real tokens, no code of ours."""
    task, sites, batches, _ = split
    small = prune.shrink(task.model, sites, removals)
    found = []
    for layer in range(2):
        lost = total = 0.0
        for batch in batches:
            with torch.no_grad():
                ours, theirs = (
                    net.bert(**batch.inputs, output_hidden_states=True).hidden_states[layer + 1][batch.real]
                    for net in (small, task.model)
                )
            lost += float((ours - theirs).square().sum())
            total += float(theirs.square().sum())
        found.append(lost / total)
    return found


def test_every_block_comes_nearer_to_the_dense_one(split, matched):
    before, after = away(split, split[3]), away(split, matched)
    assert all(now < 0.9 * then for now, then in zip(after, before, strict=True))


def test_support_and_rank_stay_and_the_parts_are_the_weight(split, matched):
    _, sites, _, removals = split
    moved = 0
    for site in sites:
        old, new = removals[site.name], matched[site.name]
        assert (new.form, set(new.factors)) == (old.form, set(old.factors))
        for name in old.factors:
            parts = []
            for one in (old, new):
                value = one.weight if name == site.writer else one.readers[name]
                left, right = one.factors[name]
                rest = value - left @ right
                parts.append((value, rest.abs() > 1e-6 * value.abs().max(), left.shape, right.shape))
            assert parts[0][2:] == parts[1][2:]
            assert not bool((parts[1][1] & ~parts[0][1]).any())
            assert bool(parts[1][1].any()) == (old.form == MIXED)
            moved += not torch.equal(parts[0][0], parts[1][0])
    assert moved == len([name for one in removals.values() for name in one.factors])


def test_the_model_and_what_came_in_are_left_alone(split):
    task, sites, batches, removals = split
    model, copied = copy.deepcopy(task.model.state_dict()), copy.deepcopy(removals)
    told = []
    only = {sites[0].name: removals[sites[0].name], sites[1].name: Removal(torch.arange(3))}
    found = block_reconstruction.reconstruct(
        task.model, sites, only, batches, progress=lambda *done: told.append(done)
    )
    assert found[sites[1].name] is only[sites[1].name]
    assert told == [(1, 1)]
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, model[name])
    for name, one in removals.items():
        assert torch.equal(one.weight, copied[name].weight)
    assert all(value.requires_grad for value in task.model.parameters())


def linear(seed=0):
    """A block of one layer by rank alone, with correlated inputs, and its exact optimum."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(8, 12, generator=generator)
    best = lowrank.factor(prepare(weight, (x.T @ x / 200).double(), torch.zeros(12), 1e-9), 3)
    layer = sltrain_layers.from_parts(
        torch.zeros(8, 12),
        torch.zeros(8, 12, dtype=torch.bool),
        torch.randn(8, 3, generator=generator) * 0.3,
        torch.randn(3, 12, generator=generator) * 0.3,
    )
    return layer, x, weight, best.error


def test_a_single_linear_layer_reaches_the_closed_form_and_never_passes_it():
    layer, x, weight, best = linear()
    shown = [BlockExample((x,), {}, x @ weight.T, Batch({}))]
    before, after = block_reconstruction.train_block(
        layer, HiddenState(""), {"w": layer}, shown, epochs=800, rate=2e-2
    )
    assert before > 5 * best
    assert best * (1 - 1e-4) < after < 1.05 * best


def test_what_gets_no_nearer_goes_back():
    """The control: steps so large that they do harm."""
    layer, x, weight, _ = linear()
    start = copy.deepcopy(layer.state_dict())
    shown = [BlockExample((x,), {}, x @ weight.T, Batch({}))]
    before, after = block_reconstruction.train_block(
        layer, HiddenState(""), {"w": layer}, shown, epochs=2, rate=1e3
    )
    assert before == after
    assert all(torch.equal(value, start[name]) for name, value in layer.state_dict().items())


def test_a_goal_of_other_data_is_not_reached(split):
    """The control: answers that belong to other inputs teach nothing that helps."""
    task, sites, batches, removals = split
    place = distillation.hidden_states(task.model, sites)[0]
    small = prune.shrink(task.model, sites, removals).requires_grad_(False)
    shown = block_reconstruction.collect_examples(task.model, small, place, batches, 100)
    assert len(shown) == len(batches)
    assert len(block_reconstruction.collect_examples(task.model, small, place, batches, 0)) == 1
    assert all(len(one.goal) == int(one.batch.real.sum()) for one in shown)
    block = task.model.get_submodule(place.name)
    shuffled = [
        BlockExample(one.args, one.kwargs, one.goal[torch.randperm(len(one.goal))], one.batch)
        for one in shown
    ]
    with torch.no_grad():
        right, wrong = (
            sum(float(block_reconstruction.distance(block, place, one)) for one in some)
            for some in (shown, shuffled)
        )
    assert right < 1e-10
    assert wrong > 0.1


def test_a_layer_that_stores_its_weight_across_stays(split):
    class Across(nn.Linear):
        """No plain linear layer."""

    task, sites, _, removals = split
    site = sites[1]
    small = prune.shrink(task.model, sites, removals)
    name = site.writer.removesuffix(".weight")
    small.get_submodule(name).__class__ = Across
    layers = block_reconstruction._split(small, [site], removals)
    assert set(layers) == set(removals[site.name].factors) - {site.writer}


def test_of_biases_only_the_writers_learn_since_a_removal_holds_no_other(split):
    task, sites, _, removals = split
    small = prune.shrink(task.model, sites, removals).requires_grad_(False)
    for site in sites:
        layers = block_reconstruction._split(small, [site], removals)
        assert len(layers) == len(removals[site.name].factors) > 1
        assert all(layer.bias is not None for layer in layers.values())
        assert [name for name, layer in layers.items() if layer.bias.requires_grad] == [site.writer]


def test_the_rate_falls_along_a_cosine_to_a_fifth(monkeypatch):
    rates = []

    class Watched(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    layer, x, weight, _ = linear()
    shown = [BlockExample((x,), {}, x @ weight.T, Batch({}))]
    block_reconstruction.train_block(layer, HiddenState(""), {"w": layer}, shown, epochs=50, rate=0.1)
    expected = [0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 50)) / 2) for step in range(50)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_block_of_a_decoder_that_keeps_a_cache_answers_alike_every_time(name):
    model, inputs = families.build(name)
    batch = Batch({**inputs, "use_cache": True})
    place = HiddenState({"llama": "model.layers.1", "gpt2": "transformer.h.1"}[name])
    (shown,) = block_reconstruction.collect_examples(model, model, place, [batch], 100)
    block = model.get_submodule(place.name)
    with torch.no_grad():
        assert [float(block_reconstruction.distance(block, place, shown)) for _ in range(3)] == [0.0] * 3


@pytest.mark.parametrize("helps", [True, False])
def test_the_compilation_keeps_it_only_where_unseen_inputs_say_that_it_helps(split, helps):
    task, sites, batches, removals = split
    asked = Recipe(target="cpu", budget=Budget(speedup=2.0))
    job = SimpleNamespace(task=task, sites=sites, calibration=batches, recipe=asked, stages=stage)
    marks = iter([0.5, 0.25 if helps else 0.75])
    judge = SimpleNamespace(of=lambda model: next(marks))
    found, note = compilation._reconstructed(job, removals, judge)
    if helps:
        assert note == "Block reconstruction used: divergence from the dense model 0.5 -> 0.25"
        assert away(split, found)[1] < away(split, removals)[1]
    else:
        assert note == "Block reconstruction not used: divergence 0.5 -> 0.75, not lower"
        assert found is removals


@contextmanager
def stage(name):
    yield lambda done, work: None
