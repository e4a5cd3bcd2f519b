"""A report as people read it: an offline HTML page, Markdown for a pull request, a model card.

Everything that came from outside (names, paths, warnings) is escaped where it is printed. A figure
that was only predicted never stands without the word "estimate".
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.artifacts import write_text
from compress.errors import CompressError
from compress.ir import Engine
from compress.report import charts, methods_table, metrics_table, snippets
from compress.report.formatting import amount, digits, duration, exact, lost
from compress.report.metrics_table import NONE
from compress.report.next_steps import next_step, ruin
from compress.report.schema import Fact, Report, found, precision
from compress.report.summary import device, latencies, quality, scores, shown_model, verdict_line
from compress.report.svg import DARK_KINDS, PALETTE, Chart
from compress.task_specs import TASKS

WORDS = {"met": "Met", "missed": "Missed", "not_measured": "Not measured"}
MOST_NAMES = 6
MOST_CLASSES = 12


class Headline(NamedTuple):
    """One of the large figures at the top of the page."""

    label: str
    value: str
    note: str


class SiteRow(NamedTuple):
    """One site of the plan, in words."""

    name: str
    kind: str
    kept: str
    error: str
    before: str
    after: str


def write(report: Report, directory: Path) -> Path:
    """Write report.json, report.html, report.md and `plots/*.svg`; returns the page's path.

    Raises:
        CompressError: the directory cannot be written, or its disk is full.
    """
    drawn = charts.draw(report)
    texts = {
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.html": html(report, drawn),
        "report.md": markdown(report),
        **{f"plots/{name}.svg": chart.file for name, chart in drawn.items()},
    }
    try:
        for name, text in texts.items():
            write_text(directory / name, text)
    except OSError as error:
        raise CompressError(
            f"the report cannot be written to {directory} ({error.strerror}); "
            "free some space or give another directory with --out"
        ) from error
    return directory / "report.html"


def html(report: Report, drawn: dict[str, Chart] | None = None) -> str:
    """The whole report as one page that needs no network and no script."""
    images = charts.draw(report) if drawn is None else drawn
    inline = {name: Markup(chart.page) for name, chart in images.items()}
    titles = {name: chart.title for name, chart in images.items()}
    template = _environment("html").get_template("report.html.j2")
    return template.render(
        **_view(report), charts=inline, titles=titles, palette=PALETTE, dark_kinds=DARK_KINDS
    )


def markdown(report: Report) -> str:
    """The report for a pull request: verdict, figures, sites, what to know."""
    return _environment("md").get_template("report.md.j2").render(**_view(report))


def card(
    report: Report,
    *,
    name: str,
    base_model: str | None = None,
    license_name: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The model card (README.md) of the output directory.

    Args:
        report: the finished report.
        name: the title of the card.
        base_model: the hub id of the dense model; None when it is not on the hub.
        license_name: the dense model's license, which the compressed one inherits.
        datasets: hub ids of the data that calibrated and scored it.
    """
    return (
        _environment("md")
        .get_template("card.md.j2")
        .render(
            **_view(report),
            name=name,
            base_model=base_model,
            license=license_name,
            datasets=list(datasets),
        )
    )


def _view(report: Report) -> dict[str, object]:
    """What the templates print, in words."""
    return {
        "report": report,
        "model": shown_model(report.model),
        "classes": class_rows(report),
        "heading": "Why not smaller" if report.verdict.asked.name == "size_mb" else "Why not faster",
        "snippet": snippets.run_snippet(report),
        "load_snippet": snippets.load_snippet(report),
        "library_snippet": snippets.library_snippet(report),
        "own_module": snippets.is_own_module(report),
        "low_precision": _low_precision(report),
        "tags": _tags(report),
        "line": verdict_line(report).replace("->", "→"),
        "status": WORDS[report.verdict.status],
        "device": device(report.target, precision(report.target, report.sites)),
        "quality": quality(report).replace("->", "→"),
        "headlines": _headlines(report),
        "rows": metrics_table.rows(report),
        "sites": _site_rows(report),
        "offers": methods_table.table(report),
        "guessed": any(site.source == "estimated" for site in report.sites),
        "notes": notes(report),
        "limits": limits(report),
        "parity": _parity(report),
        "facts": {
            "Run": _facts({name: value for name, value in _run_facts(report).items() if value is not None}),
            "Protocol": _facts(report.protocol),
            "Environment": _facts(report.environment),
            "Inputs": _facts(dict(report.inputs)),
        },
        "total_seconds": digits(sum(stage.seconds for stage in report.stages)),
        "digits": digits,
    }


def _headlines(report: Report) -> list[Headline]:
    """What was asked, what came out, what it cost in quality, what it saved in size."""
    verdict, metric = report.verdict, report.score.metric
    asked, measured = verdict.asked, verdict.measured
    limit = report.max_drop
    allowed = "" if limit is None else f"losing at most {lost(metric, limit)}"
    value = found(asked, measured, report.compressed)
    if value is not None:
        note = "of the file that ships"
        if measured is not None:
            low, high = measured.interval95
            speed = "" if asked.name == "speedup" else f"{measured.speedup:.2f}x, "
            note = f"{latencies(report).replace('->', '→')}, {speed}95 % interval [{low:.2f}, {high:.2f}]"
        result = Headline("Measured", exact(asked, value), note)
    else:
        guess = getattr(verdict.predicted, asked.name, None)
        words = "none" if guess is None else amount(asked.name, guess)
        result = Headline("Predicted (estimate)", words, f"{verdict.predicted.source}, {NONE}")
    unknown = None in (report.baseline.score, report.compressed.score)
    quality_text = NONE if unknown else scores(report).replace("->", "→")
    size = next(row for row in metrics_table.rows(report) if row.label == "weights")
    return [
        Headline("Asked", amount(asked.name, asked.value), allowed),
        result,
        Headline(metric.capitalize(), quality_text, metrics_table.score_change(report)),
        Headline("Weights", size.after, f"from {size.before}, {size.change}"),
    ]


def _site_rows(report: Report) -> list[SiteRow]:
    """The plan as a table; a time that was not measured says so."""
    table = []
    for site in report.sites:
        word = "" if site.source == "measured" else " (estimate)"
        times = [f"{digits(ms)}{word}" for ms in (site.dense_latency_ms, site.latency_ms)]
        extras = [site.option.pattern, site.option.precision]
        extras += [f"rank {site.option.rank}"] if site.option.rank else []
        moves = [extra for extra in extras if extra not in ("dense", "fp32")]
        what = ", ".join([charts.kept(site.option), *moves])
        table.append(SiteRow(site.name, site.kind, what, digits(site.error), *times))
    return table


def notes(report: Report) -> list[str]:
    """What a reader must know before believing the verdict."""
    verdict, found_notes = report.verdict, []
    asked, measured = verdict.asked, verdict.measured
    if verdict.reason:
        found_notes.append(f"{verdict.reason[:1].upper()}{verdict.reason[1:]}.")
    step = next_step(report)
    found_notes += [f"{line}." for line in (step, ruin(report)) if line is not None]
    if verdict.status == "met" and asked.speedup and measured:
        low = measured.interval95[0]
        if low < asked.speedup:
            found_notes.append(
                f"The median is above {asked.speedup:.2f}x, the interval reaches down to {low:.2f}x."
            )
    if report.parity is not None and report.parity.max_abs_difference > report.parity.tolerance:
        found_notes.append("The exported file and PyTorch differ by more than the tolerance.")
    return [*found_notes, *report.warnings]


def class_rows(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Name, samples, dense, compressed and change in points of the classes that lose or gain most."""
    changed = [one for one in report.classes if one.compressed != one.dense]
    if len(changed) > MOST_CLASSES:
        changed = [*changed[: MOST_CLASSES - 3], *changed[-3:]]
    return [
        (
            one.name,
            f"{one.samples:,}",
            f"{one.dense:.1%}",
            f"{one.compressed:.1%}",
            f"{100 * (one.compressed - one.dense):+.1f} points",
        )
        for one in changed
    ]


def _run_facts(report: Report) -> dict[str, Fact]:
    """How the run was started, by which program, and how long it took."""
    took = None if report.wall_seconds is None else duration(report.wall_seconds)
    return {"command": report.command, "compress": report.revision, "time": took}


def _low_precision(report: Report) -> str | None:
    """The number formats below the model's own in the file, e.g. `int8`; None where there are none."""
    names = (report.compressed.precision or "").split(" + ")[1:]
    return " and ".join(names) or None


def _tags(report: Report) -> list[str]:
    """The tags of a model card, by what was done to the model."""
    options = [site.option for site in report.sites]
    done = {
        "structured-pruning": any(option.units < option.units_total for option in options),
        "sparsity": any(option.pattern != "dense" for option in options),
        "low-rank": any(option.rank for option in options),
        "quantization": _low_precision(report) is not None,
    }
    spec = TASKS.get(report.task or "")
    tags = () if spec is None else spec.tags
    return ["compress", *(name for name, holds in done.items() if holds), *tags, "onnx"]


def limits(report: Report) -> list[str]:
    """Why it is not faster still: what no plan can remove, and what was tried."""
    lines = []
    if report.reachable_speedup is not None:
        lines.append(f"The fastest plan there is reaches {report.reachable_speedup:.2f}x (estimate).")
    if report.fixed_ms is not None:
        total = report.verdict.predicted.latency_ms
        share = f", {report.fixed_ms / total:.0%} of the compressed model's time" if total else ""
        lines.append(f"{digits(report.fixed_ms)} ms (estimate) lie outside every site{share}.")
    if report.engine is not None:
        lines.append(_engine(report.engine))
    return [*lines, *report.attribution]


def _engine(engine: Engine) -> str:
    """What became of 2:4 zeros in the engine that was built from the file."""
    built = f"The engine for {engine.device} (TensorRT {engine.tensorrt})"
    if not engine.sparse:
        return f"{built} was built without 2:4 kernels: the plan has no 2:4 zeros."
    could, does = (
        f"{len(names)} layer{'' if len(names) == 1 else 's'}{f' ({_few(names)})' if names else ''}"
        for names in (engine.eligible, engine.picked)
    )
    lost = "" if engine.picked else "; so its 2:4 zeros gain no time"
    return f"{built} may use 2:4 kernels in {could} and does in {does}{lost}."


def _few(names: Sequence[str]) -> str:
    """The first names of a list."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _parity(report: Report) -> str:
    """PyTorch against the file, in one sentence."""
    parity = report.parity
    if parity is None:
        return f"PyTorch against the exported file: {NONE}."
    rounded = ""
    if parity.products:
        rounded = (
            f" Its {parity.products:,} products in low precision were compared one by one, each on what the "
            "file's product reads: they differ by at most "
            f"{parity.product_difference:.1e} of the largest value."
        )
    return (
        f"Over {parity.inputs:,} inputs the exported file differs from PyTorch by at most "
        f"{parity.max_abs_difference:.1e} (tolerance {parity.tolerance:.1e}); "
        f"{parity.agreement:.2%} of the answers agree.{rounded}"
    )


def _facts(values: dict[str, Fact]) -> list[tuple[str, str]]:
    words = {True: "yes", False: "no", None: "unknown"}
    return [
        (key.replace("_", " "), words[value] if value is None or isinstance(value, bool) else str(value))
        for key, value in values.items()
    ]


@cache
def _environment(kind: str) -> Environment:
    """Templates that escape for HTML or for Markdown whatever they print."""
    environment = Environment(
        loader=PackageLoader("compress.report", ""),
        autoescape=kind == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if kind == "html" else _markdown_text,
    )
    environment.filters["code"] = Markup  # only our own snippets, which hold nothing from outside
    environment.filters["yaml"] = lambda value: Markup(json.dumps(value, ensure_ascii=False))
    return environment


def _markdown_text(value: object) -> object:
    r"""One line of Markdown that shows `value` as it is: no markup, no HTML, no table cell ended.

    >>> print(_markdown_text("<b>|*x*"))
    \<b\>\|\*x\*
    """
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*|<>#~])", r"\\\1", " ".join(str(value).split()))
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return re.sub(r"\](?=[(\[:])", r"\\]", text)
