"""Winning quality back after pruning: the shrunk model is tuned on the job's data, judged on unseen inputs.

The graph is final before this begins, so the measured time stays what it was. Products learn in the forms
in which they run: integers through their rounding, thin factors as factors, zeros of a pattern as zeros.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import artifact, database, distill, learning, quantize, several, sltrain, stitch, tune
from compress.console import span
from compress.distill import Teacher
from compress.ir import Site
from compress.job import Job, Tick, content, fingerprint
from compress.recipe import Recovery
from compress.surgery import Removal
from compress.task import Batch, Task
from compress.task import Run as Answering
from compress.tune import Lesson, Run
from compress.wording import digits

NEARNESS = 512  # inputs that judge a student by its divergence; the dense answers are held in memory
ANSWERS = "answers"
CHECKPOINT = "recovery.safetensors"


def recover(
    job: Job, model: nn.Module, removals: Mapping[str, Removal]
) -> tuple[dict[str, Removal], list[str]]:
    """Tune a shrunk model in place, as the recipe's `[recovery]` says.

    Gives the removals with the codes and factors that were learned, and what is worth a note.

    Args:
        job: gives the dense model, the data and the settings.
        model: what `surgery.shrink` gave for `removals`.
        removals: by site name.
    """
    wanted = job.recipe.recovery
    if wanted.mode == "none":
        return dict(removals), []
    if several.size() > 1:
        _call(job, removals)
    with several.working():
        data = artifact.digest(job.key, *map(_content, lessons(job.task, wanted)))
        alone = wanted.model_copy(update={"shard": False})  # where numbers are does not change them
        made_from = artifact.digest(data, alone, *fingerprint(model), *learning.fingerprint(removals))
        answers = artifact.folder(job.folder / ANSWERS, artifact.digest(data, several.size()))
        judge = Judge(job)
        with job.stages(f"recover ({wanted.mode})") as tick:
            scores, learned = learn(
                job.task,
                job.sites,
                wanted,
                model,
                removals,
                answers,
                judge=judge,
                tick=tick,
                say=job.stages.progress.say,
                checkpoint=job.folder / CHECKPOINT,
                made_from=made_from,
                dense=job.baseline.task.model,
                down=None if job.narrowed is None else job.narrowed.down,
            )
    shutil.rmtree(answers)
    forms = sorted({one.form for one in removals.values()} - {"dense"})
    forms += ["sparse plus low-rank updates"] if wanted.adapter == "sltrain" else []
    return learned, [_said(scores, judge, wanted.mode, forms)]


def learn(
    task: Task,
    sites: Sequence[Site],
    wanted: Recovery,
    model: nn.Module,
    removals: Mapping[str, Removal],
    answers: Path,
    *,
    judge: Callable[[nn.Module], float],
    tick: Tick,
    say: Callable[[str], None],
    dense: nn.Module,
    checkpoint: Path | None = None,
    made_from: str = "",
    down: Tensor | None = None,
) -> tuple[tuple[float, ...], dict[str, Removal]]:
    """Tune a shrunk model in place; the scores before and after each epoch, and the removals as learned.

    Of several processes each calls this with the same model and data; the first one's judge, progress and
    checkpoint count.

    Args:
        task: gives the data.
        sites: of the dense model.
        wanted: the settings.
        model: what `surgery.shrink` gave for `removals`.
        removals: by site name.
        answers: where this process keeps the teacher's answers.
        judge: larger is better.
        tick: takes steps done and steps in all.
        say: takes how long it will last.
        dense: the teacher.
        checkpoint: a file that is written now and then, and taken up if made from `made_from`.
        made_from: a hash of student, teacher, data and settings.
        down: what of the teacher's hidden states a narrower student can have.
    """
    several.alike("training data", several.contents(lessons(task, wanted)))
    several.spread(dense)
    several.spread(model)
    at = distill.places(dense, sites)
    teacher = Teacher(task, dense, at, answers, wanted.cache_mb / several.size())
    count = sum(1 for _ in lessons(task, wanted))
    lesson = Lesson(task, teacher, lambda: lessons(task, wanted), count, wanted, down)
    zeros = learning.insert(model, sites, removals)
    if wanted.adapter == "sltrain":
        zeros = sltrain.adapt(model, zeros, rank=wanted.rank, density=wanted.density, seed=wanted.seed)
    run = Run(model, lesson, zeros=zeros, checkpoint=checkpoint, made_from=made_from)
    if not run.finished:
        say(_announced(run))
    scores = tune.tune(run, judge, tick)
    sltrain.fold(model)
    return scores, learning.settle(model, sites, removals)


def lessons(task: Task, wanted: Recovery) -> Iterator[Batch]:
    """The inputs that are learned from, the same every time."""
    return task.batches("calibration", wanted.batch, wanted.samples)


def _call(job: Job, removals: Mapping[str, Removal]) -> None:
    """Tell the other processes what is to be tuned; they hold the dense model."""
    words = {
        "recovery": job.recipe.recovery.model_dump(mode="json"),
        "sites": [site.model_dump(mode="json") for site in job.sites],
        "forms": {name: one.form for name, one in removals.items()},
    }
    tensors = {
        f"{name}/{part}": value
        for name, one in removals.items()
        for part, value in database.packed(one).items()
    }
    several.call("recover", words, tensors)


def _content(batch: Batch) -> str:
    """A hash of inputs and labels."""
    labels = b"" if batch.labels is None else batch.labels.contiguous().numpy().tobytes()
    return artifact.digest(content(batch), labels)


def _announced(run: Run) -> str:
    """How long recovery will take and what it holds, before it begins."""
    lesson, wanted = run.lesson, run.lesson.wanted
    seconds = tune.forecast_s(run.held.model, lesson)
    steps = wanted.epochs * lesson.count
    course = f"{wanted.epochs} epochs, {steps:,} steps, about {span(seconds)} (estimate)"
    where = f" in each of {several.size()} processes" if run.held.apart else ""
    held = f"weights, gradients and moments take {digits(run.held_bytes / 1e6)} MB{where}"
    if wanted.mode == "fast":
        return f"recovery: {course}; {held}"
    return (
        f"recovery: at most {wanted.courses} courses of {course}; it ends when the score stops rising; {held}"
    )


def _said(scores: Sequence[float], judge: "Judge", mode: str, forms: Sequence[str]) -> str:
    before, after = (judge.worded(score) for score in (scores[0], max(scores)))
    learned = f", learning in {', '.join(forms)}" if forms else ""
    return f"Recovery ({mode}, {len(scores) - 1} epochs{learned}): {judge.name} {before} -> {after}"


class Judge:
    """How good a student is on the validation split: the task's score, or nearness to the dense model.

    Larger is better. Without labels the divergence from the dense model stands in for the score;
    without a validation split every student is as good as any other.
    """

    def __init__(self, job: Job) -> None:
        """Look at what the validation split holds."""
        self._task, self._limit = job.task, job.recipe.recovery.validation
        self._batches: list[Batch] = []
        self._dense: list[Tensor] = []
        first = next(iter(job.task.batches("validation", 1, 1)), None)
        self.empty = first is None
        self.scored = first is not None and first.labels is not None and job.task.labelled
        if not self.empty and not self.scored:
            self._batches = list(job.task.batches("validation", job.recipe.recovery.batch, NEARNESS))
            self._dense = stitch.logits(job.task, job.baseline.task.model, self._batches)

    @property
    def name(self) -> str:
        """What is judged, in words."""
        if self.empty:
            return "not judged, for want of validation data"
        return f"validation {self._task.metric if self.scored else 'divergence from dense'}"

    def worded(self, score: float) -> str:
        """A score as it is usually written: not negated."""
        return f"{score if self.scored and self._task.higher_is_better else abs(score):.4g}"

    def __call__(self, model: nn.Module) -> float:
        """Larger is better; weights that learn through rounding are rounded once for all inputs."""
        if self.empty:
            return 0.0
        with quantize.held(model):
            if not self.scored:
                return -stitch.divergence(self._task, model, self._batches, self._dense)
            found = self._task.score(self._run(model), "validation", self._limit)
        return found if self._task.higher_is_better else -found

    def _run(self, model: nn.Module) -> Answering:
        """The model as scores are asked of it."""

        @torch.inference_mode()
        def run(inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
            tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
            answer: NDArray[Any] = self._task.logits(model(**tensors)).numpy()
            return answer

        return run
