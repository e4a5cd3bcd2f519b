"""The outer loop over hidden widths: what it tries, what it leaves out, and that it keeps the best."""

import random
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch

from compress import width as widths
from compress.analyze import find_sites
from compress.console import Quiet
from compress.errors import CompressError
from compress.ir import Option, Whole
from compress.job import Stages
from compress.loop import Menus, OutOfReachError, Round, Rounds, Timing
from compress.recipe import Options
from compress.residual import find_stream, narrow
from compress.search import Menu
from compress.width import Found, Ground, levels, narrow_site, search_widths


@pytest.mark.parametrize("name", ["vit", "gpt2", "opt", "llama", "qwen3", "phi3"])
def test_sites_of_a_narrow_model_are_those_that_would_be_found_in_it(name):
    model, example = families.build(name)
    stream = find_stream(model, example)
    units = stream.width - 6
    narrowed = narrow(model, stream, torch.eye(stream.width, dtype=torch.float64), units)
    expected = find_sites(narrowed, example).sites
    assert tuple(narrow_site(site, stream, units) for site in find_sites(model, example).sites) == expected


def at(step, fractions=(0.875, 0.75, 0.625, 0.5)):
    recipe = SimpleNamespace(options=Options(widths=fractions))
    return SimpleNamespace(profile=SimpleNamespace(align_units=step, name="box"), recipe=recipe)


def test_widths_are_multiples_of_the_step_of_the_target():
    wide = SimpleNamespace(width=768)
    assert levels(at(64), wide) == [640, 576, 512, 384]
    assert levels(at(8), wide) == [672, 576, 480, 384]
    assert levels(at(8, (0.99, 0.01)), wide) == [760, 8]
    with pytest.raises(CompressError, match=r"hidden width is 48, box .* multiples of 64, and none"):
        levels(at(64, (0.5,)), SimpleNamespace(width=48))


FULL = 64
LEVELS = (56, 48, 40, 32)
SITE = Menu(np.array([4.0, 2.0, 1.0]), np.array([0.0, 0.1, 0.5]))


def play(monkeypatch, alone, plans, speeds=None, asked=2.0):
    """Search widths whose models lose `alone`, and whose best plans lose `plans` (None: out of reach).

    Returns what is kept and told, and the widths that were searched, in order.
    """
    searched = []
    menus = Menus(
        names=("a",), kinds=("ffn",), options=((Option(), Option(units=2), Option(units=1)),), totals=(4,),
        prior=(SITE,), scaled=(SITE,), whole=Whole(inside_ms=(4.0,), whole_ms=(5.0,)),
    )  # fmt: skip
    costs = SimpleNamespace(dense_ms=5.0, source="measured")

    def narrowed(job, seen, units):
        own = SimpleNamespace(units=units)
        return SimpleNamespace(narrowed=own, units=units, task=SimpleNamespace(model=units))

    job = SimpleNamespace(**vars(at(8)), narrowed=None, units=FULL, stages=Stages(Quiet()))

    def ground(own):
        return Ground(own, costs, menus, SimpleNamespace(of=lambda units: alone[units]), None)

    def choose(one):
        units = one.job.units
        searched.append(units)
        if plans[units] is None:
            raise OutOfReachError(f"{units} is too slow")
        timing = None
        if speeds is not None:
            timing = Timing(speedup=speeds[units], interval95=(1, 9), dense_ms=5.0, measured_ms=2.5)
        turn = Round(limit_ms=2.5, predicted_ms=2.5, choices={}, loss=plans[units], timing=timing)
        return Found(one, Rounds(rounds=(turn,)), turn)

    monkeypatch.setattr(widths, "narrow", narrowed)
    monkeypatch.setattr(widths, "directions", lambda job, stream: None)
    monkeypatch.setattr(widths, "_share", lambda job, stream, units: units / FULL)
    found, tried = search_widths(ground(job), SimpleNamespace(width=FULL), asked, ground, choose)
    return found, tried, searched


def test_the_best_plan_over_all_widths_is_kept_and_only_hopeless_ones_are_not_searched(monkeypatch):
    dice = random.Random(0)
    skipped = 0
    for _ in range(200):
        alone = {FULL: 0.0, **dict(zip(LEVELS, sorted(dice.random() for _ in LEVELS), strict=True))}
        plans = {units: None if dice.random() < 0.3 else alone[units] + dice.random() for units in alone}
        reached = {units: loss for units, loss in plans.items() if loss is not None}
        if not reached:
            with pytest.raises(OutOfReachError):
                play(monkeypatch, alone, plans)
            continue
        found, tried, searched = play(monkeypatch, alone, plans)
        best = min(reached, key=reached.__getitem__)
        assert found.turn.loss == reached[best]
        assert [one.units for one in tried] == [FULL, *LEVELS]
        assert [one.units for one in tried if one.chosen] == [best]
        for one in tried:
            assert one.loss == alone[one.units]
            assert one.plan_loss == (reached.get(one.units) if one.units in searched else None)
            assert one.units in searched or one.loss >= found.turn.loss
        skipped += len(alone) - len(searched)
    assert skipped > 100


def test_a_width_that_gains_by_pruning_breaks_the_bound_and_is_missed(monkeypatch):
    alone = {FULL: 0.0, 56: 0.5, 48: 0.6, 40: 0.7, 32: 0.8}
    found, _, searched = play(monkeypatch, alone, {FULL: 0.3, 56: 0.1, 48: 0.1, 40: 0.1, 32: 0.1})
    assert (found.turn.loss, searched) == (0.3, [FULL])


def test_a_plan_that_keeps_the_budget_wins_over_one_that_loses_less_and_misses_it(monkeypatch):
    alone = {FULL: 0.0, 56: 0.4, 48: 0.5, 40: 0.6, 32: 0.7}
    plans = {FULL: 0.1, 56: 0.45, 48: 0.55, 40: 0.65, 32: 0.75}
    speeds = {FULL: 1.9, 56: 1.9, 48: 2.01, 40: 2.2, 32: 2.3}
    found, tried, searched = play(monkeypatch, alone, plans, speeds)
    assert (found.ground.job.units, found.turn.loss) == (48, 0.55)
    assert 40 not in searched
    assert [one.why for one in tried if one.chosen] == [widths.BEST]


def test_widths_are_searched_in_order_of_promise(monkeypatch):
    # In the time of the first plan the site still loses 0.5 at 56, 0.1 at 48 and 40, and nothing at 32.
    alone = {FULL: 0.0, 56: 0.50, 48: 0.55, 40: 0.6, 32: 0.68}
    _, _, searched = play(monkeypatch, alone, dict.fromkeys(alone, 0.9))
    assert searched == [FULL, 48, 32, 40, 56]


def test_the_error_of_the_narrowest_is_told_when_no_width_is_fast_enough(monkeypatch):
    alone = dict.fromkeys((FULL, *LEVELS), 0.5)
    with pytest.raises(OutOfReachError, match="32 is too slow"):
        play(monkeypatch, alone, dict.fromkeys(alone))
