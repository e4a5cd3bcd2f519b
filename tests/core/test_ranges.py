import numpy as np
import pytest
import torch

from compress.core import ranges
from compress.core.fakequant import affine
from compress.errors import CompressError


def filled(*batches):
    histogram = ranges.Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def lost(values, low, high):
    """The mean squared error of bytes over [low, high], one value at a time."""
    step = (high - low) / 255
    zero = round(-low / step)
    codes = np.clip(np.round(values / step) + zero, 0, 255)
    return float((((codes - zero) * step - values) ** 2).mean())


def heavy(seed=0, size=40000):
    """Most values are small, some are far out."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, size)).float()


def test_every_value_is_counted_once_however_the_range_grows():
    values = torch.cat([torch.randn(500) * scale for scale in (0.01, 1.0, 37.0, 0.5)])
    histogram = filled(*values.split(500))
    assert float(histogram.counts.sum()) == 2000
    assert (histogram.low, histogram.high) == (float(values.min()), float(values.max()))
    assert histogram.reach >= float(values.abs().max())
    edges = np.linspace(-histogram.reach, histogram.reach, ranges.BINS + 1)
    expected = np.histogram(values.double().numpy(), edges)[0]
    moved = np.abs(np.cumsum(histogram.counts.numpy() - expected)).max()
    assert moved <= 2  # a value that lies on an edge in float32


def test_batches_may_come_in_any_cut():
    values = heavy()
    whole, parts = filled(values), filled(values.max()[None], *values.split(999))
    assert ranges.span(whole, "mse") == pytest.approx(ranges.span(parts, "mse"), rel=0.05)


def test_the_whole_range_is_kept_by_the_rule_of_that_name():
    values = heavy(1)
    assert ranges.span(filled(values), "max") == (float(values.min()), float(values.max()))


def test_a_percentile_leaves_that_share_outside_at_either_end():
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    low, high = ranges.span(filled(values), "percentile")
    expected = np.quantile(values.numpy(), [ranges.TAIL, 1 - ranges.TAIL])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.02)


def test_least_squared_error_beats_every_range_of_a_fine_grid():
    values = heavy(2)
    low, high = ranges.span(filled(values), "mse")
    data = values.double().numpy()
    best = min(lost(data, data.min() * part, data.max() * part) for part in np.linspace(0.02, 1, 150))
    assert lost(data, low, high) <= 1.05 * best
    assert lost(data, low, high) < 0.95 * lost(data, data.min(), data.max())


def test_least_entropy_cuts_a_long_tail_and_leaves_an_even_spread_alone():
    low, high = ranges.span(filled(heavy(3)), "entropy")
    assert 3 < high < 0.6 * float(heavy(3).max())
    even = torch.linspace(-1, 1, 100_001)
    low, high = ranges.span(filled(even), "entropy")
    assert (low, high) == pytest.approx((-1, 1), abs=0.03)


@pytest.mark.parametrize("rule", ["max", "percentile", "entropy", "mse"])
def test_ranges_hold_zero_and_stay_within_what_was_seen(rule):
    for values in (heavy(), heavy().abs() + 1, -heavy().abs() - 1, torch.zeros(9)):
        low, high = ranges.span(filled(values), rule)
        assert (
            min(0.0, float(values.min())) - 1e-6 <= low <= 0 <= high <= max(0.0, float(values.max())) + 1e-6
        )


@pytest.mark.parametrize("seed", range(20))
def test_a_symmetric_range_covers_what_it_is_made_from_with_zero_at_128(seed):
    random = np.random.default_rng(seed)
    low, high = -float(random.uniform(0, 9)), float(random.uniform(0, 9))
    found = ranges.symmetric((low, high))
    assert found[0] <= low + 1e-9
    assert found[1] >= high - 1e-9
    assert found[0] == pytest.approx(low) or found[1] == pytest.approx(high)
    assert float(affine(torch.tensor(found[0]), torch.tensor(found[1]))[1]) == 128


def test_an_input_that_is_not_finite_is_refused():
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(CompressError, match="NaN or infinite"):
            filled(torch.tensor([1.0, value]))
