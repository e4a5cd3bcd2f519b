import itertools

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from compress.core import fakequant
from compress.core.fakequant import Grid, Quantized, grid_of
from compress.errors import CompressError

INT8 = grid_of("int8-dynamic")


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def in_onnxruntime(values):
    """What DynamicQuantizeLinear answers: bytes, step, zero point."""
    made = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in (
        ("q", TensorProto.UINT8, None), ("s", TensorProto.FLOAT, []), ("z", TensorProto.UINT8, []),
    )]  # fmt: skip
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(values.shape))
    graph = helper.make_graph([node], "g", [given], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": values.numpy()})


# Inputs


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shift", [-9.0, -0.7, 0.0, 0.4, 6.0])
def test_an_input_becomes_the_bytes_that_onnxruntime_makes_of_it(seed, shift):
    values = random(37, 53, seed=seed, scale=10.0 ** (seed - 3)) * 2 + shift
    codes, step, zero = in_onnxruntime(values)
    mine, origin = fakequant.dynamic_range(values)
    assert (mine.numpy().tobytes(), float(origin)) == (step.tobytes(), float(zero))
    found = fakequant.input_codes(values, mine, origin) + origin
    assert np.array_equal(found.numpy(), codes.astype(np.float32))


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_inputs_and_nothing_at_all_are_as_in_onnxruntime(value):
    values = torch.full((3, 4), value)
    codes, step, zero = in_onnxruntime(values)
    mine, origin = fakequant.dynamic_range(values)
    assert (float(mine), float(origin)) == (float(step), float(zero))
    assert np.array_equal((fakequant.input_codes(values, mine, origin) + origin).numpy(), codes)


def test_halves_go_to_even_numbers():
    step, zero = torch.tensor(1.0), torch.tensor(100.0)
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fakequant.input_codes(values, step, zero).tolist() == [0, 2, 2, 0, -2]


def test_zero_is_a_code_whatever_the_range():
    for low, high in itertools.product((-3.1, -0.2, 0.0), (0.0, 0.9, 17.0)):
        step, zero = fakequant.affine(torch.tensor(low), torch.tensor(high))
        assert float(fakequant.input_codes(torch.zeros(1), step, zero)) == 0


def test_a_byte_is_off_by_half_a_step_at_most_and_quantizing_again_changes_nothing():
    values = random(200, seed=3)
    step, zero = fakequant.dynamic_range(values)
    once = fakequant.input_codes(values, step, zero) * step
    assert float((once - values).abs().max()) <= float(step) * 0.5001
    assert torch.equal(fakequant.input_codes(once, step, zero) * step, once)


def test_codes_agree_with_the_fake_quantization_of_torch():
    values = random(50, 20, seed=4)
    step, zero = fakequant.affine(torch.tensor(-1.0), torch.tensor(1.5))
    expected = torch.fake_quantize_per_tensor_affine(values, float(step), int(zero), 0, 255)
    assert torch.allclose(fakequant.input_codes(values, step, zero) * step, expected, atol=1e-6)


def test_the_input_of_an_int4_product_has_a_step_for_every_block():
    values = random(3, 70, seed=5)
    values[1, 32:64] = 0
    codes, step = fakequant.block_codes(values, 32)
    assert (codes.shape, step.shape) == ((3, 3, 32), (3, 3, 1))
    assert codes.abs().amax(-1).tolist() == [[127] * 3, [127, 0, 127], [127] * 3]
    assert torch.equal(codes[:, 2, 6:], torch.zeros(3, 26))
    assert float(((codes * step).reshape(3, 96)[:, :70] - values).abs().max()) <= float(step.max()) * 0.5001


# Weights


@pytest.mark.parametrize("grid", [Grid(-127, 127), INT8, Grid(-8, 7, block=32), Grid(-8, 7, block=16)])
def test_every_zero_of_a_weight_stays_zero(grid):
    weight = random(6, 70) * (random(6, 70, seed=1) > 0)
    codes = fakequant.weight_codes(weight, fakequant.weight_step(weight, grid), grid)
    assert torch.equal(codes[weight == 0], torch.zeros(int((weight == 0).sum())))
    assert grid.low <= float(codes.min()) < float(codes.max()) <= grid.high


def test_codes_are_nearest_unless_a_pair_is_too_large():
    weight = random(8, 33, seed=2)
    step = fakequant.weight_step(weight, Grid(-127, 127))
    expected = torch.fake_quantize_per_channel_affine(
        weight, step[:, 0], torch.zeros(8, dtype=torch.int32), 0, -127, 127
    )
    assert torch.equal(fakequant.weight_codes(weight, step, Grid(-127, 127)) * step, expected)


def pairs(codes):
    """The sums of neighbors of one sign."""
    even = codes[:, : codes.shape[1] // 2 * 2].reshape(len(codes), -1, 2)
    return [float(a + b) for a, b in even.reshape(-1, 2) if a * b > 0]


@pytest.mark.parametrize("columns", [2, 7, 64])
def test_two_neighbors_of_one_sign_never_overflow_sixteen_bits(columns):
    weight = random(40, columns, seed=columns)
    codes = fakequant.weight_codes(weight, fakequant.weight_step(weight, INT8), INT8)
    assert all(-(2**15) <= 255 * total < 2**15 for total in pairs(codes))
    # The step that rounding alone would take must break the rule, or this test shows nothing.
    plain = weight.abs().amax(1, keepdim=True) / 127
    free = fakequant.weight_codes(weight, plain, Grid(-127, 127))
    assert max(map(abs, pairs(free))) > 128
    assert max(map(abs, pairs(fakequant.weight_codes(weight, plain, INT8)))) == 128


def test_pairs_that_are_too_large_become_the_nearest_that_fit():
    for first, second in (
        (127, 127),
        (127, 40),
        (100, 30),
        (65, 64),
        (90.4, 40.3),
        (90.4, 39.3),
        (90.3, 39.4),
        (3, 127),
        (-127, -8),
    ):
        codes = fakequant.weight_codes(torch.tensor([[float(first), float(second)]]), torch.ones(1, 1), INT8)
        fits = [(a, b) for a in range(-127, 128) for b in range(-127, 128) if a * b <= 0 or abs(a + b) <= 128]
        least = min((a - first) ** 2 + (b - second) ** 2 for a, b in fits)
        a, b = codes[0].tolist()
        assert (a - first) ** 2 + (b - second) ** 2 == pytest.approx(least)


def test_neighbors_of_different_sign_keep_the_whole_range():
    weight = torch.tensor([[127.0, -127.0, 1.0, 127.0]])
    assert fakequant.weight_codes(weight, torch.ones(1, 1), INT8).tolist() == [[127, -127, 1, 127]]


def test_holding_pairs_loses_less_than_giving_up_a_bit_of_every_weight():
    weight = random(64, 384, seed=7)

    def lost(grid):
        step = fakequant.weight_step(weight, grid)
        return float((fakequant.weight_codes(weight, step, grid) * step - weight).square().sum())

    assert lost(Grid(-127, 127)) <= lost(INT8) < 0.6 * lost(Grid(-64, 64))


def test_the_step_is_the_best_of_those_tried_and_weighs_columns_by_importance():
    weight = torch.tensor([[1.0, 1.0, 1.0, 10.0]])
    grid = Grid(-7, 7)
    importance = torch.tensor([1.0, 1.0, 1.0, 1e-6])

    def error(step, worth):
        return float(((fakequant.weight_codes(weight, step, grid) * step - weight).square() * worth).sum())

    for worth in (torch.ones(4), importance):
        found = fakequant.weight_step(weight, grid, worth)
        tried = [torch.full((1, 1), 10 / 7 * part) for part in np.linspace(1, 0.4, 25)]
        assert error(found, worth) == pytest.approx(min(error(step, worth) for step in tried), rel=1e-4)
    assert float(fakequant.weight_step(weight, grid, importance)) < float(fakequant.weight_step(weight, grid))


def test_blocks_have_steps_of_their_own_and_the_last_may_be_short():
    weight = torch.cat([random(3, 16), random(3, 16, scale=50.0), random(3, 5, scale=0.01)], 1)
    step = fakequant.weight_step(weight, Grid(-8, 7, block=16))
    assert step.shape == (3, 3)
    assert bool((step[:, 1] > 10 * step[:, 0]).all())
    assert bool((step[:, 2] < 0.1 * step[:, 0]).all())
    assert torch.equal(fakequant.spread(step, 37, 16)[:, 32:], step[:, 2:].expand(3, 5))


def test_a_row_of_zeros_has_a_step_all_the_same():
    step = fakequant.weight_step(torch.zeros(2, 8), INT8)
    assert step.tolist() == [[1.0], [1.0]]
    assert step.dtype == torch.float32


def test_a_quantized_weight_counts_its_bytes():
    weight = random(6, 70)
    assert fakequant.nearest(weight, "int8-dynamic").weight_bytes() == 6 * 70 + 4 * 6
    four = fakequant.nearest(weight, "int4")  # three blocks of 32 columns, 16 bytes and a step each
    assert four.weight_bytes() == 6 * 3 * (16 + 4)
    found = fakequant.nearest(weight, "int8-static", (-1.0, 2.0))
    assert (found.codes.dtype, found.input_zero) == (torch.int8, 85)
    assert found.input_step == pytest.approx(3 / 255)
    assert float((found.weight() - weight).abs().max()) < float(found.step.max())


def test_a_range_is_asked_for_where_it_is_needed_and_only_there():
    for precision, span in (("int8-static", None), ("int8-dynamic", (0.0, 1.0))):
        with pytest.raises(CompressError, match=f"{precision} with an input range"):
            fakequant.nearest(random(2, 4), precision, span)


@pytest.mark.parametrize(("span", "largest"), [((-3.0, 2.5), 3.0), ((-0.5, 4.0), 4.0), ((0.0, 0.0), None)])
def test_floats_of_eight_bits_reach_as_far_as_the_farther_end(span, largest):
    found = fakequant.nearest(random(4, 6), "fp8", span)
    assert found.input_step == pytest.approx(1.0 if largest is None else largest / 448, rel=1e-6)
    assert found.input_zero == 0
    assert found.weight_bytes() == 4 * 6 + 4


def test_codes_of_a_weight_that_was_quantized_are_those_codes():
    for precision in ("int8-dynamic", "int4"):
        found = fakequant.nearest(random(16, 100, seed=9), precision)
        again = fakequant.weight_codes(found.weight(), found.step, grid_of(precision))
        assert torch.equal(again, found.codes.float())


# Products


def test_the_sum_of_products_is_the_integer_one_to_the_last_bit():
    rng = np.random.default_rng(0)
    codes, weight = rng.integers(-255, 256, (5, 2000)), rng.integers(-127, 128, (7, 2000))
    codes[0], weight[0] = 255, 127  # above 2^24: float32 would round
    expected = codes.astype(np.int64) @ weight.astype(np.int64).T
    found = fakequant.integer_product(torch.from_numpy(codes).float(), torch.from_numpy(weight))
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), expected)


# Gradients


def test_gradients_pass_inside_and_stop_where_a_value_is_clipped():
    values = torch.tensor([-5.0, -1.9, 0.3, 1.2, 9.0], requires_grad=True)
    step, zero = fakequant.affine(torch.tensor(-2.0), torch.tensor(2.0))
    (fakequant.input_codes(values, step, zero) * step).sum().backward()
    assert values.grad.tolist() == pytest.approx([0, 1, 1, 1, 0])
    weight = torch.tensor([[-9.0, 0.2, 3.3, 9.0]], requires_grad=True)
    (
        fakequant.weight_codes(weight, torch.ones(1, 1), Grid(-7, 7)) * torch.tensor([1.0, 2, 3, 4])
    ).sum().backward()
    assert weight.grad.tolist() == [[0, 2, 3, 0]]


def test_a_pair_that_is_clipped_gets_no_gradient_and_its_neighbors_do():
    weight = torch.tensor([[100.0, 100.0, 3.0, 4.0, 64.0, 64.0, 127.0, 1.0]], requires_grad=True)
    fakequant.weight_codes(weight, torch.ones(1, 1), INT8).sum().backward()
    assert weight.grad[0, 2:].tolist() == [1.0] * 6
    assert weight.detach()[0, :2].tolist() == [100.0] * 2
    assert weight.grad[0, :2].tolist() == [0.0, 0.0]


def test_the_gradient_of_a_step_is_that_of_learned_step_sizes():
    values = torch.tensor([-20.0, -0.7, 0.2, 0.9, 1.6, 30.0])
    incoming = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, 0.25])
    step = torch.tensor([[0.5]], requires_grad=True)
    codes = fakequant.weight_codes(values[None], step, Grid(-7, 7))
    ((codes * step)[0] * incoming).sum().backward()
    expected = 0.0
    for value, weight in zip(values.tolist(), incoming.tolist(), strict=True):
        v = value / 0.5
        slope = -7 if v <= -7 else 7 if v >= 7 else round(v) - v  # equation 3 of the paper
        expected += weight * slope
    assert float(step.grad) == pytest.approx(expected)


def test_a_step_learns_at_the_pace_of_what_it_divides():
    step = torch.tensor([0.5, 2.0], requires_grad=True)
    found = fakequant.damped_step(step, 100, 4)
    assert torch.equal(found, step)
    (found * torch.tensor([1.0, 3.0])).sum().backward()
    assert step.grad.tolist() == pytest.approx([0.05, 0.15])


def test_quantized_weights_are_plain_values():
    assert Quantized("int4", torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 1)).block == 32
