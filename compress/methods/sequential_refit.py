"""Refit the writers of a selected plan in model order, on the inputs that the compressed model gives them.

The stored candidates are fitted to inputs of the dense model. Once the plan is fixed, the sites before a site
are compressed too and change its inputs. Each writer is therefore refitted in model order by least squares,
so that it reproduces the dense model's output from the compressed model's input (sequential statistics). Only
weights change, so neither the plan nor its latency does.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.activation_statistics import real_rows
from compress.core import obs
from compress.ir import Site
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.loading import Batch

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _ReachedError(Exception):
    """Raised by a hook to end a forward pass at the requested module."""


def refit(
    model: nn.Module,
    sites: Sequence[Site],
    removals: Mapping[str, Removal],
    batches: Sequence[Batch],
    *,
    damping: float,
    memory_mb: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Removal]:
    """The same removals with writers refitted to inputs from the already compressed sites.

    Args:
        model: the dense model, not changed.
        sites: in the order in which the model runs them.
        removals: those of the plan, by site name; sites without one stay dense.
        batches: calibration inputs; padding is excluded.
        damping: ridge toward the stored solution, relative to each diagonal entry.
        memory_mb: limit for the outputs of the dense model held at a time.
        progress: called with sites done and the number of sites.
    """
    compressed = prune.mask(model, sites, {})
    fitted = [
        site.writer
        for site in sites
        if site.name in removals and len(removals[site.name].kept) and removals[site.name].form == "dense"
    ]
    goals = _Goals(model, fitted, batches, memory_mb * 1e6)
    prefix = _Prefix(compressed, fitted, batches)
    result: dict[str, Removal] = {}
    for done, site in enumerate(sites, 1):
        removal = removals.get(site.name)
        if removal is not None:
            if site.writer in fitted:  # not sparse or quantized ones, whose zeros and codes must stay
                removal = _refit_site(goals, prefix, site, removal, damping)
            prune.write_weights(compressed, site, removal)
            result[site.name] = removal
        if progress is not None:
            progress(done, len(sites))
    return result


class _Goals:
    """Outputs of the dense model's writers, for as many writers at a time as fit in memory."""

    def __init__(
        self, model: nn.Module, writers: Sequence[str], batches: Sequence[Batch], room: float
    ) -> None:
        self.model = model
        self.writers = list(writers)
        self.batches = batches
        self.room = room
        self.held: dict[str, list[Tensor]] = {}

    def of(self, writer: str) -> list[Tensor]:
        """Rows without padding [rows, out] of every batch; call once per writer, in model order."""
        if writer not in self.held:
            self._collect(self.writers[self.writers.index(writer) :])
        return self.held.pop(writer)

    def _collect(self, wanted: list[str]) -> None:
        """One pass over the data for `wanted`; the last ones are dropped if memory runs out."""
        self.held = {name: [] for name in wanted}
        for batch in self.batches:
            modules = [name.rpartition(".")[0] for name in self.held]
            for name, values in zip(self.held, _outputs(self.model, modules, batch), strict=True):
                self.held[name].append(real_rows(values, batch))
            while len(self.held) > 1 and self._bytes() > self.room:
                self.held.popitem()

    def _bytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for kept in self.held.values() for rows in kept)


class _Prefix:
    """Inputs of the compressed model's writers, without running earlier blocks again.

    If the output of each block in a module list is the input of the next one, a pass can start at any block
    from its stored calls. This is checked on the first batch at every block; if it does not hold, the pass
    starts from the inputs of the model.
    """

    def __init__(self, model: nn.Module, writers: Sequence[str], batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = batches
        self.place = _list_of_blocks(model, writers)
        self.number = -1
        self.calls: list[Call] = []

    def of(self, writer: str) -> Iterator[Tensor]:
        """Rows without padding [rows, in] of every batch; call in model order."""
        name = writer.rpartition(".")[0]
        if self.place is not None:
            self._advance(int(writer.removeprefix(f"{self.place}.").partition(".")[0]))
        if self.place is None or not _repeatable(self.calls[0]):
            found = (_call_of(self.model, name, batch) for batch in self.batches)
        else:
            block = self.model.get_submodule(f"{self.place}.{self.number}")
            inner = name.removeprefix(f"{self.place}.{self.number}.")
            found = (_halted(block, inner, *call) for call in self.calls)
        for batch, (arguments, _) in zip(self.batches, found, strict=True):
            yield real_rows(arguments[0], batch)

    def _advance(self, number: int) -> None:
        """Compute the calls of block `number`."""
        if self.number == number:
            return
        if self.calls and _repeatable(self.calls[0]):
            for before in range(self.number, number):
                block = self.model.get_submodule(f"{self.place}.{before}")
                with torch.inference_mode():
                    self.calls = [_next_call(block, *call) for call in self.calls]
        name = f"{self.place}.{number}"
        first = _call_of(self.model, name, self.batches[0])
        if not self.calls or not _same(self.calls[0], first):
            self.calls = [first]
            if _repeatable(first):
                self.calls += [_call_of(self.model, name, batch) for batch in self.batches[1:]]
        self.number = number


def _refit_site(goals: _Goals, prefix: _Prefix, site: Site, removal: Removal, damping: float) -> Removal:
    """Refit one writer: least squares from the compressed model's inputs to the dense outputs."""
    width = site.column.width
    columns = (removal.kept[:, None] * width + torch.arange(width)).reshape(-1)
    count, sum_x, sum_y = 0, torch.zeros(0), torch.zeros(0)
    second, cross = torch.zeros(0), torch.zeros(0)
    for goal, seen in zip(goals.of(site.writer), prefix.of(site.writer), strict=True):
        y, x = goal.double(), seen[:, columns].double()
        if not count:
            sum_x, sum_y = x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1])
            second, cross = x.new_zeros(x.shape[1], x.shape[1]), y.new_zeros(y.shape[1], x.shape[1])
        count += len(x)
        sum_x += x.sum(0)
        sum_y += y.sum(0)
        second += x.T @ x
        cross += y.T @ x
    if removal.weight is None:
        return removal
    weight, bias = obs.refit(
        second / count, cross / count, sum_x / count, sum_y / count, removal.weight, damping
    )
    return Removal(kept=removal.kept, weight=weight.float(), bias=bias.float())


def _call_of(model: nn.Module, name: str, batch: Batch) -> Call:
    """The arguments of the module `name` for a batch; the forward pass ends there."""
    return _halted(model, name, (), dict(batch.inputs))


def _halted(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The arguments of the module `name` in a call of `model`; the forward pass ends there."""
    caught: list[Call] = []

    def before(_: nn.Module, inner: tuple[Any, ...], words: dict[str, Any]) -> None:
        caught.append((inner, words))
        raise _ReachedError

    hook = model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
    try:
        with contextlib.suppress(_ReachedError), torch.inference_mode():
            model(*args, **kwargs)
    finally:
        hook.remove()
    return caught[0]


def _next_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call of the next block, if it takes this block's output as its hidden state."""
    answer = block(*args, **kwargs)
    hidden = answer[0] if isinstance(answer, tuple) else answer
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _list_of_blocks(model: nn.Module, writers: Sequence[str]) -> str | None:
    """The name of the module list that contains all writers, else None."""
    for name, module in model.named_modules():
        inside = all(
            writer.startswith(f"{name}.") and writer.removeprefix(f"{name}.").count(".") > 1
            for writer in writers
        )
        if isinstance(module, nn.ModuleList) and writers and inside:
            return str(name)
    return None


def _repeatable(call: Call) -> bool:
    """Whether a call can be repeated: a key-value cache among its arguments would grow."""
    plain = (Tensor, bool, int, float, str, type(None))
    values = [*call[0], *call[1].values()]
    flat = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    return all(isinstance(one, plain) for one in flat)


def _same(one: Call, other: Call) -> bool:
    """Whether two calls have bit-identical arguments."""

    def equal(left: object, right: object) -> bool:
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return torch.equal(left, right)
        if isinstance(left, tuple) and isinstance(right, tuple):
            return len(left) == len(right) and all(map(equal, left, right))
        return type(left) is type(right) and left == right

    return (
        equal(one[0], other[0])
        and one[1].keys() == other[1].keys()
        and all(equal(value, other[1][name]) for name, value in one[1].items())
    )


def _outputs(model: nn.Module, names: Sequence[str], batch: Batch) -> list[Tensor]:
    """The outputs of the modules `names`, in their order; the forward pass ends at the last of them."""
    caught: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(_: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> None:
            caught[name] = result
            if len(caught) == len(names):
                raise _ReachedError

        return after

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with contextlib.suppress(_ReachedError), torch.inference_mode():
            model(**batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[name] for name in names]
