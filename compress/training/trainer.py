"""The training loop of recovery: distillation with AdamW, while pruned weights stay exactly zero.

Training is divided into *courses*: AdamW with a linear warm-up and a linear decay to zero. The model is
validated after every epoch, and the best weights so far are kept, the initial ones among them. A further
course starts from the best weights with fresh moments. After a course in which no epoch reached the previous
best score, the next has a fifth of the learning rate; two such courses in a row end the training. Layers run
in evaluation mode (no dropout): a student that equals the teacher must have a loss of zero.

All randomness follows from the seed and the number of the step or epoch, and a checkpoint holds weights, best
weights and moments: an interrupted and resumed run gives the same bits as an uninterrupted one. Several
processes take a share of every batch and sum their gradients, so that their steps equal those of a single
process; the first validates and writes the checkpoint. Parameters are replicated or sharded (`fsdp`); the
checkpoint is the same.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compress.distributed import collectives, fsdp
from compress.errors import CompressError
from compress.ir import Document
from compress.recipe import Recovery
from compress.tasks.loading import Batch
from compress.tasks.sampler import shuffled
from compress.training import checkpoint
from compress.training.distillation_data import DistillationData
from compress.training.sltrain_layers import Updated

MOMENTS = ("exp_avg", "exp_avg_sq")
RETRY_RATE_FACTOR = 0.2  # of the rate, after a course that lowered the best score

Progress = Callable[[int, int], None]


class TrainingState(Document):
    """The progress of a run: steps, and the scores before the first and after every epoch.

    `factors` are the weights of the features of late layers in the current course.
    """

    made_from: str = ""
    step: int = 0
    scores: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def epochs(self) -> int:
        """The number of epochs that were finished and validated."""
        return len(self.scores) - 1

    def worse_courses(self, epochs: int) -> list[bool]:
        """For every whole course of so many epochs: is its best score below the best before it?"""
        ends = range(epochs, len(self.scores), epochs)
        return [
            max(self.scores[end - epochs + 1 : end + 1]) < max(self.scores[: end - epochs + 1])
            for end in ends
        ]


def train(
    run: "TrainingRun", judge: Callable[[nn.Module], float], progress: Progress | None = None
) -> tuple[float, ...]:
    """Train to the end and load the best weights; return the scores before and after each epoch.

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
    except BaseException:
        run.abandon()
        raise
    run.release()
    return run.state.scores


class TrainingRun:
    """The training of one student: weights, moments, best weights and progress."""

    def __init__(
        self,
        model: nn.Module,
        lesson: DistillationData,
        *,
        zeros: Mapping[str, Tensor] | None = None,
        checkpoint: Path | None = None,
        made_from: str = "",
        factors: tuple[float, ...] = (),
    ) -> None:
        """Freeze parameters that are not trained, apply the masks, and resume from a matching checkpoint.

        Args:
            model: the shrunk student, tuned in place; embedding tables and what an update is learned of
                stay, all else may move.
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
            TrainingState(made_from=made_from, factors=factors),
        )
        self._flags = {value: value.requires_grad for value in model.parameters()}
        still = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
        still |= {id(one.base) for one in model.modules() if isinstance(one, Updated)}
        for value in model.parameters():
            value.requires_grad_(id(value) not in still)
        own = {name: value for name, value in model.named_parameters() if value.requires_grad}
        fitting = {name: mask for name, mask in (zeros or {}).items() if _check_mask(own, name, mask)}
        self.held = fsdp.place_student(model, shard=lesson.wanted.shard)
        self.values = self.held.values
        self._zeros = [(self.values[name], self.held.part(name, mask)) for name, mask in fitting.items()]
        self._hold()
        self.optimizer = self._fresh()
        self.best = self._copy()
        self._checkpoint, self._saved = checkpoint, time.monotonic()
        self._keeps = False
        self._take_up()

    @property
    def finished(self) -> bool:
        """Whether no course is left: the last raised no score, or harmed and was followed by one that did."""
        wanted, epochs = self.lesson.wanted, self.state.epochs
        if epochs <= 0 or epochs % wanted.epochs:
            return False
        harmed = self.state.worse_courses(wanted.epochs)
        if harmed[-1]:
            most = 2 if wanted.mode == "fast" else wanted.courses
            return len(harmed) >= most or harmed[-2:] == [True, True]
        if wanted.mode == "fast" or len(harmed) >= wanted.courses:
            return True
        scores = self.state.scores
        return max(scores[-wanted.epochs :]) <= max(scores[: -wanted.epochs])

    def advance(self, number: int, batch: Batch) -> None:
        """Take one optimizer step and reapply the masks of zeros."""
        wanted, course = self.lesson.wanted, self.lesson.wanted.epochs * self.lesson.count
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(
                int(np.random.SeedSequence((wanted.seed, self.state.step)).generate_state(1)[0])
            )
            loss = self.lesson.loss(self.held.model, number, batch, self.state.factors)
            whole = torch.stack([loss.detach(), loss.new_tensor(float(self._due))])
            collectives.all_reduce([whole])
            if not bool(torch.isfinite(whole[0])):
                raise CompressError(
                    f"recovery: the loss became {whole[0].item()} at step {self.state.step}; lower rate in "
                    f"[recovery], which is {wanted.rate:g}"
                )
            torch.autograd.backward(loss)
        self.held.add_up()
        for value, mask in self._zeros:
            if value.grad is not None:
                value.grad.masked_fill_(mask, 0)
        nn.utils.clip_grads_with_norm_(self.values.values(), wanted.clip, self.held.norm())
        calm = RETRY_RATE_FACTOR ** sum(self.state.worse_courses(wanted.epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = calm * rate_at(self.state.step % course, course, wanted)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._hold()
        self.state = self.state.model_copy(update={"step": self.state.step + 1})
        if whole[1]:
            self._save()

    def judge(self, judge: Callable[[nn.Module], float]) -> None:
        """Validate the model; weights at least as good as the best so far become the best."""
        with self.held.materialized():
            own = 0.0 if collectives.rank() else judge(self.model)
            score = float(collectives.broadcast({"score": own}).words["score"])
        if score >= max(self.state.scores, default=score):
            self.best = self._copy()
        self.state = self.state.model_copy(update={"scores": (*self.state.scores, score)})
        self._save()

    def restart(self) -> None:
        """Start another course from the best weights with fresh moments and new feature weights."""
        self._take(self.best)
        self.optimizer = self._fresh()
        self.state = self.state.model_copy(update={"factors": self.lesson.factors(self.held.model)})

    def release(self) -> None:
        """Load the best weights into the model and restore `requires_grad`."""
        self._take(self.best)
        self.held.release()
        for value, flag in self._flags.items():
            value.requires_grad_(flag)

    def abandon(self) -> None:
        """Release after an error, without communication: other processes may be at another step."""
        if not self.held.apart:
            self.release()

    @property
    def held_bytes(self) -> int:
        """What this process holds from step to step: weights, and gradient, moments and best of the tuned."""
        return self.held.weight_bytes + 4 * sum(value.nbytes for value in self.values.values())

    @property
    def _due(self) -> bool:
        """Whether it is time for a checkpoint, which the first process alone decides."""
        due = time.monotonic() - self._saved >= self.lesson.wanted.checkpoint_s
        return self._keeps and not collectives.rank() and due

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
        """Write the checkpoint in the first process, atomically."""
        self._saved = time.monotonic()
        if not self._keeps:
            return
        parts = self._contents()
        wholes = self.held.wholes(parts)
        if self._checkpoint is None:
            for _ in wholes:  # an exchange in which this process only gives
                pass
            return
        checkpoint.write(self._checkpoint, self.state.model_dump_json(), self.held.shapes(parts), wholes)

    def _contents(self) -> dict[str, Tensor]:
        """Weights, best weights and moments by name."""
        tensors = {f"now.{name}": value.detach() for name, value in self.values.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, value in self.values.items():
            kept = self.optimizer.state.get(value, {})
            tensors |= {f"{key}.{name}": kept[key] for key in (*MOMENTS, "step") if key in kept}
        return tensors

    def _take_up(self) -> None:
        """Resume in all processes from the first one's checkpoint, if it is complete and matches."""
        with ExitStack() as stack:
            stored = self._stored(stack)
            words = {
                "state": (self.state if stored is None else stored[0]).model_dump(mode="json"),
                "names": [] if stored is None else sorted(stored[1].names),
                "keeps": self._checkpoint is not None,
            }
            said = collectives.broadcast(words).words
            self.state, self._keeps = TrainingState.model_validate(said["state"]), bool(said["keeps"])
            for name in said["names"]:
                own = {} if stored is None else {name: stored[1].read(name)}
                self._put(name, collectives.broadcast({}, own).tensors[name])

    def _stored(self, stack: ExitStack) -> tuple[TrainingState, checkpoint.Checkpoint] | None:
        """The checkpoint, None if there is none that matches."""
        found = None if self._checkpoint is None else checkpoint.open_checkpoint(self._checkpoint, stack)
        if found is None:
            return None
        try:
            state = TrainingState.model_validate_json(found.state)
        except ValidationError:
            return None
        needed = {f"{key}.{name}" for key in ("now", "best") for name in self.values}
        same = state.made_from == self.state.made_from and needed <= found.names
        return (state, found) if same else None

    def _put(self, key: str, whole: Tensor) -> None:
        """Restore one tensor that `_contents` named."""
        kind, _, name = key.partition(".")
        part = self.held.part(name, whole)
        if kind == "now":
            self.values[name].detach().copy_(part)
        elif kind == "best":
            self.best[name] = part
        else:
            self.optimizer.state.setdefault(self.values[name], {})[kind] = part


def _check_mask(values: Mapping[str, Tensor], name: str, mask: Tensor) -> bool:
    """True if a mask fits its parameter, else raise CompressError."""
    if name not in values or mask.shape != values[name].shape or mask.dtype != torch.bool:
        own = list(values[name].shape) if name in values else "not a tuned parameter"
        raise CompressError(
            f"recovery: the mask of {name} is {mask.dtype} {list(mask.shape)}, the parameter is {own}"
        )
    return True


def rate_at(step: int, steps: int, wanted: Recovery) -> float:
    """The learning rate: linear warm-up for a share of the course, then linear decay.

    >>> [rate_at(step, 5, Recovery(rate=1.0, warmup=0.4)) for step in range(5)]
    [0.5, 1.0, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    up = round(steps * wanted.warmup)
    return wanted.rate * ((step + 1) / up if step < up else (steps - step) / (steps - up))


def forecast_s(model: nn.Module, lesson: DistillationData, batches: int = 6) -> float:
    """Estimated seconds of one course, timed on a few batches without changing the model."""
    asked, learned = [], []
    for number, batch in lesson.spread(batches):
        began = time.perf_counter()
        lesson.teacher(number, collectives.split(batch)[0])
        told = time.perf_counter()
        torch.autograd.backward(lesson.loss(model, number, batch))
        asked.append(told - began)
        learned.append(time.perf_counter() - told)
    model.zero_grad(set_to_none=True)
    return lesson.count * (statistics.mean(asked) + lesson.wanted.epochs * statistics.mean(learned))
