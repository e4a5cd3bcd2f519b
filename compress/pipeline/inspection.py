"""What can be said without compiling: the sites of a model, what is reachable, how fast files are."""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from compress import profiles
from compress.errors import CompressError
from compress.export import generation
from compress.export.backends import onnxruntime
from compress.export.backends.select import backend_for, device_here, target_here
from compress.export.onnx.kv_cache import PAST, POSITIONS
from compress.ir import Option, Site
from compress.measure import timing
from compress.methods import hidden_width
from compress.pipeline import block_patterns, feasibility, plan_search, width_search
from compress.pipeline.block_patterns import Patterns
from compress.pipeline.job import Job, prepare
from compress.pipeline.pricing import Costs, latency_table_of, price, wanted_levels
from compress.recipe import Recipe, Shapes
from compress.report.overviews import (
    BenchResult,
    BlockTiming,
    Inspection,
    OptionOverview,
    PlanOverview,
    PlanRow,
    SiteOverview,
    SkippedPlace,
    TimedArtifact,
)
from compress.report.progress import Progress
from compress.search import knapsack
from compress.search.closed_loop import CandidateTable
from compress.sites import discovery
from compress.sites.kinds import kind_of
from compress.tasks.task import Task

DEFAULT_MODEL = "embedded default"
SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


def inspect(name: str, module: nn.Module, example: dict[str, Tensor]) -> Inspection:
    """The sites of a model, from the model alone: no data, no tokenizer.

    The hidden width, in which all others lie, comes last; `parameters_in_sites` counts none twice.

    Args:
        name: what the model is called in the result.
        module: the model.
        example: inputs by argument name, of the shape that shares of work are stated for.
    """
    found = discovery.find_sites(module, example)
    skipped = [SkippedPlace(place=skip.place, reason=skip.reason) for skip in found.skipped]
    owned = {site: site.parameters for site in found.sites}
    inside = {matmul.weight for site in found.sites for matmul in site.matmuls}
    try:
        stream = hidden_width.site_of(hidden_width.find_stream(module, example))
    except CompressError as refusal:
        skipped.append(SkippedPlace(place="residual", reason=str(refusal)))
    else:
        stored = module.state_dict(keep_vars=True)
        tensors = {id(stored[part.tensor]): stored[part.tensor].numel() for part in stream.slices}
        shared = tuple(matmul for matmul in stream.matmuls if matmul.weight in inside)
        owned[stream.model_copy(update={"matmuls": shared})] = sum(tensors.values())
    parameters = sum(p.numel() for p in module.parameters())
    everything = max(1, sum(kind_of(site).multiplications(site) for site in found.sites))
    return Inspection(
        model=name,
        sites=tuple(
            SiteOverview(
                name=site.name,
                kind=site.kind,
                units=site.units,
                parameters=own,
                weights_share=round(own / parameters, 4),
                multiplications_share=round(kind_of(site).multiplications(site) / everything, 4),
                can_be_dropped=site.drop is not None,
            )
            for site, own in owned.items()
        ),
        parameters=parameters,
        parameters_in_sites=sum(site.parameters for site in found.sites),
        skipped=tuple(skipped),
        fallback=found.fallback or "",
    )


def plan(recipe: Recipe, progress: Progress, task: Task | None = None) -> PlanOverview:
    """What is reachable on the target, by which move, and at what layer error; builds nothing.

    Everything in it is an estimate: errors are those of single sites, times come from the table.
    """
    job = prepare(recipe, progress, task)
    stream = width_search.requested_stream(job)
    feasibility.check_moves(job)
    costs = price(job)
    menus = plan_search.build_table(job, costs, plan_search.build_candidates(job, costs))
    reachable = {"everything": _reach(costs, menus)}
    for kind in sorted(set(menus.kinds)):
        reachable[f"{kind} alone"] = _reach(costs, menus, only=kind)
    rows: dict[tuple[int, ...], PlanRow] = {}  # one for each plan: several speedups may share one
    for speedup in SPEEDUPS:
        with contextlib.suppress(knapsack.UnreachableError):
            choices = knapsack.solve(menus.prior, menus.whole.room_ms(costs.dense_ms / speedup))
            rows.setdefault(tuple(choices), _row(job, costs, menus, choices))
    width = _offered(job) if stream is None else width_search.estimate_widths(job, stream, costs.dense_ms)
    return PlanOverview(
        model=recipe.model or DEFAULT_MODEL,
        target=recipe.target,
        source=costs.source,
        dense_ms=round(costs.dense_ms, 4),
        outside_sites_ms=round(costs.fixed_ms, 4),
        reachable_speedup_estimate={name: round(value, 3) for name, value in reachable.items()},
        forms=_forms(costs),
        blocks=_blocks(block_patterns.find_patterns(job)),
        hidden_width=width,
        plans=tuple(rows.values()),
    )


def _offered(job: Job) -> str:
    """What the move that was not asked for could do, in a line."""
    try:
        stream = width_search.find_stream(job)
    except CompressError as refusal:
        return f"stays: {refusal}"
    return (
        f"{stream.width}, and can be cut: --moves {','.join([*job.recipe.options.moves, width_search.MOVE])}"
    )


def _forms(costs: Costs) -> tuple[OptionOverview, ...]:
    """How much faster whole sites run on the target in every form that was priced."""
    gains: dict[str, list[float]] = {}
    for row in costs.gains.values():
        for form, gain in row.items():
            gains.setdefault(form, []).append(gain)
    return tuple(
        OptionOverview(
            form=form,
            slowest_site_speedup=round(min(found), 3),
            fastest_site_speedup=round(max(found), 3),
            pays=any(form in row for row in costs.rows.values()),
        )
        for form, found in sorted(gains.items())
    )


def _blocks(found: Patterns) -> tuple[BlockTiming, ...]:
    """The time of every product in blocks, in their fastest layout, and whether the search may take it.

    Timed on this machine; a target that is not here has no such rows.
    """
    rows: dict[tuple[object, ...], BlockTiming] = {}
    for offer in found.sites.values():
        for one in offer.products:
            key = (one.out, one.inner, one.rows, one.pattern)
            offered = one.pattern in offer.patterns or (key in rows and rows[key].offered)
            rows[key] = BlockTiming(
                product=f"{one.out}x{one.inner}",
                rows=one.rows,
                pattern=one.pattern,
                layout=one.layout,
                speedup=round(one.speedup, 2),
                offered=offered,
            )
    return tuple(rows.values())


def _reach(costs: Costs, menus: CandidateTable, only: str | None = None) -> float:
    """The speedup when everything (of one kind) is taken to its cheapest option."""
    spent = sum(
        float(menu.cost.min() if only in (None, kind) else menu.cost.max())
        for kind, menu in zip(menus.kinds, menus.prior, strict=True)
    )
    return costs.dense_ms / menus.whole.latency_ms(spent)


def _row(job: Job, costs: Costs, menus: CandidateTable, choices: tuple[int, ...]) -> PlanRow:
    """A plan in one row."""
    chosen = menus.named(choices)
    kept = {}
    for kind in sorted(set(menus.kinds)):
        own = [site for site in job.sites if site.kind == kind]
        units = sum(_kept(site, chosen[site.name]) for site in own)
        kept[kind] = round(units / sum(site.units for site in own), 3)
    counted = Counter(option.form for option in chosen.values())
    untouched = all(option == Option() for option in chosen.values())  # no error was computed for it
    error = None if untouched else knapsack.totals(menus.prior, choices)[1] / len(choices)
    return PlanRow(
        speedup_estimate=round(costs.dense_ms / menus.latency_ms(choices), 3),
        latency_ms_estimate=round(menus.latency_ms(choices), 4),
        mean_layer_error=None if error is None else float(f"{error:.3g}"),
        kept=kept,
        forms=", ".join(f"{count} x {form}" for form, count in sorted(counted.items())),
    )


def _kept(site: Site, option: Option) -> int:
    return site.units if option.units is None else option.units


def time_files(
    paths: Sequence[str], shapes: Shapes, threads: int, blocks: int, progress: Progress
) -> BenchResult:
    """Interleaved latency of ONNX files or output directories; ratios are to the first."""
    files = [_file(Path(path)) for path in paths]
    names = [path.rstrip("/") for path in paths]
    if len(set(names)) < len(names):
        raise CompressError("a file was named twice; interleaved timing needs different files")
    with ExitStack() as stack:
        calls = {}
        for name, file in zip(names, files, strict=True):
            runner = stack.enter_context(onnxruntime.OrtRunner(file, threads=threads))
            calls[name] = runner.timed(_inputs(runner, shapes))
        tick = stack.enter_context(progress.stage("time"))
        found = timing.compare(calls, blocks=blocks, threads=threads, progress=tick)
    rows = []
    for name in names:
        ratio = found.ratio(name)
        rows.append(
            TimedArtifact(
                artifact=name,
                speedup=round(ratio.value, 4),
                interval95=(round(ratio.interval.low, 4), round(ratio.interval.high, 4)),
                **found.latency(name).model_dump(),
            )
        )
    return BenchResult(
        artifacts=tuple(rows),
        shapes=shapes,
        protocol=found.protocol.model_dump(),
        drift=round(found.drift, 4),
        environment=timing.environment(),
    )


def _file(path: Path) -> Path:
    """The ONNX file that a path means."""
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        raise CompressError(f"{file} does not exist; give an .onnx file or an output directory")
    return file


def _inputs(runner: onnxruntime.OrtRunner, shapes: Shapes) -> dict[str, np.ndarray]:
    """Inputs that suit a file: ones where integers are wanted, noise for real numbers."""
    random = np.random.default_rng(0)
    made = {}
    known = runner.inputs()
    decoder = any(name.startswith(PAST) for name in known)
    for name, (kind, shape) in known.items():
        if decoder and (name.startswith(PAST) or name == POSITIONS):
            continue
        free = iter((shapes.batch, shapes.tokens))
        sizes = [size if isinstance(size, int) else next(free, shapes.tokens) for size in shape]
        made[name] = (
            random.standard_normal(sizes).astype(kind)
            if np.issubdtype(kind, np.floating)
            else np.ones(sizes, kind)
        )
    if decoder:
        return generation.inputs_of(runner, made, shapes.phase)
    if shapes.phase == "decode":
        raise CompressError(f"{runner.path} has no key-value cache to decode with; leave out --phase")
    return made


def measure_target(
    progress: Progress, target: str | None = None, model: str | None = None, shapes: Shapes | None = None
) -> dict[str, object]:
    """Time the sites of a model on this machine or its GPU, and keep the table for later runs.

    Args:
        progress: where it says what it is doing.
        target: the GPU that is here, or the processor when there is none, unless named.
        model: `package.module:factory`; the embedded default unless given.
        shapes: of the inputs.

    Raises:
        CompressError: the target is another device than this one.
    """
    name = target or target_here().name
    asked = {"target": name, "budget": {"speedup": 2.0}, "model": model}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate(asked | {"shapes": shapes or Shapes(), "out": f"{folder}/out"})
        if backend_for(profiles.load(name), recipe.bench.threads) is None:
            raise CompressError(
                f"--target {name} cannot be measured here: this machine has {device_here()}.\n"
                "  Leave out --target to measure what is here, or run this on that device"
            )
        job = prepare(recipe, progress)
        assert job.backend is not None, "it was there a moment ago"
        offered = block_patterns.find_patterns(job)
        table = latency_table_of(job, job.backend, wanted_levels(job, offered), offered)
    return {"target": name, **table.model_dump(mode="json", exclude={"schema_version"})}
