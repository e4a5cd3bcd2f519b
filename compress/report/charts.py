"""The plots of a report: what is drawn, and how.

Labels stand in gutters and strips of their own, so that no number of sites makes them overlap.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from compress.measure.intervals import quantile
from compress.report.formatting import digits
from compress.report.schema import Chosen, Report, SiteReport
from compress.report.svg import PALETTE, WIDTH, Canvas, Chart, finish, ticks
from compress.sites.kinds import KINDS

ROW = 22
BINS = 72
LABEL = 22  # characters of a label; longer ones lose their middle
CHARACTER = 7.7  # widest digit of the usual fonts at 12 pixels


class Strip(NamedTuple):
    """One distribution of latencies in milliseconds, and the words above it."""

    caption: str
    samples: Sequence[float]


class Point(NamedTuple):
    """One plan of a Pareto front: how fast it is or what it takes, and what it damages."""

    gain: float
    damage: float
    chosen: bool


class Axis(NamedTuple):
    """What a front is drawn over: its words, its unit, and what was asked for of it."""

    words: str
    unit: str
    asked: float | None = None


class Share(NamedTuple):
    """One site: the share of its units that is kept, and the words to its right."""

    label: str
    kept: float
    units: str
    times: str


class Bar(NamedTuple):
    """One horizontal bar from `start` to `end`, in a color of the palette."""

    label: str
    start: float
    end: float
    text: str
    color: str


class Turn(NamedTuple):
    """One round of the closed loop, in milliseconds."""

    label: str
    budget: float
    predicted: float
    measured: float | None
    text: str


def draw(report: Report) -> dict[str, Chart]:
    """Every chart that the report has figures for, by name."""
    drawn = []
    if report.samples.baseline and report.samples.compressed:
        drawn.append(_latency_chart(report))
    if len(report.front) > 1:
        drawn += _front_charts(report)
    for kind in dict.fromkeys(site.kind for site in report.sites):
        drawn.append(_site_chart(kind, [site for site in report.sites if site.kind == kind]))
    if len(report.waterfall) > 1:
        drawn.append(_waterfall_chart(report))
    if report.rounds:
        drawn.append(_rounds_chart(report))
    if report.stages:
        drawn.append(_stages_chart(report))
    return {chart.name: chart for chart in drawn}


def _latency_chart(report: Report) -> Chart:
    strips = []
    for label, figures, samples in (
        ("dense", report.baseline, report.samples.baseline),
        ("compressed", report.compressed, report.samples.compressed),
    ):
        known = figures.latency_ms
        caption = label if known is None else f"{label}: median {digits(known.p50)} ms"
        strips.append(Strip(caption, samples))
    return latency(*strips)


def _front_charts(report: Report) -> list[Chart]:
    """Damage over speed, and over energy where every plan has one."""
    judged = all(point.loss is not None for point in report.front)
    damage = "loss" if judged else "error"
    worth = [p.error if p.loss is None or not judged else p.loss for p in report.front]
    asked = report.verdict.asked
    speeds = [p.predicted_speedup for p in report.front]
    spent = [p.energy_mj for p in report.front if p.energy_mj is not None]
    drawn = [("front", speeds, Axis("predicted speedup", "x", asked.speedup))]
    if len(spent) == len(speeds):
        drawn.append(("energy", spent, Axis("predicted energy of a run", " mJ", asked.energy_mj)))
    marks = [p.chosen for p in report.front]
    charts = []
    for name, gains, axis in drawn:
        points = [Point(*three) for three in zip(gains, worth, marks, strict=True)]
        best = next((point.gain for point in points if point.chosen), None)
        charts.append(front(name, points, axis, damage, _chosen(best, axis.unit)))
    return charts


def _chosen(gain: float | None, unit: str) -> str:
    return "" if gain is None else f"chosen, {_amount(gain, unit)}"


def _amount(value: float, unit: str) -> str:
    """A gain with its unit: 2.00x, or 12.3 mJ."""
    return f"{value:.2f}x" if unit == "x" else f"{digits(value)}{unit}"


def _site_chart(kind: str, own: Sequence[SiteReport]) -> Chart:
    labels = short([site.name for site in own])
    rows = [
        Share(
            label,
            site.option.units / site.option.units_total,
            kept(site.option),
            f"{digits(site.dense_latency_ms)} → {digits(site.latency_ms)}",
        )
        for label, site in zip(labels, own, strict=True)
    ]
    guessed = any(site.source == "estimated" for site in own)
    header = f"dense → now, ms{' (estimate)' if guessed else ''}"
    return sites(kind, f"Units kept per site: {kind}", header, rows)


def _waterfall_chart(report: Report) -> Chart:
    first, *changes, last = report.waterfall
    measured = report.verdict.measured is not None
    unit = "ms" if measured else "ms (estimate)"
    rows = [Bar(first.name, 0.0, first.ms, f"{digits(first.ms)} {unit}", "dense")]
    spot = first.ms
    for step in changes:
        color = "worse" if step.ms > 0 else color_of(step.name) if step.name in KINDS else "dense"
        text = f"{'+' if step.ms > 0 else '-' if step.ms < 0 else ''}{digits(abs(step.ms))} {unit}"
        rows.append(Bar(step.name, spot, spot + step.ms, text, color))
        spot += step.ms
    rows.append(Bar(last.name, 0.0, last.ms, f"{digits(last.ms)} {unit}", "now"))
    return bars("waterfall", "Where the time went, from dense to compressed", rows)


def _rounds_chart(report: Report) -> Chart:
    rows = []
    for number, turn in enumerate(report.rounds, 1):
        measured = "not measured" if turn.measured_ms is None else digits(turn.measured_ms)
        text = f"{digits(turn.predicted_ms)} → {measured}"
        place = (turn.budget_ms, turn.predicted_ms, turn.measured_ms)
        rows.append(Turn(f"round {number}", *place, text))
    return rounds(rows)


def _stages_chart(report: Report) -> Chart:
    rows = [
        Bar(
            stage.name,
            0.0,
            stage.seconds,
            f"{digits(stage.seconds)} s{' (resumed)' if stage.resumed else ''}",
            "dense" if stage.resumed else "now",
        )
        for stage in report.stages
    ]
    return bars("stages", "Seconds per stage of the compilation", rows)


def kept(option: Chosen) -> str:
    """How much of a site is left, e.g. `6/12`."""
    return f"{option.units}/{option.units_total}" if option.units else "dropped"


def latency(dense: Strip, now: Strip) -> Chart:
    """Two histograms over one axis of milliseconds, logarithmic when they lie far apart."""
    pooled = sorted((*dense.samples, *now.samples))
    low, high = pooled[0] * 0.95, quantile(pooled, 0.995) * 1.05
    logarithmic = high / low > 8
    place = math.log if logarithmic else float
    height, row = 240, 84
    canvas = Canvas(height)
    axes = canvas.axes(16, 0, WIDTH - 32, 2 * row + 12)
    axes.set_ylim(2 * row + 12, 0)
    axes.set_xscale("log" if logarithmic else "linear")
    axes.set_xlim(low, high)
    axes.set_yticks([])
    ticks(axes, "x", low, high, log=logarithmic)
    edges = [low * (high / low) ** (i / BINS) for i in range(BINS + 1)]
    if not logarithmic:
        edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    for index, (part, color) in enumerate(((dense, "dense"), (now, "now"))):
        floor = row * (index + 1)
        counts = [0] * BINS
        for value in part.samples:
            spot = (place(value) - place(low)) / (place(high) - place(low))
            if spot < 1:
                counts[int(spot * BINS)] += 1
        tops = [floor - 46 * count / (max(counts) or 1) for count in counts]
        axes.stairs(tops, edges, baseline=floor, fill=True, color=PALETTE[color])
        axes.hlines(floor, low, high, color=PALETTE["line"], linewidth=1)
        median = quantile(part.samples, 0.5)
        axes.vlines(median, floor - 52, floor, color=PALETTE["ink"], linewidth=1.4)
        canvas.write(16, floor - 60, part.caption, color="ink")
    beyond = sum(value >= high for value in pooled)
    note = f"milliseconds per run{' (log scale)' if logarithmic else ''}; line: median"
    note += f"; {beyond} of {len(pooled)} runs lie beyond the axis" if beyond else ""
    canvas.write(WIDTH / 2, height - 10, note, align="center", size=11)
    return finish(canvas, "latency", "Latency of the dense and the compressed model")


def front(name: str, points: Sequence[Point], axis: Axis, damage: str, chosen: str) -> Chart:
    """The best plans over what they gain; the chosen one ringed, what was asked as a line."""
    height = 300
    canvas = Canvas(height)
    axes = canvas.axes(64, 40, WIDTH - 80, height - 92)
    ordered = sorted(points)
    xs, ys = [point.gain for point in ordered], [point.damage for point in ordered]
    ends = xs if axis.asked is None else [*xs, axis.asked]
    right = max(ends) * 1.04
    axes.set_xlim(min(ends) - 0.04 * right, right)
    top = max(ys) * 1.08 or 1.0
    axes.set_ylim(-0.04 * top, top)
    ticks(axes, "x", axes.get_xlim()[0], right, log=False, unit=axis.unit)
    ticks(axes, "y", 0, top, log=False)
    axes.grid(axis="y", color=PALETTE["line"], linewidth=1)
    if axis.asked is not None:
        axes.axvline(axis.asked, color=PALETTE["muted"], linewidth=1.2)
        canvas.line((340, 11), (340, 27), "muted")
        canvas.write(348, 23, f"asked {_amount(axis.asked, axis.unit)}")
    axes.plot(xs, ys, color=PALETTE["now"], linewidth=1.8, marker="o", markersize=5)
    canvas.line((64, 19), (80, 19), "now")
    canvas.dot(72, 19, "now", size=5)
    canvas.write(86, 23, "best plan")
    for point in ordered:
        if point.chosen:
            spot = ([point.gain], [point.damage])
            ring = axes.plot(*spot, "o", color=PALETTE["worse"], markersize=12, fillstyle="none")
            ring[0].set_markeredgewidth(2.2)
            canvas.dot(180, 19, "worse", size=9, hollow=True)
            canvas.write(191, 23, chosen)
    middle = (64 + (WIDTH - 80) / 2, 40 + (height - 92) / 2)
    canvas.write(middle[0], height - 12, f"{axis.words} (estimate)", align="center")
    canvas.write(14, middle[1], damage, align="center", turn=90)
    return finish(canvas, name, f"Pareto front: {damage} over {axis.words}")


def color_of(kind: str) -> str:
    """The palette's name for the color of a kind of site."""
    return kind if kind in PALETTE else "now"


def sites(kind: str, title: str, header: str, rows: Sequence[Share]) -> Chart:
    """One row per site: a bar for the share of units kept, the count, dense and present time."""
    canvas = Canvas(34 + ROW * len(rows))
    labels = [_fit(row.label) for row in rows]
    left, times = _gutter(labels), max(_gutter([row.times for row in rows]), 12 + 6.6 * len(header))
    bar = WIDTH - left - times - _gutter([row.units for row in rows])
    canvas.write(left, 16, "units kept", size=11)
    canvas.write(WIDTH - 12, 16, header, align="right", size=11)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = 28 + ROW * index
        canvas.write(left - 10, y + 13, label, align="right", color="ink")
        canvas.box(left, y + 3, bar, "track")
        canvas.box(left, y + 3, bar * row.kept, color_of(kind))
        canvas.write(left + bar + 8, y + 13, row.units, color="ink")
        canvas.write(WIDTH - 12, y + 13, row.times, align="right", color="ink")
    return finish(canvas, f"sites-{kind}", title)


def bars(name: str, title: str, rows: Sequence[Bar]) -> Chart:
    """Labelled horizontal bars on one scale; a waterfall when each starts where the last ended."""
    canvas = Canvas(12 + ROW * len(rows))
    labels = [_fit(row.label) for row in rows]
    left, right = _gutter(labels), _gutter([row.text for row in rows])
    ends = [end for row in rows for end in (row.start, row.end)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = (WIDTH - left - right) / ((high - low) or 1.0)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = 6 + ROW * index
        x, length = (min(row.start, row.end) - low) * scale, abs(row.end - row.start) * scale
        canvas.write(left - 10, y + 13, label, align="right", color="ink")
        canvas.box(left + x, y + 3, max(length, 1.0), row.color)
        canvas.write(WIDTH - 12, y + 13, row.text, align="right", color="ink")
        if index + 1 < len(rows) and rows[index + 1].start == row.end != 0:
            edge = left + (row.end - low) * scale
            canvas.line((edge, y + 17), (edge, y + ROW + 3), "dense")
    return finish(canvas, name, title)


def rounds(rows: Sequence[Turn]) -> Chart:
    """The closed loop: per round the budget as a stroke, the prediction as a ring, the time as a dot."""
    canvas = Canvas(40 + ROW * len(rows))
    values = [v for row in rows for v in (row.budget, row.predicted, row.measured) if v is not None]
    low, spread = min(values), (max(values) - min(values)) or 1.0
    left, right = _gutter([row.label for row in rows]), _gutter([row.text for row in rows])
    wide = WIDTH - left - right

    def at(value: float) -> float:
        return left + (0.06 + 0.88 * (value - low) / spread) * wide

    canvas.line((18, 10), (18, 22), "ink")
    canvas.write(26, 20, "budget", size=11)
    canvas.dot(92, 16, "muted", hollow=True)
    canvas.write(101, 20, "predicted (estimate)", size=11)
    canvas.dot(242, 16, "now")
    canvas.write(251, 20, "measured", size=11)
    canvas.write(WIDTH - 12, 20, "predicted → measured, ms", align="right", size=11)
    for index, row in enumerate(rows):
        y = 43 + ROW * index
        canvas.write(left - 12, y + 4, row.label, align="right", color="ink")
        canvas.line((left, y), (left + wide, y), "line")
        canvas.line((at(row.budget), y - 7), (at(row.budget), y + 7), "ink")
        canvas.dot(at(row.predicted), y, "muted", hollow=True)
        if row.measured is not None:
            canvas.dot(at(row.measured), y, "now")
        canvas.write(WIDTH - 12, y + 4, row.text, align="right", color="ink")
    return finish(canvas, "rounds", "Closed loop, round by round")


def short(names: Sequence[str]) -> list[str]:
    """Site names without the dotted parts that all of them share at either end.

    >>> short(["bert.layer.0.attention", "bert.layer.11.attention"])
    ['layer 0', 'layer 11']
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    most = min(map(len, parts)) - 1
    head = 0
    while head < most and len({part[head] for part in parts}) == 1:
        head += 1
    tail = 0
    while tail < most - head and len({part[-1 - tail] for part in parts}) == 1:
        tail += 1
    cut = [".".join(part[head : len(part) - tail]) for part in parts]
    if head and all(name.isdigit() for name in cut):
        return [f"{parts[0][head - 1]} {name}" for name in cut]
    return cut


def _fit(text: str) -> str:
    """A label of bounded length; the middle gives way, because both ends tell sites apart."""
    if len(text) <= LABEL:
        return text
    return text[: LABEL - LABEL // 2 - 1] + "…" + text[-(LABEL // 2) :]


def _gutter(texts: Sequence[str]) -> float:
    """Pixels that the longest of some texts needs beside the bars."""
    return CHARACTER * max(map(len, texts)) + 22
