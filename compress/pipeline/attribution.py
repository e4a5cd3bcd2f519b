"""Why a compressed model is not faster: what no move can touch, what every form gains, and site by site."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from compress import formats
from compress.cost import latency_table
from compress.ir import Offer, Option, Site
from compress.pipeline import energy_budget
from compress.pipeline.energy_budget import Prices
from compress.pipeline.job import Job
from compress.pipeline.plan_search import WEIGHT_PRECISION
from compress.pipeline.pricing import Costs
from compress.report.schema import Chosen, FrontPoint, SiteReport
from compress.search import knapsack
from compress.search.closed_loop import CandidateTable, Iteration

EQUAL = 1e-9  # by which two times differ in rounding only


def untouched(job: Job, costs: Costs) -> list[str]:
    """Why it is not faster: what no move can touch, and what was not there to choose."""
    share = costs.fixed_ms / costs.dense_ms
    said = "" if costs.source == "measured" else " (estimate)"
    lines = [
        f"{costs.fixed_ms:.2f} of {costs.dense_ms:.2f} ms{said} ({share:.0%}) lie outside every site: "
        "embeddings, norms, the head, and calls; no structure removed can save them."
    ]
    if job.recipe.budget.name == "size_mb":
        lines.append(_outside_bytes(job))
    lines += [f"{skip.place}: not a site, because {skip.reason}" for skip in job.found.skipped]
    if job.found.fallback:
        lines.append(f"Sites come from names, not from the program: {job.found.fallback}")
    for move, facts in formats.MOVES.items():
        if facts.pattern and facts.pattern not in (*job.profile.patterns, *job.recipe.options.moves):
            lines.append(f"{move} sparsity was not considered: {job.profile.name} gains no time from it.")
    looked = {form for row in costs.gains.values() for form in (*row, *costs.untimed)}
    for move in job.recipe.options.moves:
        if any(brought.name not in looked for brought in formats.MOVES[move].formats):
            lines.append(
                f"{move} was not considered: no site is multiplied in it on {job.profile.name} here."
            )
    return lines


def _outside_bytes(job: Job) -> str:
    """Why it is not smaller: the weights that no plan removes."""
    inside_mb = sum(latency_table.weight_bytes(site, Option(), WEIGHT_PRECISION) for site in job.sites) / 1e6
    dense_mb = (job.dense_file).stat().st_size / 1e6
    outside_mb = max(dense_mb - inside_mb, 0.0)
    return (
        f"{outside_mb:.3g} of {dense_mb:.3g} MB ({outside_mb / dense_mb:.0%}) of the dense file lie outside "
        "every site: embeddings, norms, the head; the search removes no more than the budget asks for, since "
        "every unit removed costs quality."
    )


def gains(costs: Costs, turn: Iteration) -> list[str]:
    """What every form that was looked at gains on the target, and where it was chosen."""
    said = "" if costs.source == "measured" else " (estimate)"
    chosen = Counter(option.form for option in turn.choices.values())
    lines = []
    for form in costs.untimed:
        lines.append(f"{form}: not offered, since no site could be timed in it here.")
    for form, found in by_form(costs.gains).items():
        count = chosen[form]
        why = f"chosen at {count} of {len(turn.choices)} sites" if count else "not chosen"
        if not count:
            pays = any(form in row for row in costs.rows.values())
            why += ": other moves cost less for the same time" if pays else ": it saves no time here"
        lines.append(f"{form}: {span(found)} on a whole site{said}; {why}.")
    return lines


def by_form(gains: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """What sites gain, by form, in the order of forms."""
    found: dict[str, list[float]] = {}
    for row in gains.values():
        for form, gain in row.items():
            found.setdefault(form, []).append(gain)
    return dict(sorted(found.items()))


def span(gains: Sequence[float]) -> str:
    """From the least to the most, once where both look the same.

    >>> span([1.02, 0.98]), span([2.0])
    ('0.98x to 1.02x', '2.00x')
    """
    least, most = f"{min(gains):.2f}x", f"{max(gains):.2f}x"
    return least if least == most else f"{least} to {most}"


def offers(costs: Costs, menus: CandidateTable, turn: Iteration, site: Site) -> tuple[Offer, ...]:
    """Every form that a site could have had beside the one that it was given, and what spoke against it.

    Of a form the option is told that loses least without taking longer than the chosen one.
    """
    index = menus.names.index(site.name)
    options, menu = menus.options[index], menus.scaled[index]
    given = turn.choices[site.name]
    room_ms = float(menu.cost[options.index(given)]) * (1 + EQUAL)
    own_loss = float(menu.error[options.index(given)])
    gains, found = costs.gains.get(site.name, {}), []
    looked = by_form(costs.gains)
    for form in dict.fromkeys((*(_named(o) for o in options), *looked, *costs.untimed)):
        own = [k for k, option in enumerate(options) if _named(option) == form]
        quick = [k for k in own if menu.cost[k] <= room_ms]
        best = min(quick, key=lambda k: (float(menu.error[k]), float(menu.cost[k])), default=None)
        chosen = form == _named(given)
        if chosen:
            best, why = options.index(given), "chosen"
        elif best is not None:
            why = _less(float(menu.error[best]), own_loss)
        elif own:
            most = costs.latency_ms(site, Option()) / min(float(menu.cost[k]) for k in own)
            why = f"too slow: {most:.2f}x at most, where {_given_gain(costs, site, given)} was needed"
        elif form in gains:
            why = f"saves no time here: {gains[form]:.2f}x"
        else:
            why = (
                "could not be timed here" if form in costs.untimed else "does not fit the shapes of this site"
            )
        found.append(
            Offer(
                form=form,
                speedup=gains.get(form),
                units=None if best is None else _units(options[best], site),
                loss=None if best is None else float(menu.error[best]),
                chosen=chosen,
                why=why,
            )
        )
    return tuple(found)


def _less(loss: float, chosen: float) -> str:
    """What the losses of two options at one site, in the same time, say of the one not taken."""
    if loss >= chosen:
        return f"loses more: {loss:.3g} where the chosen loses {chosen:.3g}"
    return f"loses less alone ({loss:.3g}, the chosen {chosen:.3g}), more with the rest of the plan"


def _given_gain(costs: Costs, site: Site, given: Option) -> str:
    now_ms = costs.latency_ms(site, given)
    return f"{costs.latency_ms(site, Option()) / now_ms:.2f}x" if now_ms > 0 else "no time at all"


def _named(option: Option) -> str:
    """The form as a reader knows it: what removes units, and nothing else, is structure."""
    if option.form != "dense":
        return option.form
    return formats.DENSE if option.units is None else formats.STRUCTURE


def _units(option: Option, site: Site) -> int:
    return site.units if option.units is None else option.units


def site_reports(job: Job, costs: Costs, menus: CandidateTable, turn: Iteration) -> tuple[SiteReport, ...]:
    """What was done to every site, and what it costs now."""
    found = []
    for site, options, menu in zip(job.sites, menus.options, menus.prior, strict=True):
        option = turn.choices[site.name]
        found.append(
            SiteReport(
                name=site.name,
                kind=site.kind,
                option=Chosen(
                    units=site.units if option.units is None else option.units,
                    units_total=site.units,
                    pattern=option.pattern,
                    rank=option.rank,
                    precision=option.precision,
                ),
                error=float(menu.error[options.index(option)]),
                latency_ms=costs.latency_ms(site, option),
                dense_latency_ms=costs.latency_ms(site, Option()),
                source=costs.source,
                offers=offers(costs, menus, turn, site),
            )
        )
    return tuple(found)


def front(
    job: Job, costs: Costs, menus: CandidateTable, turn: Iteration, prices: Prices | None = None
) -> tuple[FrontPoint, ...]:
    """The best plans around the chosen one, from the dense model to the fastest there is."""
    least = menus.latency_ms(menus.cheapest())
    budgets = np.linspace(least * 1.0001, costs.dense_ms, 14)
    points = []
    for budget_ms in [*budgets.tolist(), turn.predicted_ms]:
        choices = knapsack.solve(menus.scaled, menus.whole.room_ms(budget_ms))
        chosen = budget_ms == turn.predicted_ms
        if chosen:
            choices = menus.indices(turn.choices)
        spent_ms = menus.latency_ms(choices)
        points.append(
            FrontPoint(
                budget_ms=budget_ms,
                predicted_speedup=costs.dense_ms / spent_ms,
                energy_mj=energy_budget.predicted_mj(job, spent_ms, menus.named(choices), prices),
                error=knapsack.totals(menus.prior, choices)[1],
                loss=turn.loss if chosen else None,
                chosen=chosen,
            )
        )
    return tuple(sorted(points, key=lambda point: point.predicted_speedup))
