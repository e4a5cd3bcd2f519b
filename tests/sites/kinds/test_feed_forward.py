"""Neurons of feed-forward blocks: what stands between their products, and their free order."""

import pytest
import torch
from support.channel_families import FAMILIES, family
from support.sites import ROWS, ffn
from torch.utils.flop_counter import FlopCounterMode

from compress.export.microbench import torch_chain
from compress.sites.kinds.feed_forward import FEED_FORWARD


@pytest.mark.parametrize(
    ("gated", "activation", "values"),
    [("", "gelu", [2.0]), ("", "", []), ("two", "silu", [2.0, 3.0]), ("one", "silu", [2.0, 3.0])],
)
def test_the_activation_and_the_gate_move_their_features_unless_fused(gated, activation, values):
    site = ffn(gated=gated, activation=activation)
    found = FEED_FORWARD.kernels(site, 5, 4.0, fused=False)
    assert [kernel.moved_bytes for kernel in found] == [ROWS * 5 * 4.0 * value for value in values]
    assert not any(kernel.rows for kernel in found)
    assert FEED_FORWARD.kernels(site, 5, 4.0, fused=True) == []


@pytest.mark.parametrize("gated", ["", "two", "one"])
def test_multiplications_are_those_that_torch_counts(gated):
    site = ffn(gated=gated)
    x, _ = torch_chain.inputs(site, site.units)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch_chain.Chain(site, site.units, 1)(x)
    assert 2 * FEED_FORWARD.multiplications(site) == counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_makes_the_neurons_follows_their_order(name):
    site = family(name)[2]["ffn"]
    (parts,) = FEED_FORWARD.channel_sets(site)
    assert set(parts) == {part for part in site.slices if part.tensor != site.writer}
    assert FEED_FORWARD.free_columns(site, 24) == 24
