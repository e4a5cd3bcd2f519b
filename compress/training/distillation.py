"""Distillation losses between student and teacher (logits, hidden states, rankings), and the cached teacher.

Pruning keeps every layer and its outer width, so hidden states are compared token by token and layer by layer
without a learned mapping. For a student with a smaller hidden width, the teacher's states are first projected
(`project_teacher`). Padding is excluded. The outputs of the teacher are computed once and cached on disk, up
to a size limit.

The feature loss of GPUSQ uses the hidden states of late layers only, and only those of inputs on which
student and teacher predict the same. After a first stage of training, layers whose loss became small get a
larger weight and layers whose loss stayed large a smaller one (`layer_factors`).

References: Kurtic, Frantar, Alistarh, "ZipLM", arXiv 2302.04089 (task, logits and token losses);
Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization", arXiv 2305.10727;
Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531 (temperature);
Hofstätter et al., "Improving Efficient Neural Ranking Models", arXiv 2010.02666 (Margin-MSE).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.calibration.activation_statistics import real_rows
from compress.distributed.collectives import WHOLE, BatchShare
from compress.errors import CompressError
from compress.ir import Site
from compress.recipe import Recovery
from compress.tasks.feature_extraction import FeatureExtraction, pooled
from compress.tasks.loading import Batch, Task

MEGABYTE = 10**6
LAYER_FACTOR_RANGE = (0.25, 4.0)  # smallest and largest weight of one layer's feature loss


@dataclass(frozen=True)
class HiddenState:
    """A hidden state: the output of the module `name`, item `output` if it is a tuple."""

    name: str
    output: int = 0


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model for one batch: logits, and [real tokens, hidden] for every hidden state read."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


def hidden_states(model: nn.Module, sites: Sequence[Site]) -> tuple[HiddenState, ...]:
    """One hidden state for every layer that contains a site, in the order of the sites.

    A layer is the outermost entry of a module list. For a site outside of any list, it is the output of the
    module that contains its writer. Both exist in the student too, even if the site was dropped.
    """
    found = []
    for site in sites:
        steps = site.writer.split(".")[:-1]
        inside = site.drop if site.drop is not None and site.drop.writer else None
        name = _layer(model, steps) or (".".join(steps) if inside is None else inside.module)
        output = inside.output if inside is not None and inside.module == name else None
        found.append(HiddenState(name, output or 0))
    return tuple(dict.fromkeys(found))


def _layer(model: nn.Module, steps: Sequence[str]) -> str | None:
    """The outermost entry of a module list on the path to a module."""
    for end in range(len(steps)):
        if isinstance(model.get_submodule(".".join(steps[:end])), (nn.ModuleList, nn.Sequential)):
            return ".".join(steps[: end + 1])
    return None


def run_model(task: Task, model: nn.Module, batch: Batch, at: Sequence[HiddenState]) -> ModelOutputs:
    """One forward pass that also returns hidden states; gradients flow if they are enabled."""
    caught: dict[HiddenState, Tensor] = {}

    def catch(place: HiddenState) -> RemovableHandle:
        def hook(_: nn.Module, __: object, output: object) -> None:
            value = output[place.output] if isinstance(output, (tuple, list)) else output
            if not isinstance(value, Tensor):
                raise CompressError(
                    f"{place.name} returns {type(value).__name__} where a hidden state was expected; "
                    "set hidden = 0 in [recovery]"
                )
            caught[place] = real_rows(value, batch)

        return model.get_submodule(place.name).register_forward_hook(hook)

    handles = [catch(place) for place in at]
    try:
        logits = task.logits(model(**batch.inputs))
    finally:
        for handle in handles:
            handle.remove()
    return ModelOutputs(logits, tuple(caught[place] for place in at))


def project_teacher(teacher: ModelOutputs, student: ModelOutputs, down: Tensor) -> ModelOutputs:
    """The outputs of the teacher with its hidden states projected to the width of a narrower student.

    Args:
        teacher: hidden states of width d, or of another width outside of the residual stream.
        student: its widths decide which hidden states are projected.
        down: [n, d] projection of the residual stream.
    """
    narrow = down.to(teacher.logits)
    pairs = zip(teacher.hidden, student.hidden, strict=True)
    hidden = (theirs @ narrow.T if ours.shape[-1] < theirs.shape[-1] else theirs for theirs, ours in pairs)
    return ModelOutputs(teacher.logits, tuple(hidden))


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of `|h_student - h_teacher|^2 / |h_teacher|^2`.

    Relative to each token, so that neither the scale of deep layers nor single tokens with very large
    activations dominate. Each entry is [tokens, hidden].
    """
    each = [_relative_distance(ours, theirs).mean() for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(each).mean()


def _relative_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """[tokens] squared distances divided by the squared norm of the teacher's token."""
    return (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)


def feature_losses(
    task: Task, batch: Batch, student: ModelOutputs, teacher: ModelOutputs, wanted: Recovery
) -> Tensor:
    """[late layers] mean over all tokens of `1[agreed] |h_student - h_teacher|^2 / |h_teacher|^2`.

    A token counts if both models predict the same for its input. For embeddings, which have no prediction,
    and if `wanted.gated` is off, all tokens count. The paper uses absolute distances; with relative ones the
    weights of layers depend on the factors alone. Of `n` layers the last `ceil(n * wanted.late)` are used.
    """
    late = max(1, math.ceil(len(teacher.hidden) * wanted.late))
    pairs = zip(student.hidden[-late:], teacher.hidden[-late:], strict=True)
    apart = torch.stack([_relative_distance(ours, theirs) for ours, theirs in pairs])  # [late, tokens]
    if wanted.gated and not isinstance(task, FeatureExtraction):
        apart = apart * agreement_mask(student.logits, teacher.logits, batch, apart.shape[1])
    return apart.mean(1)


def agreement_mask(student: Tensor, teacher: Tensor, batch: Batch, tokens: int) -> Tensor:
    """[tokens] bool: whether student and teacher predict the same label for the input of a token.

    Args:
        student: logits, [inputs, labels], or [inputs, tokens, labels] with one prediction per token.
        teacher: the same of the teacher.
        batch: its padding mask is used.
        tokens: rows of a hidden state: all tokens, or all without padding.
    """
    same = (student.argmax(-1) == teacher.argmax(-1)).reshape(len(student), -1)
    padded = batch.real is not None and int(batch.real.sum()) == tokens
    width = batch.real.shape[1] if batch.real is not None and padded else tokens // len(same)
    spread = same.expand(-1, width)
    return spread[batch.real] if padded else spread.reshape(-1)


def layer_factors(apart: Sequence[float]) -> tuple[float, ...]:
    """The weight of each late layer's feature loss, from its loss `l_k` after the first training stage.

    `(1 / l_k) / mean(1 / l)`, clamped to [0.25, 4]: layers that could not be matched get a smaller weight.
    The paper states only the direction; this is the simplest such map with mean 1 before clamping.

    >>> [round(factor, 3) for factor in layer_factors([0.1, 0.2])]
    [1.333, 0.667]
    """
    inverse = [1 / max(each, 1e-12) for each in apart]
    mean = sum(inverse) / len(inverse)
    low, high = LAYER_FACTOR_RANGE
    return tuple(min(max(each / mean, low), high) for each in inverse)


def margin_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Margin-MSE over all pairs: mean of `((s_ij - s_ik) - (t_ij - t_ik))^2` over queries i and j != k.

    Only differences of a query's scores count, so a constant added to them changes nothing. With
    `d = s - t` the mean over all ordered pairs is twice the sample variance of `d` along each row.

    Args:
        student: [queries, documents] scores.
        teacher: the same of the teacher.

    >>> margin_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 5.0]])).item()
    4.0
    """
    if student.shape[1] < 2:
        return (student - teacher).sum() * 0.0
    return 2 * (student - teacher).var(dim=1).mean()


def cosines(hidden: Tensor, batch: Batch, part: BatchShare = WHOLE) -> Tensor:
    """[texts, texts] cosine similarities between the embeddings of a batch; each text is a query.

    In distributed training the parts of all processes are gathered first, so these cover the whole batch.
    """
    unit = part.gather_rows(nn.functional.normalize(pooled(hidden, batch.real), dim=-1))
    return unit @ unit.T


def loss(
    task: Task,
    batch: Batch,
    student: ModelOutputs,
    teacher: ModelOutputs,
    wanted: Recovery,
    part: BatchShare = WHOLE,
    factors: Sequence[float] = (),
) -> Tensor:
    """The weighted sum of all losses; losses of weight 0, or whose inputs are missing, are skipped.

    For a part of a batch (`part`) it is the contribution of this part to the loss of the whole batch, and its
    gradient is the contribution to the whole gradient.

    The divergence from the teacher depends on the task: the KL divergence of softened distributions, times
    the squared temperature to keep the scale of its gradient; for embeddings 1 - cosine, without temperature,
    plus Margin-MSE within the batch (`wanted.ranking`). `factors` weight the feature loss of each late layer
    before these are summed; the default is 1 for all.
    """
    total = student.logits.sum() * 0.0
    if wanted.task and task.labelled and batch.labels is not None:
        total = total + part.samples * wanted.task * task.loss(student.logits, batch)
    embeds = isinstance(task, FeatureExtraction)
    if wanted.logits:
        heat = 1.0 if embeds else wanted.temperature
        soft = task.divergence(student.logits / heat, teacher.logits / heat, batch)
        total = total + part.samples * wanted.logits * heat**2 * soft
    if wanted.ranking and embeds:
        scores = cosines(student.logits, batch, part), cosines(teacher.logits, batch, part)
        total = total + part.pairs * wanted.ranking * margin_loss(*scores)
    if wanted.hidden and teacher.hidden:
        total = total + part.tokens * wanted.hidden * hidden_loss(student.hidden, teacher.hidden)
    if wanted.features and teacher.hidden:
        each = feature_losses(task, batch, student, teacher, wanted)
        weights = each.new_tensor(factors) if factors else torch.ones_like(each)
        total = total + part.tokens * wanted.features * (weights * each).sum()
    return total


class Teacher:
    """The dense model's outputs by batch number, cached on disk within a size limit."""

    def __init__(
        self, task: Task, model: nn.Module, at: Sequence[HiddenState], directory: Path, room_mb: float
    ) -> None:
        """Reuse the outputs already in `directory`.

        Args:
            task: extracts the logits.
            model: the dense model, not changed.
            at: the hidden states to read.
            directory: one file per batch; the caller ensures that they belong to this model and data.
            room_mb: limit for all files together, in megabytes.
        """
        self.at = tuple(at)
        self._task, self._model, self._directory = task, model, directory
        self._room = room_mb * MEGABYTE
        self._used = sum(path.stat().st_size for path in directory.glob("*.safetensors"))

    @property
    def used_mb(self) -> float:
        """Megabytes on disk."""
        return self._used / MEGABYTE

    def __call__(self, number: int, batch: Batch) -> ModelOutputs:
        """The outputs for batch `number`; cached and computed ones are bit-identical."""
        path = self._directory / f"{number:06d}.safetensors"
        stored = _read(path, len(self.at))
        if stored is not None:
            return stored
        with torch.no_grad():
            found = run_model(self._task, self._model, batch, self.at)
        self._keep(path, found)
        return found

    def clear(self) -> None:
        """Delete all cached outputs."""
        for path in self._directory.glob("*.safetensors"):
            path.unlink()
        self._used = 0

    def _keep(self, path: Path, found: ModelOutputs) -> None:
        tensors = {f"hidden.{place}": value for place, value in enumerate(found.hidden)}
        tensors = {name: value.contiguous() for name, value in [*tensors.items(), ("logits", found.logits)]}
        size = (
            sum(value.numel() * value.element_size() for value in tensors.values()) + 4096
        )  # room for the header
        damaged = path.stat().st_size if path.exists() else 0
        if self._used - damaged + size > self._room:
            return
        half = path.with_suffix(".part")
        save_file(tensors, half)
        half.replace(path)
        self._used += path.stat().st_size - damaged


def _read(path: Path, hidden: int) -> ModelOutputs | None:
    """The outputs in a complete file, else None."""
    try:
        found = load_file(path)
        return ModelOutputs(found["logits"], tuple(found[f"hidden.{place}"] for place in range(hidden)))
    except (OSError, SafetensorError, KeyError):
        return None
