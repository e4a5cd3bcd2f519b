"""Channels in another order: the model stays, and 2:4 loses less of it."""

import pytest
import torch
from support.channel_families import FAMILIES, family

from compress.calibration.activation_statistics import Statistics
from compress.core import permute
from compress.core.support import NM
from compress.ir import Option
from compress.methods import apply, candidate_store
from compress.sites import permutation, prune

VALUES = {
    "separate": {"value.weight": 0, "value.bias": 0},
    "fused": {"c_attn.weight": 32, "c_attn.bias": 32},
    "grouped": {"v_proj.weight": 0},
}
NEURONS = {
    "separate": ["dense.weight", "dense.bias"],
    "fused": ["c_fc.weight", "c_fc.bias"],
    "grouped": ["gate_proj.weight", "up_proj.weight"],
}


def end(part):
    return ".".join(part.tensor.split(".")[-2:])


def answer(model, example):
    with torch.no_grad():
        return model(**example).logits


def reordered(model, site, kept, seed=0, dropped=()):
    """The removal of all but `kept` with what stays in a random legal order, not followed by `dropped`."""
    own = site.model_copy(update={"units": len(kept)})
    columns = permutation.random_order(own, seed)
    weight = prune.writer_columns(model, site)
    width = site.column.width
    stay = (kept[:, None] * width + torch.arange(width)).flatten()
    readers = permutation.permute_readers(model, site, kept, columns, {})
    readers = {name: value for name, value in readers.items() if name not in dropped}
    return prune.Removal(kept, weight[:, stay][:, columns], readers=readers)


@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_neurons_are_proven_free_and_nothing_else(name):
    _, _, sites = family(name)
    values = sites["heads"].channels
    assert {end(part): part.start for part in values} == VALUES[name]
    assert all(part.width == sites["heads"].head_dim for part in values)
    assert sorted(end(part) for part in sites["ffn"].channels) == sorted(NEURONS[name])


@pytest.mark.parametrize("kind", ["heads", "ffn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_another_order_is_another_model_with_the_same_answers(name, kind):
    model, example, sites = family(name)
    site = sites[kind]
    expected = answer(model, example)
    everything = torch.arange(site.units)
    moved = reordered(model, site, everything)
    assert not torch.equal(moved.weight, prune.writer_columns(model, site))
    for build in (prune.mask, prune.shrink):
        assert torch.allclose(answer(build(model, [site], {site.name: moved}), example), expected, atol=1e-5)
    # The control: one tensor that does not follow is seen.
    for part in site.channels:
        broken = reordered(model, site, everything, dropped=(part.tensor,))
        found = answer(prune.mask(model, [site], {site.name: broken}), example)
        assert not torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["heads", "ffn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_of_a_site_may_be_ordered_as_well(name, kind):
    model, example, sites = family(name)
    site = sites[kind]
    kept = torch.arange(site.units - 1) if kind == "heads" else torch.tensor([0, 2, 3, 7, 11, 12, 20, 23])
    plain = prune.Removal(kept)
    moved = reordered(model, site, kept)
    expected = answer(prune.shrink(model, [site], {site.name: plain}), example)
    for build in (prune.mask, prune.shrink):
        assert torch.allclose(answer(build(model, [site], {site.name: moved}), example), expected, atol=1e-5)


def test_a_site_is_put_back_with_its_biases():
    model, example, sites = family("separate")
    site = sites["ffn"]
    expected = answer(model, example)
    copy = prune.mask(model, [site], {})
    before = prune.take_snapshot(copy, site)
    prune.write_weights(copy, site, reordered(copy, site, torch.arange(site.units)))
    prune.restore(copy, site, before)
    assert torch.equal(answer(copy, example), expected)


def test_values_stay_in_their_head_and_all_queries_of_a_group_move_alike():
    _, _, sites = family("grouped")
    site = sites["heads"]
    assert (site.units, site.queries, site.head_dim) == (2, 2, 8)
    score = torch.rand(16, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    score[:, :4] += 10  # four loud columns in one group of four
    found = permutation.find_order(site, score).reshape(2, 2, 8)
    assert sorted(found.flatten().tolist()) == list(range(32))
    for unit in range(2):
        first, second = (found[unit, query] - 16 * unit - 8 * query for query in range(2))
        assert torch.equal(first, second)
        assert sorted(first.tolist()) == list(range(8))
    assert permute.retained(score, found.flatten()) > permute.retained(score)


def test_every_query_of_a_group_has_a_say_in_the_order_of_its_values():
    _, _, sites = family("grouped")
    score = torch.rand(16, 2, 2, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for query in range(2):
        one = torch.ones_like(score)
        one[:, :, query] = score[:, :, query]  # the other query does not mind any order
        flat = one.reshape(16, 32)
        assert permute.retained(flat, permutation.find_order(sites["heads"], flat)) > permute.retained(flat)


def test_where_nothing_is_proven_or_no_fours_fit_the_order_stays():
    _, _, sites = family("separate")
    score = torch.rand(16, 24, dtype=torch.float64)
    bare = sites["ffn"].model_copy(update={"channels": ()})
    assert torch.equal(permutation.find_order(bare, score), torch.arange(24))
    assert torch.equal(permutation.find_order(sites["ffn"], score[:, :22]), torch.arange(22))
    odd = sites["heads"].model_copy(update={"head_dim": 6})
    assert torch.equal(permutation.find_order(odd, score), torch.arange(24))


def moments(width, seed):
    x = torch.randn(400, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 1)).double() * 0.3 + x


@pytest.mark.parametrize("kind", ["heads", "ffn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_with_two_of_four_loses_less_in_the_order_it_finds(name, kind):
    model, _, sites = family(name)
    site = sites[kind]
    weight = prune.writer_columns(model, site)
    x, hidden = moments(weight.shape[1], 3), moments(16, 5)
    found = Statistics(400, x.mean(0), x.T @ x / 400, reader=hidden.T @ hidden / 400)
    uncut = prune.Removal(torch.arange(site.units), weight, torch.zeros(len(weight)))
    option = Option.of("2:4", None)
    bare = site.model_copy(update={"channels": ()})
    moved, error = apply.apply_option(model, site, option, uncut, found, 1e-2)
    _, plain = apply.apply_option(model, bare, option, uncut, found, 1e-2)
    assert error <= plain
    assert NM().mask(moved.weight.abs()).sum() == (moved.weight != 0).sum()
    if kind == "ffn":
        assert error < plain
        own = {part.tensor for part in site.channels}
        assert own <= set(moved.readers)


def test_the_order_keeps_more_energy_than_the_one_at_hand():
    model, _, sites = family("separate")
    score = prune.writer_columns(model, sites["ffn"]).double().square()
    assert permute.retained(score, permutation.find_order(sites["ffn"], score)) > permute.retained(score)


def test_an_ordered_candidate_is_stored_and_read_back(tmp_path):
    model, example, sites = family("separate")
    site = sites["ffn"]
    kept = torch.arange(site.units)
    moved = reordered(model, site, kept)
    bias = model.get_parameter(site.bias).detach().clone()
    stored = prune.Removal(kept, moved.weight, bias, moved.readers)
    candidate_store._write(tmp_path / "000.safetensors", {Option().key: (stored, 0.0)})
    found = candidate_store.removal(tmp_path, 0, Option())
    masked = prune.mask(model, [site], {site.name: found})
    assert torch.allclose(answer(masked, example), answer(model, example), atol=1e-5)
