"""The tuning loop: a smaller model learns to answer like the dense one, and its zeros stay exact zeros.

Work is cut into *courses*: AdamW with a linear warm-up and a linear decay to nothing. After every epoch
the model is judged, and the best weights so far are kept, the untuned ones among them. A further course
starts from the best weights with fresh moments. Layers run as in evaluation (no dropout): the teacher
speaks without noise, and a student that equals it must have nothing to learn.

Everything random follows from the seed and the number of the step or epoch, and a checkpoint holds
weights, best weights and moments; a run that was killed and resumed gives the same bits as one that
was not. Several processes take a part of every batch each and add up their gradients, so that they make
the steps that one alone makes; the first of them judges, and keeps the checkpoint.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress import distill, several
from compress.distill import Answers, Teacher
from compress.errors import CompressError
from compress.ir import Document
from compress.recipe import Recovery
from compress.task import Batch, Task

POOL_BYTES = 2**28  # inputs held back to be shuffled; all of them where they are this small
MOMENTS = ("exp_avg", "exp_avg_sq")
LOOKED_AT = 8  # batches that tell how far late layers are after a course

Batches = Callable[[], Iterable[Batch]]
Progress = Callable[[int, int], None]


class State(Document):
    """How far a run is: steps taken, and the score before the first and after every epoch.

    `factors` weigh the features of late layers: those that were given, and since the last course its own.
    """

    made_from: str = ""
    step: int = 0
    scores: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def epochs(self) -> int:
        """Epochs that were finished and judged."""
        return len(self.scores) - 1


@dataclass(frozen=True)
class Lesson:
    """What is learned from: `batches` gives the same `count` batches in the same order every time.

    `down` [n, d] is there where the student's residual stream is narrower than the teacher's.
    """

    task: Task
    teacher: Teacher
    batches: Batches
    count: int
    wanted: Recovery
    down: Tensor | None = None

    def loss(self, model: nn.Module, number: int, batch: Batch, factors: Sequence[float] = ()) -> Tensor:
        """The distillation loss of one batch, or what this process's part of it adds to that.

        `factors` weigh the features of late layers.
        """
        mine, part = several.split(batch)
        said, goal = self._pair(model, number, mine)
        return distill.loss(self.task, mine, said, goal, self.wanted, part, factors)

    @torch.no_grad()
    def apart(self, model: nn.Module) -> list[float]:
        """How far each late layer of a model is from the teacher's, in the mean of the first batches."""
        found = []
        for number, batch in enumerate(itertools.islice(self.batches(), LOOKED_AT)):
            mine, part = several.split(batch)
            said, goal = self._pair(model, number, mine)
            found.append(part.tokens * distill.features(self.task, mine, said, goal, self.wanted))
        mean = torch.stack(found).mean(0)
        several.add_up([mean])
        apart: list[float] = mean.tolist()
        return apart

    def factors(self, model: nn.Module) -> tuple[float, ...]:
        """How much the features of each late layer of a tuned model count from now on; none without any."""
        if not self.wanted.features or not self.teacher.at:
            return ()
        return distill.aware(self.apart(model))

    def _pair(self, model: nn.Module, number: int, batch: Batch) -> tuple[Answers, Answers]:
        """What student and teacher say of a batch."""
        goal = self.teacher(number, batch)
        said = distill.answers(self.task, model, batch, self.teacher.at)
        return said, goal if self.down is None else distill.lowered(goal, said, self.down)


def tune(
    run: "Run", judge: Callable[[nn.Module], float], progress: Progress | None = None
) -> tuple[float, ...]:
    """Take a run to its end and its model to the best weights; the scores before and after each epoch.

    Args:
        run: a student with what it learns from, at the beginning or taken up from a checkpoint.
        judge: larger is better. One that always says the same keeps the last weights of one course.
        progress: called with steps done and steps until the end of the course.

    Raises:
        CompressError: the loss became NaN or infinite.
    """
    lesson, first = run.lesson, run.state.step
    course = lesson.wanted.epochs * lesson.count
    try:
        if not run.state.scores:
            run.judge(judge)
        while not run.finished:
            epoch = run.state.epochs
            begun = run.state.step - epoch * lesson.count
            if not begun and epoch and epoch % lesson.wanted.epochs == 0:
                run.restart()
            end = (epoch // lesson.wanted.epochs + 1) * course
            order = shuffled(lesson.batches(), (lesson.wanted.seed, epoch))
            for number, batch in itertools.islice(order, begun, None):
                run.advance(number, batch)
                if progress is not None:
                    progress(run.state.step - first, end - first)
            run.judge(judge)
    finally:
        run.release()
    return run.state.scores


class Run:
    """One student on its way: weights, moments, the best weights, and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        lesson: Lesson,
        *,
        zeros: Mapping[str, Tensor] | None = None,
        checkpoint: Path | None = None,
        made_from: str = "",
        factors: tuple[float, ...] = (),
    ) -> None:
        """Freeze what is not tuned, set the zeros, and take up a checkpoint that fits.

        Args:
            model: the shrunk student, tuned in place; embedding tables stay, all else may move.
            lesson: teacher, data and settings.
            zeros: by parameter name, a mask of its shape that is True where it must stay zero.
            checkpoint: a file that is written now and then, and taken up if made from `made_from`.
            made_from: a hash of student, teacher, data and settings.
            factors: how much the features of each late layer count in the first course.

        Raises:
            CompressError: a mask does not fit.
        """
        self.model, self.lesson, self.state = (
            model.eval(),
            lesson,
            State(made_from=made_from, factors=factors),
        )
        self._flags = {value: value.requires_grad for value in model.parameters()}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for value in model.parameters():
            value.requires_grad_(id(value) not in tables)
        self.values = {name: value for name, value in model.named_parameters() if value.requires_grad}
        masks = (zeros or {}).items()
        self._zeros = [(self.values[name], mask) for name, mask in masks if _fits(self.values, name, mask)]
        self._hold()
        self.optimizer = self._fresh()
        self.best = self._copy()
        self._checkpoint, self._saved = checkpoint, time.monotonic()
        self._load()
        self._agree()

    @property
    def finished(self) -> bool:
        """Whether no course is left, or the last one raised no score."""
        wanted, epochs, scores = self.lesson.wanted, self.state.epochs, self.state.scores
        if epochs <= 0 or epochs % wanted.epochs:
            return False
        if wanted.mode == "fast" or epochs // wanted.epochs >= wanted.courses:
            return True
        return max(scores[-wanted.epochs :]) <= max(scores[: -wanted.epochs])

    def advance(self, number: int, batch: Batch) -> None:
        """One step of the optimizer, and zeros again wherever they belong."""
        wanted, course = self.lesson.wanted, self.lesson.wanted.epochs * self.lesson.count
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(
                int(np.random.SeedSequence((wanted.seed, self.state.step)).generate_state(1)[0])
            )
            loss = self.lesson.loss(self.model, number, batch, self.state.factors)
            whole = loss.detach().clone()
            several.add_up([whole])
            if not bool(torch.isfinite(whole)):
                raise CompressError(
                    f"recovery: the loss became {whole.item()} at step {self.state.step}; lower rate in "
                    f"[recovery], which is {wanted.rate:g}"
                )
            torch.autograd.backward(loss)
        several.add_up_gradients(list(self.values.values()))
        for value, mask in self._zeros:
            if value.grad is not None:
                value.grad.masked_fill_(mask, 0)
        nn.utils.clip_grad_norm_(self.values.values(), wanted.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.state.step % course, course, wanted)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._hold()
        self.state = self.state.model_copy(update={"step": self.state.step + 1})
        if time.monotonic() - self._saved >= wanted.checkpoint_s:
            self._save()

    def judge(self, judge: Callable[[nn.Module], float]) -> None:
        """Add a score; weights that are as good as the best so far become the best."""
        score = float(several.told({"score": 0.0 if several.rank() else judge(self.model)}).words["score"])
        if score >= max(self.state.scores, default=score):
            self.best = self._copy()
        self.state = self.state.model_copy(update={"scores": (*self.state.scores, score)})
        self._save()

    def restart(self) -> None:
        """Begin another course: the best weights, no moments, late layers weighed by how near they came."""
        self._take(self.best)
        self.optimizer = self._fresh()
        self.state = self.state.model_copy(update={"factors": self.lesson.factors(self.model)})

    def release(self) -> None:
        """Leave the best weights in the model, and its gradients as they were asked for before."""
        self._take(self.best)
        for value, flag in self._flags.items():
            value.requires_grad_(flag)

    def _fresh(self) -> torch.optim.AdamW:
        """An optimizer without moments; biases and norms do not decay, nor do ranges of inputs.

        Steps of weights in low precision decay toward those they had at the start.
        """
        values = list(self.values.values())
        groups = [
            {
                "params": [value for value in values if value.ndim > 1],
                "weight_decay": self.lesson.wanted.decay,
            },
            {"params": [value for value in values if value.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0)

    def _hold(self) -> None:
        for value, mask in self._zeros:
            value.detach().masked_fill_(mask, 0)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.values.items()}

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.detach().copy_(tensors[name])

    def _save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self._saved = time.monotonic()
        if self._checkpoint is None:
            return
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        half = self._checkpoint.with_suffix(".part")
        tensors = {name: value.contiguous() for name, value in self._contents().items()}
        save_file(tensors, half, metadata={"state": self.state.model_dump_json()})
        half.replace(self._checkpoint)

    def _contents(self) -> dict[str, Tensor]:
        """Weights, best weights and moments by name."""
        tensors = {f"now.{name}": value.detach() for name, value in self.values.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, value in self.values.items():
            kept = self.optimizer.state.get(value, {})
            tensors |= {f"{key}.{name}": kept[key] for key in (*MOMENTS, "step") if key in kept}
        return tensors

    def _agree(self) -> None:
        """Stand where the first process stands."""
        found = several.told({"state": self.state.model_dump(mode="json")}, self._contents())
        if several.rank():
            self._take_up(found.tensors, State.model_validate(found.words["state"]))

    def _load(self) -> None:
        """Go on from the checkpoint when it is whole and made from the same."""
        if self._checkpoint is None:
            return
        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                state = State.model_validate(json.loads(file.metadata()["state"]))
                if state.made_from != self.state.made_from:
                    return
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, ValidationError):
            return
        self._take_up(stored, state)

    def _take_up(self, stored: Mapping[str, Tensor], state: State) -> None:
        """Go on from what `_contents` gave."""
        self._take({name: stored[f"now.{name}"] for name in self.values})
        self.best = {name: stored[f"best.{name}"] for name in self.values}
        for name, value in self.values.items():
            kept = {key: stored[f"{key}.{name}"] for key in (*MOMENTS, "step") if f"{key}.{name}" in stored}
            if kept:
                self.optimizer.state[value] = kept
        self.state = state


def _fits(values: Mapping[str, Tensor], name: str, mask: Tensor) -> bool:
    """True, or the reason why a mask cannot be held."""
    if name not in values or mask.shape != values[name].shape or mask.dtype != torch.bool:
        own = list(values[name].shape) if name in values else "not a tuned parameter"
        raise CompressError(
            f"recovery: the mask of {name} is {mask.dtype} {list(mask.shape)}, the parameter is {own}"
        )
    return True


def rate_at(step: int, steps: int, wanted: Recovery) -> float:
    """The learning rate: up along a line for a share of the course, then down along one.

    >>> [rate_at(step, 5, Recovery(rate=1.0, warmup=0.4)) for step in range(5)]
    [0.5, 1.0, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    up = round(steps * wanted.warmup)
    return wanted.rate * ((step + 1) / up if step < up else (steps - step) / (steps - up))


def shuffled(
    batches: Iterable[Batch], seed: tuple[int, int], pool_bytes: int = POOL_BYTES
) -> Iterator[tuple[int, Batch]]:
    """Batches with their numbers in a random order, drawn from a pool of bounded size."""
    generator = np.random.default_rng(seed)
    pool: list[tuple[int, Batch]] = []
    held = 0
    for numbered in enumerate(batches):
        pool.append(numbered)
        held += _bytes(numbered[1])
        while held > pool_bytes:
            number, batch = pool.pop(int(generator.integers(len(pool))))
            held -= _bytes(batch)
            yield number, batch
    while pool:
        yield pool.pop(int(generator.integers(len(pool))))


def _bytes(batch: Batch) -> int:
    return sum(value.numel() * value.element_size() for value in batch.inputs.values())


def forecast_s(model: nn.Module, lesson: Lesson, batches: int = 4) -> float:
    """Seconds that one course will take, from a few batches; neither weights nor moments move."""
    asked, learned = [], []
    for number, batch in enumerate(itertools.islice(lesson.batches(), batches)):
        began = time.perf_counter()
        lesson.teacher(number, several.split(batch)[0])
        told = time.perf_counter()
        torch.autograd.backward(lesson.loss(model, number, batch))
        asked.append(told - began)
        learned.append(time.perf_counter() - told)
    model.zero_grad(set_to_none=True)
    return lesson.count * (statistics.median(asked) + lesson.wanted.epochs * statistics.median(learned))
