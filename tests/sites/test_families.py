"""What must hold for every site that is found in every family, whatever its code looks like."""

import itertools

import pytest
import torch
from support import families
from support.family_changes import change, changes, run, subject, tensor_of

from compress import load
from compress.errors import CompressError
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.huggingface import save
from compress.export.onnx.writer import export
from compress.sites.prune import Removal, mask, parameters_after, shrink

ATOL = 1e-5  # two orders of summing a few dozen float32 products near 1
DIFFERENT = 1e-4

every_family = pytest.mark.parametrize("name", families.NAMES)


def gap(model, sites, removals, inputs):
    """How far the masked and the shrunk model are apart."""
    masked, shrunk = mask(model, sites, removals), shrink(model, sites, removals)
    return (run(masked, inputs) - run(shrunk, inputs)).abs().max()


@every_family
def test_every_element_belongs_to_at_most_one_site(name):
    model, sites, _ = subject(name)
    assert sites
    owners = {key: torch.zeros(value.shape, dtype=torch.int64) for key, value in model.state_dict().items()}
    for number, site in enumerate(sites, 1):
        for part in site.slices:
            owned = owners[part.tensor].narrow(part.dim, part.start, site.units * part.width)
            assert set(owned.unique().tolist()) <= {0, number}, (site.name, part.tensor)
            owned.fill_(number)


@every_family
@pytest.mark.parametrize("bias", [True, False])
def test_masked_is_shrunk_when_every_site_loses_units(name, bias):
    model, sites, inputs = subject(name)
    for seed in range(2):
        removals = changes(model, sites, seed, bias)
        assert gap(model, sites, removals, inputs) <= ATOL


@every_family
def test_masked_is_shrunk_when_one_site_loses_all_its_units(name):
    model, sites, inputs = subject(name)
    assert any(site.drop is not None for site in sites)
    for site, bias in itertools.product(sites, (True, False)):
        if site.drop is not None:
            removals = {site.name: change(model, site, 0, 0, bias)}
            assert gap(model, sites, removals, inputs) <= ATOL, site.name
            removals |= changes(model, [other for other in sites if other is not site])
            assert gap(model, sites, removals, inputs) <= ATOL, site.name


@every_family
def test_every_site_matters(name):
    model, sites, inputs = subject(name)
    dense = run(model, inputs)
    for site in sites:
        masked = mask(model, sites, {site.name: Removal(torch.arange(site.units // 2))})
        assert (run(masked, inputs) - dense).abs().max() > DIFFERENT, site.name


@every_family
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_after_a_removal_are_those_predicted(name, bias):
    model, sites, _ = subject(name)
    removals = changes(model, sites, bias=bias)
    empty = next(site for site in sites if site.drop is not None)
    for more in ({}, {empty.name: change(model, empty, 0, 0, bias)}):
        removals |= more
        units = {site: len(removal.kept) for site, removal in removals.items()}
        counted = sum(value.numel() for value in shrink(model, sites, removals).parameters())
        assert parameters_after(model, sites, units, biased=bias) == counted
    whole, state = sum(value.numel() for value in model.parameters()), model.state_dict()
    for site in sites:
        one = sum(state[part.tensor].narrow(part.dim, 0, part.width).numel() for part in site.slices)
        left = parameters_after(model, sites, {site.name: site.units - 1})
        assert whole - left == one, site.name


@every_family
def test_the_order_of_the_units_means_nothing(name):
    model, sites, inputs = subject(name)
    permuted = shrink(model, [], {})
    state = permuted.state_dict()
    for site in sites:
        order = [*range(1, site.units), 0]
        for part in site.slices:
            old = state[part.tensor].clone()
            for new, unit in enumerate(order):
                moved = old.narrow(part.dim, part.start + unit * part.width, part.width)
                state[part.tensor].narrow(part.dim, part.start + new * part.width, part.width).copy_(moved)
        assert not torch.equal(state[site.writer], model.state_dict()[site.writer])
    dense = run(model, inputs)
    assert (run(permuted, inputs) - dense).abs().max() <= ATOL * dense.abs().max().clamp(min=1)


@every_family
def test_a_saved_model_loads_with_the_same_logits_bit_for_bit(name, tmp_path):
    model, sites, inputs = subject(name)
    removals = changes(model, sites)
    empty = next(site for site in sites if site.drop is not None)
    removals[empty.name] = change(model, empty, 0, 0)
    shrunk = shrink(model, sites, removals)
    save(shrunk, sites, {site: len(removal.kept) for site, removal in removals.items()}, tmp_path)
    factory = None if hasattr(model, "config") else families.FAMILIES[name][0]
    assert torch.equal(run(load(tmp_path, factory), inputs), run(shrunk, inputs))


def agrees(model, site, removal, inputs):
    """Whether a site describes the model: it shrinks, runs, and gives what its mask gives."""
    try:
        return bool(gap(model, [site], {site.name: removal}, inputs) <= DIFFERENT)
    except (CompressError, RuntimeError, ValueError):
        return False


@every_family
def test_a_wrong_site_does_not_pass_for_a_right_one(name):
    model, sites, inputs = subject(name)
    for site in {site.kind: site for site in sites}.values():
        removal = change(model, site, site.units // 2, 3)
        assert agrees(model, site, removal, inputs)
        for place, part in enumerate(site.slices):
            others = site.slices[:place] + site.slices[place + 1 :]
            axes = model.state_dict()[part.tensor].ndim
            turned = part.model_copy(update={"dim": (part.dim + 1) % axes})
            if axes == 1:
                turned = part.model_copy(update={"start": part.start + 1})
            assert not agrees(model, site.model_copy(update={"slices": others}), removal, inputs)
            wrong = site.model_copy(update={"slices": (*others, turned)})
            assert not agrees(model, wrong, removal, inputs), part
        for place, count in enumerate(site.counts):
            others = site.counts[:place] + site.counts[place + 1 :]
            wrong = site.model_copy(update={"counts": others})
            assert not agrees(model, wrong, removal, inputs), count


@every_family
def test_other_units_give_another_model(name):
    model, sites, inputs = subject(name)
    for site in {site.kind: site for site in sites}.values():
        first = Removal(torch.arange(site.units // 2))
        last = Removal(torch.arange(site.units - site.units // 2, site.units))
        masked = mask(model, sites, {site.name: first})
        shrunk = shrink(model, sites, {site.name: last})
        assert (run(masked, inputs) - run(shrunk, inputs)).abs().max() > DIFFERENT


def shapes(name):
    """Inputs at another batch, and at another length where the family takes tokens; with padding."""
    if families.FAMILIES[name][1] is not families.tokens:
        yield {key: torch.cat([value, value[:1] / 2]) for key, value in subject(name)[2].items()}
        return
    for batch, length in ((3, 9), (1, 4)):
        inputs = families.tokens(5, batch=batch, length=length)
        inputs["attention_mask"][0, length - 1 :] = 0
        yield inputs


@pytest.mark.slow
@every_family
def test_the_onnx_file_gives_what_the_shrunk_model_gives(name, tmp_path):
    model, sites, inputs = subject(name)
    removals = changes(model, sites)
    for site in sites[2:]:
        if site.drop is not None:
            removals[site.name] = change(model, site, 0, 0)
    shrunk = shrink(model, sites, removals)
    example = families.build(name)[1]
    export(shrunk, example, tmp_path / "model.onnx", tensors=lambda output: {"logits": tensor_of(output)})
    with OrtRunner(tmp_path / "model.onnx", 1) as runner:
        for other in (inputs, *shapes(name)):
            wanted = set(runner.inputs())  # a model that ignores an input has none of it in its file
            feed = {key: value.numpy() for key, value in other.items() if key in wanted}
            found = torch.from_numpy(next(iter(runner.infer(feed).values())))
            expected = run(shrunk, other)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-4
