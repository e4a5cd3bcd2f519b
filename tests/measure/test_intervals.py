"""Every interval in the product, and the file that travels to devices with it."""

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from compress.measure import intervals
from compress.measure.intervals import Estimate, Interval, paired_difference, paired_ratio


def test_it_is_python_3_9_and_imports_nothing_but_numpy():
    tree = ast.parse(Path(intervals.__file__).read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize(
    ("asked", "inside", "decided"),
    [(1.5, False, True), (1.9, True, True), (2.0, True, False), (2.1, True, False), (2.2, False, True)],
)
def test_an_interval_decides_what_lies_at_or_below_its_lower_end_or_above_its_upper(asked, inside, decided):
    found = Interval(1.9, 2.1)
    assert (found.contains(asked), found.decides(asked)) == (inside, decided)
    assert found.ends == (1.9, 2.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # Noise is shared by the runs of a block: an interval over single runs would be far too narrow.
    random = np.random.default_rng(5)
    covered = 0
    trials = 100
    for _ in range(trials):
        blocks = [
            tuple(
                ms * math.exp(random.normal(0, 0.05)) * np.exp(random.normal(0, 0.01, 20)) for _ in range(40)
            )
            for ms in (3.0, 2.0)
        ]
        ratio = paired_ratio(blocks[0], blocks[1])
        assert ratio.interval.contains(ratio.value)
        covered += ratio.interval.contains(1.5)
    assert 0.90 <= covered / trials <= 0.99


def test_the_interval_depends_on_the_seed_alone():
    random = np.random.default_rng(1)
    blocks = [tuple(random.uniform(1, 2, 5) for _ in range(30)) for _ in range(2)]
    assert paired_ratio(*blocks, seed=3) == paired_ratio(*blocks, seed=3)
    assert paired_ratio(*blocks, seed=3) != paired_ratio(*blocks, seed=4)


def test_one_cycle_is_two_blocks_and_an_odd_last_block_is_left_out():
    dense = (np.array([3.0, 1.0, 2.0]), np.array([6.0]), np.array([99.0]))
    small = (np.array([1.0]), np.array([3.0]), np.array([1.0]))
    assert paired_ratio(dense, small) == Estimate(2.0, Interval(2.0, 2.0))


def test_a_higher_level_gives_a_wider_interval():
    random = np.random.default_rng(2)
    blocks = [[random.lognormal(0, 0.1, 5) for _ in range(30)] for _ in range(2)]
    narrow, wide = (paired_ratio(*blocks, level=level) for level in (0.5, 0.99))
    assert narrow.value == wide.value
    assert wide.interval.low < narrow.interval.low < narrow.interval.high < wide.interval.high
    assert (narrow.interval.level, wide.interval.level) == (0.5, 0.99)


def test_the_interval_of_a_difference_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(3)
    covered, trials = 0, 100
    for _ in range(trials):
        before = (random.random(400) < 0.9).astype(float)
        after = np.where(random.random(400) < 0.1, 0.0, before)  # a tenth of the hits is lost: 9 points
        covered += paired_difference(np.mean, before, after).interval.contains(0.09)
    assert 0.88 <= covered / trials <= 1.0


def test_both_sides_of_a_difference_draw_the_same_inputs():
    outcomes = np.random.default_rng(0).random(50)
    assert paired_difference(np.mean, outcomes, outcomes) == Estimate(0.0, Interval(0.0, 0.0))
    shifted = paired_difference(np.mean, outcomes, outcomes - 0.25)
    assert shifted.interval.ends == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("runs", [3, 999, 1000, 2500])
def test_latencies_are_described_by_their_percentiles(runs):
    samples = np.random.default_rng(runs).lognormal(0, 0.3, runs)
    found = intervals.describe(samples)
    assert found["p50"] == np.quantile(samples, 0.5)
    assert found["p90"] == np.quantile(samples, 0.9)
    assert (found["p99"] is None) == (runs < 1000)
    assert (found["mean"], found["std"], found["runs"]) == (samples.mean(), samples.std(), runs)
