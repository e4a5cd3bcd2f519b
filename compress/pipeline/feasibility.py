"""Refuse requests that cannot be met before the expensive stages run.

Statistics and candidates are most of the work of a run, and a budget that no plan meets needs neither. The
fastest plan is known from the prices. If the budget is close to its predicted speedup, a model of its shapes
alone is built and timed, which takes seconds.
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

# As shares of the largest predicted speedup: up to the first a request is accepted and beyond the second
# refused, both without timing.
ACCEPT_SHARE, REFUSE_SHARE = 0.75, 1.5
INSTEAD = "Use --moves structure, which removes whole heads and neurons and gains on every target"
ZEROS = "; onnxruntime does not skip zeros"


def check_moves(job: Job) -> None:
    """Report moves that no site supports on the target; refuse the request if no move is left.

    Raises:
        CompressError: no requested move is supported.
    """
    moves, name = job.recipe.options.moves, job.profile.name
    idle = [
        move
        for move in moves
        if formats.MOVES[move].implementation
        and not any(apply.offered_forms(site, (move,), job.runtime) for site in job.sites)
    ]
    lines = [f"{move} is not supported on {name}: {job.runtime.explain_refusal(move)}" for move in idle]
    if idle and len(idle) == len(moves):
        reasons = "".join(f"\n  {line}." for line in lines)
        raise CompressError(f"--moves {','.join(moves)} leaves no option:{reasons}\n  {INSTEAD}")
    for line in lines:
        job.stages.progress.say(f"{line}; the other moves are used")


def check(job: Job, costs: Costs, asked: float) -> None:
    """Refuse a budget that no plan meets, by the prices and, if these are not decisive, by one timing.

    Args:
        job: the request.
        costs: its prices.
        asked: the budget as a speedup, 0 for budgets of another kind.

    Raises:
        CompressError: no move saves time or bytes.
        OutOfReachError: even the fastest, or smallest, plan does not meet the budget.
    """
    nothing = {site.name: dict.fromkeys([o.key for o in costs.options(site)], 0.0) for site in job.sites}
    table = plan_search.build_table(job, costs, nothing)
    if all(len(options) == 1 for options in table.options):
        raise CompressError(_no_gain(job, costs))
    if job.recipe.budget.size_mb is not None:
        _check_size(job, table, job.recipe.budget.size_mb)
    if asked == 0.0:
        return
    predicted = costs.dense_ms / table.latency_ms(table.cheapest())
    if asked <= ACCEPT_SHARE * predicted or (job.backend is None and asked <= predicted):
        return
    timing = None if asked > REFUSE_SHARE * predicted else _fastest(job, table)
    if timing is None and asked <= REFUSE_SHARE * predicted and job.backend is not None:
        return  # no timing without weights: left to the closed loop
    if timing is None or timing.interval95[1] < asked:
        raise closed_loop.unreachable(table, asked, costs.dense_ms, timing)


def _check_size(job: Job, table: CandidateTable, asked_mb: float) -> None:
    """Refuse a size that the dense model already meets, or that the smallest plan does not."""
    dense_mb = (job.dense_file).stat().st_size / 1e6
    if dense_mb <= asked_mb:
        raise CompressError(
            f"--size-mb {asked_mb:g} is already met: the dense model takes {dense_mb:.1f} MB; there is "
            "nothing to compress"
        )
    plan_search.size_costs(job, table)


def _no_gain(job: Job, costs: Costs) -> str:
    """The message when options were priced and none of them is faster or smaller."""
    moves, name = job.recipe.options.moves, job.profile.name
    source = f"({costs.source}{', an estimate' if costs.source == 'estimated' else ''})"
    lines = [
        f"{form}: {attribution.span(gains)} as fast as dense on a whole site {source}"
        + (ZEROS if formats.nm_of(form) else "")
        for form, gains in attribution.by_form(costs.gains).items()
    ]
    lines += [f"{form}: could not be timed at any site here" for form in costs.untimed]
    return (
        f"--moves {','.join(moves)} gains nothing on {name}:\n  "
        + "\n  ".join(lines)
        + f"\n  An option is used from {1 / MAX_COST_SHARE:.2f}x on. {INSTEAD}"
    )


def _fastest(job: Job, table: CandidateTable) -> Timing | None:
    """Timing of the fastest plan against the dense model, built by its shapes with arbitrary weights.

    None if the target is not this machine, or if the plan has quantized, sparse or low-rank sites, whose
    weights do not exist yet.
    """
    backend = job.backend
    chosen = table.named(table.cheapest())
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
