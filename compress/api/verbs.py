"""The public Python API: what the command line does, as functions with typed results.

`compress/__init__.py` hands these out under their names without importing torch before one is called. They
raise `CompressError` for whatever the caller can mend, write nothing to the standard streams unless
`progress="terminal"` asks for it, and change no state of the process.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from torch import nn

from compress import artifacts
from compress.api import request as requests
from compress.api.request import Request
from compress.api.results import FamilyResult, Result
from compress.cost import device_facts
from compress.cost.device_facts import Device
from compress.distributed import collectives, process_env
from compress.errors import CompressError
from compress.export import huggingface
from compress.export.delivery import deliver
from compress.export.edge import bundle_schema, merge
from compress.ir import BUDGETS
from compress.pipeline import compilation, family_compilation, inspection, worker
from compress.recipe import Recipe
from compress.report import family, render, schema
from compress.report import progress as shown
from compress.report.family import Family
from compress.report.overviews import BenchResult, Cleaned, Inspection, PlanOverview
from compress.report.progress import Function, Progress
from compress.report.schema import Report
from compress.tasks import loading
from compress.tasks.own_module import Inputs, ModuleTask
from compress.tasks.task import Task

Model = str | Path | nn.Module | Task | None
Shown = Progress | Function | str | None


@overload
def compile(
    model: Model = None,
    *,
    speedup: Sequence[float],
    recipe: Recipe | str | Path | None = None,
    example_inputs: Inputs | None = None,
    data_loader: Iterable[object] | None = None,
    progress: Shown = None,
    **request: Unpack[Request],
) -> FamilyResult: ...


@overload
def compile(
    model: Model = None,
    *,
    speedup: float | str | None = None,
    recipe: Recipe | str | Path | None = None,
    example_inputs: Inputs | None = None,
    data_loader: Iterable[object] | None = None,
    progress: Shown = None,
    **request: Unpack[Request],
) -> Result: ...


def compile(
    model: Model = None,
    *,
    speedup: float | str | Sequence[float] | None = None,
    recipe: Recipe | str | Path | None = None,
    example_inputs: Inputs | None = None,
    data_loader: Iterable[object] | None = None,
    progress: Shown = None,
    **request: Unpack[Request],
) -> Result | FamilyResult:
    """Compile a model to a budget on a target, and measure that it was met.

    Args:
        model: a Hugging Face directory or hub id, `package.module:factory`, an `nn.Module`, or a `Task`;
            None compiles the embedded default.
        speedup: budget: how many times faster, 2.0 or "2x". Several of them, or a recipe with several, make a
            family, whose result is a `FamilyResult`.
        recipe: a whole request, as an object or a TOML file; the other arguments are laid over it.
        example_inputs: of an `nn.Module`: one batch, by argument name or in the order of `forward`.
        data_loader: of an `nn.Module`: batches of inputs, or pairs of inputs and labels.
        progress: None, "terminal", a function of (stage, done, total, message), or a `Progress`.
        **request: see `request.Request`.

    Raises:
        CompressError: the request cannot be carried out; the message says what can.
    """
    options = {**request, "speedup": speedup}
    asked, task, factory = _prepared(model, recipe, example_inputs, data_loader, options)
    steps = shown.chosen(progress)
    if asked.speedups:
        members = family_compilation.run(asked, steps, task)
        out = Path(asked.out)
        results = [
            Result(out / one.directory, schema.read(out / one.directory), factory) for one in members.members
        ]
        return FamilyResult(out, members, tuple(results))
    return Result(Path(asked.out), compilation.run(asked, steps, task), factory)


def load(directory: str | Path, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The compressed model in the output directory of a run, ready to run or to train further.

    Args:
        directory: holds config.json and model.safetensors.
        factory: gives a fresh instance of the original architecture; needed only for a model that is
            none of transformers' own.

    Raises:
        CompressError: a file is missing, damaged, or does not fit the others.
    """
    return huggingface.read(Path(directory), factory)


def inspect(
    model: Model = None,
    *,
    example_inputs: Inputs | None = None,
    batch: int | None = None,
    tokens: int | None = None,
) -> Inspection:
    """The sites of a model: what can be compressed, and its share of weights and work. No data is needed.

    Args:
        model: as for `compile`.
        example_inputs: of an `nn.Module`: one batch, by argument name or in the order of `forward`.
        batch: inputs in one run; 1 unless given.
        tokens: length of a text input; 32 unless given.

    Raises:
        CompressError: the model cannot be loaded or run.
    """
    shapes = requests.shapes(batch=batch, tokens=tokens)
    if isinstance(model, Task):
        name, module, example = _name(model), model.model, model.example(shapes.batch, shapes.tokens)
    elif isinstance(model, nn.Module):
        if example_inputs is None:
            raise CompressError(f"{type(model).__name__} is a module of your own; give example_inputs=")
        name, module = _name(model), model
        example = ModuleTask.example_of(model, example_inputs, shapes.batch)
    else:
        words = None if model is None else str(model)
        name = words or inspection.DEFAULT_MODEL
        module, example = loading.load_example(words, shapes.batch, shapes.tokens)
    return inspection.inspect(name, module, example)


def plan(
    model: Model = None,
    *,
    recipe: Recipe | str | Path | None = None,
    example_inputs: Inputs | None = None,
    data_loader: Iterable[object] | None = None,
    progress: Shown = None,
    speedup: float | str | None = None,
    **request: Unpack[Request],
) -> PlanOverview:
    """What is reachable on a target, and by which moves; builds nothing. Arguments are those of `compile`.

    Raises:
        CompressError: the request cannot be carried out.
    """
    options = {**request, "speedup": speedup}
    if not any(options.get(name) is not None for name in BUDGETS) and not _has_budget(recipe):
        options["speedup"] = 2.0
    asked, task, _ = _prepared(model, recipe, example_inputs, data_loader, options)
    return inspection.plan(asked, shown.chosen(progress), task)


def bench(
    *paths: str | Path,
    batch: int | None = None,
    tokens: int | None = None,
    phase: str | None = None,
    threads: int = 1,
    blocks: int = 40,
    progress: Shown = None,
) -> BenchResult:
    """Latency of ONNX files or output directories, timed in turn; speedups are over the first.

    A family's directory stands for all of its members.

    Raises:
        CompressError: a file is missing or was named twice, or a shape does not fit.
    """
    files = [str(one) for path in paths for one in _outputs(Path(path))]
    shapes = requests.shapes(batch=batch, tokens=tokens, phase=phase)
    return inspection.time_files(files, shapes, threads, blocks, shown.chosen(progress))


def export_files(
    directory: str | Path, to: str, *, out: str | Path | None = None, archive: bool = False
) -> list[Path]:
    """Write the result of a run as files for a runtime or a device; of a family, of every member.

    Args:
        directory: the output directory of a run.
        to: onnx, onnx-fp16, ort, edge, edge+ort or tensorrt.
        out: where to; `directory/FORMAT` unless given.
        archive: one .tar.gz instead of a folder.

    Raises:
        CompressError: the output is unfinished or was changed, or the format cannot be made here.
    """
    members = _outputs(Path(directory))
    written = []
    for member in members:
        place = None if out is None else Path(out) / member.name if len(members) > 1 else Path(out)
        written += deliver.deliver(member, to, place, archive=archive)
    return written


def write_report(
    directory: str | Path, *, measurement: str | Path | None = None, device_is_target: bool = False
) -> Report | Family:
    """The report of a run, or of a family; its pages are written again.

    Args:
        directory: the output directory of a run.
        measurement: `measured.json` of a device, which joins the report.
        device_is_target: vouches for a device that is not recognized.

    Raises:
        CompressError: there is no report, or the measurement does not belong to it.
    """
    place = Path(directory)
    if _is_family(place):
        if measurement is not None:
            raise CompressError(f"{place} is a family; name the member that was measured, e.g. {place}/2x")
        members = family.read(place)
        family.write(members, place)
        return members
    found = schema.read(place)
    folder = schema.folder_of(place)
    if measurement is not None:
        taken = bundle_schema.read(Path(measurement))
        before, found = found, merge.merge(found, taken, device_is_target=device_is_target)
        merge.renew_card(folder, before, found)
    elif device_is_target:
        raise CompressError("--device-is-target is about a measurement; name it with --merge measured.json")
    render.write(found, folder)
    return found


def targets(name: str | None = None) -> tuple[Device, ...] | dict[str, object]:
    """The devices that can be a target; with `name`, all that is known of one, with sources.

    Raises:
        CompressError: there is no such target (with the nearest names).
    """
    return device_facts.listed() if name is None else device_facts.facts(name)


def measure_target(
    target: str | None = None,
    *,
    model: str | None = None,
    batch: int | None = None,
    tokens: int | None = None,
    progress: Shown = None,
) -> dict[str, object]:
    """Time the sites of a model on this machine's GPU or processor, and keep the table for later runs.

    Raises:
        CompressError: the target is another device than this one.
    """
    shapes = requests.shapes(batch=batch, tokens=tokens)
    return inspection.measure_target(shown.chosen(progress), target, model, shapes)


def clean(directory: str | Path) -> Cleaned:
    """Remove the working files of a run or a family; what ships, the report and the baseline stay.

    Raises:
        CompressError: the directory is no output of a run.
    """
    place = Path(directory)
    members = _outputs(place)
    if not (place / artifacts.MARKER).is_dir():
        raise CompressError(f"{place} is not an output of compress; give the --out directory of a run")
    before = artifacts.size_mb(place)
    for member in members:
        artifacts.remove_work(member)
    after = artifacts.size_mb(place)
    return Cleaned(directory=str(place), freed_mb=round(before - after, 1), remaining_mb=round(after, 1))


def join() -> None:
    """Meet the other processes, where torchrun or accelerate started several."""
    if process_env.process_info().size > 1:
        collectives.join()


def serve() -> int:
    """Take a share of the first process's work until it ends; the exit code that it gives."""
    return worker.serve()


def _prepared(
    model: Model,
    recipe: Recipe | str | Path | None,
    example_inputs: Inputs | None,
    data_loader: Iterable[object] | None,
    request: dict[str, Any],
) -> tuple[Recipe, Task | None, Callable[[], nn.Module] | None]:
    """The recipe of a request, its task where the model was given as an object, and what gives that model."""
    if not isinstance(model, (Task, nn.Module)):
        if example_inputs is not None or data_loader is not None:
            raise CompressError(
                "example_inputs and data_loader belong to an nn.Module; a model from a directory, hub id or "
                "factory brings its own inputs, and data= names its data"
            )
        words = {} if model is None else {"model": str(model)}
        return requests.make(recipe, request | words), None, None
    own = [name for name in ("data", "test", "task", "text", "label") if request.get(name) is not None]
    if own:
        raise CompressError(f"{_name(model)} brings its own data; leave out {', '.join(own)}")
    if isinstance(model, nn.Module):
        if example_inputs is None or data_loader is None:
            raise CompressError(
                f"{type(model).__name__} is a module of your own; give example_inputs= (one batch) and "
                "data_loader= (batches of inputs, or pairs of inputs and labels)"
            )
        task: Task = ModuleTask(model, example_inputs, data_loader)
    else:
        task = model
    asked = requests.make(recipe, request | {"model": _name(model)})
    return asked, task, lambda: copy.deepcopy(task.model)


def _name(model: Task | nn.Module) -> str:
    """What reports call a model that was given as an object."""
    return type(model).__name__


def _has_budget(recipe: Recipe | str | Path | None) -> bool:
    """Whether a recipe names a budget of its own."""
    return isinstance(recipe, Recipe) or (recipe is not None and requests.names_budget(Path(recipe)))


def _is_family(directory: Path) -> bool:
    return (directory / family.FILE).is_file()


def _outputs(path: Path) -> list[Path]:
    """The output directories that a path stands for: itself, or all members of a family."""
    if not _is_family(path):
        return [path]
    return [path / one.directory for one in family.read(path).members]
