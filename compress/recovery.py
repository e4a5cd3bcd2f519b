"""Winning quality back after pruning: the shrunk model is tuned on the job's data, judged on unseen inputs.

The graph is final before this begins, so the measured time stays what it was. Products learn in the forms
in which they run: integers through their rounding, thin factors as factors, zeros of a pattern as zeros.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import artifact, distill, learning, quantize, stitch, tune
from compress.console import span
from compress.distill import Teacher
from compress.job import Job, content, fingerprint
from compress.surgery import Removal
from compress.task import Batch
from compress.task import Run as Answering
from compress.tune import Lesson, Run

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

    def batches() -> Iterator[Batch]:
        return job.task.batches("calibration", wanted.batch, wanted.samples)

    seen = [_content(batch) for batch in batches()]
    data = artifact.digest(job.key, *seen)
    zeros = learning.insert(model, job.sites, removals)
    forms = sorted({one.form for one in removals.values()} - {"dense"})
    made_from = artifact.digest(data, wanted, forms, *fingerprint(model))
    answers = artifact.folder(job.folder / ANSWERS, data)
    teacher = Teacher(
        job.task, job.task.model, distill.places(job.task.model, job.sites), answers, wanted.cache_mb
    )
    lesson = Lesson(job.task, teacher, batches, len(seen), wanted)
    judge = Judge(job)
    run = Run(model, lesson, zeros=zeros, checkpoint=job.folder / CHECKPOINT, made_from=made_from)
    if not run.finished:
        job.stages.progress.say(_announced(model, lesson))
    with job.stages(f"recover ({wanted.mode})") as tick:
        scores = tune.tune(run, judge, tick)
    shutil.rmtree(answers)
    learned = learning.settle(model, job.sites, removals)
    return learned, [_said(scores, judge, wanted.mode, forms)]


def _content(batch: Batch) -> str:
    """A hash of inputs and labels."""
    labels = b"" if batch.labels is None else batch.labels.contiguous().numpy().tobytes()
    return artifact.digest(content(batch), labels)


def _announced(model: nn.Module, lesson: Lesson) -> str:
    """How long recovery will take, before it begins."""
    wanted = lesson.wanted
    seconds = tune.forecast_s(model, lesson)
    steps = wanted.epochs * lesson.count
    course = f"{wanted.epochs} epochs, {steps:,} steps, about {span(seconds)} (estimate)"
    if wanted.mode == "fast":
        return f"recovery: {course}"
    return f"recovery: at most {wanted.courses} courses of {course}; it ends when the score stops rising"


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
            self._dense = stitch.logits(job.task, job.task.model, self._batches)

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
