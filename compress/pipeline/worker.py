"""The loop of a secondary process, which runs its share of calibration and training without any output."""

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
    """Execute the commands of the main process until the final one; returns the exit code it carries.

    Raises:
        CompressError: the main process ended without a final command.
    """
    worker = Worker()
    acts: dict[str, Callable[[Command], None]] = {
        "load": worker.load,
        "calibrate": worker.calibrate,
        "recover": worker.recover,
    }
    while True:
        call = collectives.receive_command()
        if call.act == collectives.END:
            return int(call.words["code"])
        with contextlib.suppress(Exception):  # the main process detects and handles failures
            acts[call.act](call)


class Worker:
    """The dense model and its data in a secondary process."""

    task: Task
    batches: tuple[Batch, ...]

    def load(self, call: Command) -> None:
        """Load the same model and data as the main process."""
        self.task, self.batches = job.load(Recipe.model_validate(call.words["recipe"]))

    def calibrate(self, call: Command) -> None:
        """Collect activation statistics on a share of the calibration data."""
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
        """Train the same student on a part of every batch."""
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
    """Validation runs in the main process only."""
    return 0.0


def _unseen(done: int, work: int) -> None:
    """Progress is shown by the main process only."""


def _sites(call: Command) -> tuple[Site, ...]:
    return tuple(Site.model_validate(site) for site in call.words["sites"])
