import itertools

import pytest
import torch

from compress.core import permute, support, units
from compress.errors import CompressError
from compress.ir import Slice


def scores(seed, rows, columns):
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).abs()


def kept_by_sorting(score, order):
    """What 2:4 keeps, one group at a time."""
    total = 0.0
    for row in score[:, order].tolist():
        for start in range(0, len(row), 4):
            total += sum(sorted(row[start : start + 4])[2:])
    return total


def halves():
    """The 35 ways to split eight columns in two groups of four."""
    for three in itertools.combinations(range(1, 8), 3):
        half = (0, *three)
        yield [*half, *sorted({*range(8)} - {*half})]


def test_what_is_retained_is_the_sum_of_the_mask():
    score = scores(0, 5, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    expected = kept_by_sorting(score, order)
    assert permute.retained(score, order) == pytest.approx(expected)
    placed = score[:, order]
    assert float(placed[support.NM().mask(placed)].sum()) == pytest.approx(expected)
    ties = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    assert permute.retained(ties) == 2.0 + 4.0 + 3.0


@pytest.mark.parametrize("seed", range(12))
def test_eight_columns_get_the_best_of_all_splits(seed):
    score = scores(seed, 6, 8)
    order = permute.search(score)
    assert sorted(order.tolist()) == list(range(8))
    most = max(kept_by_sorting(score, split) for split in halves())
    assert permute.retained(score, order) == pytest.approx(most)
    alone = permute._tournament(score, torch.arange(8), 1)
    assert permute.retained(score, alone) == pytest.approx(most)


def test_the_table_of_swaps_holds_what_each_swap_brings():
    score = scores(1, 5, 12)
    table = permute._table(score)
    for place, column in itertools.product(range(12), range(12)):
        group = score[:, place // 4 * 4 : place // 4 * 4 + 4].clone()
        group[:, place % 4] = score[:, column]
        assert float(table[place, column]) == pytest.approx(kept_by_sorting(group, list(range(4))))


@pytest.mark.parametrize("columns", [4, 8, 12, 20, 64])
def test_nothing_is_ever_lost_on_the_way(columns):
    score = scores(columns, 10, columns)
    order, values = torch.arange(columns), [permute.retained(score)]
    while (better := permute._swap(score, order)) is not None:
        order = better
        values.append(permute.retained(score, order))
    assert all(later > earlier for earlier, later in itertools.pairwise(values))
    for rounds in range(6):
        found = permute._tournament(score, order, rounds)
        assert sorted(found.tolist()) == list(range(columns))
        values.append(permute.retained(score, found))
        assert values[-1] >= values[-2] * (1 - 1e-12)


def test_at_the_end_no_pair_of_groups_can_be_split_better():
    score = scores(3, 8, 24)
    order = permute.search(score, rounds=1000)
    for first, second in itertools.combinations(range(6), 2):
        eight = torch.cat([order[4 * first : 4 * first + 4], order[4 * second : 4 * second + 4]])
        now = kept_by_sorting(score, eight)
        most = max(kept_by_sorting(score, eight[split]) for split in halves())
        assert most <= now * (1 + 1e-8)


def test_a_search_finds_more_than_many_random_orders():
    score = scores(4, 64, 128)
    generator = torch.Generator().manual_seed(0)
    naive = permute.retained(score)
    random = max(permute.retained(score, torch.randperm(128, generator=generator)) for _ in range(200))
    gain = permute.retained(score, permute.search(score)) - naive
    assert gain > 2 * (random - naive)
    assert gain > 0.3 * (float(score.sum()) - naive) * 0.18  # a third of what the best table states


def test_a_few_loud_columns_side_by_side_are_spread():
    score = torch.ones(3, 16, dtype=torch.float64) * 0.01
    score[:, :8] = 1.0
    assert permute.retained(score) == pytest.approx(3 * (4 * 1.0 + 4 * 0.01))
    assert permute.retained(score, permute.search(score)) == pytest.approx(3 * 8.0)


def test_widths_that_have_no_groups_are_refused():
    with pytest.raises(CompressError, match=r"score is \[2, 6\]"):
        permute.search(torch.ones(2, 6))


# Function-preserving: the tensors follow with units.cut


def normalized(values, scale, shift):
    return torch.nn.functional.layer_norm(values, values.shape[-1:], scale, shift)


def block(x, w, *, heads=2, shared=1, rotate=False):
    """Attention with shared key/value heads and a gated feed-forward net, residual and norms."""
    tokens = len(x)
    width = w["q"].shape[0] // heads
    y = normalized(x, w["n1"], w["m1"])
    q = (y @ w["q"].T + w["qb"]).reshape(tokens, heads, width)
    k = (y @ w["k"].T).reshape(tokens, heads // shared, width)
    v = (y @ w["v"].T + w["vb"]).reshape(tokens, heads // shared, width)
    if rotate:
        angle = torch.outer(torch.arange(tokens), 0.3 ** torch.arange(width // 2)).repeat(1, 2)[:, None]

        def turn(z):
            half = torch.cat([-z[..., width // 2 :], z[..., : width // 2]], -1)
            return z * angle.cos() + half * angle.sin()

        q, k = turn(q), turn(k)
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    weights = torch.softmax(torch.einsum("qhw,khw->hqk", q, k), -1)
    mixed = torch.einsum("hqk,khw->qhw", weights, v).reshape(tokens, -1)
    x = x + mixed @ w["o"].T
    y = normalized(x, w["n2"], w["m2"])
    gated = torch.nn.functional.silu(y @ w["gate"].T) * (y @ w["up"].T + w["ub"])
    return x + gated @ w["down"].T + w["db"]


def weights(shared=1, hidden=12, heads=2, width=8, neurons=16):
    generator = torch.Generator().manual_seed(0)
    groups = heads // shared

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4

    return {
        "q": make(heads * width, hidden), "qb": make(heads * width),
        "k": make(groups * width, hidden),
        "v": make(groups * width, hidden), "vb": make(groups * width),
        "o": make(hidden, heads * width),
        "gate": make(neurons, hidden), "up": make(neurons, hidden), "ub": make(neurons),
        "down": make(hidden, neurons), "db": make(hidden),
        "n1": make(hidden), "m1": make(hidden), "n2": make(hidden), "m2": make(hidden),
    }  # fmt: skip


def moved(w, slices, order, count):
    """All tensors with the units of one dimension in another order."""
    found = dict(w)
    for name in {part.tensor for part in slices}:
        parts = [part for part in slices if part.tensor == name]
        found[name] = units.cut(w[name], parts, order, units=count)
    return found


def part(tensor, dim, width=1, start=0):
    return Slice(tensor=tensor, dim=dim, width=width, start=start)


FREE = {
    "neurons": ([part("gate", 0), part("up", 0), part("ub", 0), part("down", 1)], 16, 1),
    "values of a head": ([part("v", 0, start=8), part("vb", 0, start=8), part("o", 1, start=8)], 8, 1),
    "values of a shared head": (
        [part("v", 0), part("vb", 0), part("o", 1), part("o", 1, start=8)], 8, 2,
    ),
    "queries and keys": ([part("q", 0), part("qb", 0), part("k", 0)], 8, 1),
    "heads": (
        [part(n, 0, width=8) for n in ("q", "qb", "k", "v", "vb")] + [part("o", 1, width=8)], 2, 1,
    ),
    "residual": (
        [part(n, 1) for n in ("q", "k", "v", "gate", "up")]
        + [part(n, 0) for n in ("o", "down", "db", "n1", "m1", "n2", "m2")], 12, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_an_order_of_what_is_only_passed_on_changes_no_output(name):
    slices, count, shared = FREE[name]
    w = weights(shared)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.arange(count).roll(1)
    now = moved(w, slices, order, count)
    assert any(not torch.equal(now[key], w[key]) for key in w)
    expected = block(x, w, shared=shared)
    if name == "residual":
        assert torch.allclose(block(x[:, order], now), expected[:, order], atol=1e-12, rtol=0)
    else:
        assert torch.allclose(block(x, now, shared=shared), expected, atol=1e-12, rtol=0)
    # The control: one tensor that does not follow is seen.
    left = slices[0].tensor
    broken = block(x[:, order] if name == "residual" else x, now | {left: w[left]}, shared=shared)
    assert not torch.allclose(broken, expected[:, order] if name == "residual" else expected, atol=1e-6)


def test_rotary_channels_are_not_free():
    w = weights()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [part(n, 0, start=s) for n in ("q", "qb", "k") for s in (0, 4)]
    now = moved(w, pairs, torch.tensor([1, 2, 3, 0]), 4)
    assert torch.allclose(block(x, now), block(x, w), atol=1e-12, rtol=0)
    assert not torch.allclose(block(x, now, rotate=True), block(x, w, rotate=True), atol=1e-6)


def test_a_searched_order_of_neurons_keeps_the_function_and_more_of_the_weight():
    w = weights(neurons=64)
    order = permute.search(w["down"].square())
    now = moved(w, FREE["neurons"][0], order, 64)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(block(x, now), block(x, w), atol=1e-12, rtol=0)
    kept = [float(v["down"].square()[support.NM().mask(v["down"].square())].sum()) for v in (w, now)]
    assert kept[1] > kept[0]
