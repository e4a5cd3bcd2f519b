"""Attention heads: projections told apart, what attention costs, and what a new token looks at."""

import pytest
import torch
from support.sites import BATCH, HIDDEN, ROWS, TOKENS, WIDTH, ffn, heads
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import CompressError
from compress.export.microbench import torch_chain
from compress.sites.kinds import decode_step
from compress.sites.kinds.attention import ATTENTION, projections


def test_a_step_looks_at_the_tokens_before_it():
    site = heads()
    step = decode_step(site)
    assert (step.tokens, step.past, [m.rows for m in step.matmuls]) == (1, TOKENS, [BATCH] * 4)
    assert step.shape != site.shape
    assert step.shape != decode_step(heads().model_copy(update={"tokens": TOKENS + 1})).shape
    # Neurons look at no other token, so a longer past costs them nothing.
    longer = ffn().model_copy(update={"tokens": 64})
    assert decode_step(ffn()).shape == decode_step(longer).shape


@pytest.mark.parametrize(
    ("queries", "fused", "expected"),
    [
        (1, (), [(0, [WIDTH]), (1, [WIDTH]), (2, [WIDTH])]),
        (1, (3 * WIDTH,), [(0, [WIDTH] * 3)]),
        (1, (WIDTH, 2 * WIDTH), [(1, [WIDTH] * 2), (0, [WIDTH])]),
        (3, (), [(0, [3 * WIDTH]), (1, [WIDTH]), (2, [WIDTH])]),
        (3, (WIDTH, 4 * WIDTH), [(1, [3 * WIDTH, WIDTH]), (0, [WIDTH])]),
    ],
)
def test_query_key_and_value_are_told_apart_by_their_widths(queries, fused, expected):
    site = heads(queries=queries, fused=fused)
    assert projections(site, ATTENTION.parts(site)[1]) == expected


def test_products_that_are_not_query_key_and_value_are_refused():
    with pytest.raises(CompressError, match=r"heads: .* \[4, 6, 4\] features a unit, not \[4, 4, 4\]"):
        ATTENTION.parts(heads(fused=(4, 6, 4)))
    with pytest.raises(CompressError, match="heads: only 2 of query, key and value"):
        ATTENTION.parts(heads(fused=(4, 4)))


@pytest.mark.parametrize("queries", [1, 3])
def test_multiplications_are_those_that_torch_counts(queries):
    site = heads(queries=queries)
    chain = torch_chain.Chain(site, site.units, 1)
    x, mask = torch_chain.inputs(site, site.units)
    # Fused attention is one operator that torch does not count on a CPU.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        chain(x, mask)
    assert 2 * ATTENTION.multiplications(site) == counter.get_total_flops()


def test_a_kernel_of_scores_and_one_of_context_multiply_all_heads():
    site = heads(queries=3, past=4)
    kernels = ATTENTION.kernels(site, 2, 4.0, fused=False)
    products = [k for k in kernels if k.rows]
    assert [(k.batch, k.rows, k.out, k.inner) for k in products] == [
        (BATCH * 6, TOKENS, TOKENS + 4, WIDTH),
        (BATCH * 6, TOKENS, WIDTH, TOKENS + 4),
    ]
    alone = ATTENTION.kernels(site, 2, 4.0, fused=True)
    assert sum(k.moved_bytes for k in alone) < sum(k.moved_bytes for k in kernels)
    # The cache of two key-value heads is read and written, once for keys and once for values.
    copies = [k.moved_bytes for k in alone[1:]]
    assert copies == [2 * 4.0 * BATCH * 2 * (TOKENS + 4) * WIDTH] * 2


def test_every_number_of_heads_is_priced_whatever_the_alignment():
    assert ATTENTION.levels(heads(units=5), 64) == [5, 4, 3, 2, 1]
    assert ATTENTION.parts(heads())[0].out == HIDDEN
    assert ATTENTION.parts(heads())[0].rows == ROWS
