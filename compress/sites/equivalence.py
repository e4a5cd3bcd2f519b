"""Checks every site on a copy: the smallest module around it must compute the same masked and shrunk.

The check also finds what the traced program does not contain: which integer attributes of the modules
(`num_heads`, `split_size`, ...) must follow the units for the shrunk module to run, which module can be
replaced when no unit is left, and which columns may change their order. The copy has random weights, so
that neither zero biases nor the tiny weights of a fresh model hide a mistake.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.ir import Count, Drop, Site, Slice
from compress.sites import permutation, prune
from compress.sites.kinds import kind_of
from compress.sites.trace import plain_attention

TOLERANCE = 1e-4  # float32 sums in another order, for outputs near 1
PLACE = "place"
DIFFER = "the outputs differ"
MAX_ATTEMPTS = 120
MAX_UNITS_TRIED = 16  # each is zero for an input with a probability of a half or less


@dataclass(frozen=True)
class Call:
    """What a module was called with when the model ran on the example."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


class NotEquivalentError(Exception):
    """Why the shrunk module does not compute what the masked one does."""


class _Holder(nn.Module):
    """Gives the checked module a parent, so that it can be replaced itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.place = module


def verify(module: nn.Module, call: Call, site: Site) -> Site:
    """`site` with its counts, drop and channels, found by trying them; its names are relative to `module`.

    Raises:
        NotEquivalentError: no setting makes the shrunk module agree with the masked one.
    """
    check = _EquivalenceCheck(module, call)
    inner = with_prefix(site, "", f"{PLACE}.")
    inner = inner.model_copy(update={"counts": check.counts(inner)})
    inner = inner.model_copy(update={"drop": check.drop(inner), "channels": check.channels(inner)})
    return with_prefix(inner, f"{PLACE}.", "")


def with_prefix(site: Site, old: str, new: str) -> Site:
    """`site` with the prefix `old` of all names replaced by `new`; both are empty or end in a dot."""

    def rename(name: str) -> str:
        return f"{new}{f'{name}.'.removeprefix(old)}".rstrip(".")

    drop = site.drop
    return site.model_copy(
        update={
            "slices": tuple(s.model_copy(update={"tensor": rename(s.tensor)}) for s in site.slices),
            "channels": tuple(s.model_copy(update={"tensor": rename(s.tensor)}) for s in site.channels),
            "counts": tuple(c.model_copy(update={"module": rename(c.module)}) for c in site.counts),
            "matmuls": tuple(m.model_copy(update={"weight": rename(m.weight)}) for m in site.matmuls),
            "writer": rename(site.writer),
            "bias": None if site.bias is None else rename(site.bias),
            "drop": drop and drop.model_copy(update={"module": rename(drop.module)}),
        }
    )


def common_module(names: Sequence[str]) -> str:
    """The innermost module that holds all tensors `names`.

    >>> common_module(["a.self.query.weight", "a.output.dense.weight"])
    'a'
    """
    paths = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
    return ".".join(steps[0] for steps in same)


class _EquivalenceCheck:
    """One module, copied, with random weights, and its output on a recorded call."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.call = call
        self.holder = _Holder(copy.deepcopy(module)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in self.holder.parameters():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
                if value.ndim < 2:
                    value.add_(0.1 * noise.to(value))
                else:
                    value.copy_(noise / (value.numel() / value.shape[0]) ** 0.5)
        self.dense = self.run(self.holder)

    def run(self, holder: nn.Module) -> object:
        """The output of the module for the recorded call."""
        with torch.no_grad(), plain_attention():
            return holder.get_submodule(PLACE)(*self.call.args, **self.call.kwargs)

    def counts(self, site: Site) -> tuple[Count, ...]:
        """The smallest set of attributes that must follow the units."""
        keeps = [self.all_but_one(site), [site.units - 1]]
        masked = [self.run(self.masked(site, kept)) for kept in keeps]
        if any(agree(output, self.dense) for output in masked):
            raise NotEquivalentError("removing units does not change the output of the module")
        first = ""
        for counts in itertools.islice(_attempts(self.holder, site), MAX_ATTEMPTS):
            reason = self.shrunk(site, counts, keeps, masked)
            # Outputs that differ are a better reason than errors of attempts that did not run.
            first = DIFFER if DIFFER in (reason, first) else first or reason
            if not reason:
                for count in counts:  # Drop every one that is not needed.
                    fewer = tuple(c for c in counts if c != count)
                    if not self.shrunk(site, fewer, keeps, masked):
                        counts = fewer
                return counts
        raise NotEquivalentError(f"the shrunk module does not compute what the masked one does: {first}")

    def all_but_one(self, site: Site) -> list[int]:
        """All units but one whose removal changes the output.

        The middle one is tried first; behind a ReLU it may be zero for the one input that was recorded.
        """
        middle = site.units // 2
        for unit in [*range(middle, site.units), *range(middle)][:MAX_UNITS_TRIED]:
            kept = [other for other in range(site.units) if other != unit]
            if not agree(self.run(self.masked(site, kept)), self.dense):
                return kept
        raise NotEquivalentError("removing units does not change the output of the module")

    def masked(self, site: Site, kept: Sequence[int]) -> nn.Module:
        """The copy without all but the `kept` units, at full shape."""
        removal = prune.Removal(torch.tensor(kept, dtype=torch.int64))
        try:
            return prune.mask(self.holder, [site], {site.name: removal})
        except CompressError as error:
            raise NotEquivalentError(str(error)) from error

    def shrunk(
        self, site: Site, counts: tuple[Count, ...], keeps: list[list[int]], masked: list[object]
    ) -> str:
        """What is wrong with the shrunk copies; empty when nothing is."""
        site = site.model_copy(update={"counts": counts})
        for kept, expected in zip(keeps, masked, strict=True):
            removal = prune.Removal(torch.tensor(kept, dtype=torch.int64))
            try:
                output = self.run(prune.shrink(self.holder, [site], {site.name: removal}))
            except Exception as error:
                # Any code may run here, so any error may come out; all mean "not this way".
                return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if not agree(output, expected):
                return DIFFER
        return ""

    def drop(self, site: Site) -> Drop | None:
        """The replacement for a site without units that gives what the masked module gives."""
        producers = [s.tensor for s in site.slices if s.tensor != site.writer]
        expected = self.run(self.masked(site, []))
        for module, writer in ((PLACE, True), (common_module(producers), False)):
            form = self.form(module)
            if form is None or f"{site.writer}.".startswith(f"{module}.") != writer:
                continue
            drop = Drop(module=module, writer=writer, output=form[0], outputs=form[1])
            given = site.model_copy(update={"drop": drop})
            if not self.shrunk(given, given.counts, [[]], [expected]):
                return drop
        return None

    def channels(self, site: Site) -> tuple[Slice, ...]:
        """The slices that may change their order with the writer's columns; none if no set of them may."""
        everything = torch.arange(site.units)
        weight = prune.writer_columns(self.holder, site)
        columns = permutation.random_order(site)
        for parts in kind_of(site).channel_sets(site):
            given = site.model_copy(update={"channels": parts})
            try:
                follow = permutation.permute_readers(self.holder, given, everything, columns, {})
                removal = prune.Removal(everything, weight[:, columns], readers=follow)
                output = self.run(prune.mask(self.holder, [given], {site.name: removal}))
            except Exception:
                continue  # a buffer, or a module that does not run with it: this set cannot be reordered
            if agree(output, self.dense):
                return parts
        return ()

    def form(self, name: str) -> tuple[int | None, int] | None:
        """Where the one tensor is in what a module returns; None when that is not so simple."""
        seen: list[object] = []
        hook = self.holder.get_submodule(name).register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        try:
            self.run(self.holder)
        finally:
            hook.remove()
        if len(seen) != 1:
            return None
        if isinstance(seen[0], Tensor):
            return None, 1
        if not isinstance(seen[0], tuple) or hasattr(seen[0], "_fields"):
            return None
        places = [i for i, value in enumerate(seen[0]) if value is not None]
        if len(places) != 1 or not isinstance(seen[0][places[0]], Tensor):
            return None
        return places[0], len(seen[0])


def _attempts(holder: nn.Module, site: Site) -> Iterator[tuple[Count, ...]]:
    """Sets of attributes to try, from none on; every value is a multiple of the units."""
    widths = {s.width for s in site.slices}
    per_tensor: dict[str, int] = {}
    for part in site.slices:
        per_tensor[part.tensor] = per_tensor.get(part.tensor, 0) + part.width
    heads = {1, site.queries}
    features = widths | set(per_tensor.values()) | {site.head_dim, site.head_dim * site.queries}
    groups: dict[tuple[bool, bool], list[Count]] = {}
    for name, module in holder.named_modules():
        if name and not isinstance(module, nn.Linear):
            for attribute, value in _integers(module):
                per_unit, rest = divmod(value, site.units)
                if rest == 0 and per_unit in heads | features:
                    count = Count(module=name, attribute=attribute, per_unit=per_unit)
                    groups.setdefault(("." in attribute, per_unit in heads), []).append(count)
    own, wide = groups.get((False, True), []), groups.get((False, False), [])
    shared, far = groups.get((True, True), []), groups.get((True, False), [])
    yield ()
    yield from ((*own,), (*own, *wide), (*own, *shared), (*own, *wide, *shared))
    yield (*own, *wide, *shared, *far)
    everything = [*own, *wide, *shared, *far]
    for size in (1, 2, 3):
        yield from itertools.combinations(everything, size)


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Integer attributes of a module, and of the configuration it holds."""
    for attribute, value in vars(module).items():
        if type(value) is int and value > 0:
            yield attribute, value
    config = getattr(module, "config", None)
    for attribute, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if type(value) is int and value > 0 and not attribute.startswith("_"):
            yield f"config.{attribute}", value


def agree(output: object, expected: object) -> bool:
    """Whether all tensors of two outputs agree; those of different shapes (attention maps) are left out."""
    pairs = list(itertools.zip_longest(_tensors(output), _tensors(expected)))
    same = [(a, b) for a, b in pairs if a is not None and b is not None and a.shape == b.shape]
    return (
        bool(same)
        and all(a is not None and b is not None for a, b in pairs)
        and all(float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(b.abs().max())) for a, b in same)
    )


def distance(output: object, expected: object) -> float:
    """The largest difference of two outputs of the same shapes, relative to the tensor's largest value."""
    pairs = zip(_tensors(output), _tensors(expected), strict=True)
    return max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
