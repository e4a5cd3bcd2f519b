"""Where a student's numbers are while it is tuned: all of them in every process, or a part of each in each.

`Replica` is a model that is whole everywhere; its gradients are added up. `Shards` cuts every parameter
along its first dimension among the processes (FSDP2): a layer's weights come together right before they
are needed and go apart right after, gradients arrive as the sum of this process's rows, and so moments and
best weights exist for these rows alone. Both give `values`, the tensors that an optimizer moves, by name.

Reference: Zhao et al., "PyTorch FSDP", arXiv 2304.11277.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from compress.distributed import collectives


class Replicated:
    """A student that every process holds whole; `model` is the one that learns."""

    apart = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values = {name: value for name, value in model.named_parameters() if value.requires_grad}

    @property
    def weight_bytes(self) -> int:
        """What this process holds of the model's parameters."""
        return sum(value.nbytes for value in self.model.parameters())

    def add_up(self) -> None:
        """Give the values the gradients of the whole batch."""
        collectives.all_reduce_gradients(list(self.values.values()))

    def norm(self) -> Tensor:
        """The norm of all gradients as one vector."""
        return nn.utils.get_total_norm([one.grad for one in self.values.values() if one.grad is not None])

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What belongs to this process of a tensor that is about the parameter `name`."""
        return whole

    def shapes(self, parts: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Type and shape of every tensor that `wholes` gives."""
        return {key: (part.dtype, list(part.shape)) for key, part in parts.items()}

    def wholes(self, parts: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """One tensor after the other, whole; every process asks for the same ones.

        Args:
            parts: named by a word, a dot and the name of the parameter that it is about.
        """
        yield from parts.values()

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """For a while the first process's model, the one that `held` was given, is whole and plain."""
        yield

    def release(self) -> None:
        """Leave the model whole and plain in every process."""


class Sharded(Replicated):
    """A student of which every process holds some rows of each parameter.

    What learns is a copy. The model itself keeps its parameters without their contents, and is filled for
    the time that it is lent, and at the end. Scalars are held by every process.
    """

    apart = True

    def __init__(self, model: nn.Module) -> None:
        self._shell = model
        self.model = _copy_parameters(model)
        scalars = {value for value in self.model.parameters() if value.ndim == 0}
        mesh = init_device_mesh("cpu", (collectives.size(),))
        for module in (*layers(self.model), self.model):
            _shard(module, mesh=mesh, ignored_params=scalars)
        self._all = dict(self.model.named_parameters())
        self.values = {
            name: nn.Parameter(_local_rows(value)) if isinstance(value, DTensor) else value
            for name, value in self._all.items()
            if value.requires_grad
        }
        self._empty()

    @property
    def weight_bytes(self) -> int:
        """What this process holds of the model's parameters."""
        return sum(_local_rows(value).nbytes for value in self._all.values())

    def add_up(self) -> None:
        """Hand the sums that the backward pass left on to the values."""
        whole = []
        for name, value in self.values.items():
            source = self._all[name]
            if not isinstance(source, DTensor):
                whole.append(value)
            elif source.grad is not None:
                value.grad, source.grad = _local_rows(source.grad), None
        collectives.all_reduce_gradients(whole)

    def norm(self) -> Tensor:
        """The norm of all gradients as one vector, from the squares of all processes."""
        total = torch.zeros((), dtype=torch.float64)
        for name, value in self.values.items():
            if value.grad is not None and (isinstance(self._all[name], DTensor) or not collectives.rank()):
                total += value.grad.square().sum()
        collectives.all_reduce([total])
        return total.sqrt()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's rows; a tensor that is not shaped like the parameter stays."""
        source = self._all[name]
        if not isinstance(source, DTensor) or whole.shape != source.shape:
            return whole
        return whole[rows(len(whole))].clone()

    def shapes(self, parts: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Type and shape of every tensor that `wholes` gives."""
        return {key: (part.dtype, list(self._shape(key, part))) for key, part in parts.items()}

    def wholes(self, parts: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """One tensor after the other in every process, so that no two are whole at once."""
        for key, part in parts.items():
            yield _gather_rows(part, self._shape(key, part)) if self._cut(key, part) else part

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """For a while the first process's model is whole and plain."""
        self._fill(everywhere=False)
        try:
            yield
        finally:
            self._empty()

    def release(self) -> None:
        """Leave the model whole and plain in every process."""
        self._fill(everywhere=True)

    def _cut(self, key: str, part: Tensor) -> bool:
        return part.ndim > 0 and isinstance(self._all[_parameter_name(key)], DTensor)

    def _shape(self, key: str, part: Tensor) -> torch.Size:
        return self._all[_parameter_name(key)].shape if self._cut(key, part) else part.shape

    @torch.no_grad()
    def _fill(self, *, everywhere: bool) -> None:
        parts = {f"now.{name}": _local_rows(value) for name, value in self._all.items()}
        for value, whole in zip(self._shell.parameters(), self.wholes(parts), strict=True):
            if everywhere or not collectives.rank():
                value.data = whole.detach().clone()

    def _empty(self) -> None:
        for value in self._shell.parameters():
            value.data = value.new_empty(0)


def place_student(model: nn.Module, *, shard: bool) -> Replicated:
    """A student among the processes: in shards where that is asked for and there are several."""
    return Sharded(model) if shard and collectives.size() > 1 else Replicated(model)


def rows(count: int) -> slice:
    """Which of `count` rows are this process's: equal runs of them, the last ones shorter or empty."""
    each = -(-count // collectives.size())
    start = min(collectives.rank() * each, count)
    return slice(start, min(start + each, count))


def layers(model: nn.Module) -> list[nn.Module]:
    """What comes together at once: the entries of lists of modules that share no parameter with others."""
    found = list(_entries(model))
    owners: dict[Tensor, set[int]] = {}
    for number, layer in enumerate(found):
        for value in layer.parameters():
            owners.setdefault(value, set()).add(number)
    inside = {id(module) for layer in found for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for value in module.parameters(recurse=False):
                owners.setdefault(value, set()).add(-1)
    return [
        layer
        for layer in found
        if all(len(owners[value]) == 1 for value in layer.parameters())
        and any(value.ndim for value in layer.parameters())
    ]


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost entries of lists, those that are computed as one."""
    for child in module.children():
        lists = (nn.ModuleList, nn.Sequential)
        if isinstance(module, lists) and not isinstance(child, (*lists, nn.ModuleDict)):
            yield child
        else:
            yield from _entries(child)


def _copy_parameters(model: nn.Module) -> nn.Module:
    """A copy whose parameters are others with the same contents, in the same memory."""
    memo: dict[int, Any] = {}
    for value in model.parameters():
        memo[id(value)] = nn.Parameter(value.detach().contiguous(), requires_grad=value.requires_grad)
    for module in model.modules():
        replaced = getattr(module, "original", None)  # the layer before it learned in a form
        if replaced is not None:
            memo[id(replaced)] = replaced
    return copy.deepcopy(model, memo)


def _shard(module: nn.Module, **how: Any) -> None:
    # Apart after each forward pass, the root too: one without a backward pass must not leave old weights.
    sharded = fully_shard(module, reshard_after_forward=True, **how)
    # Losses are weighed by each process's share already, so gradients are sums.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    if any(isinstance(value, DTensor) for value in module.parameters()):
        sharded.set_custom_all_gather(cast(Any, _Gather()))
        sharded.set_custom_reduce_scatter(cast(Any, _Scatter()))


class _Exchange:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Exchange):
    """Weights come together; an error in another process is told instead of waited for."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **_: object) -> None:
        collectives.all_gather(output_tensor, input_tensor)


class _Scatter(_Exchange):
    """Gradients are added up and go apart; an error in another process is told."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **_: object) -> None:
        collectives.reduce_scatter(output_tensor, input_tensor)


def _local_rows(value: Tensor) -> Tensor:
    """The rows that are here, in the memory where they are."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def _gather_rows(part: Tensor, shape: Iterable[int]) -> Tensor:
    whole = part.new_zeros(*shape)
    whole[rows(len(whole))] = part
    collectives.all_reduce([whole])
    return whole


def _parameter_name(key: str) -> str:
    return key.partition(".")[2]
