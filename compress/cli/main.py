"""Words on the command line -> a `Recipe`; a `Report` -> one line and an exit code.

Nothing heavy is imported before a verb needs it: `compress --help` does not wait for torch.
"""

import difflib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress import __version__
from compress.distributed.process_env import process_info, silence_output
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.cli.command import Session

EXAMPLES = """\b
Examples:
  compress --target cpu --speedup 2x
  compress path/to/model --data train.csv --target cpu --latency-ms 5 --out out
  compress path/to/model --data train.csv --target a100 --speedup 3x
\b
`compress MODEL ...` is short for `compress run MODEL ...`.
Exit codes: 0 the budget is met, measured; 1 missed; 2 a bad request;
3 built, but this machine is not the target, so not measured."""

Words = dict[str, Any]
Command = Callable[..., int]
Decorator = Callable[[Command], Command]


class Verbs(click.Group):
    """The verbs; words that begin with none of them belong to `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front where it was left out."""
        if args and args[0] not in (*self.commands, "-h", "--help", "--version"):
            near = difflib.get_close_matches(args[0], list(self.commands), 1, 0.8)
            if near and not args[0].startswith("-") and not Path(args[0]).exists():
                raise click.UsageError(
                    f"{args[0]!r} is neither a verb nor a file; did you mean {near[0]!r}?", ctx
                )
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of this module, which is the order of need."""
        return list(self.commands)


def _options(*options: Callable[[Any], Any]) -> Decorator:
    """Several click options as one decorator, in the order in which `--help` lists them."""

    def apply(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _verb(work: "Callable[[Session, Words], int]", *, shared: bool = False) -> Command:
    """A click callback that does `work` in a session of its own.

    Of several processes the first does it alone, unless it is `shared`.
    """

    @functools.wraps(work)
    def act(**words: Any) -> int:
        if process_info().rank and not shared:
            return 0
        from compress import progress as shown
        from compress.cli import console
        from compress.cli.command import Session

        console.hush()
        with console.own_streams() as streams:
            progress = shown.for_stream(streams.err, quiet=words["quiet"])
            session = Session(streams, progress, words["as_json"])
            try:
                code = work(session, words)
            except (Exception, KeyboardInterrupt) as error:
                code = session.fail(error)
            if process_info().size > 1 and shared:
                from compress.distributed import collectives

                collectives.stop_followers(code)
            return code

    return act


COUNT = click.IntRange(min=1)
MODEL = click.argument("model", required=False)
COMMON = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
    click.option("--quiet", "-q", is_flag=True, help="No progress."),
)
SHAPES = _options(
    click.option("--batch", type=COUNT, metavar="N", help="Inputs in one run; 1 unless given."),
    click.option("--tokens", type=COUNT, metavar="N", help="Length of a text input; 32 unless given."),
)
PHASE = click.option(
    "--phase",
    type=click.Choice(["prefill", "decode"]),
    help="Of a decoder: time to first token, or per token after --tokens of them; prefill unless given.",
)
THREADS = click.option("--threads", type=COUNT, metavar="N", help="Threads of the runtime; 1 unless given.")
REQUEST = _options(
    MODEL,
    click.option("--target", metavar="NAME", help="The device; `compress targets` lists them."),
    click.option("--speedup", metavar="2x", help="Budget: how many times faster; 2x,4x: a family."),
    click.option("--latency-ms", metavar="5", help="Budget: median latency in milliseconds."),
    click.option("--energy-mj", metavar="20", help="Budget: energy of one run in millijoules."),
    click.option("--power-w", metavar="15", help="Budget: average power in watts, at --rate-hz."),
    click.option("--rate-hz", type=float, metavar="50", help="Runs a second that the device answers."),
    click.option("--size-mb", metavar="30", help="Budget: size of the file in megabytes."),
    click.option("--data", metavar="PATH", help="Inputs with labels: a file or a folder."),
    click.option("--test", metavar="PATH", help="Inputs for the score, if --data has no test part."),
    click.option("--task", metavar="TASK", help="What the model does, if its config does not say."),
    click.option("--text", metavar="COLUMN", help="The text column, if it is not found."),
    click.option("--label", metavar="COLUMN", help="The label column, if it is not found."),
    click.option(
        "--moves",
        metavar="LIST",
        help="May be done: structure,width,int8,int8-static,int4,fp8,block,lowrank,2:4.",
    ),
    click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="A request as TOML."),
    click.option(
        "--recover",
        type=click.Choice(["none", "fast", "full"]),
        help="Tune after pruning: not, for minutes, or until the score stops rising; none unless given.",
    ),
    click.option("--max-drop", type=float, metavar="0.01", help="How much of the score may be lost."),
    click.option("--out", "-o", metavar="DIR", help="Where the result goes; `out` unless given."),
    SHAPES,
    PHASE,
    THREADS,
    click.option("--seed", type=int, metavar="N", help="Of the search; 0 unless given."),
    COMMON,
)


@click.group(
    cls=Verbs,
    epilog=EXAMPLES,
    subcommand_metavar="[VERB] [MODEL] [OPTIONS]",
    options_metavar="",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="compress %(version)s")
def app() -> None:
    """Compile a trained PyTorch model to a budget on a named device, and measure that it was met.

    MODEL is a Hugging Face directory or hub id, or package.module:factory for any nn.Module;
    without one the embedded default is compiled.
    """


@app.command()
@REQUEST
@functools.partial(_verb, shared=True)
def run(session: "Session", words: Words) -> int:
    """Compile MODEL to a budget, and measure that it was met."""
    from compress import api, request
    from compress.cli import console
    from compress.report import family, next_steps, summary

    recipe = request.make(words.pop("recipe"), _options_of(words))
    api.join()
    session.out = Path(recipe.out)
    console.use_cores()
    if process_info().rank:
        return api.serve()
    result = api.compile(recipe=recipe, progress=session.progress)
    if isinstance(result, api.FamilyResult):
        session.answer(result.family.model_dump(mode="json"), family.text(result.family))
        return result.exit_code
    page = str(session.out / "compression" / "report.html")
    session.answer(result.report.model_dump(mode="json"), summary.verdict_line(result.report, page))
    for line in (next_steps.next_step(result.report, recipe.out), next_steps.ruin(result.report)):
        if line is not None:
            session.progress.say(line)
    return result.exit_code


@app.command()
@MODEL
@SHAPES
@COMMON
@_verb
def inspect(session: "Session", words: Words) -> int:
    """List the sites of MODEL, the places to compress."""
    from compress import api

    found = api.inspect(words["model"], batch=words["batch"], tokens=words["tokens"])
    session.answer(found.model_dump(mode="json"))
    return 0


@app.command()
@REQUEST
@_verb
def plan(session: "Session", words: Words) -> int:
    """Say what is reachable, and by which move; builds nothing."""
    from compress import api
    from compress.cli import console

    session.out = Path(words["out"] or "out")
    console.use_cores()
    recipe = words.pop("recipe")
    found = api.plan(recipe=recipe, progress=session.progress, **_options_of(words))
    session.answer(found.model_dump(mode="json"))
    return 0


@app.command()
@click.argument("artifacts", metavar="FILE-OR-DIR...", nargs=-1, required=True)
@SHAPES
@PHASE
@THREADS
@click.option("--blocks", type=click.IntRange(min=30), default=40, metavar="N", help="Blocks of each; 40.")
@COMMON
@_verb
def bench(session: "Session", words: Words) -> int:
    """Time files in turn here; ratios are to the first."""
    from compress import api

    given = {name: words[name] for name in ("batch", "tokens", "phase", "blocks")}
    threads = words["threads"] or 1
    found = api.bench(*words["artifacts"], threads=threads, progress=session.progress, **given)
    session.answer(found.model_dump(mode="json"))
    return 0


@app.command("export")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--to", "to", required=True, metavar="FORMAT", help="onnx, onnx-fp16, ort, edge, edge+ort or tensorrt."
)
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="PATH", help="Where to; DIR/FORMAT.")
@click.option("--archive", is_flag=True, help="One .tar.gz instead of a folder.")
@COMMON
@_verb
def export(session: "Session", words: Words) -> int:
    """Write what a run made as files for a runtime or a device."""
    from compress import api

    directory, to, archive = words["directory"], words["to"], words["archive"]
    written = api.export_files(directory, to, out=words["out"], archive=archive)
    document: Words = {"format": to, "files": [str(path) for path in written]}
    session.answer(document, "\n".join(document["files"]))
    return 0


@app.command("report")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--merge", type=click.Path(path_type=Path), metavar="FILE", help="measured.json of a device.")
@click.option("--device-is-target", is_flag=True, help="Vouch for a device that is not recognised.")
@COMMON
@_verb
def report(session: "Session", words: Words) -> int:
    """Write the report of a run again, and repeat its verdict."""
    from compress import api
    from compress.report import family, schema, summary

    directory, vouched = words["directory"], words["device_is_target"]
    found = api.write_report(directory, measurement=words["merge"], device_is_target=vouched)
    if isinstance(found, family.Family):
        session.answer(found.model_dump(mode="json"), family.text(found))
        return family.exit_code(found)
    page = str(schema.folder_of(directory) / "report.html")
    session.answer(found.model_dump(mode="json"), summary.verdict_line(found, page))
    return schema.exit_code(found)


@app.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@COMMON
@_verb
def clean(session: "Session", words: Words) -> int:
    """Remove a run's working files; what ships and the report stay."""
    from compress import api

    found = api.clean(words["directory"])
    freed = f"{found.freed_mb:g} MB removed, {found.remaining_mb:g} MB remain in {found.directory}"
    session.answer(found.model_dump(mode="json"), freed)
    return 0


@app.command()
@click.argument("name", metavar="[NAME | measure]", required=False)
@click.option("--target", metavar="NAME", help="With measure: the GPU or the processor of this machine.")
@click.option("--model", metavar="MODEL", help="With measure: package.module:factory; its sites are timed.")
@SHAPES
@COMMON
@_verb
def targets(session: "Session", words: Words) -> int:
    """List the devices, show one, or measure this machine."""
    given = {name: words[name] for name in ("target", "model", "batch", "tokens") if words[name] is not None}
    if words["name"] == "measure":
        from compress import api
        from compress.cli import console

        console.use_cores()
        session.answer(api.measure_target(progress=session.progress, **given))
        return 0
    if given:
        raise CompressError(f"--{next(iter(given))} belongs to `compress targets measure`")
    from compress.cost import device_facts

    if words["name"] is None:
        session.answer({"targets": [one.model_dump(mode="json") for one in device_facts.listed()]})
    else:
        session.answer(device_facts.facts(words["name"]))
    return 0


@app.command("doctor")
@COMMON
@_verb
def check_up(session: "Session", words: Words) -> int:
    """Say what this environment can do, and what to install."""
    from compress.cli import doctor

    found = doctor.examine()
    session.answer(found, doctor.text(found))
    return 0 if found["ready"] else 2


def _options_of(words: Words) -> Words:
    """The words of a request without those about its output."""
    return {name: value for name, value in words.items() if name not in ("as_json", "quiet")}


def perform(words: Sequence[str]) -> int:
    """Do what the words say; the exit code."""
    try:
        return int(app.main(list(words), prog_name="compress", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.Abort:
        click.echo("compress: interrupted", err=True)
        return 130
    except click.ClickException as error:
        message = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            message += f"\n  See `{error.ctx.command_path} --help`."
        click.echo(f"compress: {message}", err=True)
        if "--json" in words:
            click.echo(json.dumps({"error": message, "exit_code": 2}, indent=2))
        return 2


def main() -> None:
    """The `compress` command."""
    if process_info().rank:
        silence_output()
    sys.exit(perform(sys.argv[1:]))
