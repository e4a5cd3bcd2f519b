"""What the shipped file really does: its latency, its answers, its score; gathered into the report."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compress import __version__, bench, energy, power, report, search
from compress.bench import Comparison
from compress.export import device, runners, verify
from compress.export.place import Place
from compress.job import Job
from compress.loop import Menus, Round, Rounds, Timing
from compress.power import Prices
from compress.pricing import Costs
from compress.report import (
    Chosen,
    Figures,
    FrontPoint,
    Measured,
    Parity,
    Predicted,
    Report,
    Samples,
    Score,
    SiteReport,
    Target,
    Verdict,
)


def compare(job: Job, place: Place, model: nn.Module, file: Path, *, blocks: int) -> Comparison:
    """The dense model and another one, timed in turn on the job's example: files, or modules on a GPU."""
    wanted, task = job.recipe.bench, job.task
    inputs = _inputs(job)
    with (
        place.runner(task.model, job.folder / "dense.onnx", task.logits, task.output_name) as dense,
        place.runner(model, file, task.logits, task.output_name) as quick,
        job.stages(f"time {file.stem}") as tick,
    ):
        return bench.compare(
            {"dense": dense.timed(inputs), "compressed": quick.timed(inputs)},
            blocks=blocks,
            block_ms=wanted.block_ms,
            threads=wanted.threads,
            seed=job.recipe.search.seed,
            progress=tick,
        )


def _inputs(job: Job) -> dict[str, runners.Array]:
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    return {name: tensor.numpy() for name, tensor in example.items()}


def timing(comparison: Comparison) -> Timing:
    """The figures of a comparison that the closed loop needs."""
    ratio = comparison.ratio("compressed")
    return Timing(
        speedup=ratio.value,
        interval95=(ratio.low, ratio.high),
        dense_ms=comparison.latency("dense").p50,
        measured_ms=comparison.latency("compressed").p50,
    )


def parity(job: Job, model: nn.Module, file: Path) -> Parity:
    """The torch model against the file that ships, at several shapes, with padding.

    Raises:
        CompressError: they disagree by more than the tolerance.
    """
    with (
        job.stages("verify"),
        runners.TorchRunner(model, job.task.logits, job.task.output_name) as reference,
        runners.OrtRunner(file, threads=job.recipe.bench.threads) as runner,
    ):
        found = verify.parity(
            reference, runner, verify.padded_examples(job.task.example, job.recipe.shapes.tokens)
        )
    return Parity(**found.model_dump())


def agreement_there(job: Job, model: nn.Module, file: Path) -> list[str]:
    """How far the model that was timed on a GPU is from float32, as a note; nothing to say of a file.

    Raises:
        CompressError: they disagree by more than the precision explains.
    """
    place, task = job.place, job.task
    if place is None or place.by_file:
        return []
    with (
        job.stages("verify on the GPU"),
        runners.TorchRunner(model, task.logits, task.output_name) as reference,
        place.runner(model, file, task.logits, task.output_name) as runner,
    ):
        found = verify.parity(
            reference,
            runner,
            verify.padded_examples(task.example, job.recipe.shapes.tokens),
            relative=device.TOLERANCES[place.precision],
        )
    return [
        f"What was timed is the torch model in {place.precision} ({place.runtime}), not the ONNX file: its "
        f"answers are at most {found.max_abs_difference:.2g} away from float32, {found.agreement:.1%} agree."
    ]


def score(job: Job, file: Path) -> float:
    """The task's score on its test split, computed on the file."""
    name = job.task.output_name
    with (
        job.stages(f"score {file.stem}"),
        runners.OrtRunner(file, threads=bench.physical_cores()) as runner,
    ):

        def answer(inputs: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
            return runner.infer(inputs)[name]

        return job.task.score(answer)


def figures(job: Job, model: nn.Module, file: Path, comparison: Comparison | None, side: str) -> Figures:
    """Everything measured about one artifact."""
    parameters = sum(p.numel() for p in model.parameters())
    used = None if comparison is None else power.metered(job, model, file)
    rate_hz = job.recipe.budget.rate_hz
    average_w = None
    if used is not None and used.idle_w is not None and rate_hz is not None:
        average_w = used.idle_w + used.energy_mj * rate_hz / 1e3
    return Figures(
        latency_ms=None if comparison is None else comparison.latency(side),
        score=score(job, file),
        parameters=parameters,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        file_bytes=file.stat().st_size,
        energy_mj=None if used is None else used.energy_mj,
        energy_source=None if used is None else used.source,
        power_w=average_w,
    )


def site_reports(job: Job, costs: Costs, menus: Menus, turn: Round) -> tuple[SiteReport, ...]:
    """What was done to every site, and what it costs now."""
    found = []
    for site, options, menu in zip(job.sites, menus.units, menus.prior, strict=True):
        units = turn.units[site.name]
        kept = site.units if units is None else units
        found.append(
            SiteReport(
                name=site.name,
                kind=site.kind,
                option=Chosen(units=kept, units_total=site.units),
                error=float(menu.error[options.index(units)]),
                latency_ms=costs.rows[site.name][kept],
                dense_latency_ms=costs.rows[site.name][site.units],
                source=costs.source,
            )
        )
    return tuple(found)


def front(costs: Costs, menus: Menus, turn: Round) -> tuple[FrontPoint, ...]:
    """The best plans around the chosen one, from the dense model to the fastest there is."""
    least = menus.latency_ms(menus.cheapest())
    budgets = np.linspace(least * 1.0001, costs.dense_ms, 14)
    points = []
    for budget_ms in [*budgets.tolist(), turn.predicted_ms]:
        choices = search.knapsack(menus.scaled, menus.whole.room_ms(budget_ms))
        chosen = budget_ms == turn.predicted_ms
        if chosen:
            choices = menus.indices(turn.units)
        spent_ms = menus.latency_ms(choices)
        points.append(
            FrontPoint(
                budget_ms=budget_ms,
                predicted_speedup=costs.dense_ms / spent_ms,
                error=search.total(menus.prior, choices)[1],
                loss=turn.loss if chosen else None,
                chosen=chosen,
            )
        )
    return tuple(sorted(points, key=lambda point: point.predicted_speedup))


def assemble(
    job: Job,
    costs: Costs,
    menus: Menus,
    rounds: Rounds,
    turn: Round,
    files: Mapping[str, tuple[nn.Module, Path]],
    comparison: Comparison | None,
    notes: list[str],
    prices: Prices | None = None,
) -> Report:
    """Check, score and gather: the report of one finished compilation."""
    agreement = parity(job, *files["compressed"])
    notes = notes + agreement_there(job, *files["compressed"])
    dense = figures(job, *files["dense"], comparison, "dense")
    quick = figures(job, *files["compressed"], comparison, "compressed")
    drop = _drop(job, dense, quick)
    measured = None
    if comparison is not None:
        ratio = comparison.ratio("compressed")
        measured = Measured(speedup=ratio.value, interval95=(ratio.low, ratio.high))
    predicted_ms = turn.predicted_ms
    asked = job.recipe.budget
    status, reason = report.judge(asked, measured, quick, drop, job.recipe.max_drop)
    sites = site_reports(job, costs, menus, turn)
    steps = report.steps(
        costs.dense_ms if comparison is None else comparison.latency("dense").p50,
        predicted_ms if comparison is None else comparison.latency("compressed").p50,
        sites,
    )
    origin = job.task.origin.get("test")
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=job.recipe.model or "embedded default (CLINC150 intents)",
        task=job.task.name,
        target=_target(job),
        verdict=Verdict(
            status=status,
            asked=asked,
            measured=measured,
            predicted=Predicted(
                speedup=costs.dense_ms / predicted_ms,
                latency_ms=predicted_ms,
                baseline_latency_ms=costs.dense_ms,
                energy_mj=_predicted_mj(job, turn, prices),
                power_w=_predicted_w(job, turn, prices),
                source="measured table" if job.here else "roofline",
            ),
            score_drop=drop,
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
        rounds=tuple(_round(one, costs) for one in rounds.rounds),
        stages=tuple(job.stages.seconds),
        front=front(costs, menus, turn),
        samples=Samples()
        if comparison is None
        else Samples(
            baseline=report.thin(comparison.samples("dense")),
            compressed=report.thin(comparison.samples("compressed")),
        ),
        waterfall=steps,
        fixed_ms=costs.fixed_ms,
        attribution=tuple(_attribution(job, costs, menus)),
        warnings=tuple(
            notes + ([] if comparison is None else bench.doubts(comparison.drift, comparison.settled))
        ),
        environment=bench.environment() | _gpu_facts(job) | {"compress": __version__},
        protocol={} if comparison is None else comparison.protocol.model_dump(),
        inputs={
            "model_and_shapes": job.model_key,
            "data_and_options": job.key,
            "file_sha256": runners.sha256(files["compressed"][1]),
            "dense_sha256": runners.sha256(files["dense"][1]),
        },
    )


def _target(job: Job) -> Target:
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    shape = next(iter(example.values())).shape
    place = job.place
    names = ("batch", "tokens") if len(shape) == 2 else ("batch", "channels", "height", "width")
    return Target(
        name=job.profile.name,
        runtime=job.profile.runtime if place is None else place.runtime,
        runtime_version=None if place is None else str(place.facts()["version"]),
        provider=None if place is None else str(place.facts()["provider"]),
        threads=place.threads if place is not None and place.by_file else None,
        precision=job.profile.baseline_precision,
        shapes=dict(zip(names, shape, strict=False)),
    )


def _gpu_facts(job: Job) -> dict[str, report.Fact]:
    """The GPU that timed, with its driver, clock and temperature just afterwards."""
    if job.place is None or job.place.by_file:
        return {}
    facts = {key: value for key, value in job.place.facts().items() if value is not None}
    return {"gpu": facts.pop("provider"), **{k: v for k, v in facts.items() if k != "version"}}


def _predicted_mj(job: Job, turn: Round, prices: Prices | None) -> float | None:
    if prices is not None:
        return prices.of(turn.units)
    return energy.energy_above_idle_mj(turn.predicted_ms, job.profile, job.recipe.bench.threads)


def _predicted_w(job: Job, turn: Round, prices: Prices | None) -> float | None:
    """Average power at the rate that was asked for."""
    rate_hz = job.recipe.budget.rate_hz
    if prices is None or rate_hz is None:
        return None
    return prices.average_w(prices.of(turn.units), rate_hz)


def _drop(job: Job, dense: Figures, quick: Figures) -> float | None:
    if dense.score is None or quick.score is None:
        return None
    lost = dense.score - quick.score
    return lost if job.task.higher_is_better else -lost


def _round(turn: Round, costs: Costs) -> report.Round:
    return report.Round(
        budget_ms=turn.limit_ms,
        predicted_ms=turn.predicted_ms,
        measured_ms=None if turn.timing is None else turn.timing.measured_ms,
        measured_speedup=None if turn.timing is None else turn.timing.speedup,
    )


def _attribution(job: Job, costs: Costs, menus: Menus) -> list[str]:
    """Why it is not faster: what no move can touch, and what was not there to choose."""
    share = costs.fixed_ms / costs.dense_ms
    said = "" if costs.source == "measured" else " (estimate)"
    lines = [
        f"{costs.fixed_ms:.2f} of {costs.dense_ms:.2f} ms{said} ({share:.0%}) lie outside every site: "
        "embeddings, norms, the head, and calls; no structure removed can save them."
    ]
    lines += [f"{skip.place}: not a site, because {skip.reason}" for skip in job.found.skipped]
    if job.found.fallback:
        lines.append(f"Sites come from names, not from the program: {job.found.fallback}")
    missing = [pattern for pattern in ("2:4",) if pattern not in job.profile.patterns]
    lines += [
        f"{pattern} sparsity was not considered: {job.profile.name} gains no time from it."
        for pattern in missing
    ]
    return lines
