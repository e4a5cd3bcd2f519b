"""The table of a report: every quantity that is known of the compressed model, beside the dense one's."""

from typing import NamedTuple

from compress.ir import Half
from compress.report.formatting import digits, lost, score_decimals, score_text
from compress.report.schema import Figures, Report

NONE = "not measured"


class Row(NamedTuple):
    """One quantity of both artifacts, and what became of it."""

    label: str
    before: str
    after: str
    change: str


def rows(report: Report) -> list[Row]:
    """The comparison: every quantity that is known of the compressed model."""
    dense, now = report.baseline, report.compressed
    metric = report.score.metric
    decimals = score_decimals(metric, dense.score, now.score)
    scores = (score_text(metric, dense.score, decimals), score_text(metric, now.score, decimals))
    count = _percent(dense.parameters, now.parameters)
    return [
        *_latency_rows(report),
        *_phase_rows(report),
        Row(metric, *scores, score_change(report)),
        *_agreement_rows(report),
        Row("parameters", f"{dense.parameters:,}", f"{now.parameters:,}", count),
        Row("weights", *_change(dense.weight_bytes / 1e6, now.weight_bytes / 1e6, "MB")),
        *([] if now.file_bytes is None else [_file_row(dense.file_bytes, now.file_bytes)]),
        *([] if report.half is None else [_half_row(report.half)]),
        *([] if now.energy_mj is None else [_source_row("energy", dense, now, "energy_mj", "mJ")]),
        *([] if now.power_w is None else [_source_row("power", dense, now, "power_w", "W")]),
    ]


def _latency_rows(report: Report) -> list[Row]:
    """Percentiles that were measured; otherwise one row of what was predicted."""
    dense, now = report.baseline.latency_ms, report.compressed.latency_ms
    predicted, measured = report.verdict.predicted, report.verdict.measured
    if dense is None or now is None or measured is None:
        dense_ms, now_ms = (
            NONE if value is None else f"{digits(value)} ms (estimate)"
            for value in (predicted.baseline_latency_ms, predicted.latency_ms)
        )
        speed = predicted.speedup
        return [Row("latency", dense_ms, now_ms, "" if speed is None else f"{speed:.2f}x (estimate)")]
    low, high = measured.interval95
    table = [
        Row(
            "latency, median",
            f"{digits(dense.p50)} ms",
            f"{digits(now.p50)} ms",
            f"{measured.speedup:.2f}x [{low:.2f}, {high:.2f}]",
        )
    ]
    for label, before, after in (
        ("p90", dense.p90, now.p90),
        ("p99", dense.p99, now.p99),
        ("mean", dense.mean, now.mean),
    ):
        if before is not None and after is not None:
            texts = (f"{digits(before)} ms", f"{digits(after)} ms", f"{before / after:.2f}x")
            table.append(Row(f"latency, {label}", *texts))
    spread = (f"{digits(dense.std)} ms", f"{digits(now.std)} ms", "")
    return [
        *table,
        Row("latency, deviation", *spread),
        Row("runs", f"{dense.runs:,}", f"{now.runs:,}", ""),
    ]


def _phase_rows(report: Report) -> list[Row]:
    """Both phases of a decoder, whichever was asked for."""
    found = report.phases
    if found is None:
        return []
    told = (
        ("time to first token", found.ttft, found.dense.ttft_ms, found.compressed.ttft_ms),
        ("time per token", found.per_token, found.dense.per_token_ms, found.compressed.per_token_ms),
    )
    return [
        Row(
            f"{label}, median",
            f"{digits(dense.p50)} ms",
            f"{digits(now.p50)} ms",
            "{:.2f}x [{:.2f}, {:.2f}]".format(ratio.speedup, *ratio.interval95),
        )
        for label, ratio, dense, now in told
    ]


def _agreement_rows(report: Report) -> list[Row]:
    """The share of test inputs that both models give the same class, where there are classes."""
    if report.dense_agreement is None:
        return []
    return [Row("same class as dense", "", f"{report.dense_agreement:.1%}", "")]


def score_change(report: Report) -> str:
    """The change of the score in words."""
    drop, between = report.verdict.score_drop, report.verdict.score_drop_interval95
    if drop is None:
        return NONE
    if drop == 0 and between in (None, (0.0, 0.0)):
        return "unchanged"
    gained = drop < 0
    if gained and between is not None:
        between = -between[1], -between[0]
    metric = report.score.metric
    decimals = score_decimals(metric, report.baseline.score, report.compressed.score)
    return f"{'gained' if gained else 'lost'} {lost(metric, abs(drop), between, decimals)}"


def _percent(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}" if before else ""


def _change(before: float, after: float, unit: str) -> tuple[str, str, str]:
    return f"{digits(before)} {unit}", f"{digits(after)} {unit}", _percent(before, after)


def _file_row(before: int | None, after: int) -> Row:
    if before is None:
        return Row("file", NONE, f"{digits(after / 1e6)} MB", "")
    return Row("file", *_change(before / 1e6, after / 1e6, "MB"))


def _half_row(half: Half) -> Row:
    """The file in fp16 that was made of the one that ships, and how far its answers are from that."""
    of = f"{half.halved} of {half.halved + len(half.kept)} products, answers within {half.distance:.1e}"
    return Row("file in fp16", "", f"{digits(half.file_bytes / 1e6)} MB", of)


def _source_row(label: str, dense: Figures, now: Figures, field: str, unit: str) -> Row:
    """Energy or power, each with where it comes from; two sources are not compared."""
    texts = []
    for side in (dense, now):
        value, word = getattr(side, field), "" if side.energy_source == "measured" else " (estimate)"
        texts.append(NONE if value is None else f"{digits(value)} {unit}{word}")
    before, after = getattr(dense, field), getattr(now, field)
    if before is None or dense.energy_source != now.energy_source:
        return Row(label, texts[0], texts[1], "")
    word = "" if now.energy_source == "measured" else " (estimate)"
    return Row(label, texts[0], texts[1], f"{_percent(before, after)}{word}")
