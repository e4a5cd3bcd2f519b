"""What every stage of a compilation needs: the request, the model, its sites, and where results go."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from compress import artifacts, profiles
from compress.distributed import collectives
from compress.errors import CompressError
from compress.export.backends.backend import Array, Backend, Capabilities
from compress.export.backends.onnx_file import OnnxFile
from compress.export.backends.select import backend_for
from compress.export.onnx import decoder
from compress.ir import Site
from compress.recipe import Recipe, to_toml
from compress.report.progress import Progress, Tick
from compress.report.schema import Stage
from compress.sites import discovery
from compress.sites.discovery import Sites
from compress.sites.kinds import KINDS, decode_step
from compress.task_specs import TASKS
from compress.tasks.loading import Batch, Task, load_task


@dataclass
class Stages:
    """The stages run so far and their seconds, for the report.

    Of stages inside others each has its own time only, so that seconds add up to the wall clock.
    """

    progress: Progress
    seconds: list[Stage] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    _inner: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def __call__(self, name: str) -> Iterator[Tick]:
        """Run one stage under its name."""
        with self.accounted(name), self.progress.stage(name) as tick:
            yield tick

    @contextmanager
    def accounted(self, name: str) -> Iterator[None]:
        """Record time under a name without showing progress; it may hold stages, whose time is theirs."""
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            own = max(took - self._inner.pop(), 0.0)
            self._inner[-1] += took
        self.seconds.append(Stage(name=name, seconds=round(own, 3)))

    def wall_seconds(self) -> float:
        """Seconds since the first stage could begin."""
        return round(time.perf_counter() - self.began, 3)


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What a job's model has lost of the one that was asked about: channels of its residual stream.

    Attributes:
        wide: the job on the model that was asked about.
        site: the residual stream of that model.
        units: channels that are left.
        error: share of what flowed through the stream that is gone.
        down: [units, site.units] from a hidden state to the one that stands for it.
        stated: whether the model's configuration says the new width, so that loading need not be told.
    """

    wide: "Job"
    site: Site
    units: int
    error: float
    down: Tensor
    stated: bool


@dataclass(frozen=True)
class Job:
    """One compilation. `model_key` names the model and shapes, `key` also data and options.

    `sites` are at the shape of the phase that was asked for, so that they cost what a run of it costs.
    `narrowed` says what the model lacks where it is a narrower one than was asked about; `origin` is the
    job on that one where another model of its shapes has taken its place.
    """

    recipe: Recipe
    task: Task
    profile: profiles.Profile
    folder: Path
    stages: Stages
    model_key: str
    key: str
    found: Sites
    sites: tuple[Site, ...]
    calibration: tuple[Batch, ...]
    narrowed: Narrowed | None = None
    origin: "Job | None" = None

    @property
    def baseline(self) -> "Job":
        """The job on the model that everything is compared with."""
        before = self.origin if self.narrowed is None else self.narrowed.wide
        return self if before is None else before.baseline

    @cached_property
    def backend(self) -> Backend | None:
        """What runs and times models on this machine; None where the target is another device."""
        found = backend_for(self.profile, self.recipe.bench.threads)
        if found is None:
            return None
        steps = self.recipe.shapes.phase == "decode"
        task = self.task
        return found.adapted(task.model, task.output_tensors, self.prompt, steps=steps)

    @property
    def runtime(self) -> Capabilities:
        """What the target's runtime executes, be it here or not."""
        return self.backend or OnnxFile(self.profile)

    @property
    def prompt(self) -> dict[str, Array]:
        """The inputs that are timed, as arrays."""
        example = self.task.example(self.recipe.shapes.batch, self.recipe.shapes.tokens)
        return {name: tensor.numpy() for name, tensor in example.items()}

    @property
    def here(self) -> bool:
        """Whether the target is this machine or its GPU, so that time is measured and not looked up."""
        return self.backend is not None

    @property
    def work(self) -> Path:
        """Where working files go, which the next run would make again; the folder is there."""
        place = self.folder / artifacts.WORK
        place.mkdir(parents=True, exist_ok=True)
        return place

    @property
    def dense_file(self) -> Path:
        """The dense model as an ONNX file: the baseline of every timing."""
        return self.work / "dense.onnx"

    @property
    def file(self) -> Path:
        """The file that ships."""
        return Path(self.recipe.out) / "model.onnx"

    @property
    def decodes(self) -> bool:
        """Whether files of this job hold a key-value cache, and two phases are timed."""
        return decodes(self.task)

    @property
    def asked(self) -> float | None:
        """The speedup that was asked for, None for a budget of another kind."""
        return self.recipe.budget.speedup

    def on(self, model: nn.Module) -> "Job":
        """The same job with another model of the same shapes in the place of the dense one."""
        task = copy.copy(self.task)
        task.model = model
        return replace(self, task=task, key=artifacts.digest(self.key, *fingerprint(model)), origin=self)


def prepare(recipe: Recipe, progress: Progress, task: Task | None = None) -> Job:
    """Load the model and its data, and find the sites; with `task` given, that is not loaded.

    Raises:
        CompressError: the target, output folder, model or data cannot be used, or nothing in the
            model can be compressed.
    """
    profile = profiles.load(recipe.target)
    folder = artifacts.claim(Path(recipe.out))
    stages = Stages(progress)
    with stages.accounted("set up"):
        return _prepared(recipe, profile, folder, stages, task)


def _prepared(
    recipe: Recipe, profile: profiles.Profile, folder: Path, stages: Stages, task: Task | None
) -> Job:
    """The job of a claimed output folder; raises what `prepare` raises."""
    with stages("load"):
        if task is None:
            collectives.send_command("load", {"recipe": recipe.model_dump(mode="json")})
        elif collectives.size() > 1:
            raise CompressError(
                f"a model given as an object is in this process alone, but {collectives.size()} run; "
                "name it as package.module:factory, which every process can load"
            )
        task, batches = load(recipe, task)
    model_key = artifacts.digest(*fingerprint(task.model), recipe.shapes)
    if recipe.shapes.phase == "decode" and not decodes(task):
        raise CompressError(
            f"--phase decode asks for the time of a token after others, but {task.name} with "
            f"{type(task.model).__name__} has no key-value cache to decode with; leave out --phase"
        )
    example = task.example(recipe.shapes.batch, recipe.shapes.tokens)
    with stages("find sites"):
        found = artifacts.saved(
            folder / artifacts.WORK / "sites.json",
            Sites,
            model_key,
            lambda: discovery.find_sites(task.model, example),
        )
    sites = tuple(site for site in found.sites if site.kind in recipe.options.kinds)
    if not sites:
        reasons = [f"{skip.place}: {skip.reason}" for skip in found.skipped[:5]]
        labels = " or ".join(KINDS[kind].label for kind in recipe.options.kinds)
        nothing = f"The traced program holds no {labels} block."
        raise CompressError(
            f"no place to compress was found among kinds {', '.join(recipe.options.kinds)}.\n"
            f"  {found.fallback or '; '.join(reasons) or nothing}\n"
            "  `compress inspect MODEL` lists what was looked at."
        )
    if recipe.shapes.phase == "decode":
        sites = tuple(decode_step(site) for site in sites)
    seen = [content(batch) for batch in batches]
    key = artifacts.digest(model_key, recipe.calibration, recipe.options, *seen)
    artifacts.write_text(folder / "recipe.toml", to_toml(recipe))
    return Job(recipe, task, profile, folder, stages, model_key, key, found, sites, batches)


def load(recipe: Recipe, task: Task | None = None) -> tuple[Task, tuple[Batch, ...]]:
    """A recipe's task and its calibration inputs; of several processes, each loads its own."""
    with collectives.synchronized():
        task = task or load_task(
            recipe.model,
            recipe.data,
            test=recipe.test,
            task=recipe.task,
            text=recipe.text,
            label=recipe.label,
            tokens=recipe.shapes.tokens if recipe.task and TASKS[recipe.task].blocks else None,
        )
        wanted = recipe.calibration
        return task, tuple(task.batches("calibration", wanted.batch, wanted.samples))


def decodes(task: Task) -> bool:
    """Whether the files of a task hold a key-value cache."""
    spec = TASKS.get(task.name)
    return spec is not None and spec.caches and decoder.takes_cache(task.model)


def fingerprint(model: nn.Module) -> list[bytes | str]:
    """The names and contents of the model's tensors."""
    parts: list[bytes | str] = [type(model).__name__]
    for name, tensor in model.state_dict().items():
        parts += [name, str(tuple(tensor.shape)), tensor.detach().contiguous().numpy().tobytes()]
    return parts


def content(batch: Batch) -> str:
    """A hash of one batch as the model receives it."""
    return artifacts.digest(*[t.contiguous().numpy().tobytes() for t in batch.inputs.values()])
