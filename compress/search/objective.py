"""The loss of the model assembled from stored candidates, for every choice that the search proposes."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.ir import Option, Site
from compress.methods import candidate_store, quantized_layers
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.loading import Batch, Task


class ModelObjective:
    """Divergence of the model assembled from stored candidates from the dense model.

    Only the layers of sites that changed since the last call are replaced. Shapes never change: a removed
    unit has zero columns in the writer (a masked model).
    """

    def __init__(
        self,
        task: Task,
        sites: Sequence[Site],
        directory: Path,
        options: Sequence[Sequence[Option]],
        batches: Sequence[Batch],
        dense: nn.Module | None = None,
    ) -> None:
        """Keep a copy of the model and the dense logits of `batches`.

        Args:
            task: the model, how its logits are read, and the divergence between two of them.
            sites: in the order of the choices.
            directory: where `candidate_store.build` stored the candidates.
            options: the options of every site.
            batches: the inputs on which every choice is evaluated.
            dense: the reference of the divergence; None takes the task's model.
        """
        self._task = task
        self._sites = sites
        self._directory = directory
        self._options = options
        self._batches = batches
        self._dense = list(compute_logits(task, dense or task.model, batches))
        self._model = copy.deepcopy(task.model).eval()
        self._original = [prune.take_snapshot(self._model, site) for site in sites]
        self._now = tuple(row.index(Option()) for row in options)

    def removal(self, index: int, option: int) -> Removal | None:
        """The stored candidate of one site, None for the dense option."""
        wanted = self._options[index][option]
        if wanted == Option():
            return None
        return candidate_store.removal(self._directory, index, wanted)

    def __call__(self, choices: Sequence[int]) -> float:
        """The mean divergence from the dense model over the batches; deterministic."""
        for index, (site, option) in enumerate(zip(self._sites, choices, strict=True)):
            if option == self._now[index]:
                continue
            removal = self.removal(index, option)
            self._restore_site(index)
            if removal is not None:
                prune.write_weights(self._model, site, removal)
                quantized_layers.insert(
                    self._model, quantized_layers.places(self._model, site, removal, masked=True)
                )
        self._now = tuple(choices)
        return self.of(self._model)

    def _restore_site(self, index: int) -> None:
        """Restore the dense layers of a site."""
        original = self._original[index]
        quantized_layers.remove(self._model, original.weights)
        prune.restore(self._model, self._sites[index], original)

    def of(self, model: nn.Module) -> float:
        """The mean divergence of any model with the same outputs, on the same inputs."""
        return mean_divergence(self._task, model, self._batches, self._dense)


@torch.inference_mode()
def compute_logits(task: Task, model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The logits of `model` for every batch."""
    return [task.logits(model(**batch.inputs)) for batch in batches]


@torch.inference_mode()
def mean_divergence(
    task: Task,
    model: nn.Module,
    batches: Sequence[Batch],
    dense: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean divergence of `model` from dense logits over all samples."""
    total, samples = 0.0, 0
    for done, (batch, target) in enumerate(zip(batches, dense, strict=True), 1):
        size = len(target)
        total += size * float(task.divergence(task.logits(model(**batch.inputs)), target, batch))
        samples += size
        if progress is not None:
            progress(done, len(batches))
    return total / samples
