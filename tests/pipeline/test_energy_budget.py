"""Energy and average power: prices, limits and refusals, each against a few sums by hand."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from support.sites import ffn, heads

from compress import profiles
from compress.cost import latency_table, roofline
from compress.cost.energy import Energy
from compress.cost.model_latency import Whole
from compress.cost.roofline import WAITING_POWER_SHARE
from compress.errors import CompressError
from compress.ir import Budget, Option
from compress.pipeline import energy_budget
from compress.pipeline.pricing import Costs
from compress.search import knapsack
from compress.search.closed_loop import CandidateTable
from compress.search.knapsack import OptionCosts

SITES = (ffn(), heads())
ROWS = {"ffn": {"dense": {12: 4.0, 6: 2.0, 0: 0.0}}, "heads": {"dense": {3: 3.0, 1: 1.0}}}
ALL = Option()


def costs(fixed_ms=1.0):
    inside = 7.0
    whole = Whole(inside_ms=(inside,), whole_ms=(inside + fixed_ms,))
    return Costs(whole=whole, rows=ROWS, source="estimated")


def job(budget, target="a100", backend=None):
    recipe = SimpleNamespace(budget=budget, bench=SimpleNamespace(threads=1, rounds=6))
    return SimpleNamespace(
        recipe=recipe, profile=profiles.load(target), sites=SITES, backend=backend, task=None, narrowed=None
    )


def used(mj, idle_w=30.0):
    return Energy(energy_mj=mj, source="measured", meter="NVML", runs=10, seconds=5.0, idle_w=idle_w)


def test_an_estimate_is_time_times_modelled_power():
    found = energy_budget.priced(job(Budget(energy_mj=1.0)), costs(), None)
    profile = profiles.load("a100")
    for site in SITES:
        for units, ms in ROWS[site.name]["dense"].items():
            watts = roofline.above_idle_w(site, units, profile, threads=1)
            key = Option(units=None if units == site.units else units).key
            assert found.rows[site.name][key] == pytest.approx(ms * watts)
    assert found.fixed_mj == pytest.approx(1.0 * WAITING_POWER_SHARE * (400 - 45))
    assert (found.source, found.idle_w, found.meter) == ("estimated", 45.0, "power envelope of a100")


def test_a_counter_sets_the_level_and_the_model_the_shares():
    guess = energy_budget.priced(job(Budget(energy_mj=1.0)), costs(), None)
    found = energy_budget.priced(job(Budget(energy_mj=1.0)), costs(), used(500.0))
    assert found.dense_mj == pytest.approx(500.0)
    assert found.rows["ffn"]["6 dense"] / found.dense_mj == pytest.approx(
        guess.rows["ffn"]["6 dense"] / guess.dense_mj
    )
    assert (found.source, found.idle_w, found.meter) == ("measured", 30.0, "NVML")


def test_without_an_envelope_a_counter_shares_energy_out_by_time():
    found = energy_budget.priced(job(Budget(energy_mj=1.0), "cpu"), costs(), used(80.0))
    assert found.rows == {
        "ffn": pytest.approx({"all dense": 40.0, "6 dense": 20.0, "0 dense": 0.0}),
        "heads": pytest.approx({"all dense": 30.0, "1 dense": 10.0}),
    }
    assert found.fixed_mj == pytest.approx(10.0)
    assert found.of({"ffn": ALL, "heads": Option(units=1)}) == pytest.approx(60.0)
    assert found.of({"ffn": Option(units=0), "heads": ALL}) == pytest.approx(40.0)
    assert found.average_w(found.dense_mj, 100.0) == pytest.approx(30.0 + 8.0)


def test_with_neither_counter_nor_envelope_energy_is_refused():
    with pytest.raises(CompressError, match=r"--energy-mj 5: no energy counter .* 'cpu' states no power"):
        energy_budget.priced(job(Budget(energy_mj=5.0), "cpu"), costs(), None)


def test_what_a_budget_leaves_for_one_run():
    prices = energy_budget.priced(job(Budget(energy_mj=1.0), "cpu"), costs(), used(80.0))
    assert energy_budget.limit_mj(job(Budget(energy_mj=50.0)), costs(), prices) == 50.0
    # 32 W less 30 W idle, at 50 runs a second: 40 mJ each.
    asked = job(Budget(power_w=32.0, rate_hz=50.0))
    assert energy_budget.limit_mj(asked, costs(), prices) == pytest.approx(40.0)
    for budget, message in (
        (Budget(energy_mj=80.0), r"--energy-mj 80 is already kept: the dense model takes 80 mJ on"),
        (Budget(power_w=40.0, rate_hz=50.0), r"--power-w 40 --rate-hz 50 is already kept"),
        (Budget(power_w=30.0, rate_hz=50.0), r"draws 30 W with nothing to do, which no model changes"),
        (Budget(power_w=32.0, rate_hz=900.0), r"leaves 1.11 ms for a run; the fastest plan takes 2 ms"),
    ):
        with pytest.raises(CompressError, match=message):
            energy_budget.limit_mj(job(budget), costs(), prices)
    unknown = prices.model_copy(update={"idle_w": None})
    with pytest.raises(CompressError, match="draws an unknown power"):
        energy_budget.limit_mj(asked, costs(), unknown)
    guess = energy_budget.priced(job(Budget(energy_mj=1.0)), costs(), None)
    with pytest.raises(CompressError, match=r"mJ \(estimate\) on a100"):
        energy_budget.limit_mj(job(Budget(energy_mj=1e6)), costs(), guess)


@pytest.mark.parametrize("target", ["a100", "cpu-avx2"])
def test_energy_falls_with_every_unit_that_goes(target):
    """LPViT's power term counts the share that is gone, so that it rises with pruning."""
    profile = profiles.load(target)
    for site, step in ((ffn(64), 8), (heads(6), 2)):  # between these, tensor cores run unaligned products
        counts = range(site.units, -1, -step)
        row = [latency_table.price(site, Option(units=units), profile=profile) for units in counts]
        energies = [one.energy_mj for one in row]
        assert all(more > fewer for more, fewer in pairwise(energies))
        assert energies[-1] == 0


def test_energy_never_rises_with_blocks_that_go():
    profile = profiles.load("cpu-avx2")
    patterns = [Option(pattern=f"block:4x4@{density}") for density in (1.0, 0.75, 0.5, 0.25)]
    for site in (ffn(64), heads(6)):
        energies = [latency_table.price(site, option, profile=profile).energy_mj for option in patterns]
        assert all(more >= fewer > 0 for more, fewer in pairwise(energies))


def test_a_budget_of_energy_prunes_more_the_smaller_it_is_and_its_wrong_sign_would_not():
    row = {12: 4.0, 9: 3.0, 6: 2.0, 3: 1.0, 0: 0.0}
    options = tuple(Option(units=None if units == 12 else units) for units in row)
    priced = {option.key: 10.0 * ms for option, ms in zip(options, row.values(), strict=True)}
    prices = energy_budget.Prices(
        rows={"a": priced, "b": priced}, fixed_mj=5.0, idle_w=1.0, source="estimated", meter="m"
    )
    error = np.array([0.0, 0.1, 0.3, 0.6, 1.0])
    same = tuple(OptionCosts(np.array(list(row.values())), scale * error) for scale in (1.0, 2.0))
    whole = Whole(inside_ms=(8.0,), whole_ms=(9.0,))
    known = CandidateTable(("a", "b"), ("ffn", "ffn"), (options, options), (12, 12), same, same, whole)
    menus = energy_budget.menus(known, prices)
    kept = []
    for limit in (85.0, 65.0, 45.0, 25.0, 5.0):
        choices = knapsack.solve(menus, limit - prices.fixed_mj)
        named = {name: options[place] for name, place in zip("ab", choices, strict=True)}
        assert prices.of(named) <= limit
        kept.append(sum(list(row)[place] for place in choices))
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (24, 0)
    # The control: with the energy of what is gone instead, the smallest budget leaves the model dense.
    wrong = [OptionCosts(menu.cost.max() - menu.cost, menu.error) for menu in menus]
    assert knapsack.solve(wrong, 0.0) == (0, 0)


def test_nothing_is_metered_that_was_not_asked_for_or_is_not_here():
    assert energy_budget.metered(job(Budget(energy_mj=5.0)), None, None) is None
    assert energy_budget.metered(job(Budget(speedup=2.0), backend=object()), None, None) is None


def test_a_gpu_that_waits_draws_less_and_a_processor_the_same():
    a100, cpu = profiles.load("a100"), profiles.load("cpu-avx2")
    big = ffn().model_copy(
        update={"matmuls": tuple(m.model_copy(update={"rows": 10**7}) for m in ffn().matmuls)}
    )
    assert roofline.above_idle_w(ffn(), 12, a100) == pytest.approx(WAITING_POWER_SHARE * 355, rel=0.05)
    assert roofline.above_idle_w(big, 12, a100) == pytest.approx(355, rel=0.05)
    assert roofline.above_idle_w(ffn(), 0, a100) == 0.0
    assert roofline.above_idle_w(ffn(), 12, cpu, threads=2) == pytest.approx(80 * 2 / 8)
    assert roofline.above_idle_w(big, 12, cpu, threads=2) == pytest.approx(80 * 2 / 8)
    assert roofline.above_idle_w(ffn(), 12, profiles.load("cpu")) is None
