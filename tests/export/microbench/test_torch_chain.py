"""Torch chains against plain arithmetic, and the rig that times them on any device."""

import math

import numpy as np
import pytest
import torch
from support import oracles
from support.sites import BATCH, HIDDEN, ROWS, TOKENS, WIDTH, ffn, heads
from torch import nn

from compress.errors import CompressError
from compress.export.microbench import site_timing, torch_chain
from compress.export.microbench.torch_chain import Chain
from compress.sites.kinds import decode_step
from compress.sites.kinds.attention import ATTENTION, projections


def stream(seed=0):
    random = np.random.default_rng(seed)
    mask = np.zeros((BATCH, 1, TOKENS, TOKENS), dtype=np.float32)
    mask[1, :, :, -2:] = -1e4
    return random.standard_normal((ROWS, HIDDEN)).astype(np.float32), mask


def answer(chain, x, mask=None):
    with torch.no_grad():
        return chain(torch.from_numpy(x), None if mask is None else torch.from_numpy(mask)).numpy()


def pair(layer):
    bias = 0.0 if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().double().numpy(), bias


ACTIVATIONS = {
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: max(v, 0.0),
    "relu_squared": lambda v: max(v, 0.0) ** 2,
    "silu": lambda v: v / (1 + math.exp(-v)),
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "nothing known": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "identity": lambda v: v,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_feed_forward_chain_computes_the_pair(activation):
    x, _ = stream()
    chain = Chain(ffn(activation=activation), 7, 1)
    (up, a), (down, b) = pair(chain.bodies[0].products[0]), pair(chain.writers[0])
    assert (up.shape, down.shape) == ((7, HIDDEN), (HIDDEN, 7))
    inside = np.vectorize(ACTIVATIONS[activation])(x @ up.T + a)
    expected = oracles.normalized(inside @ down.T + b + x, np.ones(HIDDEN), np.zeros(HIDDEN))
    assert np.abs(answer(chain, x) - expected).max() < 1e-4


@pytest.mark.parametrize("gated", ["one", "two"])
def test_a_gate_multiplies_whether_its_matrix_is_fused_or_apart(gated):
    x, _ = stream(1)
    chain = Chain(ffn(gated=gated, activation="silu", bias=False), 5, 1)
    ups = [pair(up)[0] for up in chain.bodies[0].products]
    up, gate = (ups[0][:5], ups[0][5:]) if gated == "one" else ups
    inside = np.vectorize(ACTIVATIONS["silu"])(x @ up.T) * (x @ gate.T)
    down, _ = pair(chain.writers[0])
    expected = oracles.normalized(inside @ down.T + x, np.ones(HIDDEN), np.zeros(HIDDEN))
    assert np.abs(answer(chain, x) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("queries", "fused", "units"),
    [(1, (), 2), (3, (), 2), (1, (3 * WIDTH,), 3), (1, (WIDTH, 2 * WIDTH), 2)],
)
def test_an_attention_chain_computes_masked_attention(queries, fused, units):
    x, mask = stream(2)
    site = heads(queries=queries, fused=fused)
    chain = Chain(site, units, 1)
    outs = []
    for reader, widths in projections(site, ATTENTION.parts(site)[1]):
        weight, bias = pair(chain.bodies[0].products[reader])
        outs += np.split(x @ weight.T + bias, units * np.cumsum(widths)[:-1], axis=1)
    context = oracles.masked_attention(*outs, mask, units, queries, WIDTH)
    out, d = pair(chain.writers[0])
    expected = oracles.normalized(context @ out.T + d + x, np.ones(HIDDEN), np.zeros(HIDDEN))
    assert np.abs(answer(chain, x, mask) - expected).max() < 1e-4
    without = oracles.masked_attention(*outs, np.zeros_like(mask), units, queries, WIDTH)
    assert not np.allclose(context, without, atol=1e-3)  # the mask matters, so the comparison can fail


@pytest.mark.parametrize("queries", [1, 3])
def test_in_decoding_a_new_token_looks_at_its_past_and_at_itself(queries):
    site, units = decode_step(heads(queries=queries, causal=True)), 2
    x, mask = torch_chain.inputs(site, units)
    assert (x.shape, mask.shape, mask.abs().max()) == ((BATCH, HIDDEN), (BATCH, 1, 1, TOKENS + 1), 0)
    chain = Chain(site, units, 1)
    body = chain.bodies[0]
    q, k, v = (x.numpy() @ pair(reader)[0].T + pair(reader)[1] for reader in body.products)
    context = np.zeros((BATCH, units * queries * WIDTH))
    for b in range(BATCH):
        for head in range(units * queries):
            own = slice(head // queries * WIDTH, (head // queries + 1) * WIDTH)
            keys, values = (
                np.vstack([held[b, head // queries].numpy(), new[b, own]])
                for held, new in ((body.keys, k), (body.values, v))
            )
            scores = keys @ q[b, head * WIDTH : (head + 1) * WIDTH] / math.sqrt(WIDTH)
            shares = np.exp(scores) / np.exp(scores).sum()
            context[b, head * WIDTH : (head + 1) * WIDTH] = shares @ values
    out, d = pair(chain.writers[0])
    expected = oracles.normalized(context @ out.T + d + x.numpy(), np.ones(HIDDEN), np.zeros(HIDDEN))
    assert np.abs(answer(chain, x.numpy(), mask.numpy()) - expected).max() < 1e-4
    assert body.keys.shape == (BATCH, units, TOKENS, WIDTH)
    assert body.keys.std() > 0.5


def test_copies_follow_each_other_with_weights_of_their_own():
    x, _ = stream(3)
    chain = Chain(ffn(activation="relu"), 6, 3)
    expected = x
    for body, writer in zip(chain.bodies, chain.writers, strict=True):
        (up, a), (down, b) = pair(body.products[0]), pair(writer)
        inside = np.maximum(expected @ up.T + a, 0)
        expected = oracles.normalized(inside @ down.T + b + expected, np.ones(HIDDEN), np.zeros(HIDDEN))
    assert np.abs(answer(chain, x) - expected).max() < 1e-4
    assert not torch.equal(chain.writers[0].weight, chain.writers[1].weight)


def test_without_units_only_the_sum_and_the_norm_are_left():
    chain = Chain(heads(), 0, 2)
    assert not [layer for layer in chain.modules() if isinstance(layer, nn.Linear)]
    x, _ = stream(4)
    expected = oracles.normalized(x, np.ones(HIDDEN), np.zeros(HIDDEN))
    expected = oracles.normalized(expected, np.ones(HIDDEN), np.zeros(HIDDEN))
    assert np.abs(answer(chain, x) - expected).max() < 1e-4


def test_what_cannot_be_timed_alone_is_refused_by_name():
    with pytest.raises(CompressError, match=r"heads: .* \[4, 6, 4\] features a unit"):
        Chain(heads(fused=(4, 6, 4)), 2, 1)
    with pytest.raises(CompressError, match="heads: only 2 of query, key and value"):
        Chain(heads(fused=(4, 4)), 2, 1)
    site = ffn()
    odd = site.matmuls[1].model_copy(update={"out": HIDDEN + 1})
    with pytest.raises(CompressError, match="ffn: products of different hidden widths"):
        Chain(site.model_copy(update={"matmuls": (site.matmuls[0], odd)}), 2, 1)
    with pytest.raises(CompressError, match="ffn: 0 readers and 1 writers cannot be timed alone"):
        Chain(site.model_copy(update={"matmuls": site.matmuls[1:]}), 2, 1)
    with pytest.raises(CompressError, match="10 rows are not batch 2 x 3 tokens"):
        torch_chain.inputs(heads().model_copy(update={"tokens": 3}), 2)


def test_inputs_have_the_shape_of_the_site_and_its_mask():
    x, mask = torch_chain.inputs(heads(causal=True), 2)
    assert (x.shape, mask.shape) == ((ROWS, HIDDEN), (BATCH, 1, TOKENS, TOKENS))
    for row in range(TOKENS):
        for column in range(TOKENS):
            assert (mask[0, 0, row, column] < -1e3) == (column > row)
    assert torch_chain.inputs(heads(), 0)[1] is None
    assert torch_chain.inputs(ffn(), 3)[1] is None
    assert torch.isfinite(mask.half()).all()


def test_a_rig_times_its_own_chains_with_enough_copies_to_leave_the_caches():
    built, now = [], [0.0]

    def make(site, units, copies, form):
        built.append((units, copies))

        def call():
            now[0] += copies * (0.5 + 0.02 * units) / 1e3

        return call

    site = ffn()
    size = site_timing.weights_mb(site, site.units)
    rig = site_timing.ChainRuntime(make, lambda: now[0], least_mb=8.5 * size, group_mb=1e9)
    rows = site_timing.measure([site], {site.shape: [6]}, seconds=0.0, rig=rig)
    assert rows[site.shape] == pytest.approx({12: 0.24, 6: 0.12})
    assert built == [(12, 9), (0, 9), (6, 9)]
