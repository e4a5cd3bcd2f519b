"""Costs of a device that is not here: a shipped table of it wins over the roofline, shape by shape."""

from types import SimpleNamespace

import pytest
from support.sites import ffn, heads

from compress import profiles
from compress.cost import roofline
from compress.cost.model_latency import Whole
from compress.ir import Budget
from compress.pipeline import pricing

H100 = profiles.load("h100")


def shipped(monkeypatch, origin, rows):
    table = {
        "fingerprint": "f",
        "runtime": origin,
        "threads": 1,
        "precision": "fp16",
        "rows": {shape: {str(units): ms for units, ms in row.items()} for shape, row in rows.items()},
    }
    document = {"title": "t", "source": "s", "table": table}
    monkeypatch.setattr(profiles, "measured", lambda name, own: document if own == origin else None)


def test_a_shipped_table_prices_the_shapes_that_it_knows(monkeypatch):
    known, unknown = ffn(), heads()
    shipped(monkeypatch, "torch-cuda", {known.shape: {12: 5.0, 6: 3.0}})
    monkeypatch.setattr(pricing, "_estimate_outside_ms", lambda job: 1.0)
    job = SimpleNamespace(profile=H100, sites=(known, unknown), recipe=recipe(speedup=2.0), narrowed=None)
    costs = pricing._estimate_costs(job, {"ffn": {"dense": [12, 6]}, "heads": {"dense": [3, 1]}})
    assert costs.rows["ffn"]["dense"] == {12: 5.0, 6: 3.0}
    assert costs.rows["heads"]["dense"][3] == roofline.estimate_latency_ms(unknown, 3, H100)
    assert costs.source == "estimated"  # the model as a whole was not timed


def recipe(**budget):
    return SimpleNamespace(budget=Budget(**budget))


def test_a_form_that_saves_no_time_is_dropped_unless_bytes_are_what_is_short():
    site = ffn(64, bias=False)
    rows = {
        "dense": {64: 4.0, 32: 2.0},
        "int8-static": {64: 3.0, 32: 1.99},
        "int4": {64: 5.0, 32: 2.5},
        "2:4": {64: 4.0, 32: 2.0},
    }
    whole = Whole(inside_ms=(4.0,), whole_ms=(5.0,))
    forms = {}
    for name, budget in (("fast", recipe(speedup=2.0)), ("small", recipe(size_mb=1.0))):
        job = SimpleNamespace(sites=(site,), recipe=budget)
        costs = pricing._select_costs(job, {"ffn": rows}, 2.0, whole, "measured")
        forms[name] = costs.rows["ffn"]
        assert costs.gains["ffn"] == pytest.approx({"int8-static": 4 / 3, "int4": 0.8, "2:4": 1.0})
    assert forms["fast"] == {"dense": {64: 8.0, 32: 4.0}, "int8-static": {64: 6.0}}
    assert forms["small"] == forms["fast"] | {
        "int8-static": {64: 6.0, 32: 3.98}, "int4": {64: 10.0, 32: 5.0},
    }  # fmt: skip


def test_a_form_that_fits_between_two_widths_is_held_against_the_time_between_them():
    site = ffn(64, bias=False)
    rows = {"dense": {64: 4.0, 32: 2.0}, "block:32x32@0.5": {48: 2.5}, "int8-static": {48: 2.98}}
    job = SimpleNamespace(sites=(site,), recipe=recipe(speedup=2.0))
    costs = pricing._select_costs(
        job, {"ffn": rows}, 1.0, Whole(inside_ms=(4.0,), whole_ms=(5.0,)), "measured"
    )
    assert costs.gains["ffn"] == pytest.approx({"block:32x32@0.5": 3.0 / 2.5, "int8-static": 3.0 / 2.98})
    assert costs.rows["ffn"] == {"dense": {64: 4.0, 32: 2.0}, "block:32x32@0.5": {48: 2.5}}


def test_the_runtime_of_the_profile_comes_before_torch(monkeypatch):
    monkeypatch.setattr(profiles, "measured", lambda name, origin: None)
    assert pricing.shipped_table(H100) is None
    shipped(monkeypatch, "tensorrt", {})
    assert pricing.shipped_table(H100).runtime == "tensorrt"
    shipped(monkeypatch, "torch-cuda", {})
    assert pricing.shipped_table(H100).runtime == "torch-cuda"


def test_a_narrow_model_is_estimated_like_the_dense_one_and_counts_from_it(monkeypatch):
    wide = SimpleNamespace(profile=H100, sites=(ffn(), heads()), narrowed=None)
    fewer = {"ffn": {"dense": [12, 6]}, "heads": {"dense": [3, 1]}}
    shipped(monkeypatch, "torch-cuda", {ffn().shape: {12: 5.0, 6: 3.0}})
    monkeypatch.setattr(pricing, "_estimate_outside_ms", lambda job: 2.0 if job is wide else 1.0)
    narrow = SimpleNamespace(
        profile=H100, sites=wide.sites, narrowed=object(), baseline=wide, recipe=recipe(speedup=2.0)
    )
    costs = pricing._estimate_costs(narrow, fewer)
    inside = sum(roofline.estimate_latency_ms(site, site.units, H100, threads=1) for site in wide.sites)
    assert costs.dense_ms == inside + 2.0
    assert costs.whole.latency_ms(inside) == inside + 1.0
    assert costs.rows["ffn"]["dense"][12] == roofline.estimate_latency_ms(ffn(), 12, H100, threads=1)
    monkeypatch.setattr(pricing, "_estimate_outside_ms", lambda job: 1.0 if job is wide else 1.5)
    slower = pricing._estimate_costs(narrow, fewer)
    assert (slower.dense_ms, slower.whole.latency_ms(inside)) == (inside + 1.0, inside + 1.0)
