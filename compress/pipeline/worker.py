"""A process beside the first one: it takes its share of the work, and neither measures, writes nor speaks."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from compress.calibration import activation_statistics
from compress.distributed import collectives
from compress.distributed.collectives import Command
from compress.ir import Site
from compress.methods import candidate_store
from compress.pipeline import job, recovery
from compress.pipeline.recovery import RecoveryContext
from compress.recipe import Recipe, Recovery
from compress.sites import prune
from compress.tasks.task import Batch, Task


def serve() -> int:
    """Do what the first process calls for until it says that this is the end; the exit code it gives.

    Raises:
        CompressError: the first process has ended without a word.
    """
    follower = Worker()
    acts: dict[str, Callable[[Command], None]] = {
        "load": follower.load,
        "calibrate": follower.calibrate,
        "recover": follower.recover,
    }
    while True:
        call = collectives.receive_command()
        if call.act == collectives.END:
            return int(call.words["code"])
        with contextlib.suppress(Exception):  # the first process knows of it, and says what follows
            acts[call.act](call)


class Worker:
    """The dense model and its data in a process beside the first one."""

    task: Task
    batches: tuple[Batch, ...]

    def load(self, call: Command) -> None:
        """Load what the first process loads."""
        self.task, self.batches = job.load(Recipe.model_validate(call.words["recipe"]))

    def calibrate(self, call: Command) -> None:
        """Observe a share of the calibration data."""
        activation_statistics.observe(
            self.task,
            _sites(call),
            self.batches,
            lambda place, tensors: None,
            lambda done: None,
            taylor=call.words["taylor"],
            readers=call.words["readers"],
        )

    def recover(self, call: Command) -> None:
        """Tune the same student on a part of every batch."""
        with collectives.synchronized(), tempfile.TemporaryDirectory(prefix="compress-") as answers:
            sites = _sites(call)
            removals = {
                name: candidate_store.unpacked(candidate_store.below(call.tensors, f"{name}/"), form)
                for name, form in call.words["forms"].items()
            }
            desk = RecoveryContext(
                self.task,
                sites,
                _nothing,
                lambda words: contextlib.nullcontext(_unseen),
                lambda line: None,
                Path(answers),
            )
            recovery.train_student(
                desk,
                Recovery.model_validate(call.words["recovery"]),
                prune.shrink(self.task.model, sites, removals),
                removals,
                dense=self.task.model,
            )


def _nothing(_: nn.Module) -> float:
    """The first process judges."""
    return 0.0


def _unseen(done: int, work: int) -> None:
    """The first process draws progress."""


def _sites(call: Command) -> tuple[Site, ...]:
    return tuple(Site.model_validate(site) for site in call.words["sites"])
