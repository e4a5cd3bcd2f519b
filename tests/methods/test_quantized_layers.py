import copy
import dataclasses

import pytest
import torch
from support.classifier import Padded, padded
from torch import nn

from compress import formats
from compress.calibration import activation_statistics
from compress.core import fakequant
from compress.errors import CompressError
from compress.methods import quantized_layers
from compress.methods.quantized_layers import Place, QuantizedLinear

PRECISIONS = ("int8-dynamic", "int8-static", "int4", "fp8")
LEARNED = PRECISIONS[:3]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Sequential(nn.Linear(24, 6, bias=False))).eval()


NAMES = ("0.weight", "2.0.weight")


def inputs(rows=50, seed=0):
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))


def place(layer, precision, span=(-4.0, 4.0)):
    fixed = precision in ("int8-static", "fp8")
    return Place(fakequant.nearest(layer.weight.detach(), precision, span if fixed else None))


def places(net, precision):
    return {name: place(net.get_submodule(name.rpartition(".")[0]), precision) for name in NAMES}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_computes_the_reference_of_its_precision(precision):
    layer, x = nn.Linear(70, 9), torch.randn(3, 4, 70, generator=torch.Generator().manual_seed(1))
    found = place(layer, precision)
    made = QuantizedLinear(layer, found)
    weight, bias = found.quantized.weight().double(), layer.bias.detach().double()
    rows = x.reshape(-1, 70)
    if precision == "int4":
        codes, step = fakequant.block_codes(rows, 32)
        expected = (codes * step).flatten(1)[:, :70].double() @ weight.T + bias
    elif precision == "fp8":
        read = (rows / (4 / 448)).to(torch.float8_e4m3fn).double() * (4 / 448)
        expected = read @ weight.T + bias
    else:
        low, high = (
            torch.aminmax(rows) if precision == "int8-dynamic" else (torch.tensor(-4.0), torch.tensor(4.0))
        )
        step, zero = fakequant.affine(low, high)
        sums = fakequant.integer_product(fakequant.input_codes(rows, step, zero), found.quantized.codes)
        scale = (step * found.quantized.step[:, 0]).double()
        if precision == "int8-static":
            bias = (bias / scale).round() * scale
        expected = sums.double() * scale + bias
    assert torch.allclose(made(x).reshape(-1, 9).double(), expected, atol=1e-5)
    assert not torch.allclose(made(x), layer(x), atol=1e-4)
    assert torch.allclose(made(x), layer(x), atol=1.0 if precision == "int4" else 0.2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_insert_and_remove_are_inverse_and_names_stay(precision):
    net, x = model(), inputs()
    before, state = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    layers = [net[0], net[2][0]]
    quantized_layers.insert(net, places(net, precision))
    assert list(net.state_dict()) == list(state)
    assert not torch.equal(net(x), before)
    assert [type(layer) for layer in (net[0], net[2][0])] == [QuantizedLinear] * 2
    quantized_layers.remove(net)
    assert [net[0], net[2][0]] == layers
    assert torch.equal(net(x), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_a_copy_with_inserted_layers_stands_alone():
    net, x = model(), inputs()
    quantized_layers.insert(net, places(net, "int8-dynamic"))
    other = copy.deepcopy(net)
    expected = net(x)
    quantized_layers.remove(net)
    assert torch.equal(other(x), expected)
    quantized_layers.remove(other)
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_settled_layers_are_plain_and_hold_what_the_codes_stand_for(precision):
    net = model()
    given = places(net, precision)
    quantized_layers.insert(net, given)
    found = quantized_layers.finalize(net)
    assert type(net[0]) is type(net[2][0]) is nn.Linear
    for name in NAMES:
        assert torch.equal(found[name].codes, given[name].quantized.codes)
        assert torch.equal(net.get_parameter(name), found[name].weight())
        assert found[name].input_step == given[name].quantized.input_step
        assert found[name].input_zero == given[name].quantized.input_zero
    assert net[2][0].bias is None


def test_columns_that_are_gone_from_the_file_change_nothing():
    layer, x = nn.Linear(40, 6), inputs()
    stay = torch.tensor([1, 4, 5, 6, 9, 20, 33, 38, 39])
    small = nn.Linear(9, 6)
    small.weight, small.bias = nn.Parameter(layer.weight.detach()[:, stay]), layer.bias
    loud = x.clone()
    loud[:, 0] = 1e3  # a unit that was removed; a range that saw it would be useless
    for precision in PRECISIONS:
        found = place(small, precision)
        masked = QuantizedLinear(layer, Place(found.quantized, columns=stay))
        shrunk = QuantizedLinear(small, found)
        assert torch.equal(masked(loud), shrunk(x[:, stay]))
        assert torch.equal(masked.quantized().codes, found.quantized.codes)
        wrong = QuantizedLinear(layer, Place(fakequant.nearest(masked.weight.detach(), "int8-dynamic")))
        assert not torch.allclose(wrong(loud), shrunk(x[:, stay]), atol=0.5)


def test_a_new_bias_goes_in_and_a_missing_one_may_come():
    net, x = model(), inputs()
    found = place(net[2][0], "int8-dynamic").quantized
    hidden = net[1](net[0](x))
    plain = QuantizedLinear(net[2][0], Place(found))(hidden)
    biased = QuantizedLinear(net[2][0], Place(found, torch.arange(6.0)))(hidden)
    assert torch.allclose(biased - plain, torch.arange(6.0).expand(50, 6), atol=1e-6)


def test_rounding_with_moments_beats_rounding_to_the_nearest_and_keeps_the_mean():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=random) @ torch.randn(8, 40, generator=random) + 2
    x += 0.2 * torch.randn(2000, 40, generator=random)
    layer = nn.Linear(40, 24)
    found, error = quantized_layers.round_linear(
        layer, "int4", x.T.double() @ x.double() / 2000, x.double().mean(0)
    )

    def lost(weight, bias):
        apart = (x @ weight.T + bias - layer(x)).detach()
        assert not found.quantized.weight().requires_grad
        return float(apart.square().mean()), float(apart.mean(0).abs().max())

    mine, off = lost(found.quantized.weight(), found.bias)
    plain, far = lost(place(layer, "int4").quantized.weight(), layer.bias)
    assert mine < 0.5 * plain
    assert off < 1e-3 < far
    assert 0 < error < 1e-2
    bare, _ = quantized_layers.round_linear(
        nn.Linear(40, 24, bias=False), "int4", torch.eye(40), torch.zeros(40)
    )
    assert bare.bias is None


def test_fp8_is_not_trained():
    net = model()
    with pytest.raises(CompressError, match="fp8 layers cannot be trained"):
        quantized_layers.insert(net, places(net, "fp8"), learn=True)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("precision", LEARNED)
def test_training_moves_weights_and_steps_and_lowers_the_loss(precision):
    net, x = model(), inputs(200)
    goal = net(x).detach()
    rough = {name: place(net.get_submodule(name[:-7]), precision, (-1.0, 1.0)) for name in NAMES}
    for name, one in rough.items():  # steps that are much too large
        coarse = dataclasses.replace(
            one.quantized, codes=one.quantized.codes // 3, step=3 * one.quantized.step
        )
        rough[name] = Place(coarse)
    quantized_layers.insert(net, rough, learn=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = (net(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        grads = [value.grad for value in net.parameters()]
        assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads)
        optimizer.step()
        losses.append(loss.item())
    names = {name.rpartition(".")[2] for name, _ in net.named_parameters()}
    assert names == {"weight", "bias", "change"} | ({"input_change"} if precision == "int8-static" else set())
    assert losses[-1] < 0.7 * losses[0]
    expected = net(x)
    found = quantized_layers.finalize(net)
    quantized_layers.insert(net, {name: Place(one) for name, one in found.items()})
    assert torch.allclose(net(x), expected, atol=1e-5)


@pytest.mark.parametrize("precision", LEARNED)
def test_the_gradient_of_a_step_is_that_of_finite_changes_where_codes_stand_still(precision):
    """LSQ: inside of the grid only `round(v) - v` is left, outside the bound. Seen by rounding as it is."""
    layer, x = nn.Linear(64, 5), torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    made = QuantizedLinear(layer, place(layer, precision, (-1.0, 1.0)), learn=True)
    weight, bias = made.weight.detach().double(), made.bias.detach().double()
    with torch.no_grad():
        made.change.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(2))
    made(x).sum().backward()
    step = made.steps().detach().double()
    block = made.grid.block or 64
    spread = step.repeat_interleave(block, 1)
    codes = fakequant.weight_codes(weight, step, made.grid)
    scaled = weight / spread
    inside = (scaled > made.grid.low) & (scaled < made.grid.high) & (codes == scaled.round())
    per_step = torch.where(inside, codes - scaled, codes)
    if precision == "int4":
        read, read_step = fakequant.block_codes(x, 32)
        seen = (read * read_step).flatten(1).double()
    else:
        found = (
            fakequant.dynamic_range(x) if precision == "int8-dynamic" else (made.input_step, made.input_zero)
        )
        input_step = torch.as_tensor(found[0])
        seen = (fakequant.input_codes(x, input_step, torch.as_tensor(float(found[1]))) * input_step).double()
    expected = (seen.sum(0) * per_step * spread).reshape(5, -1, block).sum(2)
    if precision == "int8-static":  # the bias is rounded to steps of the product, and follows them
        unit = float(input_step) * step
        whole = bias[:, None] / unit
        expected += 7 * (whole.round() - whole) * unit
    damped = expected / (block * made.grid.high) ** 0.5
    assert torch.allclose(made.change.grad.double(), damped, rtol=1e-3, atol=1e-5)


def test_codes_that_are_held_are_those_of_every_pass_and_learn_again_afterwards():
    net, x = model(), inputs()
    quantized_layers.insert(net, places(net, "int8-dynamic"), learn=True)
    with torch.no_grad():
        net[0].weight.add_(0.01)
        expected = net(x)
        with quantized_layers.frozen_codes(net):
            assert torch.equal(net(x), expected)
            net[0].weight.mul_(2)
            assert torch.equal(net(x), expected)
        assert not torch.equal(net(x), expected)


def test_products_of_one_input_learn_one_step_for_it():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    quantized_layers.insert(net, {f"{k}.weight": place(net[k], "int8-static") for k in (0, 1)}, learn=True)
    quantized_layers.share_input(net, ["0.weight", "1.weight"])
    with torch.no_grad():
        net[0].input_change.fill_(0.25)
    found = quantized_layers.finalize(net)
    assert found["0.weight"].input_step == found["1.weight"].input_step
    assert found["0.weight"].input_step == pytest.approx(8 / 255 * 2.718281828**0.25)


def test_a_step_of_zero_is_never_used():
    made = QuantizedLinear(nn.Linear(8, 3), place(nn.Linear(8, 3), "int8-static"), learn=True)
    with torch.no_grad():
        made.change.fill_(-1e3)
        made.input_change.fill_(-1e3)
    assert bool(torch.isfinite(made(torch.ones(2, 8))).all())
    found = made.quantized()
    assert float(found.step.min()) > 0
    assert found.input_step > 0


def test_what_cannot_be_quantized_is_refused_and_nothing_changes():
    net = model()
    found = place(net[0], "int8-dynamic")
    wrong = {
        "1.weight": "belongs to a GELU",
        "0.bias": "belongs to a Linear",
        "7.weight": "is not a weight of the model",
        "2.0.weight": r"\[out=6, in=24\], its codes are \[24, 40\]",
    }
    for name, words in wrong.items():
        with pytest.raises(CompressError, match=words):
            quantized_layers.insert(net, {"0.weight": found, name: found})
        assert type(net[0]) is nn.Linear
    quantized_layers.insert(net, {"0.weight": found})
    with pytest.raises(CompressError, match="full precision"):
        quantized_layers.insert(net, {"0.weight": found})


def weights_of(task):
    return [f"{name}.weight" for name, layer in task.model.named_modules() if isinstance(layer, nn.Linear)]


def test_what_writers_read_is_what_the_calibration_collects(tmp_path):
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    activation_statistics.collect(task, sites, batches, tmp_path)
    seen = quantized_layers.observe(task, [site.writer for site in sites], batches)
    for index, site in enumerate(sites):
        expected, found = activation_statistics.read(tmp_path, index), seen[site.writer]
        assert torch.allclose(found.mean, expected.mean, atol=1e-6)
        assert torch.allclose(found.second, expected.second, rtol=1e-5, atol=1e-6)
        assert float(found.histogram.counts.sum()) == expected.count * len(expected.mean)


def test_products_of_one_input_share_what_is_seen_and_others_do_not():
    task = Padded()
    names = weights_of(task)
    seen = quantized_layers.observe(task, names, list(task.batches("calibration", 16)))
    assert list(seen) == names
    query, key, value, out = (one for name, one in seen.items() if ".layer.0.attention" in name)
    assert query is key is value
    assert query is not out
    # Three readers a layer share; the head reads the pooler's answer.
    assert len({id(one) for one in seen.values()}) == len(names) - 2 * 2
    with pytest.raises(CompressError, match="is not a weight of the model"):
        quantized_layers.observe(task, ["bert.nothing.weight"], [])
    with pytest.raises(CompressError, match="received no data"):
        quantized_layers.observe(task, names, [])


def test_a_layer_that_is_called_twice_counts_both_inputs():
    task = Padded()
    layers = task.model.bert.encoder.layer
    layers[1] = layers[0]
    name = "bert.encoder.layer.0.output.dense.weight"
    batches = list(task.batches("calibration", 48))
    rows = int(task.real.sum())
    found = quantized_layers.observe(task, [name], batches)[name]
    assert float(found.histogram.counts.sum()) == 2 * rows * found.mean.numel()


def test_grids_are_known_for_every_precision():
    assert {found.name for found in formats.number_formats()} == set(PRECISIONS)
