"""2:4, blocks, int8 and fp8: every layer against plain arithmetic in numpy, on a CPU."""

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.export import products


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(x, weight, bias):
    """The product in double precision, by loops over the output."""
    x, weight, bias = (np.asarray(t, dtype=np.float64) for t in (x, weight, bias))
    return np.stack([(x * row).sum(-1) for row in weight], -1) + bias


def test_a_sparse_layer_computes_with_the_weight_it_was_given():
    weight, bias, x = products.prune_24(made(6, 16)), made(6, seed=1), made(2, 3, 16, seed=2)
    layer = products.SparseLinear(weight, bias)
    assert np.allclose(layer(x), plain(x, weight, bias), atol=1e-5)
    assert torch.equal(products.SparseLinear(weight, None)(x), nn.functional.linear(x, weight))


def test_pruning_for_24_keeps_the_two_largest_of_every_four():
    weight = made(5, 24)
    pruned = products.prune_24(weight)
    for row in range(5):
        for start in range(0, 24, 4):
            group = weight[row, start : start + 4].tolist()
            best = sorted(range(4), key=lambda k, group=group: -abs(group[k]))[:2]
            expected = [value if k in best else 0.0 for k, value in enumerate(group)]
            assert pruned[row, start : start + 4].tolist() == expected
    assert ((products.prune_24(torch.zeros(1, 4)) != 0).sum() == 0).item()


def test_a_weight_with_three_of_four_is_refused_with_its_place():
    weight = products.prune_24(made(4, 8))
    weight[2, 4:8] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(CompressError, match=r"1 of 8 groups of four.*row 2, columns 4 to 7"):
        products.SparseLinear(weight, None)


@pytest.mark.parametrize(("rows", "columns", "density"), [(2, 4, 0.5), (6, 4, 0.25), (3, 2, 0.75)])
def test_blocks_compute_what_the_masked_weight_computes(rows, columns, density):
    weight = products.prune_blocks(made(6, 16), rows, columns, density)
    bias, x = made(6, seed=1), made(2, 3, 16, seed=2)
    layer = products.BlockLinear(weight, bias, rows, columns)
    assert layer.weight.numel() == round(density * 6 * 16)
    assert np.allclose(layer(x), plain(x, weight, bias), atol=1e-5)
    assert np.allclose(products.BlockLinear(weight, None, rows, columns)(x), layer(x) - bias, atol=1e-5)


def test_pruned_blocks_are_the_lightest_of_their_band():
    weight = made(4, 12)
    pruned = products.prune_blocks(weight, 2, 3, 0.5)
    for band in range(2):
        tiles = [weight[2 * band : 2 * band + 2, 3 * k : 3 * k + 3] for k in range(4)]
        heavy = sorted(range(4), key=lambda k, tiles=tiles: -float((tiles[k] ** 2).sum()))[:2]
        for k in range(4):
            found = pruned[2 * band : 2 * band + 2, 3 * k : 3 * k + 3]
            assert torch.equal(found, tiles[k] if k in heavy else torch.zeros(2, 3))


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(CompressError, match=r"4x4 do not divide a weight of 6x16"):
        products.BlockLinear(made(6, 16), None, 4, 4)
    uneven = products.prune_blocks(made(4, 8), 2, 4, 0.5)
    uneven[:2] = 1.0
    with pytest.raises(CompressError, match=r"same number of blocks.*found \[1, 2\]"):
        products.BlockLinear(uneven, None, 2, 4)
    with pytest.raises(CompressError, match=r"at least one; found \[0\]"):
        products.BlockLinear(torch.zeros(4, 8), None, 2, 4)


def rounded(values, scale, most=127):
    return np.clip(np.rint(np.asarray(values, dtype=np.float32) / np.float32(scale)), -most, most)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_int8_is_exact_in_whole_numbers(tokens):
    weight, bias, x = made(6, 16), made(6, seed=1), 3 * made(tokens, 16, seed=2)
    found = products.Int8Linear(weight, bias)(x)
    for row in range(tokens):
        x_scale = np.float32(float(x[row].abs().max()) / 127)
        for out in range(6):
            w_scale = np.float32(float(weight[out].abs().max()) / 127)
            total = int((rounded(x[row], x_scale) * rounded(weight[out], w_scale)).sum())
            assert float(found[row, out]) == pytest.approx(
                total * x_scale * w_scale + float(bias[out]), abs=1e-5
            )


def test_int8_with_a_given_scale_clips_what_lies_outside():
    weight = made(4, 8)
    layer = products.Int8Linear(weight, None, input_scale=0.01)
    far = torch.full((1, 8), 50.0)  # 0.01 x 127 is the largest input that can be told apart
    assert torch.allclose(layer(far), layer(torch.full((1, 8), 1.27)))
    assert np.allclose(layer(torch.full((1, 8), 0.5)), 0.5 * weight.sum(1), atol=0.1)


def test_int8_and_fp8_come_back_in_shape_and_type():
    for kind in (products.Int8Linear, products.Fp8Linear):
        layer = kind(made(16, 32), None)
        answer = layer(made(2, 3, 32).to(torch.bfloat16))
        assert (answer.shape, answer.dtype) == ((2, 3, 16), torch.bfloat16)


def e4m3(value):
    """The nearest number with four exponent and three mantissa bits, ties to even, by its definition."""
    if value == 0:
        return 0.0
    exponent = max(np.floor(np.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return float(np.rint(value / step) * step)


def test_fp8_rounds_to_three_bits_of_mantissa_under_one_scale():
    weight, bias, x = made(16, 32), made(16, seed=1), 5 * made(4, 32, seed=2)
    layer = products.Fp8Linear(weight, bias)
    w_scale, x_scale = float(weight.abs().max()) / 448, float(x.abs().max()) / 448
    w = np.vectorize(e4m3)(np.asarray(weight / w_scale, dtype=np.float64))
    q = np.vectorize(e4m3)(np.asarray(x / x_scale, dtype=np.float64))
    expected = q @ w.T * x_scale * w_scale + np.asarray(bias)
    assert np.allclose(layer(x), expected, rtol=1e-4, atol=1e-3)
    # A control: eight bits of a whole number give other values, so the comparison can fail.
    assert not np.allclose(products.Int8Linear(weight, bias)(x), expected, rtol=1e-4, atol=1e-3)


def test_fp8_with_a_given_scale_does_not_look_at_the_input():
    layer = products.Fp8Linear(made(16, 16), None, input_scale=0.01)
    one, both = made(1, 16), torch.cat([made(1, 16), 4 * torch.ones(1, 16)])
    assert torch.allclose(layer(both)[:1], layer(one))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize(
    ("words", "kind", "left"),
    [
        ("2:4", products.SparseLinear, ["body.2", "head"]),
        ("int8", products.Int8Linear, ["head"]),
        ("fp8", products.Fp8Linear, ["head"]),
        ("block:32x32@0.5", products.BlockLinear, ["head"]),
    ],
)
def test_layers_are_replaced_where_the_form_fits_and_the_others_are_named(words, kind, left):
    model = Net()
    before = model.head
    assert products.convert(model, words) == left
    assert isinstance(model.body[0], kind)
    assert model.head is before
    assert torch.isfinite(model(made(2, 64))).all()


def test_only_the_named_layers_are_replaced():
    model = Net()
    assert products.convert(model, "int8", ["body.2"]) == []
    assert isinstance(model.body[0], nn.Linear)
    assert isinstance(model.body[2], products.Int8Linear)


def test_an_unknown_form_is_refused():
    with pytest.raises(CompressError, match=r"'3:4' is no form.*2:4, int8, fp8, block:RxC@DENSITY"):
        products.convert(Net(), "3:4")
