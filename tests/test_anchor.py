"""Whole models set the level of a table: sums of sites are their times, whatever the table says."""

import pytest
from pydantic import ValidationError

from compress import anchor
from compress.ir import Whole

ALONE = [10.0, 5.2, 2.7, 0.1]


def test_sums_of_sites_are_the_times_of_the_models_they_were_fitted_to():
    whole = [15.0, 7.0, 4.5, 2.1]
    factor, found = anchor.fit(whole, ALONE)
    assert [found.latency_ms(factor * ms) for ms in ALONE] == pytest.approx(whole)
    assert [found.room_ms(ms) for ms in whole] == pytest.approx([factor * ms for ms in ALONE])
    assert found.dense_ms == 15.0


def test_a_table_that_is_right_up_to_a_factor_gives_the_truth_back():
    factor, found = anchor.fit([1.5 + 2.0 * ms for ms in ALONE], ALONE)
    assert factor == pytest.approx(2.0)
    assert found.fixed_ms == pytest.approx(1.5)
    for inside in (0.0, 0.3, 7.0, 12.0):
        assert found.latency_ms(2.0 * inside) == pytest.approx(1.5 + 2.0 * inside)


def test_what_the_dense_model_loses_to_caches_does_not_lie_outside_every_site():
    factor, found = anchor.fit([1.0 + 13.0, 1.0 + 5.2, 1.0 + 2.7, 1.0 + 0.1], ALONE)
    assert factor == pytest.approx(1.0)
    assert found.fixed_ms == pytest.approx(1.0)
    assert found.latency_ms(5.2) == pytest.approx(6.2)
    assert found.latency_ms(7.6) == pytest.approx((6.2 + 14.0) / 2)


def test_room_and_latency_undo_each_other_everywhere():
    _, found = anchor.fit([15.0, 7.0, 4.5, 2.1], ALONE)
    for ms in (0.0, 1.0, 2.1, 3.0, 4.5, 6.9, 8.0, 15.0, 20.0):
        assert found.latency_ms(found.room_ms(ms)) == pytest.approx(ms)


def test_one_size_alone_leaves_the_table_as_it_is():
    factor, found = anchor.fit([5.0], [3.0])
    assert (factor, found.fixed_ms, found.latency_ms(2.0), found.room_ms(4.0)) == (1.0, 2.0, 4.0, 2.0)
    assert Whole(inside_ms=(3.0,), whole_ms=(2.0,)).fixed_ms == 0.0


def test_a_curve_without_points_is_refused():
    with pytest.raises(ValidationError):
        Whole(inside_ms=(), whole_ms=())
