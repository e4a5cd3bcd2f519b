import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.core import support
from compress.core.lowrank import decompose
from compress.core.sltrain import account
from compress.errors import CompressError
from compress.training import sltrain_layers


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))


def converted(**keywords):
    model = network()
    sltrain_layers.convert(model, ["0", "2"], **{"rank": 3, "density": 0.2, **keywords})
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
    assert sltrain_layers.merge(dense) == 2
    assert [type(module) for module in dense] == [nn.Linear, nn.Tanh, nn.Linear]
    assert (dense[0].bias is None, dense[2].bias is None) == (False, True)
    assert torch.allclose(dense(x), before, atol=1e-6)
    assert sltrain_layers.merge(dense) == 0


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
    sltrain_layers.convert(model, ["0", "1"], rank=2, density=0.3)
    assert not torch.equal(model[0].columns, model[1].columns)


def test_a_solution_becomes_a_layer_that_trains_on_from_it():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    found = decompose(support.prepare(weight, x.T @ x / 100, x.mean(0)), support.NM(), 2)
    layer = sltrain_layers.from_parts(
        found.values, support.spread(found.mask, 8), found.left, found.right, found.shift
    )
    assert torch.allclose(layer(x), x @ found.merged.T + found.shift, atol=1e-12)
    assert layer.values.numel() == 8 * 16 // 2


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(CompressError, match="1 is a Tanh, not a linear layer"):
        sltrain_layers.convert(network(), ["1"], rank=2, density=0.1)
    for rank in (0, 13):
        with pytest.raises(CompressError, match=r"0 is \[20, 12\]: a rank of .* at most 12"):
            sltrain_layers.convert(network(), ["0"], rank=rank, density=0.1)


def pruned(seed=0):
    """A network, half of whose first weight is zero, and the mask of that half."""
    model = network(seed)
    mask = torch.rand(20, 12, generator=torch.Generator().manual_seed(5)) < 0.5
    return model, {"0.weight": mask}


def test_updates_begin_at_the_layers_and_untrained_ones_change_no_bit():
    model, zeros = pruned()
    x = torch.randn(5, 12)
    masked = copy.deepcopy(model)
    masked[0].weight.detach()[zeros["0.weight"]] = 0
    layers = list(model)
    assert sltrain_layers.adapt(model, zeros | {"other": zeros["0.weight"]}, rank=2, density=0.1).keys() == {
        "other"
    }
    assert torch.allclose(model(x), masked(x), atol=1e-6)
    assert sltrain_layers.merge_updates(model) == 2
    assert list(model) == layers
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), masked.parameters(), strict=True))
    assert sltrain_layers.merge_updates(model) == 0


def test_learned_updates_are_folded_in_with_equal_outputs_and_exact_zeros():
    model, zeros = pruned()
    before = copy.deepcopy(model)
    sltrain_layers.adapt(model, zeros, rank=2, density=0.1)
    for name in ("0", "2"):
        model.get_submodule(name).base.requires_grad_(False)
    losses = train(model, 60)
    assert losses[-1] < 0.95 * losses[0]
    first, second = model[0], model[2]
    moved = 8.0 * second.left @ second.right
    moved[torch.repeat_interleave(second.pointers.diff()), second.columns.long()] += second.values
    assert torch.allclose(second.weight, before[2].weight + moved, atol=1e-6)
    x = torch.randn(5, 3, 12)
    expected = model(x)
    sltrain_layers.merge_updates(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert torch.equal(model[0].weight == 0, zeros["0.weight"])
    assert int((first.values != 0).sum()) == len(first.values) < int(0.1 * 240)
    assert not torch.equal(model[0].bias, before[0].bias)


def test_an_update_holds_as_many_numbers_as_the_account_says_and_no_more_than_the_weight():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 3))
    sltrain_layers.adapt(model, {}, rank=3, density=0.05)
    layer = model[0]
    found = sum(part.numel() for part in (layer.left, layer.right, layer.values))
    assert found == account(48, 64, 3, 0.05).parameters < 48 * 64
    assert type(model[1]) is nn.Linear


def test_a_weight_that_another_module_has_too_is_left_alone():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False))
    model[2].weight = model[0].weight
    sltrain_layers.adapt(model, {}, rank=1, density=0.05)
    assert [type(module) for module in model] == [nn.Embedding, sltrain_layers.Updated, nn.Linear]


def test_a_weight_stored_the_other_way_round_is_updated_as_it_is_stored():
    model = nn.Sequential(Conv1D(24, 16))
    zeros = {"0.weight": torch.rand(16, 24, generator=torch.Generator().manual_seed(0)) < 0.5}
    sltrain_layers.adapt(model, zeros, rank=2, density=0.1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model[0].left.normal_(generator=generator)
        model[0].values.normal_(generator=generator)
    x = torch.randn(5, 16)
    expected = model(x)
    sltrain_layers.merge_updates(model)
    assert torch.allclose(model(x), expected, atol=1e-4)
    assert torch.equal(model[0].weight == 0, zeros["0.weight"])
