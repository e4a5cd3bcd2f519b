"""Two stages of recovery: the pruned floats learn from the dense model, then teach their own integers."""

import copy
import dataclasses

import pytest
import torch
from support.classifier import padded
from support.jobs import job
from support.trainable_forms import Bare, away, candidates, equal, same  # noqa: F401 - a fixture

from compress.core import fakequant
from compress.methods import quantized_layers
from compress.pipeline import recovery
from compress.recipe import Recovery
from compress.sites import prune
from compress.sites.prune import Removal
from compress.training import distillation, trainer, two_stage

GPUSQ = {"task": 1.0, "logits": 10.0, "hidden": 0.0, "features": 5.0, "late": 1.0}


class Killed(Exception):  # noqa: N818
    """What ends a run from outside."""


@pytest.fixture
def plan(request):
    """A function that gives a fresh model and removals in a form."""
    return request.getfixturevalue("candidates")


def prepared(folder, data=None, **changes):
    one = job(folder, data)
    wanted = one.recipe.recovery.model_copy(update=changes)
    recipe = one.recipe.model_copy(update={"recovery": wanted})
    return dataclasses.replace(one, sites=padded()[1], recipe=recipe)


def told(one):
    """What was announced, without progress."""
    return [line for line in one.stages.progress.lines if line.startswith("recovery")]


def products(site):
    return (site.writer, *prune.readers(site))


def test_only_a_plan_that_removes_and_runs_on_integers_has_two_stages(plan):
    _, sites = padded()
    both, integers, sparse = plan("int8-dynamic")[1], plan("int8-dynamic", 1.0)[1], plan("rank:4")[1]
    assert two_stage.applies(sites, both)
    assert not two_stage.applies(sites, integers)
    assert two_stage.applies(sites, integers, narrow=True)
    assert not two_stage.applies(sites, sparse)
    assert not two_stage.applies(sites, sparse, narrow=True)
    assert two_stage.applies(sites, plan("2:4+int8-dynamic", 1.0)[1])
    # What removes may be another site than the one on integers.
    first, second = (site.name for site in sites[:2])
    assert two_stage.applies(sites, {first: integers[first], second: Removal(torch.arange(1))})


def test_the_first_stage_begins_at_the_plan_without_its_rounding(plan):
    task, sites = padded()
    small, removals = plan("int4")
    plain = two_stage.float_stage(removals)
    assert {one.form for one in plain.values()} == {"dense"}
    assert not any(one.codes for one in plain.values())
    model = prune.shrink(task.model, sites, plain)
    for site in sites:
        for name in prune.readers(site):
            own = prune.kept_reader_weight(task.model, site, name, removals[site.name].kept)
            assert torch.equal(model.get_parameter(name), own)
            assert not torch.equal(small.get_parameter(name), own)
    assert away(task, model) < away(task, quantized_layers.emulated(small, sites, removals))


def test_zeros_of_a_pattern_stay_where_they_are_in_both_stages(plan):
    task, sites = padded()
    small, removals = plan("2:4+int8-dynamic")
    model = prune.shrink(task.model, sites, two_stage.float_stage(removals))
    zeros = {name: small.get_parameter(name) == 0 for site in sites for name in products(site)}
    assert all(torch.equal(model.get_parameter(name) == 0, mask) for name, mask in zeros.items())
    again = two_stage.quantize_model(task, model, sites, removals, list(task.batches("calibration", 16)))
    for one in again.values():
        for name, codes in one.codes.items():
            assert not bool(codes.codes[zeros[name]].any())


def inputs(model, names, batches):
    """[tokens, in] of what products read, over all batches; padding is no token."""
    read = {name: [] for name in names}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, given, name=name: read[name].append(given[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    real = [batch.real for batch in batches]
    return {
        name: torch.cat([one[mask] for one, mask in zip(seen, real, strict=True)])
        for name, seen in read.items()
    }


@pytest.mark.parametrize("form", ["int4", "int8-static"])
def test_integers_are_those_of_the_tuned_floats_and_what_they_read(plan, form):
    task, sites = padded()
    _, removals = plan(form)
    model = prune.shrink(task.model, sites, two_stage.float_stage(removals))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as if it had been tuned: other weights, and inputs of another size
        for name, value in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                value.mul_(3.0)
            elif value.ndim == 2 and "embedding" not in name:
                value.add_(0.1 * value.std() * torch.randn(value.shape, generator=generator))
    before = copy.deepcopy(model)
    batches = list(task.batches("calibration", 16))
    found = two_stage.quantize_model(task, model, sites, removals, batches)
    names = [name for site in sites for name in products(site)]
    read = inputs(before, names, batches)
    for site in sites:
        for name in products(site):
            codes = found[site.name].codes[name]
            assert torch.equal(model.get_parameter(name), codes.weight())
            floats = before.get_parameter(name)
            rows = read[name]
            span = None if form == "int4" else (-1.0, 1.0)
            near = fakequant.nearest(floats, codes.precision, span).weight()
            lost, plain = (
                ((rows - rows.mean(0)) @ (floats - w).T).square().sum() for w in (codes.weight(), near)
            )
            assert lost <= 1.001 * plain
            bias = name.replace("weight", "bias")
            old, new = (
                net.get_parameter(bias) + rows.mean(0) @ net.get_parameter(name).T for net in (before, model)
            )
            assert torch.allclose(old, new, atol=1e-4)  # the mean is taken up
            if form == "int8-static" and name != site.writer:
                old = removals[site.name].codes[name]
                assert codes.input_step > 2 * old.input_step  # with the old range most would be clipped
                assert codes.input_step == found[site.name].codes[prune.readers(site)[0]].input_step


def test_the_second_stage_learns_less_and_slower_by_the_same_losses():
    wanted = Recovery(mode="full", epochs=5, rate=1e-3, features=5.0)
    second = two_stage.second_stage_settings(wanted)
    assert (second.epochs, second.rate) == (3, pytest.approx(4e-4))
    assert second == wanted.model_copy(update={"epochs": 3, "rate": second.rate})
    assert two_stage.second_stage_settings(Recovery(epochs=1)).epochs == 1


class Watched:
    """Every run that was taken to its end, with what it was taught by and begun at."""

    def __init__(self, patch):
        self.runs = []
        tuned = trainer.train

        def watch(run, judge, progress=None):
            self.runs.append(
                {
                    "factors": run.state.factors,
                    "teacher": copy.deepcopy(run.lesson.teacher._model),
                    "student": type(
                        next(m for n, m in run.model.named_modules() if n.endswith("output.dense"))
                    ),
                    "start": {name: value.detach().clone() for name, value in run.values.items()},
                    "scores": (scores := tuned(run, judge, progress)),
                    "steps": run.state.step,
                    "apart": run.lesson.apart(run.model),
                }
            )
            return scores

        patch.setattr(recovery.trainer, "train", watch)


@pytest.mark.parametrize("form", ["int4", pytest.param("int8-static", marks=pytest.mark.slow)])
def test_floats_learn_from_the_dense_model_and_teach_the_integers_without_labels(
    plan, tmp_path, monkeypatch, form
):
    task, sites = Bare(), padded()[1]
    model, removals = plan(form)
    before = away(task, quantized_layers.emulated(model, sites, removals))
    seen = Watched(monkeypatch)
    one = prepared(tmp_path / "out", task, **GPUSQ)
    learned, (note,) = recovery.recover(one, model, removals)
    first, second = seen.runs
    assert same(task.model.state_dict(), first["teacher"].state_dict())
    assert (first["student"], second["student"]) == (torch.nn.Linear, quantized_layers.QuantizedLinear)
    # The teacher of the second stage is what the first one left: far nearer to the dense model.
    assert away(task, second["teacher"]) == pytest.approx(-max(first["scores"]), rel=1e-4)
    assert (first["factors"], second["factors"]) == ((), distillation.layer_factors(first["apart"]))
    assert len(set(second["factors"])) > 1
    taught = dict(second["teacher"].named_parameters())
    near = [n for n in second["start"] if n in taught and n.endswith("LayerNorm.weight")]
    assert near
    assert all(torch.equal(second["start"][name], taught[name]) for name in near)
    assert [stage.name for stage in one.stages.seconds] == [
        "recover (fast), floats",
        "recover (fast), integers",
    ]
    # What was announced is what was done; as much again where it made the model worse.
    again = max(second["scores"][1:3]) < second["scores"][0]
    assert (first["steps"], second["steps"]) == (18, 24 if again else 12)
    both, second_alone = told(one)
    assert "in all (estimate): in floats 3 epochs, 18 steps" in both
    assert "then on integers 2 epochs, 12 steps" in both
    assert "recovery on integers: 2 epochs, 12 steps" in second_alone
    after = quantized_layers.emulated(model, sites, learned)
    assert away(task, after) < 0.6 * before
    assert f"3 + {4 if again else 2} epochs, learning in {form}, taught by its own floats" in note
    assert recovery.Validator(one).format_score(recovery.Validator(one)(after)) in note


def test_what_the_judge_likes_less_is_not_used(plan, tmp_path, monkeypatch):
    model, removals = plan("int8-dynamic")
    before = copy.deepcopy(model.state_dict())
    scores = iter([0.5, 0.5, 0.5, 0.5, 0.8])  # of the floats, then of the plan as it was
    monkeypatch.setattr(recovery.Validator, "__call__", lambda judge, net: next(scores, 0.7))
    learned, (note,) = recovery.recover(prepared(tmp_path / "out"), model, removals)
    assert note.endswith("0.8 -> 0.7, so it was not used")
    assert same(before, model.state_dict())
    equal(learned, removals)
    # As good is good enough.
    scores = iter([0.5, 0.5, 0.5, 0.5, 0.7])
    learned, (note,) = recovery.recover(prepared(tmp_path / "other"), model, removals)
    assert note.endswith("0.7 -> 0.7")
    assert not same(before, model.state_dict())


def test_one_stage_is_to_be_had(plan, tmp_path):
    model, removals = plan("int8-dynamic")
    one = prepared(tmp_path / "out", staged=False, epochs=1)
    _, (note,) = recovery.recover(one, model, removals)
    assert [stage.name for stage in one.stages.seconds] == ["recover (fast)"]
    assert "(fast, 1 epochs, learning in int8-dynamic)" in note


def killed_at(patch, count):
    """The run ends from outside after so many steps of the optimizer."""
    advance, steps = trainer.TrainingRun.advance, iter(range(count))

    def step(run, number, batch):
        if next(steps, None) is None:
            raise Killed
        advance(run, number, batch)

    patch.setattr(trainer.TrainingRun, "advance", step)


@pytest.mark.slow
def test_a_run_killed_in_either_stage_goes_on_to_the_same_bits(plan, tmp_path):
    words = {"checkpoint_s": 0.0, **GPUSQ}
    whole, removals = plan("int4")
    start = copy.deepcopy(whole)
    expected, notes = recovery.recover(prepared(tmp_path / "whole", **words), whole, removals)
    taken = []
    for count in (7, 14, 1000):  # in the floats, then three steps into the integers, then to the end
        model = copy.deepcopy(start)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, count)
            one = prepared(tmp_path / "killed", **words)
            try:
                learned, found = recovery.recover(one, model, removals)
            except Killed:
                taken.append(count)
    assert taken == [7, 14]
    assert "in floats" not in " ".join(told(one))  # that stage was over
    assert found == notes
    assert same(whole.state_dict(), model.state_dict())
    equal(learned, expected)
    folder = tmp_path / "killed" / "compression" / "work"
    assert sorted(path.name for path in folder.iterdir()) == [
        recovery.FLOAT_STAGE_CHECKPOINT,
        recovery.CHECKPOINT,
    ]
    again = prepared(tmp_path / "killed", **words)
    assert recovery.recover(again, copy.deepcopy(start), removals)[1] == notes
    assert told(again) == []


def test_other_floats_make_the_integers_begin_anew(plan, tmp_path):
    model, removals = plan("int8-dynamic")
    start = copy.deepcopy(model)
    recovery.recover(prepared(tmp_path / "out", epochs=1), model, removals)
    (tmp_path / "out" / "compression" / "work" / recovery.FLOAT_STAGE_CHECKPOINT).unlink()
    one = prepared(tmp_path / "out", epochs=1)
    again = copy.deepcopy(start)
    recovery.recover(one, again, removals)
    assert len(told(one)) == 1  # the same floats again, so the integers are taken up
    assert same(model.state_dict(), again.state_dict())
    other = prepared(tmp_path / "out", epochs=1, rate=1e-3)
    recovery.recover(other, copy.deepcopy(start), removals)
    assert len(told(other)) == 2
