"""The report of a family: one row for every model, and the front of score over measured speed."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field

from compress.artifacts import write_text
from compress.errors import CompressError
from compress.ir import SCHEMA_VERSION, Document
from compress.report.formatting import digits, lost, score_text
from compress.report.schema import EXIT_CODES, Report, Status, Target
from compress.report.summary import device, shown_model
from compress.report.svg import PALETTE, WIDTH, Canvas, Chart, finish, ticks

FILE = "family.json"


class Member(Document):
    """One model of a family; `directory` lies beside the report, and holds a report of its own."""

    directory: str
    speedup: float = Field(gt=0)
    status: Status
    measured: float | None = None
    interval95: tuple[float, float] | None = None
    predicted: float | None = None
    latency_ms: float | None = None
    score: float | None = None
    score_drop: float | None = None
    score_drop_interval95: tuple[float, float] | None = None
    parameters: int
    file_bytes: int | None = None
    precision: str | None = None
    seconds: float


class Family(Document):
    """All models that were made from one dense model in one run, from the mildest to the hardest."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    created: str
    model: str
    target: Target
    metric: str
    dense_score: float | None
    dense_parameters: int
    members: tuple[Member, ...]


def member(directory: str, report: Report) -> Member:
    """The row of one finished model."""
    verdict, now = report.verdict, report.compressed
    measured = verdict.measured
    return Member(
        directory=directory,
        speedup=verdict.asked.value,
        status=verdict.status,
        measured=None if measured is None else measured.speedup,
        interval95=None if measured is None else measured.interval95,
        predicted=verdict.predicted.speedup,
        latency_ms=None if now.latency_ms is None else now.latency_ms.p50,
        score=now.score,
        score_drop=verdict.score_drop,
        score_drop_interval95=verdict.score_drop_interval95,
        parameters=now.parameters,
        file_bytes=now.file_bytes,
        precision=now.precision,
        seconds=sum(stage.seconds for stage in report.stages),
    )


def of(report: Report, members: Sequence[Member]) -> Family:
    """The family of one dense model, which `report` is about."""
    return Family(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=report.model,
        target=report.target,
        metric=report.score.metric,
        dense_score=report.baseline.score,
        dense_parameters=report.baseline.parameters,
        members=tuple(members),
    )


def exit_code(family: Family) -> int:
    """0 when every member kept its budget, else 1 when one missed it, else 3."""
    codes = {EXIT_CODES[one.status] for one in family.members}
    return 1 if 1 in codes else max(codes)


def read(directory: Path) -> Family:
    """The family in a directory.

    Raises:
        CompressError: there is none, or it is damaged.
    """
    path = directory / FILE
    try:
        return Family.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(
            f"{path} cannot be read ({error.strerror}); give the --out of a family"
        ) from error
    except ValueError as error:
        raise CompressError(f"{path} is damaged; run compress with --out {directory} again") from error


def write(family: Family, directory: Path) -> None:
    """Write family.json, README.md (the table) and family.html (with the front)."""
    write_text(directory / FILE, family.model_dump_json(indent=1) + "\n")
    write_text(directory / "README.md", markdown(family))
    write_text(directory / "family.html", html(family))


def rows(family: Family) -> list[list[str]]:
    """Asked, measured, score, lost, parameters, file, seconds, status: one row for every member."""
    return [
        [
            one.directory,
            _speed(one),
            score_text(family.metric, one.score),
            "-" if one.score_drop is None else lost(family.metric, one.score_drop, one.score_drop_interval95),
            f"{one.parameters / family.dense_parameters:.0%}",
            "-" if one.file_bytes is None else f"{digits(one.file_bytes / 1e6)} MB",
            f"{one.seconds:.0f} s",
            one.status.replace("_", " "),
        ]
        for one in family.members
    ]


def header(family: Family) -> list[str]:
    """What the columns of `rows` are."""
    return ["asked", "measured", family.metric, "lost", "parameters", "file", "took", "status"]


def text(family: Family) -> str:
    """The table for a terminal."""
    lines = [header(family), *rows(family)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(family: Family) -> str:
    """The table as Markdown, under what it is about."""
    lines = [header(family), [":--", *["--:"] * 6, ":--"], *rows(family)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"# {title(family)}\n\nDense {family.metric}: {score_text(family.metric, family.dense_score)}. "
        "Every directory holds a model and its own report.\n\n"
        f"{table}\n"
    )


def title(family: Family) -> str:
    """What the family is of, and where its times hold."""
    runs = dict.fromkeys(
        part for one in family.members for part in (one.precision or "").split(" + ") if part
    )
    where = device(family.target, " + ".join(runs))
    return f"{shown_model(family.model)}: {len(family.members)} models for {where}"


def html(family: Family) -> str:
    """One page that needs no network and no script."""
    environment = Environment(
        loader=PackageLoader("compress.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    drawn = front(family)
    return environment.get_template("family.html.j2").render(
        title=title(family),
        header=header(family),
        rows=rows(family),
        chart=None if drawn is None else Markup(drawn.page),
        palette=PALETTE,
        dense=f"{family.metric} {score_text(family.metric, family.dense_score)}",
    )


def front(family: Family) -> Chart | None:
    """Score over speedup, the dense model at 1x among the points; None without scores."""
    points = [
        (one.measured or one.predicted, one.score)
        for one in family.members
        if (one.measured or one.predicted) and one.score is not None
    ]
    if family.dense_score is None or not points:
        return None
    known = [(1.0, family.dense_score), *points]
    height = 300
    canvas = Canvas(height)
    axes = canvas.axes(64, 16, WIDTH - 80, height - 68)
    xs, ys = [float(x or 1.0) for x, _ in known], [float(y) for _, y in known]
    spread = (max(ys) - min(ys)) or 0.01
    axes.set_xlim(0.9, max(xs) * 1.04)
    axes.set_ylim(min(ys) - 0.08 * spread, max(ys) + 0.08 * spread)
    ticks(axes, "x", 0.9, max(xs) * 1.04, log=False, unit="x")
    ticks(axes, "y", *axes.get_ylim(), log=False)
    axes.grid(axis="y", color=PALETTE["line"], linewidth=1)
    axes.plot(xs, ys, color=PALETTE["now"], linewidth=1.8, marker="o", markersize=6)
    for one in family.members:
        speed = one.measured or one.predicted
        if speed is None or one.score is None:
            continue
        if one.interval95 is not None:
            axes.hlines(one.score, *one.interval95, color=PALETTE["now"], linewidth=4, alpha=0.35)
        axes.annotate(
            one.directory, (speed, one.score), (0, 8), textcoords="offset points", ha="right",
            fontsize=12, color=PALETTE["ink"], parse_math=False,
        )  # fmt: skip
    measured = all(one.measured is not None for one in family.members)
    words = "measured speedup" if measured else "speedup (estimate where it was not measured)"
    canvas.write(64 + (WIDTH - 80) / 2, height - 12, words, align="center")
    canvas.write(14, 16 + (height - 68) / 2, family.metric, align="center", turn=90)
    return finish(canvas, "family", f"{family.metric} over speedup")


def _speed(one: Member) -> str:
    if one.measured is not None and one.interval95 is not None:
        low, high = one.interval95
        return f"{one.measured:.2f}x [{low:.2f}, {high:.2f}]"
    return "not measured" if one.predicted is None else f"{one.predicted:.2f}x (estimate)"
