"""Pruning-aware tuning of a plan: the plan's own shapes, nearer to the dense model, or left alone."""

import copy
from dataclasses import replace

import pytest
import torch
from support.toys import job_of

from compress.core.units import index_of
from compress.errors import CompressError
from compress.pipeline import pruning_aware_recovery, recovery, width_search
from compress.recipe import Recovery
from compress.search import objective
from compress.sites import prune
from compress.sites.prune import Removal

pytestmark = pytest.mark.slow

UNITS = 16
WANTED = Recovery(mode="fast", epochs=25, batch=2, rate=3e-3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A narrow job, its model with units gone, and what was removed."""
    wide = job_of("llama", tmp_path_factory.mktemp("aware") / "out", recovery=WANTED)
    seen = width_search.measure_directions(wide, width_search.requested_stream(wide))
    job = width_search.narrow(wide, seen, UNITS)
    removals = {
        site.name: Removal(torch.arange(site.units // 2, site.units), bias=torch.zeros(UNITS))
        for site in job.sites[:3]
    }
    return job, prune.shrink(job.task.model, job.sites, removals), removals


def away(job, model):
    dense = objective.compute_logits(job.task, job.baseline.task.model, job.calibration)
    return objective.mean_divergence(job.task, model, job.calibration, dense)


def test_units_go_first_and_what_stays_is_solved_again_at_the_whole_width(plan):
    job, _, removals = plan
    cut = pruning_aware_recovery.prune_wide(job.baseline, removals)
    plain = {}
    for site in job.baseline.sites:
        if site.name in removals:
            kept = removals[site.name].kept
            columns = prune.writer_columns(job.baseline.task.model, site)
            plain[site.name] = Removal(kept, columns[:, index_of(site.column, kept)].clone())
    unsolved = prune.shrink(job.baseline.task.model, job.baseline.sites, plain)
    shapes = {name: value.shape for name, value in unsolved.state_dict().items()}
    found = {name: value.shape for name, value in cut.state_dict().items()}
    assert shapes.items() <= found.items()
    assert away(job, cut) < away(job, unsolved)


def test_a_plan_is_tuned_while_its_width_falls_and_keeps_its_shapes(plan, monkeypatch):
    job, small, removals = plan
    model = copy.deepcopy(small)
    (note,) = pruning_aware_recovery.recover(job, model, removals)
    assert note.startswith("Pruning-aware tuning: validation divergence from dense ")
    assert "not used" not in note
    assert away(job, model) < 0.7 * away(job, small)
    before, after = small.state_dict(), model.state_dict()
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in after.items()
    }
    monkeypatch.setattr(pruning_aware_recovery, "_tune", None)  # a second run reads what the first one wrote
    again = copy.deepcopy(small)
    assert pruning_aware_recovery.recover(job, again, removals) == [note]
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())

    other = job.recipe.model_copy(update={"recovery": WANTED.model_copy(update={"seed": 1})})
    fresh = []

    def refuse(*asked):
        fresh.append(asked)
        raise CompressError("tuned anew")

    with monkeypatch.context() as anew:  # what other settings or weights gave is not taken
        anew.setattr(pruning_aware_recovery, "_tune", refuse)
        changed = copy.deepcopy(small)
        changed.get_parameter(next(iter(before))).data.add_(1.0)
        for one, start in ((replace(job, recipe=other), small), (job, changed)):
            assert pruning_aware_recovery.recover(one, copy.deepcopy(start), removals) == [
                "No pruning-aware tuning: tuned anew"
            ]
    assert len(fresh) == 2

    class Contrary(recovery.Validator):
        """Likes best what is farthest from the dense model."""

        def __call__(self, model):
            return -super().__call__(model)

    monkeypatch.setattr(recovery, "Validator", Contrary)
    left = copy.deepcopy(small)
    (note,) = pruning_aware_recovery.recover(job, left, removals)
    assert note.endswith("; not used")
    assert all(torch.equal(value, before[name]) for name, value in left.state_dict().items())


def test_what_cannot_be_tuned_so_is_said_and_left_alone(plan):
    job, small, removals = plan
    assert pruning_aware_recovery.recover(job.baseline, small, removals) == []
    name = next(iter(removals))
    formed = {**removals, name: Removal(removals[name].kept, form="rank:4")}
    before = {key: value.clone() for key, value in small.state_dict().items()}
    assert pruning_aware_recovery.recover(job, small, formed) == [
        f"No pruning-aware tuning: {name} is compressed as rank:4."
    ]
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
