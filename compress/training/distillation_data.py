"""What a student is trained on: teacher, batches and settings, and the loss of a batch.

Several processes take a share of every batch each; losses are weighted so that they add up to the loss of
the whole batch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.distributed import collectives
from compress.recipe import Recovery
from compress.tasks.loading import Batch, Task
from compress.training import distillation
from compress.training.distillation import ModelOutputs, Teacher

FEATURE_LOSS_BATCHES = 8  # batches that tell how far late layers are after a course

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class DistillationData:
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
        mine, part = collectives.split(batch)
        said, goal = self._pair(model, number, mine)
        return distillation.loss(self.task, mine, said, goal, self.wanted, part, factors)

    def spread(self, few: int) -> Iterator[tuple[int, Batch]]:
        """So many batches with their numbers, from everywhere: the first ones may be the shortest."""
        every = max(1, self.count // few)
        return itertools.islice(enumerate(self.batches()), every // 2, min(self.count, few * every), every)

    @torch.no_grad()
    def apart(self, model: nn.Module) -> list[float]:
        """How far each late layer of a model is from the teacher's, in the mean of a few batches."""
        found = []
        for number, batch in self.spread(FEATURE_LOSS_BATCHES):
            mine, part = collectives.split(batch)
            said, goal = self._pair(model, number, mine)
            found.append(part.tokens * distillation.feature_losses(self.task, mine, said, goal, self.wanted))
        mean = torch.stack(found).mean(0)
        collectives.all_reduce([mean])
        apart: list[float] = mean.tolist()
        return apart

    def factors(self, model: nn.Module) -> tuple[float, ...]:
        """How much the features of each late layer of a tuned model count from now on; none without any."""
        if not self.wanted.features or not self.teacher.at:
            return ()
        return distillation.layer_factors(self.apart(model))

    def _pair(self, model: nn.Module, number: int, batch: Batch) -> tuple[ModelOutputs, ModelOutputs]:
        """What student and teacher say of a batch."""
        goal = self.teacher(number, batch)
        said = distillation.run_model(self.task, model, batch, self.teacher.at)
        return said, goal if self.down is None else distillation.project_teacher(goal, said, self.down)
