"""From a budget of energy or average power to the plan: searched in millijoules, metered where it can be."""

from collections.abc import Callable, Mapping

from compress.ir import Budget, Option
from compress.pipeline import energy_budget, plan_search
from compress.pipeline.energy_budget import Prices
from compress.pipeline.job import Job
from compress.pipeline.pricing import Costs
from compress.search import knapsack
from compress.search.closed_loop import CandidateTable, Iteration, OutOfReachError
from compress.search.objective import ModelObjective

NEAR = 0.95  # of what is allowed: close enough to stop
AIM = 0.98
KEEP_UP = 0.97  # of the time between two runs
Meter = Callable[[Mapping[str, Option]], float | None]


def choose(
    job: Job, costs: Costs, menus: CandidateTable, judge: ModelObjective, prices: Prices, meter: Meter | None
) -> Iteration:
    """The least compressed plan that keeps the budget; with a meter, plans are built and measured.

    Raises:
        CompressError: the budget is kept already or out of reach; it says what can be had.
    """
    limit = energy_budget.limit_mj(job, costs, prices)
    if meter is None:
        return _once(job, costs, menus, judge, prices, limit, limit)
    aim, kept, least = limit, None, None
    seen: list[dict[str, Option]] = []
    for _ in range(job.recipe.bench.rounds):
        turn = _once(job, costs, menus, judge, prices, limit, aim)
        if turn.choices in seen:
            break
        seen.append(turn.choices)
        found = meter(turn.choices)
        if found is None:
            return turn
        job.stages.progress.say(f"measured {found:.3g} mJ, {limit:.3g} mJ are allowed")
        if found <= limit and (kept is None or turn.loss < kept.loss):
            kept = turn
        if least is None or found < least[0]:
            least = (found, turn)
        if NEAR * limit <= found <= limit:
            break
        aim *= AIM * limit / found
        if found > limit:  # never the same plan again
            aim = min(aim, (1 - 1e-6) * prices.of(turn.choices))
    if kept is not None:
        return kept
    assert least is not None, "the first round always measures"
    return least[1]


def _once(
    job: Job,
    costs: Costs,
    menus: CandidateTable,
    judge: ModelObjective,
    prices: Prices,
    limit: float,
    aim: float,
) -> Iteration:
    """The best plan of at most `aim` millijoules by the prices, which also keeps up with the rate."""
    priced = energy_budget.menus(menus, prices)
    try:
        choices, loss = plan_search.search_within(job, priced, aim - prices.fixed_mj, judge)
    except knapsack.UnreachableError as error:
        raise OutOfReachError(_out_of_reach(job.recipe.budget, prices, limit, error.least)) from error
    turn = Iteration(
        limit_ms=costs.dense_ms,
        predicted_ms=menus.latency_ms(choices),
        choices=menus.named(choices),
        loss=loss,
    )
    rate_hz = job.recipe.budget.rate_hz
    if rate_hz is None or turn.predicted_ms * rate_hz <= 1e3:
        return turn
    # The plan rests too little: it would not answer in time. What does costs less energy still.
    limit_ms = KEEP_UP * 1e3 / rate_hz
    return plan_search.search_once(job, menus, judge, limit_ms, costs.dense_ms / limit_ms)


def _out_of_reach(budget: Budget, prices: Prices, limit: float, least: float) -> str:
    how = "measured for the dense model" if prices.source == "measured" else "estimate"
    words = (
        f"--{budget.name.replace('_', '-')} {budget.value:g} is out of reach: it leaves {limit:.3g} mJ above "
        f"idle for one run, the smallest plan takes {prices.fixed_mj + least:.3g} of the dense model's "
        f"{prices.dense_mj:.3g} mJ ({how}, {prices.meter}); {prices.fixed_mj:.3g} mJ lie outside every site"
    )
    if budget.rate_hz is None:
        return f"{words}.\n  Ask for --energy-mj {1.05 * (prices.fixed_mj + least):.3g} or more"
    lowest = prices.average_w(1.05 * (prices.fixed_mj + least), budget.rate_hz)
    rate = f"{budget.rate_hz:g} runs a second"
    return f"{words}.\n  Ask for --power-w {lowest:.3g} or more at {rate}, or for a lower rate"
