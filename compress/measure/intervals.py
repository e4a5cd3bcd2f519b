"""Intervals of timings and of scores: every interval in the product is computed here.

This file is copied into edge bundles beside `verify.py`, so it needs only numpy and Python 3.9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RATIO_RESAMPLES = 2000
DIFFERENCE_RESAMPLES = 1000
P99_RUNS = 1000  # with fewer runs the 99th percentile rests on less than ten of them


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        low: its lower end.
        high: its upper end.
        level: how often such intervals hold the true value, 0.95 for 95 %.
    """

    low: float
    high: float
    level: float = LEVEL

    def contains(self, value: float) -> bool:
        """Whether a value lies inside, the ends included."""
        return self.low <= value <= self.high

    def decides(self, asked: float) -> bool:
        """Whether the interval shows that what was asked is reached, or that it is not.

        >>> Interval(1.9, 2.1).decides(2.0), Interval(2.0, 2.1).decides(2.0), Interval(1.8, 1.9).decides(2.0)
        (False, True, True)
        """
        return asked <= self.low or asked > self.high

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends, as documents hold them."""
        return self.low, self.high


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    interval: Interval


def paired_ratio(
    baseline: Sequence[Any], other: Sequence[Any], seed: int = 0, level: float = LEVEL
) -> Estimate:
    """How many times faster `other` is than the baseline, from blocks that were timed in turn (A B B A).

    The ratio of a cycle is that of the medians inside it; the estimate is the median over cycles. Its
    interval is a bootstrap over whole cycles, since runs within a block share their noise (Efron,
    "Bootstrap methods: another look at the jackknife", 1979).

    Args:
        baseline: times of single runs, one array per block, in time order.
        other: as many blocks of the other model.
        seed: of the resampling.
        level: of the interval.

    >>> paired_ratio([[4.0, 4.0]] * 30, [[2.0, 2.0]] * 30).value
    2.0
    """
    dense = np.array([np.median(block) for block in baseline])
    quick = np.array([np.median(block) for block in other])
    cycles = len(dense) // 2
    # Blocks 2k and 2k+1 ran in opposite order, so their sums see the same part of a linear drift.
    per_cycle = dense[: 2 * cycles].reshape(cycles, 2).sum(1) / quick[: 2 * cycles].reshape(cycles, 2).sum(1)
    draws = np.random.default_rng(seed).integers(0, cycles, size=(RATIO_RESAMPLES, cycles))
    resampled = np.median(per_cycle[draws], axis=1)
    return Estimate(float(np.median(per_cycle)), _percentile_interval(resampled, level))


def paired_difference(
    statistic: Callable[[Any], float],
    before: Any,
    after: Any,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """How much a statistic falls from `before` to `after`, which hold outcomes of the same inputs.

    The interval is a bootstrap over inputs: each resample draws the same inputs on both sides, so that only
    the change between them varies.

    Args:
        statistic: of outcomes [inputs, ...].
        before: outcomes of one model, [inputs, ...].
        after: outcomes of the other, in the same order.
        seed: of the resampling.
        level: of the interval.

    >>> paired_difference(np.mean, np.ones(400), np.zeros(400))
    Estimate(value=1.0, interval=Interval(low=1.0, high=1.0, level=0.95))
    """
    random = np.random.default_rng(seed)
    differences = []
    for _ in range(DIFFERENCE_RESAMPLES):
        drawn = random.integers(0, len(before), len(before))
        differences.append(statistic(before[drawn]) - statistic(after[drawn]))
    value = float(statistic(before) - statistic(after))
    return Estimate(value, _percentile_interval(np.array(differences), level))


def _percentile_interval(resampled: Any, level: float) -> Interval:
    """The interval that holds the middle of resampled values."""
    tail = round((1 - level) / 2, 12)
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Interval(float(low), float(high), level)


def describe(samples_ms: Any) -> dict[str, float | int | None]:
    """Percentiles, mean and standard deviation of single latencies; "p99" from 1,000 runs on."""
    p50, p90, p99 = (float(value) for value in np.quantile(samples_ms, (0.5, 0.9, 0.99)))
    return {
        "p50": p50,
        "p90": p90,
        "p99": p99 if len(samples_ms) >= P99_RUNS else None,
        "mean": float(samples_ms.mean()),
        "std": float(samples_ms.std()),
        "runs": len(samples_ms),
    }


def quantile(samples: Any, share: float) -> float:
    """The value below which a share of the samples lies, interpolated.

    >>> quantile([1.0, 3.0, 2.0], 0.75)
    2.5
    """
    return float(np.quantile(samples, share))
