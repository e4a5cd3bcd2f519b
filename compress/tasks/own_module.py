"""A task made of an `nn.Module`, example inputs and a data loader, for models without a task of their own."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.errors import CompressError
from compress.tasks.pretrained import check_finite
from compress.tasks.task import SCORE_BATCH, Batch, Run, Split, Task, answer

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
SPLITS: tuple[tuple[Split, float], ...] = (("calibration", 0.5), ("validation", 0.25), ("test", 0.25))
LEAST_ROWS = 8  # below, a split would hold a single input


class ModuleTask(Task):
    """An own model with the rows of a data loader.

    With integer labels, one for every row, and `[batch, classes]` outputs the score is accuracy. Otherwise it
    is the mean cosine between the outputs of the compressed model and those of the dense one.
    """

    name = "own-module"

    def __init__(self, model: nn.Module, example_inputs: Inputs, data_loader: Iterable[object]) -> None:
        """Read the loader once and split its rows in their order: half, a quarter and a quarter.

        Args:
            model: takes the inputs as arguments; it is copied to float32 and evaluation mode.
            example_inputs: one batch, as a tensor, a sequence in the order of `forward`, or by argument name.
            data_loader: gives batches of inputs, or pairs of inputs and labels.

        Raises:
            CompressError: inputs do not fit `forward`, or the loader holds too few rows.
        """
        check_finite(model, type(model).__name__)
        self.model = copy.deepcopy(model).cpu().float().eval()
        self._example = _by_name(model, example_inputs)
        inputs, labels = self._read(data_loader)
        self.labelled = labels is not None
        self.metric = "accuracy" if self.labelled else "cosine"
        self._rows: dict[str, tuple[dict[str, Tensor], Tensor | None]] = {}
        count, first = len(next(iter(inputs.values()))), 0
        for split, share in SPLITS:
            last = count if split == "test" else first + round(share * count)
            part = {name: tensor[first:last] for name, tensor in inputs.items()}
            self._rows[split] = part, None if labels is None else labels[first:last]
            first = last
        self.samples = {split: len(next(iter(part.values()))) for split, (part, _) in self._rows.items()}
        self.origin = {split: "the data loader's rows, in their order" for split, _ in SPLITS}
        self._dense: dict[tuple[str, int | None], NDArray[Any]] = {}

    @classmethod
    def example_of(cls, model: nn.Module, example_inputs: Inputs, batch: int) -> dict[str, Tensor]:
        """A batch of example inputs by the names of `forward`'s arguments, without any data.

        Raises:
            CompressError: inputs do not fit `forward`.
        """
        return _repeated(_by_name(model, example_inputs), batch)

    def example(self, batch: int, tokens: int) -> dict[str, Tensor]:
        """Rows of the example inputs, repeated to a batch of `batch`; `tokens` is not used."""
        return _repeated(self._example, batch)

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The rows of a split in batches of `size`, in the loader's order."""
        inputs, labels = self._rows[split]
        count = min(self.samples[split], self.samples[split] if limit is None else limit)
        for first in range(0, count, size):
            rows = slice(first, min(first + size, count))
            yield Batch(
                {name: tensor[rows] for name, tensor in inputs.items()},
                None if labels is None else labels[rows],
            )

    def divergence(self, logits: Tensor, dense: Tensor, batch: Batch) -> Tensor:
        """KL(dense || logits) of a classifier, else the mean of 1 - cosine between the outputs."""
        if self.labelled:
            return super().divergence(logits, dense, batch)
        return 1 - F.cosine_similarity(logits.flatten(1), dense.flatten(1), dim=-1).mean()

    def outcomes(self, run: Run, split: Split = "test", limit: int | None = None) -> NDArray[Any]:
        """[inputs, 1] whether the label is right, or the cosine to the dense model's output."""
        if self.labelled:
            return super().outcomes(run, split, limit)
        key = (split, limit)
        if key not in self._dense:
            self._dense[key] = self._outputs(self._run_dense, split, limit)
        cosine: NDArray[Any] = (self._outputs(run, split, limit) * self._dense[key]).sum(-1, keepdims=True)
        return cosine

    def _outputs(self, run: Run, split: Split, limit: int | None) -> NDArray[Any]:
        """[inputs, features] outputs of unit length."""
        found = [answer(run, batch) for batch in self.batches(split, SCORE_BATCH, limit)]
        flat = np.concatenate([values.reshape(len(values), -1) for values in found]).astype(np.float64)
        unit: NDArray[Any] = flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
        return unit

    def _run_dense(self, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            output = self.model(
                **{name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
            )
        return self.logits(output).cpu().numpy()

    def _read(self, loader: Iterable[object]) -> tuple[dict[str, Tensor], Tensor | None]:
        """All rows of the loader, and their labels where it gives them."""
        inputs: dict[str, list[Tensor]] = {}
        labels: list[Tensor] = []
        for item in loader:
            given, label = _with_label(item, len(self._example))
            for name, value in _by_name(self.model, given).items():
                inputs.setdefault(name, []).append(value)
            if label is not None:
                labels.append(label.detach().cpu())
        if inputs.keys() != self._example.keys():
            raise CompressError(
                f"the data loader gives {', '.join(inputs) or 'nothing'}, the example inputs are "
                f"{', '.join(self._example)}; both must hold the same arguments"
            )
        try:
            rows = {name: torch.cat(parts) for name, parts in inputs.items()}
        except RuntimeError as error:
            raise CompressError(
                f"batches of the data loader differ in shape ({error}); pad them to one shape"
            ) from error
        count = len(next(iter(rows.values())))
        if count < LEAST_ROWS:
            raise CompressError(
                f"the data loader holds {count} rows; at least {LEAST_ROWS} are needed, and some "
                "hundred for a score that means something"
            )
        if not labels or torch.cat(labels).is_floating_point() or torch.cat(labels).ndim != 1:
            return rows, None
        return rows, torch.cat(labels).long()


def _argument_names(model: nn.Module) -> list[str]:
    """The arguments of `forward` in their order, "**" last where it takes any name."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return names + ["**"] * any(one.kind is one.VAR_KEYWORD for one in parameters)


def _with_label(item: object, arguments: int) -> tuple[object, Tensor | None]:
    """A loader's item as inputs and labels: the last of a pair, or the entry "labels"."""
    if isinstance(item, Mapping):
        rest = {name: value for name, value in item.items() if name not in ("labels", "label")}
        label = item.get("labels", item.get("label"))
        return rest, label if isinstance(label, Tensor) else None
    if isinstance(item, (tuple, list)):
        if len(item) == 2 and isinstance(item[0], (tuple, list, Mapping)):
            return item[0], item[1] if isinstance(item[1], Tensor) else None
        if len(item) == arguments + 1:
            return item[:-1], item[-1] if isinstance(item[-1], Tensor) else None
    return item, None


def _by_name(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    """A batch of inputs by the names of `forward`'s arguments, on the processor, real numbers in float32."""
    names = _argument_names(model)
    if isinstance(inputs, Mapping):
        unknown = [str(name) for name in inputs if name not in names]
        if unknown and "**" not in names:
            raise CompressError(
                f"input {unknown[0]!r} is no argument of {type(model).__name__}.forward; it takes "
                f"{', '.join(names)}"
            )
        found = dict(inputs)
    else:
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        if len(values) > len(names):
            raise CompressError(
                f"{len(values)} inputs were given, but {type(model).__name__}.forward takes "
                f"{', '.join(names)}"
            )
        found = dict(zip(names, values, strict=False))
    wrong = [name for name, value in found.items() if not isinstance(value, Tensor) or value.ndim == 0]
    if wrong:
        raise CompressError(
            f"input {wrong[0]!r} is a {type(found[wrong[0]]).__name__}; give tensors with a batch dimension"
        )
    return {
        name: value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        for name, value in found.items()
    }


def _repeated(example: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Rows of example inputs, from the first again after the last, in a batch of `batch`."""
    return {name: rows[torch.arange(batch) % len(rows)].contiguous() for name, rows in example.items()}
