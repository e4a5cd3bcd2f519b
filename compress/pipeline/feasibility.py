"""What cannot be had, told before anything is computed for it: from the request, then from its prices.

Statistics and candidates are most of a run's work, and a budget that no plan keeps needs none of them. The
fastest plan is known from the prices; where the budget is near what is predicted of it, its shapes alone are
built and timed, which takes seconds.
"""

import torch

from compress import formats
from compress.errors import CompressError
from compress.ir import Option
from compress.methods import apply
from compress.pipeline import attribution, evaluation, model_files, plan_search
from compress.pipeline.job import Job
from compress.pipeline.pricing import MAX_COST_SHARE, Costs
from compress.search import closed_loop
from compress.search.closed_loop import CandidateTable, Timing
from compress.sites import prune
from compress.sites.prune import Removal

NEAR, FAR = 0.75, 1.5  # of the predicted reach: below nothing is in doubt, beyond nothing is worth timing
INSTEAD = "Ask for --moves structure, which removes whole heads and neurons and pays everywhere"
ZEROS = "; onnxruntime multiplies zeros like any other number"


def check_moves(job: Job) -> None:
    """Say which moves no site can take on the target; refuse the request when that is all of them.

    Raises:
        CompressError: there is nothing to choose from.
    """
    moves, name = job.recipe.options.moves, job.profile.name
    idle = [
        move
        for move in moves
        if formats.MOVES[move].implementation
        and not any(apply.offered_forms(site, (move,), job.runtime) for site in job.sites)
    ]
    lines = [f"{move} is not possible on {name}: {job.runtime.explain_refusal(move)}" for move in idle]
    if idle and len(idle) == len(moves):
        told = "".join(f"\n  {line}." for line in lines)
        raise CompressError(f"--moves {','.join(moves)} leaves nothing to choose from:{told}\n  {INSTEAD}")
    for line in lines:
        job.stages.progress.say(f"{line}; the other moves are used")


def check(job: Job, costs: Costs, asked: float) -> None:
    """Refuse a budget that no plan keeps, from its prices, and where they leave doubt from one timing.

    Args:
        job: what is asked.
        costs: its prices.
        asked: the budget as a speedup, 0 for one of another kind.

    Raises:
        CompressError: no move saves anything.
        OutOfReachError: the fastest plan, or the smallest, is not enough.
    """
    nothing = {site.name: dict.fromkeys([o.key for o in costs.options(site)], 0.0) for site in job.sites}
    menus = plan_search.build_table(job, costs, nothing)
    if all(len(options) == 1 for options in menus.options):
        raise CompressError(_no_gain(job, costs))
    if job.recipe.budget.size_mb is not None:
        _check_size(job, menus, job.recipe.budget.size_mb)
    if asked == 0.0:
        return
    predicted = costs.dense_ms / menus.latency_ms(menus.cheapest())
    if asked <= NEAR * predicted or (job.backend is None and asked <= predicted):
        return
    timing = None if asked > FAR * predicted else _fastest(job, menus)
    if timing is None and asked <= FAR * predicted and job.backend is not None:
        return  # only the loop can tell
    if timing is None or timing.interval95[1] < asked:
        raise closed_loop.unreachable(menus, asked, costs.dense_ms, timing)


def _check_size(job: Job, menus: CandidateTable, asked_mb: float) -> None:
    """Refuse a size that the dense model keeps, or that the smallest plan does not."""
    dense_mb = (job.dense_file).stat().st_size / 1e6
    if dense_mb <= asked_mb:
        raise CompressError(
            f"--size-mb {asked_mb:g} is already kept: the dense model takes {dense_mb:.1f} MB; there is "
            "nothing to compress"
        )
    plan_search.size_costs(job, menus)


def _no_gain(job: Job, costs: Costs) -> str:
    """Why there is nothing to choose from although sites were looked at in some form."""
    moves, name = job.recipe.options.moves, job.profile.name
    said = f"({costs.source}{', an estimate' if costs.source == 'estimated' else ''})"
    lines = [
        f"{form}: {attribution.span(gains)} as fast as dense on a whole site {said}"
        + (ZEROS if formats.nm_of(form) else "")
        for form, gains in attribution.by_form(costs.gains).items()
    ]
    lines += [f"{form}: no site could be timed in it here" for form in costs.untimed]
    return (
        f"--moves {','.join(moves)} gains nothing on {name}, so there is nothing to choose from:\n  "
        + "\n  ".join(lines)
        + f"\n  A form is taken from {1 / MAX_COST_SHARE:.2f}x on. {INSTEAD}"
    )


def _fastest(job: Job, menus: CandidateTable) -> Timing | None:
    """The fastest plan timed against the dense model: its shapes, with whatever weights are there.

    None where nothing is timed here, or where the plan runs in forms, which need their weights.
    """
    backend = job.backend
    chosen = menus.named(menus.cheapest())
    if backend is None or any(option.form != "dense" and option.units != 0 for option in chosen.values()):
        return None
    removals = {
        site.name: Removal(kept=torch.arange(_kept(chosen[site.name], site.units)))
        for site in job.sites
        if _kept(chosen[site.name], site.units) < site.units
    }
    model = prune.shrink(job.task.model, job.sites, removals)
    file = job.work / "fastest.onnx"

    def write() -> None:
        with job.stages("export fastest"):
            model_files.write(job, model, file)

    model = backend.build(model, write=write)
    found = evaluation.timing_of(
        evaluation.compare(job, backend, model, file, blocks=job.recipe.bench.blocks)
    )
    file.unlink(missing_ok=True)
    return found


def _kept(option: Option, units: int) -> int:
    return units if option.units is None else option.units
