import copy
import re

import pytest
import torch
from support.classifier import Padded, padded
from support.jobs import job

from compress.pipeline import recovery
from compress.search import objective
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.loading import Batch


class Bare(Padded):
    """The same data without labels."""

    labelled = False


class Unjudged(Padded):
    """The same data without a validation split."""

    def batches(self, split, size, limit=None):
        return iter(()) if split == "validation" else super().batches(split, size, limit)


def student(task=None):
    known, sites = padded()
    kept = {site.name: Removal(torch.arange(site.units // 2)) for site in sites}
    return prune.shrink((task or known).model, sites, kept)


def away(task, model):
    batches = list(task.batches("test", 16))
    return objective.mean_divergence(
        task, model, batches, objective.compute_logits(task, task.model, batches)
    )


def test_none_changes_nothing_and_says_nothing(tmp_path):
    model = student()
    before = copy.deepcopy(model.state_dict())
    one = job(tmp_path / "out", mode="none")
    assert recovery.recover(one, model, {}) == ({}, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert one.stages.progress.lines == []


@pytest.mark.parametrize("kind", [Padded, Bare, Unjudged])
def test_fast_brings_the_student_nearer_with_labels_without_and_unjudged(tmp_path, kind):
    task = kind()
    model = student(task)
    before = away(task, model)
    one = job(tmp_path / "out", task)
    _, notes = recovery.recover(one, model, {})
    assert away(task, model) < 0.7 * before
    words = {Padded: "validation accuracy", Bare: "divergence from dense", Unjudged: "not validated"}
    assert words[kind] in notes[0]
    assert any(
        "3 epochs, 18 steps, about" in line and "estimate" in line for line in one.stages.progress.lines
    )
    assert [stage.name for stage in one.stages.seconds] == ["recover (fast)"]


def test_a_second_run_reads_the_first_and_the_answers_are_cleared_away(tmp_path):
    first, second = student(), student()
    _, notes = recovery.recover(job(tmp_path / "out"), first, {})
    folder = tmp_path / "out" / "compression" / "work"
    assert sorted(path.name for path in folder.iterdir()) == [recovery.CHECKPOINT]
    again = job(tmp_path / "out", shard=True)  # where numbers are held changes none of them
    assert recovery.recover(again, second, {}) == ({}, notes)
    assert again.stages.progress.lines == []
    found = first.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in second.state_dict().items())


class Renamed(Padded):
    """The same inputs under other labels."""

    def batches(self, split, size, limit=None):
        for batch in super().batches(split, size, limit):
            yield Batch(batch.inputs, (batch.labels + 1) % 3, batch.real)


def test_other_settings_other_labels_or_another_student_begin_anew(tmp_path):
    recovery.recover(job(tmp_path / "out"), student(), {})
    for one, model in (
        (job(tmp_path / "out", rate=1e-3), student()),
        (job(tmp_path / "out", Renamed(), rate=1e-3), student()),
        (job(tmp_path / "out"), copy.deepcopy(padded()[0].model)),
    ):
        recovery.recover(one, model, {})
        assert one.stages.progress.lines


def test_the_judge_prefers_what_is_better_whatever_the_direction_of_the_score(tmp_path):
    task = Padded()
    one = job(tmp_path / "out", task)
    dense, small = recovery.Validator(one)(task.model), recovery.Validator(one)(student())
    task.higher_is_better = False
    assert recovery.Validator(one)(task.model) == -dense
    bare = job(tmp_path / "out", Bare())
    assert recovery.Validator(bare)(bare.task.model) == pytest.approx(0, abs=1e-6)
    assert recovery.Validator(bare)(student()) < -1e-2
    assert 0 <= small <= 1


def patterned():
    """A student one of whose sites has zeros, with its removals and the place of the zeros."""
    task, sites = padded()
    removals = {site.name: Removal(torch.arange(site.units // 2)) for site in sites[1:]}
    zeros = task.model.get_parameter(sites[0].writer).detach().clone()
    zeros[torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    removals[sites[0].name] = Removal(torch.arange(sites[0].units), weight=zeros, form="block:1x1@0.5")
    return prune.shrink(task.model, sites, removals), removals, (sites[0].writer, zeros == 0)


def megabytes(one):
    """What recovery said that it holds."""
    return float(re.search(r"moments take ([0-9.]+) MB", " ".join(one.stages.progress.lines))[1])


def test_updates_win_quality_back_and_hold_less(tmp_path):
    plain = job(tmp_path / "plain")
    recovery.recover(plain, *patterned()[:2])
    model, removals, (name, zeros) = patterned()
    kinds = [type(module) for module in model.modules()]
    before = away(padded()[0], model)
    one = job(tmp_path / "out", adapter="sltrain", rank=2, density=0.05)
    _, notes = recovery.recover(one, model, removals)
    assert "learning in block:1x1@0.5, sparse plus low-rank updates)" in notes[0]
    assert away(padded()[0], model) < 0.8 * before
    assert torch.equal(model.get_parameter(name) == 0, zeros)
    assert [type(module) for module in model.modules()] == kinds
    assert megabytes(one) < 0.7 * megabytes(plain)


def test_updates_at_a_rate_of_zero_move_nothing(tmp_path):
    model, removals, _ = patterned()
    before = copy.deepcopy(model.state_dict())
    recovery.recover(job(tmp_path / "out", adapter="sltrain", rank=2, rate=0.0), model, removals)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
