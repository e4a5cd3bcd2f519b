import copy

import pytest
import torch
from torch import nn

from compress import sltrain
from compress.core import support
from compress.core.lowrank import decompose
from compress.errors import CompressError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))


def converted(**keywords):
    model = network()
    sltrain.convert(model, ["0", "2"], **{"rank": 3, "density": 0.2, **keywords})
    return model


def train(model, steps=30):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 12, generator=generator), torch.randn(64, 8, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_merged_layers_give_identical_outputs_after_training():
    model = converted()
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    x = torch.randn(5, 3, 12)
    before = model(x)
    dense = copy.deepcopy(model)
    assert sltrain.merge(dense) == 2
    assert [type(module) for module in dense] == [nn.Linear, nn.Tanh, nn.Linear]
    assert (dense[0].bias is None, dense[2].bias is None) == (False, True)
    assert torch.allclose(dense(x), before, atol=1e-6)
    assert sltrain.merge(dense) == 0


def test_every_part_is_trained_and_the_scale_is_alpha_over_rank():
    model = converted(alpha=6.0)
    assert model[0].scale == 2.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, 3)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{i}.{part}" for i in (0, 2) for part in ("left", "right", "values")} | {"0.bias"}
    weight = 2.0 * model[2].left @ model[2].right
    weight[torch.repeat_interleave(model[2].pointers.diff()), model[2].columns.long()] += model[2].values
    assert torch.allclose(model[2].merged().weight, weight, atol=1e-6)


def test_a_state_dict_keeps_the_places():
    model, other = converted(seed=1), converted(seed=2)
    assert not torch.equal(model[0].columns, other[0].columns)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model[0].columns, other[0].columns)
    x = torch.randn(4, 12)
    assert torch.equal(model(x), other(x))


def test_layers_draw_places_of_their_own():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sltrain.convert(model, ["0", "1"], rank=2, density=0.3)
    assert not torch.equal(model[0].columns, model[1].columns)


def test_a_solution_becomes_a_layer_that_trains_on_from_it():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    found = decompose(support.prepare(weight, x.T @ x / 100, x.mean(0)), support.NM(), 2)
    layer = sltrain.from_parts(
        found.values, support.spread(found.mask, 8), found.left, found.right, found.shift
    )
    assert torch.allclose(layer(x), x @ found.merged.T + found.shift, atol=1e-12)
    assert layer.values.numel() == 8 * 16 // 2


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(CompressError, match="1 is a Tanh, not a linear layer"):
        sltrain.convert(network(), ["1"], rank=2, density=0.1)
    for rank in (0, 13):
        with pytest.raises(CompressError, match=r"0 is \[20, 12\]: a rank of .* at most 12"):
            sltrain.convert(network(), ["0"], rank=rank, density=0.1)
