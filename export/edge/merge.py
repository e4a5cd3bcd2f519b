"""Merge a measurement made on a device into the report of the result that it was made of.

The measurement is checked first: the device must have timed the files of this result, computed the same
numbers as here, and be the target. The ratio is computed again from the blocks.
"""

import re
from pathlib import Path

import numpy as np

from compress import __version__, artifacts, profiles, recipe
from compress.errors import CompressError
from compress.export.edge.bundle_schema import MERGED, Measurement, Runtime, Timings, identity
from compress.measure import timing
from compress.measure.intervals import paired_ratio
from compress.report import render
from compress.report.formatting import digits
from compress.report.schema import Fact, Figures, Measured, Report, Samples, judge, precision, steps

SIDES = ("dense", "compressed")
STALE = re.compile(r"On the device: |The (dense|compressed) model (was .* slower at|did not settle)")
SAME_FIGURES = 1e-6


def merge(report: Report, measurement: Measurement, *, device_is_target: bool = False) -> Report:
    """The report with the device's figures, facts and protocol, and the verdict that follows.

    Args:
        report: of the output that the bundle was exported from.
        measurement: what `verify.py` wrote on the device.
        device_is_target: the user vouches for a device that is not recognised as the target.

    Raises:
        CompressError: the measurement is of other files, its numbers disagree or contradict each
            other, or it was made on another kind of device.
    """
    _same_files(report, measurement)
    timed = _timings(measurement)
    measured = _ratio(measurement)
    notes = [*_device(report, measurement, vouched=device_is_target), *_setting(report, measurement)]
    notes += timing.timing_warnings(measurement.drift or 0.0, {side: timed[side].settled for side in SIDES})
    asked, drop = report.verdict.asked, report.verdict.score_drop
    runtime = measurement.runtime
    target = report.target.model_copy(update=_target(runtime))
    dense = _figures(report.baseline, timed["dense"], asked.rate_hz, target.precision)
    small = _figures(report.compressed, timed["compressed"], asked.rate_hz, precision(target, report.sites))
    status, reason = judge(asked, measured, small, drop, report.max_drop)
    verdict = report.verdict.model_copy(update={"status": status, "reason": reason, "measured": measured})
    kept = [line for line in report.warnings if not STALE.match(line)]
    changes = {
        "target": target,
        "verdict": verdict,
        "baseline": dense,
        "compressed": small,
        "samples": Samples(baseline=timed["dense"].samples_ms, compressed=timed["compressed"].samples_ms),
        "waterfall": steps(timed["dense"].latency_ms.p50, timed["compressed"].latency_ms.p50, report.sites),
        "warnings": (*kept, *(f"On the device: {line}" for line in notes)),
        "environment": _environment(report, measurement),
        "protocol": measurement.protocol,
        "inputs": {**report.inputs, MERGED: artifacts.digest(measurement)},
    }
    return Report.model_validate({**dict(report), **changes})


def _same_files(report: Report, measurement: Measurement) -> None:
    """Refuse a measurement of anything but this output's two files, at its shapes."""
    for side, key in (("dense", "dense_sha256"), ("compressed", "file_sha256")):
        ours, theirs = report.inputs.get(key), getattr(measurement.models, side)
        if ours != theirs:
            raise CompressError(
                f"the {side} model that was measured is not the one of this output: its sha256 is "
                f"{theirs[:16]}..., this output's is {(ours or 'not recorded')[:16]}...\n"
                "  Merge it into the output that the bundle was exported from, or export and measure again."
            )
    if measurement.shapes != report.target.shapes or measurement.report != identity(report):
        raise CompressError(
            "the measurement is of the same files but of another request: it was made at "
            f"{_sizes(measurement.shapes)}, this output is for {_sizes(report.target.shapes)}; budget, "
            "target and data must be the same too.\n  Export a bundle of this output and measure that."
        )


def _sizes(shapes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in shapes.items())


def _timings(measurement: Measurement) -> dict[str, Timings]:
    """The timings of both models, which only a device that computes the right numbers has."""
    for side in SIDES:
        golden = getattr(measurement.golden, side)
        gap = golden.max_abs_difference
        if not golden.passed or gap is None or gap > golden.tolerance:
            far = "cannot be compared with" if gap is None else f"are {digits(gap)} away from"
            raise CompressError(
                f"the device computes other numbers than this output: its outputs of the {side} model {far} "
                f"the stored ones (tolerance {digits(golden.tolerance)}), so its times are not used.\n"
                "  Try verify.py there with another --runtime or --precision."
            )
    if measurement.timings is None:
        raise CompressError("the measurement holds no timings; run verify.py on the device again")
    return {side: getattr(measurement.timings, side) for side in SIDES}


def _ratio(measurement: Measurement) -> Measured:
    """The speedup computed from the device's blocks; it must equal the one in the measurement."""
    timed = _timings(measurement)
    blocks = [tuple(np.array([ms]) for ms in timed[side].block_medians_ms) for side in SIDES]
    if len(blocks[0]) < timing.MIN_BLOCKS:
        raise CompressError(
            f"the measurement holds {len(blocks[0])} blocks, too few for an interval; "
            f"{timing.MIN_BLOCKS} are needed. Run verify.py as it came with the bundle."
        )
    ratio = paired_ratio(blocks[0], blocks[1], int(measurement.protocol.get("seed") or 0))
    stored = measurement.ratio
    found = (ratio.value, *ratio.interval.ends)
    written = None if stored is None else (stored.value, stored.low, stored.high)
    if written is None or not np.allclose(found, written, rtol=SAME_FIGURES, atol=0):
        raise CompressError(
            f"the measurement is inconsistent: its blocks give {ratio.value:.4f}x "
            f"[{ratio.interval.low:.4f}, {ratio.interval.high:.4f}], but its ratio is "
            f"{'missing' if written is None else '{:.4f}x [{:.4f}, {:.4f}]'.format(*written)}.\n"
            "  Run verify.py on the device again, and merge its file unchanged."
        )
    return Measured(speedup=ratio.value, interval95=ratio.interval.ends)


def _device(report: Report, measurement: Measurement, *, vouched: bool) -> list[str]:
    """What is doubtful about the device; refused when it is certainly not the target."""
    name, facts = report.target.name, measurement.device
    what = str(facts.get("gpu") or facts.get("model") or facts.get("cpu") or "an unknown device")
    if name == "cpu":
        _this_machine(report, measurement)
        return []
    wanted, kind = profiles.load(name).kind, measurement.runtime.kind
    others = [one for one in profiles.names() if one != name and recognised(one, measurement)]
    others = [one for one in others if profiles.load(one).kind == kind]
    if recognised(name, measurement) and kind == wanted:
        return []
    if vouched:
        return [f"{what} ({kind}) was not recognised as {name}; --device-is-target was given."]
    remedy = (
        f"\n  Run verify.py on a {name}. If this is one, add --device-is-target; the report will state it."
    )
    if kind != wanted:
        raise CompressError(
            f"the target {name} is a {wanted.upper()}, but this was measured on the {kind.upper()} of {what} "
            f"({measurement.runtime.provider}).{remedy}"
        )
    if others:
        raise CompressError(f"the target is {name}, but this was measured on {what}: {others[0]}.{remedy}")
    return [f"{what} could not be recognised as {name}, nor as another known device."]


def recognised(name: str, measurement: Measurement) -> bool:
    """Whether the facts of a device match a target.

    A class of machines (`cpu-avx2`) is recognised by its instruction sets.
    """
    facts = measurement.device
    keys = ("flags", "machine") if name.startswith("cpu") else ("gpu", "model", "cpu")
    return profiles.means(name, " ".join(str(facts.get(key) or "") for key in keys))


def _this_machine(report: Report, measurement: Measurement) -> None:
    """Refuse a measurement for the target `cpu` that another machine made."""
    ours, theirs = report.environment, measurement.device
    for key, meaning in (("cpu", "processor"), ("machine", "architecture")):
        if ours.get(key) != theirs.get(key):
            raise CompressError(
                "the target cpu is the machine that compiled, but this was measured on another one: its "
                f"{meaning} is {theirs.get(key)}, not {ours.get(key)}.\n"
                "  Compile for that device by its name; `compress targets` lists them."
            )
    if measurement.runtime.kind != "cpu":
        raise CompressError(
            "the target is the CPU of this machine, but this was measured on its GPU.\n"
            "  Run verify.py with --provider CPUExecutionProvider."
        )


def _setting(report: Report, measurement: Measurement) -> list[str]:
    """Where the device ran the files in another way than was planned."""
    runtime, lines = measurement.runtime, []
    planned = profiles.load(report.target.name)
    if runtime.name != planned.runtime:
        lines.append(
            f"it ran {runtime.name} ({runtime.provider}), but the plan was made for {planned.runtime}."
        )
    if runtime.precision != planned.baseline_precision:
        lines.append(
            f"both models ran in {runtime.precision}, but the plan was made for {planned.baseline_precision}."
        )
    asked = measurement.protocol.get("threads_asked")
    if runtime.kind == "cpu" and asked not in (None, runtime.threads):
        lines.append(f"it ran {runtime.threads} threads, but {asked} were asked for.")
    return lines


def _figures(before: Figures, timed: Timings, rate_hz: float | None, runs: str) -> Figures:
    """One model's figures with what the device measured; energy of other devices does not stay.

    Power is that of a device that never rests, or, at a rate of runs, of one that rests in between.
    """
    used = timed.energy
    drawn_w = None if used is None else used.power_w
    if used is not None and rate_hz is not None:
        drawn_w = used.idle_w + used.energy_mj * rate_hz / 1e3
    return before.model_copy(
        update={
            "precision": runs,
            "latency_ms": timed.latency_ms,
            "energy_mj": None if used is None else used.energy_mj,
            "power_w": drawn_w,
            "energy_source": None if used is None else used.source,
        }
    )


def _target(runtime: Runtime) -> dict[str, Fact]:
    return {
        "runtime": runtime.name,
        "runtime_version": runtime.version,
        "provider": runtime.provider,
        "threads": runtime.threads if runtime.kind == "cpu" else None,
        "precision": runtime.precision,
    }


def _environment(report: Report, measurement: Measurement) -> dict[str, Fact]:
    """The device that measured, and the machine that compiled."""
    compiled_on = report.environment.get("compiled_on", report.environment.get("cpu"))
    return {
        **measurement.device,
        measurement.runtime.name: measurement.runtime.version,
        "measured": measurement.created,
        "compiled_on": compiled_on,
        "compress": __version__,
    }


def renew_card(folder: Path, before: Report, after: Report) -> None:
    """Write the model card beside `folder` again, where it still is the one that compress wrote."""
    card = folder.parent / "README.md"
    if card.is_file():
        name = Path(recipe.read(folder / "recipe.toml", {}).model or "compress-demo").name
        if card.read_text(encoding="utf-8") == render.card(before, name=name):
            artifacts.write_text(card, render.card(after, name=name))
