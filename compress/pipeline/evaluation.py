"""What the shipped file really does: its latency, its answers, its score; gathered into the report."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compress import __version__
from compress.cost import latency_table
from compress.export import generation
from compress.export.backends import onnxruntime, parity
from compress.export.backends.backend import Backend
from compress.ir import Option
from compress.measure import timing
from compress.measure.timing import Comparison
from compress.measure.verify_on_device import TOLERANCES
from compress.methods import quantized_layers
from compress.methods.quantized_parity import LayerwiseParityRunner
from compress.pipeline import attribution, energy_budget, model_files
from compress.pipeline.energy_budget import Prices
from compress.pipeline.job import Job
from compress.pipeline.pricing import Costs
from compress.recipe import Phase
from compress.report import provenance, schema
from compress.report.schema import (
    ClassScore,
    Figures,
    Measured,
    Parity,
    Phases,
    PhaseTimes,
    Predicted,
    Report,
    Samples,
    Score,
    Target,
    Verdict,
)
from compress.search.closed_loop import CandidateTable, Iteration, SearchHistory, Timing
from compress.sites.prune import Removal
from compress.tasks import class_accuracy
from compress.tasks.task import Task, lost_between

FLOAT = "fp32"  # the precision of exported weights without a form
STEPS = 16  # tokens that are read one by one when a cache is verified


def compare(
    job: Job, backend: Backend, model: nn.Module, file: Path, *, blocks: int, phase: Phase | None = None
) -> Comparison:
    """The dense model and another one, timed in turn on the job's example, in the phase asked for.

    Where files are not what runs, as in torch on a GPU, the modules are timed.
    """
    base = job.baseline
    wanted = job.recipe.bench
    named = f"time {file.stem}" if phase is None else f"time {phase}"
    with (
        model_files.opened(base, backend, base.task.model, base.dense_file) as dense,
        model_files.opened(job, backend, model, file) as quick,
        job.stages(named) as tick,
    ):
        return timing.compare(
            {
                "dense": model_files.timed(job, dense, phase),
                "compressed": model_files.timed(job, quick, phase),
            },
            blocks=blocks,
            block_ms=wanted.block_ms,
            threads=wanted.threads,
            seed=job.recipe.search.seed,
            progress=tick,
        )


def timing_of(comparison: Comparison) -> Timing:
    """The figures of a comparison that the closed loop needs."""
    ratio = comparison.ratio("compressed")
    return Timing(
        speedup=ratio.value,
        interval95=ratio.interval.ends,
        dense_ms=comparison.latency("dense").p50,
        measured_ms=comparison.latency("compressed").p50,
    )


def check_parity(job: Job, model: nn.Module, file: Path) -> Parity:
    """The torch model, low precision emulated, against the file that ships, at several padded shapes.

    Where products are in low precision each is compared on what the file's product reads
    (see `quantized_parity`).
    A decoder must agree both in one run and when it reads its input token by token; in low precision
    only in one run, since inputs are rounded by the range of all that is seen at once.

    Raises:
        CompressError: they disagree by more than the tolerance.
    """
    threads = job.recipe.bench.threads
    tensors = job.task.output_tensors
    examples = parity.padded_examples(job.task.example, job.recipe.shapes.tokens)
    with job.stages("verify"), onnxruntime.OrtRunner(file, threads=threads) as runner:
        if _rounded(model):
            with LayerwiseParityRunner(model, file, tensors, threads=threads) as lead:
                found = parity.parity(lead, runner, examples)
            return Parity(**found.model_dump(), products=lead.products, product_difference=lead.apart)
        with onnxruntime.TorchRunner(model, tensors) as reference:
            found = parity.parity(reference, runner, examples)
            if not job.decodes:
                return Parity(**found.model_dump())
            few = parity.padded_examples(job.task.example, min(STEPS, job.recipe.shapes.tokens))
            steps = parity.parity(reference, generation.Stepwise(runner, job.task.outputs[0]), few)
    return Parity(
        max_abs_difference=max(found.max_abs_difference, steps.max_abs_difference),
        tolerance=max(found.tolerance, steps.tolerance),
        agreement=min(found.agreement, steps.agreement),
        inputs=found.inputs + steps.inputs,
    )


def _agreement(job: Job, expected: nn.Module, model: nn.Module, file: Path) -> list[str]:
    """How far what was timed is from what is expected, where it is not the file that was timed."""
    if job.backend is None:
        return []
    examples = parity.padded_examples(job.task.example, job.recipe.shapes.tokens)
    layers = [module for module in expected.modules() if isinstance(module, quantized_layers.QuantizedLinear)]
    kernels = [layer.format.kernel for layer in layers if layer.format.rounds_inputs]
    rounding = max((TOLERANCES[kernel] for kernel in kernels if kernel in TOLERANCES), default=0.0)
    opened = partial(model_files.opened, job, job.backend, model, file)
    return job.backend.agreement(expected, opened, job.task.output_tensors, examples, rounding=rounding)


def _rounded(model: nn.Module) -> bool:
    """Whether products in low precision are emulated in a model."""
    layers = [one for one in model.modules() if isinstance(one, quantized_layers.QuantizedLinear)]
    return any(layer.format.rounds_inputs for layer in layers)


def phases(job: Job, model: nn.Module, file: Path, comparison: Comparison | None) -> Phases | None:
    """Both phases of a decoder; the one that was not asked for is timed here, for a turn of the loop."""
    backend = job.backend
    if not job.decodes or comparison is None or backend is None:
        return None
    asked = job.recipe.shapes.phase
    other: Phase = "prefill" if asked == "decode" else "decode"
    taken = {
        asked: comparison,
        other: compare(job, backend, model, file, blocks=job.recipe.bench.blocks, phase=other),
    }

    def times(side: str) -> PhaseTimes:
        return PhaseTimes(ttft_ms=taken["prefill"].latency(side), per_token_ms=taken["decode"].latency(side))

    def faster(phase: Phase) -> Measured:
        ratio = taken[phase].ratio("compressed")
        return Measured(speedup=ratio.value, interval95=ratio.interval.ends)

    return Phases(
        asked=asked,
        tokens=job.task.example(1, job.recipe.shapes.tokens)["input_ids"].shape[1],
        dense=times("dense"),
        compressed=times("compressed"),
        ttft=faster("prefill"),
        per_token=faster("decode"),
    )


@dataclass(frozen=True)
class Judged:
    """A score on the test split, and what came of every input where the task's score is made of that.

    `classes` holds the class that a classifier gives every input, None for other tasks.
    """

    score: float
    outcomes: NDArray[np.float64] | None
    classes: NDArray[np.int64] | None = None


def judged(job: Job, file: Path) -> Judged:
    """The task's score on its test split, computed on the file."""
    with (
        job.stages(f"score {file.stem}"),
        onnxruntime.OrtRunner(file, threads=timing.physical_cores()) as runner,
    ):
        logits: list[NDArray[np.generic]] = []

        def infer(inputs: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
            logits.append(job.task.join(runner.infer(inputs)))
            return logits[-1]

        # A score of a user's own need not be made of outcomes.
        if getattr(job.task.score, "__func__", None) is not Task.score:
            return Judged(job.task.score(infer), None)
        outcomes = job.task.outcomes(infer)
    return Judged(
        job.task.scored(outcomes), outcomes, class_accuracy.predicted(job.task, logits, len(outcomes))
    )


def figures(
    job: Job,
    model: nn.Module,
    file: Path,
    comparison: Comparison | None,
    side: str,
    score: float,
    saved_bytes: int = 0,
) -> Figures:
    """Everything measured about one artifact; `saved_bytes` is what forms take off its float weights."""
    parameters = sum(p.numel() for p in model.parameters())
    used = None if comparison is None else energy_budget.metered(job, model, file)
    return Figures(
        latency_ms=None if comparison is None else comparison.latency(side),
        score=score,
        parameters=parameters,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()) - saved_bytes,
        file_bytes=file.stat().st_size,
        energy_mj=None if used is None else used.energy_mj,
        energy_source=None if used is None else used.source,
        power_w=energy_budget.average_w(used, job.recipe.budget.rate_hz),
    )


def _saved_bytes(job: Job, turn: Iteration) -> int:
    """How much smaller the weights are in the forms of a plan than as plain floats."""
    saved = 0
    for site in job.sites:
        option = turn.choices[site.name]
        plain = Option(units=option.units)
        saved += latency_table.weight_bytes(site, plain, FLOAT) - latency_table.weight_bytes(
            site, option, FLOAT
        )
    return saved


def assemble(
    job: Job,
    costs: Costs,
    menus: CandidateTable,
    rounds: SearchHistory,
    turn: Iteration,
    files_of: Mapping[str, tuple[nn.Module, Path]],
    removals: Mapping[str, Removal],
    comparison: Comparison | None,
    notes: list[str],
    prices: Prices | None = None,
) -> Report:
    """Check, score and gather: the report of one finished compilation."""
    with job.stages.accounted("check and report"):
        found = _assembled(job, costs, menus, rounds, turn, files_of, removals, comparison, notes, prices)
    stages, seconds = tuple(job.stages.seconds), job.stages.wall_seconds()
    return found.model_copy(update={"stages": stages, "wall_seconds": seconds})


def _assembled(
    job: Job,
    costs: Costs,
    menus: CandidateTable,
    rounds: SearchHistory,
    turn: Iteration,
    files_of: Mapping[str, tuple[nn.Module, Path]],
    removals: Mapping[str, Removal],
    comparison: Comparison | None,
    notes: list[str],
    prices: Prices | None,
) -> Report:
    """The report, all but its stages."""
    shrunk, shipped = files_of["compressed"]
    emulated = quantized_layers.emulated(shrunk, job.sites, removals)
    agreement = check_parity(job, emulated, shipped)
    shaped = model_files.deployed(job, shrunk, removals)
    warnings = _agreement(job, emulated, shaped, shipped)
    if comparison is not None:
        warnings += timing.timing_warnings(comparison.drift, comparison.settled, comparison.elsewhere)
    before, after = judged(job, files_of["dense"][1]), judged(job, shipped)
    dense = figures(job, *files_of["dense"], comparison, "dense", before.score)
    quick = figures(job, shaped, shipped, comparison, "compressed", after.score, _saved_bytes(job, turn))
    drop = before.score - after.score if job.task.higher_is_better else after.score - before.score
    sites, target = attribution.site_reports(job, costs, menus, turn), _target(job)
    dense = dense.model_copy(update={"precision": target.precision})
    quick = quick.model_copy(update={"precision": schema.precision(target, sites)})
    measured = None
    if comparison is not None:
        ratio = comparison.ratio("compressed")
        measured = Measured(speedup=ratio.value, interval95=ratio.interval.ends)
    predicted_ms = turn.predicted_ms
    asked = job.recipe.budget
    status, reason = schema.judge(asked, measured, quick, drop, job.recipe.max_drop)
    steps = schema.steps(
        costs.dense_ms if comparison is None else comparison.latency("dense").p50,
        predicted_ms if comparison is None else comparison.latency("compressed").p50,
        sites,
    )
    origin = job.task.origin.get("test")
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=job.recipe.model or "embedded default (CLINC150 intents)",
        task=job.task.name,
        target=target,
        verdict=Verdict(
            status=status,
            asked=asked,
            measured=measured,
            predicted=Predicted(
                speedup=costs.dense_ms / predicted_ms,
                latency_ms=predicted_ms,
                baseline_latency_ms=costs.dense_ms,
                energy_mj=energy_budget.predicted_mj(job, predicted_ms, turn.choices, prices),
                power_w=energy_budget.predicted_w(job, turn, prices),
                source="measured table" if job.here else "roofline",
            ),
            score_drop=drop,
            score_drop_interval95=_drop_interval(job, before, after),
            reason=reason,
        ),
        max_drop=job.recipe.max_drop,
        reachable_speedup=costs.dense_ms / menus.latency_ms(menus.cheapest()),
        baseline=dense,
        compressed=quick,
        score=Score(
            metric=job.task.metric,
            split="test" if origin is None else f"test ({origin})",
            samples=job.task.samples.get("test", 0),
            higher_is_better=job.task.higher_is_better,
        ),
        parity=agreement,
        sites=sites,
        rounds=tuple(_round(one, shipped=one == turn) for one in rounds.rounds),
        front=attribution.front(job, costs, menus, turn, prices),
        samples=Samples()
        if comparison is None
        else Samples(
            baseline=timing.thin(comparison.samples("dense"), schema.MOST_SAMPLES),
            compressed=timing.thin(comparison.samples("compressed"), schema.MOST_SAMPLES),
        ),
        waterfall=steps,
        phases=phases(job, shaped, shipped, comparison),
        fixed_ms=costs.fixed_ms,
        attribution=(*attribution.untouched(job, costs), *attribution.gains(costs, turn)),
        warnings=tuple(warnings),
        notes=tuple(notes),
        classes=_class_scores(job, before, after),
        dense_agreement=class_accuracy.agreement(before.classes, after.classes),
        command=provenance.command_line(),
        revision=provenance.revision(),
        environment=timing.environment()
        | ({} if job.backend is None else job.backend.environment())
        | {"compress": __version__},
        protocol={} if comparison is None else comparison.protocol.model_dump(),
        inputs={
            "model_and_shapes": job.baseline.model_key,
            "data_and_options": job.baseline.key,
            "file_sha256": onnxruntime.sha256(files_of["compressed"][1]),
            "dense_sha256": onnxruntime.sha256(files_of["dense"][1]),
        },
    )


def _target(job: Job) -> Target:
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    shape = next(iter(example.values())).shape
    backend = job.backend
    names = ("batch", "tokens") if len(shape) == 2 else ("batch", "channels", "height", "width")
    facts = {} if backend is None else backend.facts()
    return Target(
        name=job.profile.name,
        runtime=job.profile.runtime if backend is None else backend.runtime,
        runtime_version=None if backend is None else str(facts["version"]),
        provider=None if backend is None else str(facts["provider"]),
        threads=backend.threads if backend is not None and "threads" in facts else None,
        precision=job.profile.baseline_precision if backend is None else backend.precision,
        shapes=dict(zip(names, shape, strict=False)),
        phase=job.recipe.shapes.phase if job.decodes else None,
    )


def _class_scores(job: Job, before: Judged, after: Judged) -> tuple[ClassScore, ...]:
    found = class_accuracy.by_class(job.task, before.classes, after.classes)
    return tuple(ClassScore(**one._asdict()) for one in found)


def _drop_interval(job: Job, before: Judged, after: Judged) -> tuple[float, float] | None:
    if before.outcomes is None or after.outcomes is None:
        return None
    return lost_between(job.task, before.outcomes, after.outcomes)


def _round(turn: Iteration, *, shipped: bool) -> schema.Round:
    return schema.Round(
        budget_ms=turn.limit_ms,
        predicted_ms=turn.predicted_ms,
        measured_ms=None if turn.timing is None else turn.timing.measured_ms,
        measured_speedup=None if turn.timing is None else turn.timing.speedup,
        shipped=shipped,
    )
