"""Options of the command line: what each is called, its help, and the group that `--help` lists it in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from compress.formats import MOVES

Command = Callable[..., int]
Decorator = Callable[[Command], Command]

GENERAL = "General"
COUNT = click.IntRange(min=1)
FOLDER = click.Path(path_type=Path)


class Option(click.Option):
    """An option with the title of its group in `--help`."""

    def __init__(self, *args: Any, group: str = GENERAL, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group


class Verb(click.Command):
    """A command whose `--help` lists options by group, in their order; general ones come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                title = parameter.group if isinstance(parameter, Option) else GENERAL
                groups.setdefault(title, []).append(record)
        for title in sorted(groups, key=lambda title: title == GENERAL):
            with formatter.section(title):
                formatter.write_dl(groups[title])


def combined(*decorators: Callable[[Any], Any]) -> Decorator:
    """Several options as one decorator, in the order in which `--help` lists them."""

    def apply(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def option(*flags: str, group: str = GENERAL, **settings: Any) -> Decorator:
    """One option of a group."""
    return click.option(*flags, cls=Option, group=group, **settings)


BUDGET, DATA, METHOD, RUN = "Target and budget", "Data", "Compression", "What is timed"
MODEL = click.argument("model", required=False)
DIRECTORY = click.argument("directory", metavar="DIR", type=FOLDER)
COMMON = combined(
    option("--json", "as_json", is_flag=True, help="Write one JSON document to standard output."),
    option("--quiet", "-q", is_flag=True, help="Show no progress."),
)
SHAPES = combined(
    option("--batch", group=RUN, type=COUNT, metavar="N", help="Inputs in one run; 1 by default."),
    option(
        "--tokens", group=RUN, type=COUNT, metavar="N", help="Length of text inputs in tokens; 32 by default."
    ),
)
PHASE = option(
    "--phase",
    group=RUN,
    type=click.Choice(["prefill", "decode"]),
    help="Of a decoder: time to first token (default), or time per token after --tokens of them.",
)
THREADS = option(
    "--threads", group=RUN, type=COUNT, metavar="N", help="Threads of the runtime; 1 by default."
)
REQUEST = combined(
    MODEL,
    option("--target", group=BUDGET, metavar="NAME", help="Device; `compress targets` lists them."),
    option(
        "--speedup",
        group=BUDGET,
        metavar="2x",
        help="Times faster than the dense model; 2x,4x makes a family of models.",
    ),
    option("--latency-ms", group=BUDGET, metavar="5", help="Median latency in milliseconds."),
    option("--energy-mj", group=BUDGET, metavar="20", help="Energy of one run in millijoules."),
    option("--power-w", group=BUDGET, metavar="15", help="Average power in watts, at --rate-hz."),
    option("--rate-hz", group=BUDGET, type=float, metavar="50", help="Runs per second, for --power-w."),
    option("--size-mb", group=BUDGET, metavar="30", help="Size of the file in megabytes."),
    option(
        "--max-drop",
        group=BUDGET,
        type=float,
        metavar="0.01",
        help="Maximum allowed score drop, as a fraction; no limit by default.",
    ),
    option("--data", group=DATA, metavar="PATH", help="Inputs with labels: a file or a folder."),
    option("--test", group=DATA, metavar="PATH", help="Inputs for the score; held out of --data by default."),
    option("--task", group=DATA, metavar="TASK", help="Task of the model; read from its config by default."),
    option(
        "--text", group=DATA, metavar="COLUMN", help="Column of text; found by its name or type by default."
    ),
    option(
        "--label",
        group=DATA,
        metavar="COLUMN",
        help="Column of labels; found by its name or type by default.",
    ),
    option(
        "--moves",
        group=METHOD,
        metavar="LIST",
        help=f"Techniques to search, comma-separated: {', '.join(MOVES)}; structure unless given.",
    ),
    option(
        "--recover",
        group=METHOD,
        type=click.Choice(["none", "fast", "full"]),
        help="Fine-tuning after compression: none (default), one course, or until the score stops rising.",
    ),
    option("--seed", group=METHOD, type=int, metavar="N", help="Seed of the search; 0 by default."),
    option(
        "--recipe",
        group=METHOD,
        type=FOLDER,
        metavar="FILE",
        help="Request as TOML; other options override it.",
    ),
    SHAPES,
    PHASE,
    THREADS,
    option("--out", "-o", metavar="DIR", help="Output directory; `out` by default."),
    COMMON,
)
