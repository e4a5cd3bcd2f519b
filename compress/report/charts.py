"""The plots of a report: what is drawn, and how.

Labels stand in gutters and strips of their own, so that no number of sites makes them overlap.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from compress.measure.intervals import quantile
from compress.report.formatting import digits, score_text
from compress.report.schema import Chosen, Report, SiteReport
from compress.report.svg import CHARACTER, PALETTE, WIDTH, Canvas, Chart, finish, fit, gutter, ticks
from compress.sites.kinds import KINDS

ROW = 22
BINS = 72
CUT = 3.0  # times what was asked: where the axis of a front ends
SPREAD = 8.0  # from here on the largest over the smallest value asks for a logarithmic axis


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
    """One iteration of the closed loop, in milliseconds."""

    label: str
    budget: float
    predicted: float
    measured: float | None
    text: str
    shipped: bool = False


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
        chosen = _chosen(best, axis.unit)
        if chosen and report.compressed.score is not None:
            metric = report.score.metric
            chosen += f", {metric} {score_text(metric, report.compressed.score)}"
        charts.append(front(name, _within_reach(points, axis), axis, damage, chosen))
    return charts


def _within_reach(points: Sequence[Point], axis: Axis) -> list[Point]:
    """The points up to three times the speedup that was asked for, and the chosen one; all without one."""
    if axis.unit != "x" or axis.asked is None:
        return list(points)
    near = [point for point in points if point.chosen or point.gain <= CUT * axis.asked]
    return near if len(near) > 1 else list(points)


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
        rows.append(Turn(f"iteration {number}", *place, text, turn.shipped))
    return rounds(rows)


def _stages_chart(report: Report) -> Chart:
    rows = []
    for name, resumed in dict.fromkeys((stage.name, stage.resumed) for stage in report.stages):
        own = [s.seconds for s in report.stages if (s.name, s.resumed) == (name, resumed)]
        text = f"{digits(sum(own))} s{f' in {len(own)}' if len(own) > 1 else ''}"
        color = "dense" if resumed else "now"
        rows.append(Bar(name, 0.0, sum(own), f"{text}{' (resumed)' if resumed else ''}", color))
    return bars("stages", "Seconds per stage of the compilation", rows)


def kept(option: Chosen) -> str:
    """How much of a site is left, e.g. `6/12`."""
    return f"{option.units}/{option.units_total}" if option.units else "dropped"


def latency(dense: Strip, now: Strip) -> Chart:
    """Two histograms over one axis of milliseconds, logarithmic when they lie far apart."""
    pooled = sorted((*dense.samples, *now.samples))
    low, high = pooled[0] * 0.95, quantile(pooled, 0.995) * 1.05
    logarithmic = high / low > SPREAD
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
    logarithmic = min(ends) > 0 and max(ends) > SPREAD * min(ends)
    axes.set_xscale("log" if logarithmic else "linear")
    axes.set_xlim(min(ends) / 1.04 if logarithmic else min(ends) - 0.04 * right, right)
    top = max(ys) * 1.08 or 1.0
    axes.set_ylim(-0.04 * top, top)
    ticks(axes, "x", axes.get_xlim()[0], right, log=logarithmic, unit=axis.unit)
    ticks(axes, "y", 0, top, log=False)
    axes.grid(axis="y", color=PALETTE["line"], linewidth=1)
    if axis.asked is not None:
        axes.axvline(axis.asked, color=PALETTE["muted"], linewidth=1.2)
        asked = f"asked {_amount(axis.asked, axis.unit)}"
        canvas.line(
            (WIDTH - 20 - CHARACTER * len(asked), 11), (WIDTH - 20 - CHARACTER * len(asked), 27), "muted"
        )
        canvas.write(WIDTH - 12, 23, asked, align="right")
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
    canvas.write(
        middle[0],
        height - 12,
        f"{axis.words} (estimate{', log scale' if logarithmic else ''})",
        align="center",
    )
    canvas.write(14, middle[1], damage, align="center", turn=90)
    return finish(canvas, name, f"Pareto front: {damage} over {axis.words}")


def color_of(kind: str) -> str:
    """The palette's name for the color of a kind of site."""
    return kind if kind in PALETTE else "now"


def sites(kind: str, title: str, header: str, rows: Sequence[Share]) -> Chart:
    """One row per site: a bar for the share of units kept, the count, dense and present time."""
    canvas = Canvas(34 + ROW * len(rows))
    labels = [fit(row.label) for row in rows]
    left, times = gutter(labels), max(gutter([row.times for row in rows]), 12 + 6.6 * len(header))
    bar = WIDTH - left - times - gutter([row.units for row in rows])
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
    labels = [fit(row.label) for row in rows]
    left, right = gutter(labels), gutter([row.text for row in rows])
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
    """The closed loop: per iteration the budget as a stroke, predicted as a ring, measured as a dot.

    The plan that ships has a second ring; milliseconds stand on the axis below.
    """
    canvas = Canvas(84 + ROW * len(rows))
    values = [v for row in rows for v in (row.budget, row.predicted, row.measured) if v is not None]
    low, spread = min(values), (max(values) - min(values)) or 1.0
    left, right = gutter([row.label for row in rows]), gutter([row.text for row in rows])
    wide = WIDTH - left - right

    def at(value: float) -> float:
        return left + (0.06 + 0.88 * (value - low) / spread) * wide

    axes = canvas.axes(left, 32, wide, ROW * len(rows) + 6)
    margin = 0.06 / 0.88 * spread
    axes.set_xlim(low - margin, low - margin + spread / 0.88)
    axes.set_yticks([])
    ticks(axes, "x", *axes.get_xlim(), log=False)
    canvas.write(left + wide / 2, canvas.height - 10, "milliseconds", align="center", size=11)

    canvas.line((18, 10), (18, 22), "ink")
    canvas.write(26, 20, "budget", size=11)
    canvas.dot(92, 16, "muted", hollow=True)
    canvas.write(101, 20, "predicted (estimate)", size=11)
    canvas.dot(242, 16, "now")
    canvas.write(251, 20, "measured", size=11)
    if any(row.shipped for row in rows):
        canvas.dot(322, 16, "worse", size=9, hollow=True)
        canvas.write(331, 20, "shipped", size=11)
    canvas.write(WIDTH - 12, 20, "predicted → measured", align="right", size=11)
    for index, row in enumerate(rows):
        y = 43 + ROW * index
        canvas.write(left - 12, y + 4, row.label, align="right", color="ink")
        canvas.line((left, y), (left + wide, y), "line")
        canvas.line((at(row.budget), y - 7), (at(row.budget), y + 7), "ink")
        canvas.dot(at(row.predicted), y, "muted", hollow=True)
        if row.measured is not None:
            canvas.dot(at(row.measured), y, "now")
        if row.shipped:
            spot = row.predicted if row.measured is None else row.measured
            canvas.dot(at(spot), y, "worse", size=12, hollow=True)
        canvas.write(WIDTH - 12, y + 4, row.text, align="right", color="ink")
    return finish(canvas, "rounds", "Closed loop: budget, prediction and measurement by iteration")


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
