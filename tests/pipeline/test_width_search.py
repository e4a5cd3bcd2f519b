"""The outer loop over hidden widths: what it tries, what it leaves out, and that it keeps the best."""

import copy
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import families
from support.reports import whole
from support.toys import job_of, logits

import compress
from compress import profiles
from compress.cost.model_latency import Whole
from compress.errors import CompressError
from compress.export.backends.onnxruntime import OrtRunner
from compress.ir import Budget, Matmul, Option, Site, Width
from compress.methods.hidden_width import find_stream, narrow
from compress.pipeline import compilation, evaluation, plan_search, pricing, recovery
from compress.pipeline import width_search as widths
from compress.pipeline.job import Stages
from compress.pipeline.width_search import (
    SearchResult,
    SearchSpace,
    candidate_widths,
    narrow_site,
    search_widths,
)
from compress.recipe import Options, Recovery, Search
from compress.report.progress import Quiet
from compress.search import objective
from compress.search.closed_loop import CandidateTable, Iteration, OutOfReachError, SearchHistory, Timing
from compress.search.knapsack import OptionCosts
from compress.sites import prune
from compress.sites.discovery import find_sites
from compress.sites.prune import Removal
from compress.training import distillation


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
    return SimpleNamespace(
        profile=SimpleNamespace(align_units=step, name="box"), recipe=recipe, narrowed=None
    )


def test_widths_are_multiples_of_the_step_of_the_target():
    wide = SimpleNamespace(width=768)
    assert candidate_widths(at(64), wide) == [640, 576, 512, 384]
    assert candidate_widths(at(8), wide) == [672, 576, 480, 384]
    assert candidate_widths(at(8, (0.99, 0.01)), wide) == [760, 8]
    with pytest.raises(CompressError, match=r"hidden width is 48, box .* multiples of 64, and none"):
        candidate_widths(at(64, (0.5,)), SimpleNamespace(width=48))


@pytest.mark.parametrize("centered", [False, True])
def test_what_a_width_does_not_carry_is_the_tail_of_the_moments(centered):
    moments = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    seen = widths.Directions(SimpleNamespace(centered=centered), torch.eye(5), moments)
    for units in range(1 + centered, 6):
        carried = [8, 4, 2, 1, 1][: units - centered]  # under LayerNorm one channel holds no direction
        assert seen.error(units) == pytest.approx(1 - sum(carried) / 16)


def test_the_outlook_is_a_share_of_the_dense_time_by_the_products_of_the_sites(monkeypatch):
    up = Matmul(weight="up", rows=1, out=30, inner=64, out_per_unit=1)
    down = Matmul(weight="down", rows=1, out=64, inner=30, inner_per_unit=1)
    other = Matmul(weight="other", rows=1, out=7, inner=10)
    site = Site(name="f", kind="ffn", units=30, slices=(), matmuls=(up, down, other), writer="down")
    stream = SimpleNamespace(
        width=64, readers=(SimpleNamespace(weight="up"),), writers=(SimpleNamespace(tensor="down"),)
    )

    def price(site, option, profile):
        return SimpleNamespace(latency_ms=sum(m.out * m.inner for m in site.matmuls))

    monkeypatch.setattr(widths.latency_table, "price", price)
    monkeypatch.setattr(
        widths, "measure_directions", lambda job, stream: SimpleNamespace(error=lambda units: units / 100)
    )
    job = SimpleNamespace(**vars(at(8, (0.5, 0.75))), sites=(site,))
    rows = widths.estimate_widths(job, stream, 10.0)
    assert [row["width"] for row in rows] == [48, 32]
    for row in rows:
        share = (2 * 30 * row["width"] + 70) / (2 * 30 * 64 + 70)
        assert row["latency_ms_estimate"] == pytest.approx(10 * share, abs=1e-4)
        assert row["speedup_estimate"] == pytest.approx(1 / share, abs=1e-3)
        assert row["stream_error"] == row["width"] / 100


FULL = 64
LEVELS = (56, 48, 40, 32)
SITE = OptionCosts(np.array([4.0, 2.0, 1.0]), np.array([0.0, 0.1, 0.5]))


def play(monkeypatch, alone, plans, speeds=None, asked=2.0):
    """Search widths whose models lose `alone`, and whose best plans lose `plans` (None: out of reach).

    Returns what is kept and told, and the widths that were searched, in order.
    """
    searched = []
    menus = CandidateTable(
        names=("a",), kinds=("ffn",), options=((Option(), Option(units=2), Option(units=1)),), totals=(4,),
        prior=(SITE,), scaled=(SITE,), whole=Whole(inside_ms=(4.0,), whole_ms=(5.0,)),
    )  # fmt: skip
    costs = SimpleNamespace(dense_ms=5.0, source="measured")

    def narrowed(job, seen, units):
        return SimpleNamespace(narrowed=SimpleNamespace(units=units), units=units)

    job = SimpleNamespace(**vars(at(8)), units=FULL, stages=Stages(Quiet()))

    def ground(own):
        return SearchSpace(own, costs, menus, SimpleNamespace(of=lambda units: alone[units]), None)

    def choose(one):
        units = one.job.units
        searched.append(units)
        if plans[units] is None:
            raise OutOfReachError(f"{units} is too slow")
        timing = None
        if speeds is not None:
            timing = Timing(speedup=speeds[units], interval95=(1, 9), dense_ms=5.0, measured_ms=2.5)
        turn = Iteration(limit_ms=2.5, predicted_ms=2.5, choices={}, loss=plans[units], timing=timing)
        return SearchResult(one, SearchHistory(rounds=(turn,)), turn)

    monkeypatch.setattr(widths, "narrow", narrowed)
    monkeypatch.setattr(widths, "narrow_model", lambda job, seen, units: units)
    monkeypatch.setattr(widths, "measure_directions", lambda job, stream: SimpleNamespace(stream=stream))
    monkeypatch.setattr(widths, "_time_share", lambda job, stream, units: units / FULL)
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
        assert found.iteration.loss == reached[best]
        assert [one.units for one in tried] == [FULL, *LEVELS]
        assert [one.units for one in tried if one.chosen] == [best]
        for one in tried:
            assert one.loss == alone[one.units]
            assert one.plan_loss == (reached.get(one.units) if one.units in searched else None)
            assert one.units in searched or one.loss >= found.iteration.loss
        skipped += len(alone) - len(searched)
    assert skipped > 100


def test_a_width_that_gains_by_pruning_breaks_the_bound_and_is_missed(monkeypatch):
    alone = {FULL: 0.0, 56: 0.5, 48: 0.6, 40: 0.7, 32: 0.8}
    found, _, searched = play(monkeypatch, alone, {FULL: 0.3, 56: 0.1, 48: 0.1, 40: 0.1, 32: 0.1})
    assert (found.iteration.loss, searched) == (0.3, [FULL])


def test_a_plan_that_keeps_the_budget_wins_over_one_that_loses_less_and_misses_it(monkeypatch):
    alone = {FULL: 0.0, 56: 0.4, 48: 0.5, 40: 0.6, 32: 0.7}
    plans = {FULL: 0.1, 56: 0.45, 48: 0.55, 40: 0.65, 32: 0.75}
    speeds = {FULL: 1.9, 56: 1.9, 48: 2.01, 40: 2.2, 32: 2.3}
    found, tried, searched = play(monkeypatch, alone, plans, speeds)
    assert (found.space.job.units, found.iteration.loss) == (48, 0.55)
    assert 40 not in searched
    assert [one.why for one in tried if one.chosen] == [widths.REASON_BEST]
    assert {one.why for one in tried if one.units in (FULL, 56)} == {widths.REASON_MISSED}
    assert found.rank(2.0) == (False, 0.55)


def test_the_fastest_plan_is_kept_when_none_keeps_the_budget(monkeypatch):
    alone = {FULL: 0.0, 56: 0.4, 48: 0.5, 40: 0.6, 32: 0.7}
    speeds = {FULL: 1.2, 56: 1.5, 48: 1.9, 40: 1.7, 32: 1.6}
    found, tried, searched = play(monkeypatch, alone, dict.fromkeys(alone, 0.9), speeds)
    assert (found.space.job.units, len(searched)) == (48, 5)
    assert [one.why for one in tried if one.chosen] == [widths.REASON_FASTEST]


def test_widths_are_searched_in_order_of_promise(monkeypatch):
    # In the time of the first plan the site still loses 0.5 at 56, 0.1 at 48 and 40, and nothing at 32.
    alone = {FULL: 0.0, 56: 0.50, 48: 0.55, 40: 0.6, 32: 0.68}
    _, _, searched = play(monkeypatch, alone, dict.fromkeys(alone, 0.9))
    assert searched == [FULL, 48, 32, 40, 56]


def test_the_error_of_the_narrowest_is_told_when_no_width_is_fast_enough(monkeypatch):
    alone = dict.fromkeys((FULL, *LEVELS), 0.5)
    with pytest.raises(OutOfReachError, match="32 is too slow"):
        play(monkeypatch, alone, dict.fromkeys(alone))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "gpt2", "opt", "llama", "mistral", "qwen2", "qwen3"])
def test_a_narrow_and_cut_model_is_saved_loaded_and_exported_alike(family, tmp_path):
    wide = job_of(family, tmp_path / "out")
    seen = widths.measure_directions(wide, widths.requested_stream(wide))
    job = widths.narrow(wide, seen, 16)
    choices = {site.name: Option(units=site.units - 1) for site in job.sites}
    removals = {
        site.name: Removal(torch.arange(1, site.units), bias=0.1 * torch.ones(16)) for site in job.sites
    }
    model = prune.shrink(job.task.model, job.sites, removals)
    compilation.save(job, Iteration(limit_ms=1, predicted_ms=1, choices=choices, loss=0), model, removals)
    again = compress.load(tmp_path / "out")
    inputs = wide.task.example(2, 7)
    expected = logits(job.task, model, inputs)
    assert torch.equal(logits(job.task, again, inputs), expected)
    assert not torch.allclose(logits(job.task, wide.task.model, inputs), expected, atol=1e-3)
    found = evaluation.check_parity(job, model, job.file)
    assert found.max_abs_difference <= found.tolerance
    assert found.agreement == 1.0
    with OrtRunner(job.file, 1) as runner:
        assert np.allclose(runner.infer(job.prompt)["logits"], expected.numpy(), atol=1e-4)
    assert widths.narrow(wide, seen, 16).key == job.key != wide.key


def test_a_stream_of_few_directions_loses_nothing_at_their_number_and_is_judged_by_the_dense_model(tmp_path):
    wide = job_of("llama", tmp_path / "out", rank=10)
    seen = widths.measure_directions(wide, widths.requested_stream(wide))
    menus = SimpleNamespace(options=tuple((Option(),) for _ in wide.sites))
    dense = plan_search.build_objective(wide, menus)
    exact, less = widths.narrow(wide, seen, 10), widths.narrow(wide, seen, 6)
    assert seen.error(10) < 1e-6 < seen.error(6)
    assert dense.of(exact.task.model) == pytest.approx(0, abs=1e-6)
    lost = dense.of(less.task.model)
    assert lost > 1e-4
    own = plan_search.build_objective(less, menus)
    assert own(tuple(0 for _ in wide.sites)) == pytest.approx(lost, rel=1e-5)
    assert less.baseline is wide is wide.baseline


def test_a_narrow_student_is_held_against_what_its_stream_can_hold(tmp_path):
    wide = job_of("gpt2", tmp_path / "out", rank=9)
    seen = widths.measure_directions(wide, widths.requested_stream(wide))
    at = distillation.hidden_states(wide.task.model, wide.sites)
    batch = wide.calibration[0]
    with torch.no_grad():
        told = distillation.run_model(wide.task, wide.task.model, batch, at)
    for units, near in ((10, True), (6, False)):
        job = widths.narrow(wide, seen, units)
        with torch.no_grad():
            said = distillation.run_model(job.task, job.task.model, batch, at)
        goal = distillation.project_teacher(told, said, job.narrowed.down)
        assert [part.shape for part in goal.hidden] == [part.shape for part in said.hidden]
        assert torch.equal(goal.logits, told.logits)
        loss = float(distillation.hidden_loss(said.hidden, goal.hidden))
        assert (loss < 1e-8) is near


def test_recovery_of_a_narrow_model_brings_it_nearer_to_the_dense_one(tmp_path):
    wanted = Recovery(mode="fast", epochs=12, batch=2, rate=3e-3)
    wide = job_of("llama", tmp_path / "out", recovery=wanted)
    seen = widths.measure_directions(wide, widths.requested_stream(wide))
    job = widths.narrow(wide, seen, 16)
    model = copy.deepcopy(job.task.model)
    dense = objective.compute_logits(wide.task, wide.task.model, wide.calibration)
    before = objective.mean_divergence(wide.task, model, wide.calibration, dense)
    recovery.recover(job, model, {})
    assert objective.mean_divergence(wide.task, model, wide.calibration, dense) < 0.7 * before


def test_the_report_tells_the_width_as_a_site_as_a_step_and_in_words():
    before = whole()
    less = SimpleNamespace(
        site=SimpleNamespace(name="residual", kind="residual", units=64), units=48, error=0.1
    )
    menus = SimpleNamespace(dense=(0,), latency_ms=lambda choices: 3.5)
    costs = SimpleNamespace(dense_ms=4.1, source="measured")
    ground = SearchSpace(SimpleNamespace(narrowed=less), costs, menus, None, None)
    tried = (
        Width(units=64, loss=0.0, latency_ms=4.1, source="measured", plan_loss=0.3, plan_speedup=2.0,
              why="a"),
        Width(units=48, loss=0.05, latency_ms=3.5, source="measured", plan_loss=0.1, plan_speedup=2.1,
              chosen=True, why="b"),
        Width(units=32, loss=0.4, latency_ms=2.9, source="estimated", why="c"),
    )  # fmt: skip
    found = widths.add_to_report(before, SearchResult(ground, SearchHistory(), None), tried)
    assert found.sites[:-1] == before.sites
    assert (found.sites[-1].option.units, found.sites[-1].option.units_total) == (48, 64)
    added = {step.name: step.ms for step in found.waterfall}
    assert added["residual"] == pytest.approx(3.5 - 4.1)
    rest = {step.name: step.ms for step in before.waterfall}
    assert added["unexplained"] == pytest.approx(rest["unexplained"] + 0.6)
    assert {k: added[k] for k in ("dense", "compressed")} == {k: rest[k] for k in ("dense", "compressed")}
    assert found.widths == tried
    assert found.attribution == (
        *before.attribution,
        "Hidden width 64: divergence 0 and 4.1 ms with all units, 0.3 at 2.00x with its best plan; "
        "not chosen: a.",
        "Hidden width 48: divergence 0.05 and 3.5 ms with all units, 0.1 at 2.10x with its best plan; "
        "chosen: b.",
        "Hidden width 32: divergence 0.4 and 2.9 ms (estimate) with all units; not chosen: c.",
    )
    plain = SearchSpace(SimpleNamespace(narrowed=None), costs, menus, None, None)
    assert widths.add_to_report(before, SearchResult(plain, SearchHistory(), None), ()) == before


def test_post_norm_is_refused_in_one_message_that_names_the_place_and_the_remedy(tmp_path):
    job = job_of("bert", tmp_path / "out")
    with pytest.raises(CompressError) as refusal:
        compilation.compiled(job)
    said = str(refusal.value)
    assert said.startswith(
        "--moves width does not support this model: the width of BertForSequenceClassification"
    )
    assert re.search(r"normalization after the sum \(post-norm\): bert\.\S+LayerNorm writes", said)
    assert said.endswith("Use --moves structure")
    assert [path for path in (tmp_path / "out" / "compression").rglob("*") if path.is_file()] == []


def test_without_the_move_nothing_is_looked_for(tmp_path):
    job = job_of("bert", tmp_path / "out")
    plain = job.recipe.model_copy(update={"options": Options()})
    assert widths.requested_stream(replace(job, recipe=plain)) is None


@pytest.mark.slow
def test_a_compilation_cuts_the_width_where_that_loses_least(tmp_path):
    wide = job_of("llama", tmp_path / "out", rank=8, search=Search(samples=8, generations=1))
    dense_bytes = pricing.export_dense(wide).stat().st_size
    budget = Budget(size_mb=(dense_bytes - 22_000) / 1e6)  # of 34,560 bytes of weights in sites
    job = replace(wide, recipe=wide.recipe.model_copy(update={"budget": budget, "target": "rpi5"}))
    job = replace(job, profile=profiles.load("rpi5"))
    job.task.samples, job.task.score = {"test": 8}, lambda run, split="test", limit=None: 0.5
    found = compilation.compiled(job).report
    assert [one.units for one in found.widths if one.chosen] == [8]
    assert found.widths[0].plan_loss > 1e-4 > abs(found.widths[-1].loss)
    assert {site.kind for site in found.sites} == {"heads", "ffn", "residual"}
    (cut,) = [site for site in found.sites if site.kind == "residual"]
    assert (cut.option.units, cut.option.units_total) == (8, 24)
    assert cut.error < 1e-6
    assert cut.dense_latency_ms == found.verdict.predicted.baseline_latency_ms > cut.latency_ms
    assert any(line.startswith("Hidden width 8: ") and "; chosen: " in line for line in found.attribution)
    plan = json.loads((tmp_path / "out" / "compression" / "plan.json").read_text())["value"]
    assert plan["choices"]["residual"]["units"] == 8
    assert found.compressed.file_bytes <= dense_bytes - 22_000 < found.baseline.file_bytes
    assert found.parity.agreement == 1.0
    again = compress.load(tmp_path / "out")
    assert sum(value.numel() for value in again.parameters()) == found.compressed.parameters
