"""2:4, blocks, ranks, int8 and fp8: every layer against plain arithmetic in numpy, on a CPU."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from compress.core import fakequant
from compress.errors import CompressError
from compress.export.backends import torch_kernels


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(x, weight, bias):
    """The product in double precision, by loops over the output."""
    x, weight, bias = (np.asarray(t, dtype=np.float64) for t in (x, weight, bias))
    return np.stack([(x * row).sum(-1) for row in weight], -1) + bias


def test_a_sparse_layer_computes_with_the_weight_it_was_given():
    weight, bias, x = torch_kernels.prune_24(made(6, 16)), made(6, seed=1), made(2, 3, 16, seed=2)
    layer = torch_kernels.SparseLinear(weight, bias)
    assert np.allclose(layer(x), plain(x, weight, bias), atol=1e-5)
    assert torch.equal(torch_kernels.SparseLinear(weight, None)(x), nn.functional.linear(x, weight))


def test_pruning_for_24_keeps_the_two_largest_of_every_four():
    weight = made(5, 24)
    pruned = torch_kernels.prune_24(weight)
    for row in range(5):
        for start in range(0, 24, 4):
            group = weight[row, start : start + 4].tolist()
            best = sorted(range(4), key=lambda k, group=group: -abs(group[k]))[:2]
            expected = [value if k in best else 0.0 for k, value in enumerate(group)]
            assert pruned[row, start : start + 4].tolist() == expected
    assert ((torch_kernels.prune_24(torch.zeros(1, 4)) != 0).sum() == 0).item()


def test_a_weight_with_three_of_four_is_refused_with_its_place():
    weight = torch_kernels.prune_24(made(4, 8))
    weight[2, 4:8] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(CompressError, match=r"1 of 8 groups of four.*row 2, columns 4 to 7"):
        torch_kernels.SparseLinear(weight, None)


@pytest.mark.parametrize(("rows", "columns", "density"), [(2, 4, 0.5), (6, 4, 0.25), (3, 2, 0.75)])
def test_blocks_compute_what_the_masked_weight_computes(rows, columns, density):
    weight = torch_kernels.prune_blocks(made(6, 16), rows, columns, density)
    bias, x = made(6, seed=1), made(2, 3, 16, seed=2)
    layer = torch_kernels.BlockLinear(weight, bias, rows, columns)
    assert layer.weight.numel() == round(density * 6 * 16)
    assert np.allclose(layer(x), plain(x, weight, bias), atol=1e-5)
    assert np.allclose(torch_kernels.BlockLinear(weight, None, rows, columns)(x), layer(x) - bias, atol=1e-5)


def test_pruned_blocks_are_the_lightest_of_their_band():
    weight = made(4, 12)
    pruned = torch_kernels.prune_blocks(weight, 2, 3, 0.5)
    for band in range(2):
        tiles = [weight[2 * band : 2 * band + 2, 3 * k : 3 * k + 3] for k in range(4)]
        heavy = sorted(range(4), key=lambda k, tiles=tiles: -float((tiles[k] ** 2).sum()))[:2]
        for k in range(4):
            found = pruned[2 * band : 2 * band + 2, 3 * k : 3 * k + 3]
            assert torch.equal(found, tiles[k] if k in heavy else torch.zeros(2, 3))


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(CompressError, match=r"4x4 do not divide a weight of 6x16"):
        torch_kernels.BlockLinear(made(6, 16), None, 4, 4)
    uneven = torch_kernels.prune_blocks(made(4, 8), 2, 4, 0.5)
    uneven[:2] = 1.0
    with pytest.raises(CompressError, match=r"same number of blocks.*found \[1, 2\]"):
        torch_kernels.BlockLinear(uneven, None, 2, 4)
    with pytest.raises(CompressError, match=r"at least one; found \[0\]"):
        torch_kernels.BlockLinear(torch.zeros(4, 8), None, 2, 4)


def int8(weight, bias):
    found = fakequant.nearest(weight, "int8-dynamic")
    return found, torch_kernels.required_kernel(found.precision).deploy(found, linear(weight, bias))


def fp8(weight, bias, span=(-8.0, 8.0)):
    found = fakequant.nearest(weight, "fp8", span)
    return found, torch_kernels.required_kernel(found.precision).deploy(found, linear(weight, bias))


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_int8_is_exact_in_whole_numbers(tokens):
    """By the definition of ONNX's DynamicQuantizeLinear, in Python's own numbers."""
    weight, bias, x = made(6, 16), made(6, seed=1), 3 * made(tokens, 16, seed=2) + 0.5
    found, layer = int8(weight, bias)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = np.float32(np.float32(high - low) / np.float32(255))
    zero = int(np.clip(np.rint(-np.float32(low) / step), 0, 255))
    codes = np.clip(np.rint(x.numpy() / step) + zero, 0, 255).astype(int)
    answer = layer(x)
    for row in range(tokens):
        for out in range(6):
            total = sum((int(q) - zero) * int(w) for q, w in zip(codes[row], found.codes[out], strict=True))
            expected = total * float(step) * float(found.step[out, 0]) + float(bias[out])
            assert float(answer[row, out]) == pytest.approx(expected, abs=1e-4)


def test_an_input_on_one_side_of_zero_loses_no_code_to_the_other():
    found, layer = int8(made(4, 8), None)
    x = torch.full((2, 8), 3.0)
    assert np.allclose(layer(x), 3.0 * found.weight().sum(1), atol=1e-3)
    assert np.allclose(layer(-x), -layer(x), atol=1e-3)


def test_int8_and_fp8_come_back_in_shape_and_type():
    for make in (int8, fp8):
        _, layer = make(made(16, 32), None)
        answer = layer(made(2, 3, 32).to(torch.bfloat16))
        assert (answer.shape, answer.dtype) == ((2, 3, 16), torch.bfloat16)


def e4m3(value):
    """The nearest number with four exponent and three mantissa bits, ties to even, by its definition."""
    if value == 0:
        return 0.0
    exponent = max(np.floor(np.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return float(np.rint(value / step) * step)


def test_fp8_rounds_to_three_bits_of_mantissa_under_one_step():
    weight, bias, x = made(16, 32), made(16, seed=1), 5 * made(4, 32, seed=2)
    _, layer = fp8(weight, bias, (-20.0, 10.0))
    w_step, x_step = float(weight.abs().max()) / 448, 20 / 448
    w = np.vectorize(e4m3)(np.asarray(weight / w_step, dtype=np.float64))
    q = np.vectorize(e4m3)(np.asarray(x / x_step, dtype=np.float64))
    expected = q @ w.T * x_step * w_step + np.asarray(bias)
    assert np.allclose(layer(x), expected, rtol=1e-4, atol=1e-3)
    # A control: eight bits of a whole number give other values, so the comparison can fail.
    assert not np.allclose(int8(weight, bias)[1](x), expected, rtol=1e-4, atol=1e-3)


def test_fp8_clips_what_lies_outside_and_looks_at_no_other_row():
    _, layer = fp8(made(16, 16), None, (-2.0, 2.0))
    one, far = made(1, 16), torch.full((1, 16), 50.0)
    assert torch.allclose(layer(torch.cat([one, far]))[:1], layer(one))
    assert torch.allclose(layer(far), layer(torch.full((1, 16), 2.0)))
    assert torch.isfinite(layer(far)).all()


def test_a_precision_without_a_product_in_torch_is_refused():
    with pytest.raises(CompressError, match="torch has no product of int4 on a GPU"):
        torch_kernels.required_kernel("int4")


def test_a_rank_is_the_product_of_its_factors():
    left, right, bias, x = made(6, 3), made(3, 16, seed=1), made(6, seed=2), made(2, 5, 16, seed=3)
    expected = plain(x, left @ right, bias)
    assert np.allclose(torch_kernels.LowRankLinear(left, right, bias)(x), expected, atol=1e-5)
    assert np.allclose(
        torch_kernels.LowRankLinear(left, right, None)(x), expected - np.asarray(bias), atol=1e-5
    )


@pytest.mark.parametrize("tokens", [1, 32, 33])
def test_block_rows_are_given_to_torchs_kernel_in_whole_tiles(monkeypatch, tokens):
    """The kernel is for a GPU; a double of it says what it was given, and multiplies plainly."""
    from torch.sparse import _triton_ops

    seen = []

    def double(rest, bsr, dense):
        assert bsr.layout == torch.sparse_bsr
        seen.append((tuple(bsr.values().shape[1:]), dense.shape[1]))
        return rest + bsr.to_dense() @ dense

    monkeypatch.setattr(_triton_ops, "bsr_dense_addmm", double)
    weight, bias = torch_kernels.prune_blocks(made(64, 96), 32, 16, 0.5), made(64, seed=1)
    x = made(tokens, 96, seed=2)
    assert np.allclose(torch_kernels.BsrLinear(weight, bias, 32, 16)(x), plain(x, weight, bias), atol=1e-4)
    assert np.allclose(
        torch_kernels.BsrLinear(weight, None, 32, 16)(x[None]), plain(x, weight, 0)[None], atol=1e-4
    )
    assert {size for size, _ in seen} == {(32, 16)}
    assert {columns for _, columns in seen} == {-(-tokens // 32) * 32}
    assert isinstance(
        torch_kernels.block_layer(weight, bias, 32, 16), torch_kernels.BlockLinear
    )  # on a processor


def test_elementwise_work_stays_as_it_is_without_triton(monkeypatch):
    torch_kernels.fused.cache_clear()
    monkeypatch.setattr(torch_kernels, "find_spec", lambda name: None)
    assert torch_kernels.fused(torch_kernels._to_floats) is torch_kernels._to_floats
    torch_kernels.fused.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_fused_work_computes_what_plain_work_does(monkeypatch):
    """Compiled for a processor: that it is traced whole and changes nothing is all that is shown here."""
    torch_kernels.fused.cache_clear()
    monkeypatch.setattr(torch_kernels, "find_spec", lambda name: name)
    for rows in (3, 40):
        x, total = made(rows, 32).half(), torch.randint(-999, 999, (rows, 16))
        low, high = torch.aminmax(x)
        for work, given in (
            (torch_kernels._to_floats, (x, torch.tensor(0.25))),
            (torch_kernels._to_bytes, (x, low, high)),
            (
                torch_kernels._from_sums,
                (total, torch.tensor(3.0), made(16), torch.tensor(0.1), made(16), None),
            ),
        ):
            found, expected = torch_kernels.fused(work)(*given), work(*given)
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            for one, other in pairs:
                assert torch.allclose(one.float(), other.float(), rtol=1e-5)
    torch_kernels.fused.cache_clear()


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
        ("2:4", torch_kernels.SparseLinear, ["body.2", "head"]),
        ("int8-dynamic", torch_kernels.Int8Linear, ["head"]),
        ("rank:8", torch_kernels.LowRankLinear, []),
        ("fp8", torch_kernels.Fp8Linear, ["head"]),
        ("block:32x32@0.5", torch_kernels.BlockLinear, ["head"]),
    ],
)
def test_layers_are_replaced_where_the_form_fits_and_the_others_are_named(words, kind, left):
    model = Net()
    before = model.head
    assert torch_kernels.convert(model, words) == left
    assert isinstance(model.body[0], kind)
    assert (model.head is before) == bool(left)
    assert torch.isfinite(model(made(2, 64))).all()


def test_only_the_named_layers_are_replaced():
    model = Net()
    assert torch_kernels.convert(model, "int8-dynamic", ["body.2"]) == []
    assert isinstance(model.body[0], nn.Linear)
    assert isinstance(model.body[2], torch_kernels.Int8Linear)


def test_an_unknown_form_is_refused():
    for words in ("3:4", "dense", "int4", "block:32x32@0.5+rank:4"):
        with pytest.raises(CompressError, match=f"torch has no product of {re.escape(words)} on a GPU"):
            torch_kernels.convert(Net(), words)
