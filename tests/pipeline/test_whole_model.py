"""Whole models set the level of a table: sums of sites are their times, whatever the table says."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from compress.cost.model_latency import Whole
from compress.pipeline import whole_model

ALONE = [10.0, 5.2, 2.7, 0.1]


def test_sums_of_sites_are_the_times_of_the_models_they_were_fitted_to():
    whole = [15.0, 7.0, 4.5, 2.1]
    factor, found = whole_model.fit(whole, ALONE)
    assert [found.latency_ms(factor * ms) for ms in ALONE] == pytest.approx(whole)
    assert [found.room_ms(ms) for ms in whole] == pytest.approx([factor * ms for ms in ALONE])
    assert found.dense_ms == 15.0


def test_a_table_that_is_right_up_to_a_factor_gives_the_truth_back():
    factor, found = whole_model.fit([1.5 + 2.0 * ms for ms in ALONE], ALONE)
    assert factor == pytest.approx(2.0)
    assert found.fixed_ms == pytest.approx(1.5)
    for inside in (0.0, 0.3, 7.0, 12.0):
        assert found.latency_ms(2.0 * inside) == pytest.approx(1.5 + 2.0 * inside)


def test_what_the_dense_model_loses_to_caches_does_not_lie_outside_every_site():
    factor, found = whole_model.fit([1.0 + 13.0, 1.0 + 5.2, 1.0 + 2.7, 1.0 + 0.1], ALONE)
    assert factor == pytest.approx(1.0)
    assert found.fixed_ms == pytest.approx(1.0)
    assert found.latency_ms(5.2) == pytest.approx(6.2)
    assert found.latency_ms(7.6) == pytest.approx((6.2 + 14.0) / 2)


def test_room_and_latency_undo_each_other_everywhere():
    _, found = whole_model.fit([15.0, 7.0, 4.5, 2.1], ALONE)
    for ms in (0.0, 1.0, 2.1, 3.0, 4.5, 6.9, 8.0, 15.0, 20.0):
        assert found.latency_ms(found.room_ms(ms)) == pytest.approx(ms)


def test_one_size_alone_leaves_the_table_as_it_is():
    factor, found = whole_model.fit([5.0], [3.0])
    assert (factor, found.fixed_ms, found.latency_ms(2.0), found.room_ms(4.0)) == (1.0, 2.0, 4.0, 2.0)
    assert Whole(inside_ms=(3.0,), whole_ms=(2.0,)).fixed_ms == 0.0


def test_a_curve_without_points_is_refused():
    with pytest.raises(ValidationError):
        Whole(inside_ms=(), whole_ms=())


def narrow_times(monkeypatch, whole_ms, narrowed):
    site = SimpleNamespace(name="a", units=8)
    monkeypatch.setattr(whole_model, "_time_models", lambda job, backend, sizes: whole_ms)
    job = SimpleNamespace(sites=[site], narrowed=narrowed)
    return whole_model.measure(job, None, {"a": {8: 4.0, 4: 2.0, 2: 1.0, 0: 0.0}})


def test_times_of_a_narrow_model_count_from_the_dense_one(monkeypatch):
    factor, found = narrow_times(monkeypatch, [18.0, 9.0, 5.0, 3.0, 1.0], object())
    assert factor == pytest.approx(2.0)
    assert found.dense_ms == 18.0
    assert [found.latency_ms(factor * ms) for ms in (4.0, 2.0, 1.0, 0.0)] == pytest.approx(
        [9.0, 5.0, 3.0, 1.0]
    )
    assert found.room_ms(12.0) > factor * 4.0  # slower than the uncut narrow model: everything fits


def test_a_narrow_model_that_is_no_faster_has_no_room_to_gain(monkeypatch):
    _, found = narrow_times(monkeypatch, [9.0, 9.5, 5.0, 3.0, 1.0], object())
    assert found.dense_ms == 9.0
    assert found.whole_ms == (9.0, 5.0, 3.0, 1.0)
