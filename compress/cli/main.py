"""The verbs of the command line: options become calls of `compress.api.verbs`, results text and exit codes.

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
from compress.cli import options
from compress.cli.options import COMMON, DIRECTORY, MODEL, PHASE, REQUEST, SHAPES, THREADS, Command, option
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
\b
Exit codes:
  0    the budget is met, measured (other verbs: done)
  1    the budget is missed
  2    a bad request: what was asked cannot be done
  3    built, but not measured: this machine is not the target
  70   a bug in compress; its trace is in a file
  130  interrupted; the same command resumes"""

Words = dict[str, Any]


class Verbs(click.Group):
    """The verbs; words that begin with none of them belong to `run`."""

    command_class = options.Verb

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


def _verb(work: "Callable[[Session, Words], int]", *, shared: bool = False) -> Command:
    """A click callback that does `work` in a session of its own.

    Of several processes the first does it alone, unless it is `shared`.
    """

    @functools.wraps(work)
    def act(**words: Any) -> int:
        if process_info().rank and not shared:
            return 0
        from compress.cli import console
        from compress.cli.command import Session
        from compress.report import progress as shown

        console.hush()
        with console.own_streams() as streams:
            progress = shown.for_stream(streams.err, quiet=words["quiet"])
            session = Session(streams, progress, words["as_json"])
            try:
                code = work(session, words)
            except (Exception, KeyboardInterrupt) as error:
                code = session.report_error(error)
            if process_info().size > 1 and shared:
                from compress.distributed import collectives

                collectives.stop_followers(code)
            return code

    return act


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
    from compress.api import request, verbs
    from compress.api.results import FamilyResult
    from compress.cli import console
    from compress.report import family, next_steps, summary

    asked = request.make(words.pop("recipe"), _options_of(words))
    verbs.join()
    session.out = Path(asked.out)
    console.use_cores()
    if process_info().rank:
        return verbs.serve()
    result = verbs.compile(recipe=asked, progress=session.progress)
    if isinstance(result, FamilyResult):
        session.print_result(result.family.model_dump(mode="json"), family.text(result.family))
        return result.exit_code
    page = str(session.out / "compression" / "report.html")
    verdict = summary.verdict_line(result.report, page)
    text = console.verdict_text(verdict, result.report.verdict.status, session.streams.out)
    session.print_result(result.report.model_dump(mode="json"), text)
    for line in (next_steps.next_step(result.report, asked.out), next_steps.ruin(result.report)):
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
    from compress.api import verbs

    found = verbs.inspect(words["model"], batch=words["batch"], tokens=words["tokens"])
    session.print_result(found.model_dump(mode="json"))
    return 0


@app.command()
@REQUEST
@_verb
def plan(session: "Session", words: Words) -> int:
    """Estimate what is reachable, and by which moves; build nothing."""
    from compress.api import verbs
    from compress.cli import console

    session.out = Path(words["out"] or "out")
    console.use_cores()
    file = words.pop("recipe")
    found = verbs.plan(recipe=file, progress=session.progress, **_options_of(words))
    session.print_result(found.model_dump(mode="json"))
    return 0


@app.command()
@click.argument("artifacts", metavar="FILE-OR-DIR...", nargs=-1, required=True)
@SHAPES
@PHASE
@THREADS
@option(
    "--blocks",
    group=options.RUN,
    type=click.IntRange(min=30),
    default=40,
    metavar="N",
    help="Interleaved timing blocks of each file; 40 by default.",
)
@COMMON
@_verb
def bench(session: "Session", words: Words) -> int:
    """Time files on this machine; speedups are over the first."""
    from compress.api import verbs

    given = {name: words[name] for name in ("batch", "tokens", "phase", "blocks")}
    threads = words["threads"] or 1
    found = verbs.bench(*words["artifacts"], threads=threads, progress=session.progress, **given)
    document = found.model_dump(mode="json")
    session.print_result(document, _with_units(document))
    return 0


def _with_units(document: Words) -> str:
    """The result of `bench` as text, with the unit of every latency in its column's name."""
    from compress.cli.console import plain
    from compress.ir import Latency

    timed = set(Latency.model_fields) - {"runs"}
    rows = [
        {f"{name}_ms" if name in timed else name: value for name, value in row.items()}
        for row in document.get("artifacts", [])
    ]
    return plain({**document, "artifacts": rows} if rows else document)


@app.command()
@DIRECTORY
@option(
    "--to",
    required=True,
    metavar="FORMAT",
    help="Format: onnx, onnx-fp16, ort, edge, edge+ort or tensorrt.",
)
@option("--out", "-o", type=options.FOLDER, metavar="PATH", help="Where to write; DIR/FORMAT by default.")
@option("--archive", is_flag=True, help="Write one .tar.gz instead of a folder.")
@COMMON
@_verb
def export(session: "Session", words: Words) -> int:
    """Write a run's result as files for a runtime or a device."""
    from compress.api import verbs

    directory, to, archive = words["directory"], words["to"], words["archive"]
    written = verbs.export_files(directory, to, out=words["out"], archive=archive)
    document: Words = {"format": to, "files": [str(path) for path in written]}
    session.print_result(document, "\n".join(document["files"]))
    return 0


@app.command()
@DIRECTORY
@option("--merge", type=options.FOLDER, metavar="FILE", help="Add measured.json of a device.")
@option("--device-is-target", is_flag=True, help="Accept a device that is not recognized as the target.")
@COMMON
@_verb
def report(session: "Session", words: Words) -> int:
    """Write a run's report again, and print its verdict."""
    from compress.api import verbs
    from compress.cli import console
    from compress.report import family, schema, summary

    directory, vouched = words["directory"], words["device_is_target"]
    found = verbs.write_report(directory, measurement=words["merge"], device_is_target=vouched)
    if isinstance(found, family.Family):
        session.print_result(found.model_dump(mode="json"), family.text(found))
        return family.exit_code(found)
    page = str(schema.folder_of(directory) / "report.html")
    verdict = summary.verdict_line(found, page)
    text = console.verdict_text(verdict, found.verdict.status, session.streams.out)
    session.print_result(found.model_dump(mode="json"), text)
    return schema.exit_code(found)


@app.command()
@DIRECTORY
@COMMON
@_verb
def clean(session: "Session", words: Words) -> int:
    """Remove a run's working files; what ships and the report stay."""
    from compress.api import verbs

    found = verbs.clean(words["directory"])
    freed = f"{found.freed_mb:g} MB removed, {found.remaining_mb:g} MB remain in {found.directory}"
    session.print_result(found.model_dump(mode="json"), freed)
    return 0


@app.command()
@click.argument("name", metavar="[NAME | measure]", required=False)
@option("--target", metavar="NAME", help="With measure: the GPU or the processor of this machine.")
@option("--model", metavar="MODEL", help="With measure: package.module:factory; its sites are timed.")
@SHAPES
@COMMON
@_verb
def targets(session: "Session", words: Words) -> int:
    """List the devices, show one, or measure this machine."""
    given = {name: words[name] for name in ("target", "model", "batch", "tokens") if words[name] is not None}
    if words["name"] == "measure":
        from compress.api import verbs
        from compress.cli import console

        console.use_cores()
        session.print_result(verbs.measure_target(progress=session.progress, **given))
        return 0
    if given:
        raise CompressError(f"--{next(iter(given))} belongs to `compress targets measure`")
    from compress.cost import device_facts

    if words["name"] is None:
        session.print_result({"targets": [one.model_dump(mode="json") for one in device_facts.listed()]})
    else:
        session.print_result(device_facts.facts(words["name"]))
    return 0


@app.command()
@click.argument("path", metavar="[FILE]", required=False, type=options.FOLDER)
@option("--reference", is_flag=True, help="List all keys with types and defaults instead.")
@COMMON
@_verb
def recipe(session: "Session", words: Words) -> int:
    """Check a recipe and show it with all defaults filled in."""
    from compress import recipe as recipes
    from compress.api import request
    from compress.cli import recipe_reference

    if words["reference"]:
        keys = [key.model_dump(mode="json") for key in recipe_reference.list_keys()]
        session.print_result({"keys": keys}, recipe_reference.text())
        return 0
    if words["path"] is None:
        raise CompressError("no recipe was given; name a TOML file, or list the keys with --reference")
    found = request.make(words["path"], {})
    session.print_result(found.model_dump(mode="json", exclude_none=True), recipes.to_toml(found).rstrip())
    return 0


@app.command()
@COMMON
@_verb
def doctor(session: "Session", words: Words) -> int:
    """Check this environment, and name what to install."""
    from compress.cli import doctor as checks

    found = checks.examine()
    session.print_result(found, checks.text(found))
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
