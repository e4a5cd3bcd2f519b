import copy
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import halves
from support.classifier import padded
from support.lessons import judge, lesson, same, student, weights
from torch import nn

from compress.distributed import collectives, fsdp
from compress.training import sltrain_layers, trainer
from compress.training.trainer import TrainingRun


@pytest.fixture
def alone(monkeypatch):
    """A group of one process, in which students are held in shards."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    monkeypatch.setattr(fsdp, "place_student", lambda model, shard: fsdp.Sharded(model))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_are_those_of_chunks(monkeypatch, count, size):
    whole = torch.arange(count)
    chunks = [*whole.chunk(size), *[torch.empty(0, dtype=whole.dtype)] * size][:size]
    monkeypatch.setattr(collectives, "size", lambda: size)
    for rank, chunk in enumerate(chunks):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        assert torch.equal(whole[fsdp.rows(count)], chunk)


def test_what_comes_together_is_a_layer_that_shares_nothing():
    model = padded()[0].model
    assert fsdp.layers(model) == list(model.bert.encoder.layer)
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)]), nn.ReLU()])
    tied[1].bias = tied[0].bias
    assert fsdp.layers(nn.Sequential(tied)) == [tied[2][0]]
    outside = nn.Module()
    outside.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    outside.own = outside.layers[0].weight
    assert fsdp.layers(outside) == [outside.layers[1]]


def test_one_process_gives_a_replica(tmp_path):
    run = TrainingRun(student(), lesson(tmp_path / "c", shard=True))
    assert type(run.held) is fsdp.Replicated
    assert run.held.model is run.model


MASKED = "bert.encoder.layer.0.output.dense.weight"


def prepared(updates):
    """A student with a mask of zeros, and maybe with updates in the place of its layers."""
    model = student()
    shape = model.get_parameter(MASKED).shape
    zeros = {MASKED: torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5}
    return model, sltrain_layers.adapt(model, zeros, rank=2, density=0.1) if updates else zeros, zeros[MASKED]


@pytest.mark.parametrize("updates", [False, True])
def test_a_run_in_shards_is_a_run(tmp_path, alone, monkeypatch, updates):
    path, plan = tmp_path / "run.safetensors", lesson(tmp_path / "a", epochs=1)
    model, zeros, mask = prepared(updates)
    before = model.classifier.bias
    run = TrainingRun(model, plan, zeros=zeros, checkpoint=path, made_from="x")
    assert all(value.numel() == 0 for value in model.parameters())
    scores = trainer.train(run, judge)
    assert model.classifier.bias is before
    with monkeypatch.context() as patch:
        patch.setattr(fsdp, "place_student", lambda model, shard: fsdp.Replicated(model))
        other, zeros, _ = prepared(updates)
        again = trainer.train(TrainingRun(other, plan, zeros=zeros), judge)
        resumed, zeros, _ = prepared(updates)
        taken = TrainingRun(resumed, plan, zeros=zeros, checkpoint=path, made_from="x")
        assert taken.state.step == run.state.step
        assert trainer.train(taken, judge) == pytest.approx(scores)
    assert scores == pytest.approx(again, rel=1e-4)
    for one in (model, other, resumed):
        sltrain_layers.merge_updates(one)
    assert bool((model.get_parameter(MASKED)[mask] == 0).all())
    assert type(copy.deepcopy(model)) is type(student())
    assert same(weights(model), weights(resumed))
    assert not same(weights(model), weights(student()))
    for name, value in weights(other).items():
        if not name.endswith("key.bias"):  # softmax does not see it: Adam makes steps of its rounding
            assert torch.allclose(model.state_dict()[name], value, atol=1e-4), name


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model.heat = nn.Parameter(torch.tensor(2.0))
    return model


def test_scalars_are_held_by_every_process_and_counted_once(alone, monkeypatch):
    model = small()
    found = fsdp.Sharded(model)
    assert found.values["heat"].shape == ()
    assert found.values["0.weight"].shape == (3, 4)
    assert [name for name, value in model.named_parameters() if value.numel()] == []
    with found.materialized():
        assert float(model.heat.detach()) == 2.0
        assert model[0].weight.shape == (3, 4)
    found.values["heat"].grad, found.values["0.bias"].grad = torch.tensor(3.0), torch.tensor([0.0, 0.0, 4.0])
    assert float(found.norm()) == 5.0
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    assert float(found.norm()) == 4.0


def test_what_computes_are_the_values_as_they_are_now_and_in_the_end_the_model_has_them(alone):
    model, x = small(), torch.ones(1, 4)
    expected = copy.deepcopy(model)
    found = fsdp.Sharded(model)
    with torch.no_grad():
        assert torch.allclose(found.model(x), expected(x))
        for value, same_value in zip(found.values.values(), expected.parameters(), strict=True):
            value.mul_(2)
            same_value.mul_(2)
        assert torch.allclose(found.model(x), expected(x))
        found.release()
        assert torch.equal(model(x), expected(x))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What two processes did that each hold a half, and what each said."""
    folder = tmp_path_factory.mktemp("halves")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, halves.__file__, str(folder), str(port)]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder, *(json.loads((folder / f"said{rank}.json").read_text()) for rank in (0, 1))


def apart(folder, name):
    """The largest difference to the model that one process tuned alone."""
    one, other = (load_file(folder / f"{which}.safetensors") for which in ("one", name))
    return max(float((value - other[key]).abs().max()) for key, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "shards", "late", "again"])
def test_halves_tune_to_the_model_of_one_process_also_when_it_or_they_were_killed(done, name):
    folder, first, second = done
    assert apart(folder, name) < 1e-10
    assert first[name]["from"] == (4 if name in ("late", "again") else 0)
    assert first[name]["same"] == second[name]["same"]
    assert first[name]["judged"] == pytest.approx(first["one"]["judged"], rel=1e-9)
    assert first[name]["zeros"]
    assert second[name]["zeros"]


@pytest.mark.slow
def test_without_sums_of_gradients_halves_tune_to_another_model(done):
    assert apart(done[0], "lonely") > 1e-3


@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_weights_best_weights_and_moments(done):
    _, first, second = done
    whole = first["whole"]
    assert whole["account"] == whole["bytes"] + whole["tuned"]
    for one in (first["shards"], second["shards"]):
        assert 0.4 < one["bytes"] / whole["bytes"] < 0.62  # four rows of seven, or three; and a scalar
        assert one["account"] == pytest.approx(one["bytes"] + one["tuned"], rel=0.1)
        assert (one["shell"], whole["shell"] > 0) == (0, True)
    both = first["shards"]["tuned"] + second["shards"]["tuned"]
    assert both == whole["tuned"] + 8  # the scalar twice


@pytest.mark.slow
def test_what_fails_in_one_half_in_the_middle_of_a_step_is_told_to_the_other(done):
    _, first, second = done
    assert first["broken"] == "process 1 of 2: no such layer here"
    assert second["broken"] == "no such layer here"
