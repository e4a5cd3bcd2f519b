"""Recovery after pruning: the shrunk model is trained on the job's data and validated on unseen inputs.

The graph is fixed before this begins, so the measured latency does not change. Quantized, block-sparse and
low-rank layers are trained in their deployed format: with fake quantization, masked zeros, and separate
factors. A plan that both prunes and quantizes is trained in two stages (`two_stage`).
"""

import copy
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import artifacts
from compress.distributed import collectives
from compress.ir import Site
from compress.methods import candidate_store, quantized_layers, training_layers
from compress.pipeline.job import Job, content, fingerprint
from compress.recipe import Recovery
from compress.report.formatting import digits, duration
from compress.report.progress import Tick
from compress.search import objective
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.loading import Batch, Task
from compress.tasks.loading import Run as Answering
from compress.training import distillation, sltrain_layers, trainer, two_stage
from compress.training.distillation import HiddenState, Teacher
from compress.training.distillation_data import DistillationData
from compress.training.trainer import TrainingRun

DIVERGENCE_SAMPLES = 512  # validation samples without labels; their dense logits are held in memory
TEACHER_CACHE = "answers"
CHECKPOINT = "recovery.safetensors"
FLOAT_STAGE_CHECKPOINT = "recovery-floats.safetensors"  # of the first of two stages


def recover(
    job: Job, model: nn.Module, removals: Mapping[str, Removal]
) -> tuple[dict[str, Removal], list[str]]:
    """Train a shrunk model in place with the settings in `[recovery]`.

    Returns the removals with the learned codes and factors, and notes for the report.

    Args:
        job: the dense model, the data and the settings.
        model: the result of `prune.shrink` for `removals`.
        removals: by site name.
    """
    wanted = job.recipe.recovery
    if wanted.mode == "none":
        return dict(removals), []
    if collectives.size() > 1:
        _start_followers(job, removals)
    with collectives.synchronized():
        data = artifacts.digest(job.key, *map(_batch_hash, training_batches(job.task, wanted)))
        alone = wanted.model_copy(update={"shard": False})  # sharding does not change the numbers
        judge = Validator(job)
        desk = RecoveryContext(
            job.task, job.sites, judge,
            lambda words: job.stages(f"recover ({wanted.mode}){words}"),
            job.stages.progress.say, job.work / TEACHER_CACHE, job.work,
            artifacts.digest(data, alone, *fingerprint(model), *training_layers.fingerprint(removals)),
            artifacts.digest(data, collectives.size()),
        )  # fmt: skip
        down = None if job.narrowed is None else job.narrowed.down
        found = train_student(desk, wanted, model, removals, dense=job.baseline.task.model, down=down)
    shutil.rmtree(job.work / TEACHER_CACHE)
    forms = sorted({one.form for one in removals.values()} - {"dense"})
    forms += ["sparse plus low-rank updates"] if wanted.adapter == "sltrain" else []
    return found.removals, [_summary(found, judge, wanted.mode, forms)]


@dataclass(frozen=True)
class RecoveryContext:
    """What the training of a student needs besides the model: data, validation, progress and folders.

    Attributes:
        task: the data.
        sites: of the dense model.
        judge: the validation score of a model, larger is better.
        stage: opens a progress stage; its argument is appended to the name.
        say: prints a line, such as the expected duration.
        answers: a folder where this process caches outputs of teachers.
        checkpoints: a folder for checkpoints, or None.
        made_from: a hash of student, teacher, data and settings; only such a checkpoint is resumed.
        data: a hash of the dense teacher, the data, and the number of processes.
    """

    task: Task
    sites: Sequence[Site]
    judge: Callable[[nn.Module], float]
    stage: Callable[[str], AbstractContextManager[Tick]]
    say: Callable[[str], None]
    answers: Path
    checkpoints: Path | None = None
    made_from: str = ""
    data: str = ""

    def teacher(
        self, model: nn.Module, at: Sequence[HiddenState], wanted: Recovery, place: Path, data: str
    ) -> Teacher:
        """A teacher whose outputs are cached in `place` under the hash `data`."""
        room = wanted.cache_mb / collectives.size()
        return Teacher(self.task, model, at, artifacts.folder(place, data), room)

    def begin(
        self,
        model: nn.Module,
        removals: Mapping[str, Removal],
        lesson: DistillationData,
        file: str,
        made_from: str,
        factors: tuple[float, ...] = (),
    ) -> TrainingRun:
        """Start the training of a student, or resume it from a checkpoint."""
        zeros = self.wrap(model, removals, lesson.wanted)
        path = None if self.checkpoints is None else self.checkpoints / file
        return TrainingRun(model, lesson, zeros=zeros, checkpoint=path, made_from=made_from, factors=factors)

    def wrap(self, model: nn.Module, removals: Mapping[str, Removal], wanted: Recovery) -> dict[str, Tensor]:
        """Insert trainable layers and configured adapters; return the masks of zeros."""
        zeros = training_layers.insert(model, self.sites, removals)
        if wanted.adapter == "none":
            return zeros
        return sltrain_layers.adapt(model, zeros, rank=wanted.rank, density=wanted.density, seed=wanted.seed)

    def finalize(self, model: nn.Module, removals: Mapping[str, Removal]) -> dict[str, Removal]:
        """Remove the trainable layers from the model; return the learned removals."""
        sltrain_layers.merge_updates(model)
        return training_layers.finalize(model, self.sites, removals)

    def validate(self, model: nn.Module) -> float:
        """The score of a model, computed by the first process and broadcast to all."""
        score = 0.0 if collectives.rank() else self.judge(model)
        return float(collectives.broadcast({"score": score}).words["score"])


@dataclass(frozen=True)
class RecoveryResult:
    """Learned removals, the validation scores before and after training, and the epochs of each stage.

    If not `used`, model and removals are unchanged.
    """

    removals: dict[str, Removal]
    before: float
    after: float
    epochs: tuple[int, ...]
    used: bool = True


def train_student(
    desk: RecoveryContext,
    wanted: Recovery,
    model: nn.Module,
    removals: Mapping[str, Removal],
    *,
    dense: nn.Module,
    down: Tensor | None = None,
) -> RecoveryResult:
    """Train a shrunk model in place, in two stages if its plan both prunes and quantizes.

    All processes call this with the same model and data; validation, progress and checkpoints are those of
    the first.

    Args:
        desk: data, validation, progress and folders.
        wanted: the settings.
        model: the result of `prune.shrink` for `removals`.
        removals: by site name.
        dense: the teacher.
        down: [n, d] projection of the teacher's hidden states to a narrower student's.
    """
    collectives.check_identical("training data", collectives.batch_bytes(training_batches(desk.task, wanted)))
    collectives.broadcast_model(dense)
    collectives.broadcast_model(model)
    at = distillation.hidden_states(dense, desk.sites)
    teacher = desk.teacher(dense, at, wanted, desk.answers / "dense", desk.data)
    count = sum(1 for _ in training_batches(desk.task, wanted))
    lesson = DistillationData(
        desk.task, teacher, lambda: training_batches(desk.task, wanted), count, wanted, down
    )
    if wanted.staged and two_stage.applies(desk.sites, removals, narrow=down is not None):
        return _train_two_stages(desk, lesson, model, removals)
    with desk.stage("") as tick:
        run = desk.begin(model, removals, lesson, CHECKPOINT, desk.made_from)
        if not run.finished:
            desk.say(f"recovery: {_course_estimate(lesson, _forecast_s(run))}; {_memory_use(run)}")
        scores = trainer.train(run, desk.judge, tick)
        found = desk.finalize(model, removals)
    return RecoveryResult(found, scores[0], max(scores), (run.state.epochs,))


def _train_two_stages(
    desk: RecoveryContext, lesson: DistillationData, model: nn.Module, removals: Mapping[str, Removal]
) -> RecoveryResult:
    """Distill the dense model into the float plan, then that into the quantized one; keep it if no worse."""
    sparse = prune.shrink(desk.task.model, desk.sites, two_stage.float_stage(removals))
    collectives.broadcast_model(sparse)
    with desk.stage(", floats") as tick:
        plain = two_stage.float_stage(removals)
        run = desk.begin(sparse, plain, lesson, FLOAT_STAGE_CHECKPOINT, desk.made_from)
        if not run.finished:
            desk.say(f"{_two_stage_estimate(desk, run, model, removals)}; {_memory_use(run)}")
        trainer.train(run, desk.judge, tick)
        epochs, factors = run.state.epochs, lesson.factors(sparse)
        plain = desk.finalize(sparse, plain)
        lesson.teacher.clear()
    with desk.stage(", integers") as tick:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first = desk.validate(quantized_layers.emulated(model, desk.sites, removals))
        model.load_state_dict(sparse.state_dict())
        plan = {name: replace(one, factors=plain[name].factors) for name, one in removals.items()}
        codes = _round_weights(desk, lesson, model, plan)
        made_from = artifacts.digest(
            desk.made_from, factors, *fingerprint(model), *training_layers.fingerprint(codes)
        )
        shared = artifacts.digest(made_from, collectives.size())
        taught = _second_stage(desk, lesson, sparse, desk.answers / "sparse", shared)
        run = desk.begin(model, codes, taught, CHECKPOINT, made_from, factors)
        if not run.finished:
            desk.say(
                f"recovery on integers: {_course_estimate(taught, _forecast_s(run))}; {_memory_use(run)}"
            )
        last = max(trainer.train(run, desk.judge, tick))
        found = desk.finalize(model, codes)
    if last < first:
        model.load_state_dict(before)
        found = dict(removals)
    return RecoveryResult(found, first, last, (epochs, run.state.epochs), used=last >= first)


def _round_weights(
    desk: RecoveryContext, lesson: DistillationData, model: nn.Module, plan: Mapping[str, Removal]
) -> dict[str, Removal]:
    """Quantize the model in the first process and broadcast the result."""
    made = dict(plan)
    if not collectives.rank():
        seen = list(itertools.islice(lesson.batches(), two_stage.STATISTICS_BATCHES))
        made = two_stage.quantize_model(desk.task, model, desk.sites, plan, seen)
    told = collectives.broadcast({}, _tensors(made)).tensors
    collectives.broadcast_model(model)
    return {
        name: candidate_store.unpacked(candidate_store.below(told, f"{name}/"), one.form)
        for name, one in plan.items()
    }


def _second_stage(
    desk: RecoveryContext, lesson: DistillationData, sparse: nn.Module, place: Path, data: str
) -> DistillationData:
    """The data of the second stage, with the float model as the teacher of equal width."""
    wanted = two_stage.second_stage_settings(lesson.wanted)
    teacher = desk.teacher(sparse, lesson.teacher.at, wanted, place, data)
    return replace(lesson, teacher=teacher, wanted=wanted, down=None)


def training_batches(task: Task, wanted: Recovery) -> Iterator[Batch]:
    """The training batches, equal at every call."""
    return task.batches("calibration", wanted.batch, wanted.samples)


def _start_followers(job: Job, removals: Mapping[str, Removal]) -> None:
    """Send sites, forms and settings to the other processes, which hold the dense model."""
    words = {
        "recovery": job.recipe.recovery.model_dump(mode="json"),
        "sites": [site.model_dump(mode="json") for site in job.sites],
        "forms": {name: one.form for name, one in removals.items()},
    }
    collectives.send_command("recover", words, _tensors(removals))


def _tensors(removals: Mapping[str, Removal]) -> dict[str, Tensor]:
    """All tensors of removals, by site and part."""
    return {
        f"{name}/{part}": value
        for name, one in removals.items()
        for part, value in candidate_store.packed(one).items()
    }


def _batch_hash(batch: Batch) -> str:
    """A hash of inputs and labels."""
    labels = b"" if batch.labels is None else batch.labels.contiguous().numpy().tobytes()
    return artifacts.digest(content(batch), labels)


def _course_estimate(lesson: DistillationData, seconds: float) -> str:
    """The expected duration of a course."""
    wanted, steps = lesson.wanted, lesson.wanted.epochs * lesson.count
    course = f"{wanted.epochs} epochs, {steps:,} steps, about {duration(seconds)} (estimate)"
    if wanted.mode == "fast":
        return f"{course}; one more course at a lower rate if the score falls"
    return f"at most {wanted.courses} courses of {course}; it stops when the score stops rising"


def _two_stage_estimate(
    desk: RecoveryContext, run: TrainingRun, model: nn.Module, removals: Mapping[str, Removal]
) -> str:
    """The expected duration of both stages, the second timed with the present student and teacher.

    A sharded second stage is not timed, since it would need the whole model: it is announced when it starts.
    """
    lesson, first = run.lesson, _forecast_s(run)
    if run.held.apart:
        return f"recovery in floats, then on integers; in floats {_course_estimate(lesson, first)}"
    student = copy.deepcopy(model)
    desk.wrap(student, removals, lesson.wanted)
    with tempfile.TemporaryDirectory(prefix="compress-") as place:
        second = _second_stage(desk, lesson, run.model, Path(place), "")
        seconds = first, trainer.forecast_s(student, second)
    each = [_course_estimate(*one) for one in zip((lesson, second), seconds, strict=True)]
    total = duration(sum(seconds))
    return f"recovery, {total} in all (estimate): in floats {each[0]}; then on integers {each[1]}"


def _forecast_s(run: TrainingRun) -> float:
    """Expected seconds of a course."""
    return trainer.forecast_s(run.held.model, run.lesson)


def _memory_use(run: TrainingRun) -> str:
    """The memory of weights, gradients and moments, as text."""
    where = f" in each of {collectives.size()} processes" if run.held.apart else ""
    return f"weights, gradients and moments take {digits(run.held_bytes / 1e6)} MB{where}"


def _summary(found: RecoveryResult, judge: "Validator", mode: str, forms: Sequence[str]) -> str:
    before, after = (judge.format_score(score) for score in (found.before, found.after))
    epochs = " + ".join(map(str, found.epochs))
    learned = f", learning in {', '.join(forms)}" if forms else ""
    stages = ", taught by its own floats" if len(found.epochs) > 1 else ""
    unused = "" if found.used else ", so it was not used"
    return f"Recovery ({mode}, {epochs} epochs{learned}{stages}): {judge.name} {before} -> {after}{unused}"


class Validator:
    """The validation score of a model, larger is better.

    Without labels it is the negative divergence from the dense model; without a validation split it is 0.
    """

    def __init__(self, job: Job) -> None:
        """Read the validation split and, without labels, the dense logits on it."""
        self._task, self._limit = job.task, job.recipe.recovery.validation
        self._batches: list[Batch] = []
        self._dense: list[Tensor] = []
        first = next(iter(job.task.batches("validation", 1, 1)), None)
        self.empty = first is None
        self.scored = first is not None and first.labels is not None and job.task.labelled
        if not self.empty and not self.scored:
            self._batches = list(
                job.task.batches("validation", job.recipe.recovery.batch, DIVERGENCE_SAMPLES)
            )
            self._dense = objective.compute_logits(job.task, job.baseline.task.model, self._batches)

    @property
    def name(self) -> str:
        """The name of the score."""
        if self.empty:
            return "not validated (no validation data)"
        return f"validation {self._task.metric if self.scored else 'divergence from dense'}"

    def format_score(self, score: float) -> str:
        """A score as text, without the sign that makes larger better."""
        return f"{score if self.scored and self._task.higher_is_better else abs(score):.4g}"

    def __call__(self, model: nn.Module) -> float:
        """Evaluate a model; fake-quantized weights are rounded once for all inputs."""
        if self.empty:
            return 0.0
        with quantized_layers.frozen_codes(model):
            if not self.scored:
                return -objective.mean_divergence(self._task, model, self._batches, self._dense)
            found = self._task.score(self._run(model), "validation", self._limit)
        return found if self._task.higher_is_better else -found

    def _run(self, model: nn.Module) -> Answering:
        """The model as a function from arrays to logits."""

        @torch.inference_mode()
        def run(inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
            tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
            answer: NDArray[Any] = self._task.logits(model(**tensors)).numpy()
            return answer

        return run
