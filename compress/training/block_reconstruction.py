"""Train blocks with sparse plus low-rank weights to reproduce the outputs of the dense model's blocks.

`core.lowrank` fits every weight separately. Here all split weights of one block are trained together, so that
the block reproduces the dense block's output from the inputs that the compressed model really feeds it:
weights can compensate for each other and for earlier blocks. Sparse values keep their support and factors
their rank, so neither the structure of the exported file nor its latency changes. Blocks are processed in
model order, and a block whose distance does not decrease is restored.

Norms, biases of readers and weights without factors are not trained: a removal cannot store the first two,
and quantized weights must not change.

Reference: Makni et al., "3BASiL", arXiv 2603.01376 (transformer matching).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Cache

from compress.calibration.activation_statistics import real_rows
from compress.core import lowrank
from compress.ir import Option, Site
from compress.sites import prune
from compress.sites.modeling import owner
from compress.sites.prune import Removal
from compress.tasks.task import Batch
from compress.training import distillation, sltrain_layers
from compress.training.distillation import HiddenState
from compress.training.sltrain_layers import SparseLowRank

EPOCHS = 4
LEARNING_RATE = 5e-4
FINAL_RATE_SHARE = 0.2  # final learning rate of the cosine schedule, as a share of the initial one


class _ForwardStoppedError(Exception):
    """Raised by a hook to end a forward pass once the needed value was captured."""


@dataclass(frozen=True, eq=False)
class BlockExample:
    """One call of a block: its arguments, the dense block's output without padding, and the batch."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    goal: Tensor
    batch: Batch


def reconstruct(
    model: nn.Module,
    sites: Sequence[Site],
    removals: Mapping[str, Removal],
    batches: Sequence[Batch],
    *,
    memory_mb: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Removal]:
    """The same removals with split weights trained block by block.

    Args:
        model: the dense model, not changed.
        sites: in the order in which the model runs them.
        removals: by site name; those without factors stay as they are.
        batches: calibration inputs; padding is excluded.
        memory_mb: limit for the stored calls of one block; further batches are skipped.
        progress: called with blocks done and the number of blocks.
    """
    small = prune.shrink(model, sites, removals).requires_grad_(False)
    found = dict(removals)
    blocks: dict[HiddenState, list[Site]] = {}
    for site in sites:
        if site.name in removals and removals[site.name].factors:
            (place,) = distillation.hidden_states(model, [site])
            blocks.setdefault(place, []).append(site)
    for done, (place, inside) in enumerate(blocks.items(), 1):
        layers = _split(small, inside, removals)
        if layers:
            shown = collect_examples(model, small, place, batches, memory_mb)
            train_block(small.get_submodule(place.name), place, layers, shown)
        for site in inside:
            found[site.name] = _removal(site, removals[site.name], layers)
        sltrain_layers.merge(small)
        if progress is not None:
            progress(done, len(blocks))
    return found


@torch.no_grad()
def collect_examples(
    model: nn.Module, small: nn.Module, place: HiddenState, batches: Sequence[Batch], memory_mb: int
) -> list[BlockExample]:
    """Inputs of one block in the compressed model with its outputs in the dense one; at least one."""
    found: list[BlockExample] = []
    held = 0
    for batch in batches:
        args, kwargs = _block_arguments(small, place, batch)
        found.append(BlockExample(args, kwargs, real_rows(_block_output(model, place, batch), batch), batch))
        held += sum(value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        held += found[-1].goal.nbytes
        if held > memory_mb * 1e6:
            break
    return found


def _block_arguments(
    model: nn.Module, place: HiddenState, batch: Batch
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of the block, without a key-value cache, which would grow with every call."""
    caught: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def before(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        caught.append((args, kwargs))
        raise _ForwardStoppedError

    hook = model.get_submodule(place.name).register_forward_pre_hook(before, with_kwargs=True)
    _run_until_stopped(model, batch, hook.remove)
    ((args, kwargs),) = caught
    plain = tuple(None if isinstance(value, Cache) else value for value in args)
    return plain, {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}


def _block_output(model: nn.Module, place: HiddenState, batch: Batch) -> Tensor:
    """The hidden state that the block returns."""
    caught: list[object] = []

    def after(_: nn.Module, __: object, output: object) -> None:
        caught.append(output)
        raise _ForwardStoppedError

    hook = model.get_submodule(place.name).register_forward_hook(after)
    _run_until_stopped(model, batch, hook.remove)
    return _hidden(caught[0], place)


def _run_until_stopped(model: nn.Module, batch: Batch, finish: Callable[[], None]) -> None:
    try:
        model(**batch.inputs)
    except _ForwardStoppedError:
        return
    finally:
        finish()


def _hidden(output: object, place: HiddenState) -> Tensor:
    value = output[place.output] if isinstance(output, (tuple, list)) else output
    assert isinstance(value, Tensor)
    return value


def distance(block: nn.Module, place: HiddenState, example: BlockExample) -> Tensor:
    """Squared distance of a block's output from the target, relative to the target's squared norm."""
    found = real_rows(_hidden(block(*example.args, **example.kwargs), place), example.batch)
    return (found - example.goal).square().sum() / example.goal.square().sum()


def train_block(
    block: nn.Module,
    place: HiddenState,
    layers: Mapping[str, SparseLowRank],
    shown: Sequence[BlockExample],
    *,
    epochs: int = EPOCHS,
    rate: float = LEARNING_RATE,
) -> tuple[float, float]:
    """Train the split layers of a block in place; its mean distance before and after, never increased.

    Args:
        block: contains the layers; its other parameters are not changed.
        place: which of its outputs is compared.
        layers: by the name of their weight.
        shown: inputs and target outputs.
        epochs: passes over all examples, in a fixed random order.
        rate: initial learning rate of Adam, with cosine decay.
    """
    values = [value for layer in layers.values() for value in layer.parameters() if value.requires_grad]
    start = [value.detach().clone() for value in values]
    before = _mean_distance(block, place, shown)
    optimizer = torch.optim.Adam(values, lr=rate)
    random = torch.Generator().manual_seed(0)
    order: list[int] = [
        n for _ in range(epochs) for n in torch.randperm(len(shown), generator=random).tolist()
    ]
    for step, number in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = rate * (
                FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * (1 + math.cos(math.pi * step / len(order))) / 2
            )
        optimizer.zero_grad()
        torch.autograd.backward(distance(block, place, shown[number]))
        optimizer.step()
    after = _mean_distance(block, place, shown)
    if after < before:
        return before, after
    with torch.no_grad():
        for value, old in zip(values, start, strict=True):
            value.copy_(old)
    return before, before


@torch.no_grad()
def _mean_distance(block: nn.Module, place: HiddenState, shown: Sequence[BlockExample]) -> float:
    return sum(float(distance(block, place, example)) for example in shown) / len(shown)


def _split(
    small: nn.Module, sites: Sequence[Site], removals: Mapping[str, Removal]
) -> dict[str, SparseLowRank]:
    """Replace every `nn.Linear` that has factors by a sparse plus low-rank layer; by weight name."""
    made = {}
    for site in sites:
        removal = removals[site.name]
        dense = not Option.of(removal.form, None).patterned
        for name, (left, right) in removal.factors.items():
            layer = small.get_submodule(owner(name))
            if type(layer) is not nn.Linear:  # Conv1D stores [in, out] and is not trained
                continue
            rest = lowrank.apart(layer.weight, left, right)
            mask = torch.zeros_like(rest, dtype=torch.bool) if dense else rest != 0
            parts = sltrain_layers.from_parts(rest, mask, left, right, layer.bias)
            if parts.bias is not None:
                parts.bias.requires_grad_(name == site.writer)
            small.set_submodule(owner(name), parts)
            made[name] = parts
    return made


def _removal(site: Site, removal: Removal, layers: Mapping[str, SparseLowRank]) -> Removal:
    """The removal with the trained values of its layers."""
    factors, readers = dict(removal.factors), dict(removal.readers)
    weight, bias = removal.weight, removal.bias
    for name in removal.factors:
        layer = layers.get(name)
        if layer is None:
            continue
        factors[name] = (layer.left.detach(), layer.right.detach())
        value = copy.deepcopy(layer).double().merged().weight.detach().to(layer.left.dtype)
        if name == site.writer:
            weight, bias = value, None if layer.bias is None else layer.bias.detach()
        else:
            readers[name] = value
    return replace(removal, weight=weight, bias=bias, readers=readers, factors=factors)
