"""The roofline against figures that others published: what is fitted, what is held out, what comes out."""

from dataclasses import asdict

import pytest

from compress import profiles
from compress.cost import published_latencies
from compress.cost.roofline import DEFAULT, Constants


def test_the_v100_table_is_reproduced_without_having_been_seen():
    (found,) = published_latencies.checks("v100")
    assert found.origin == "ziplm"
    assert len(found.points) == 12
    assert {point.unit for point in found.points} == {"ms"}
    assert all(point.held_out_error is not None for point in found.points)
    assert found.mean_error < 0.07
    assert found.max_error < 0.25
    assert found.held_out_error < 0.09


def test_an_a100_saturates_as_was_published():
    found = published_latencies.checks("a100")[0]
    assert [point.name for point in found.points] == [f"ffn {n}" for n in (1814, 1322, 302, 130, 76, 33)]
    # The penalty for misaligned widths is fitted to the two widest points, so these are not held out.
    assert [point.held_out_error is None for point in found.points] == [True, True, *[False] * 4]
    assert found.mean_error < 0.07
    assert found.held_out_error < 0.25
    assert max(point.predicted for point in found.points) < 5.5


def test_the_shipped_constants_are_those_of_the_fit():
    fitted = asdict(published_latencies.shipped())
    assert fitted == pytest.approx(asdict(DEFAULT), rel=0.03)


def test_held_out_predictions_do_not_know_the_figures_they_are_held_against(monkeypatch):
    real = profiles.measured

    def doubled(name, origin):
        table = real(name, origin)
        if (name, origin) == ("a100", "ziplm"):
            rows = table["ffn_speedup"].items()
            changed = {units: by * (2 if int(units) < 1000 else 1) for units, by in rows}
            table = {**table, "ffn_speedup": changed}
        return table

    published_latencies._unseen.cache_clear()
    before = [point.unseen for point in published_latencies.checks("a100")[0].points]
    published_latencies._unseen.cache_clear()
    monkeypatch.setattr(profiles, "measured", doubled)
    after = published_latencies.checks("a100")[0]
    assert [point.unseen for point in after.points] == before
    assert after.points[-1].published == 8.8
    # The control: a fit that may see them does move.
    assert published_latencies.fit(published_latencies.ziplm_cases("a100")) != published_latencies.fit(
        published_latencies.ziplm_cases("v100")
    )
    published_latencies._unseen.cache_clear()


def test_a_fit_finds_the_constants_that_made_the_figures():
    truth = Constants(launches=2.0, misaligned=1.2)
    made = [
        published_latencies.Case(case.name, case.unit, case.predict(truth), case.predict)
        for name in ("v100", "a100")
        for case in published_latencies.ziplm_cases(name)
    ]
    found = published_latencies.fit(made)
    assert (found.launches, found.misaligned) == pytest.approx((2.0, 1.2), rel=0.03)
    assert sum(case.off(found) for case in made) < 0.02 * sum(case.off(DEFAULT) for case in made)


def test_vision_transformers_in_int4_are_foreseen_to_gain_more_than_they_did():
    for name in ("a100", "orin-agx"):
        found = published_latencies.checks(name)[-1]
        assert found.origin == "gpusq"
        assert len(found.points) == 6
        latency = [point for point in found.points if point.name.endswith("latency")]
        throughput = [point for point in found.points if point.name.endswith("throughput")]
        assert len(latency) == len(throughput) == 3
        # What the check is for: at large batches the estimate is far off, and says so.
        assert all(point.predicted > 1 for point in found.points)
        assert found.mean_error == pytest.approx(found.held_out_error)


def test_a_vit_counts_every_product_once():
    profile = profiles.load("a100")
    small, large = (published_latencies.vit_ms("deit-b", size, profile, "fp16", "fp16") for size in (64, 256))
    assert 3.5 < large / small < 4.1
    flops = 12 * 2 * 256 * 197 * (12 * 768**2 + 2 * 197 * 768)
    assert large > flops / (312e9 * DEFAULT.compute)
    assert large < 3 * flops / (312e9 * DEFAULT.compute)


def test_there_is_no_check_without_a_published_table():
    assert published_latencies.checks("t4") == ()
