"""Finds the independent units of a region of the traced program, by which values depend on which.

A region maps features of its producers to input columns of its writer. NaN spreads along every dependency
and along nothing else, so NaN in some rows marks the columns that depend on them. Rows and columns that
depend on each other belong to one *unit*: an attention head, a group of query heads that share a key, a
neuron with its gate. Gradients give the rows of the first unit; the others are assumed to follow at equal
distances, and that is checked: in each of 2 log2(units) runs the units with one bit of their number set
are filled with NaN, and exactly their columns must become NaN. Views, splits, rotations, norms and
repeats need no rules of their own, since the region is run as it is.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.sites.kinds.layout import Layout, Run
from compress.sites.trace import Linear, Program, Region, evaluate

# Any two of these differ by more than 1e-4 somewhere in [-6, 6].
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}
ACTIVATION_TOLERANCE = 2e-5  # float32 rounding of values up to 6; gelu and gelu_tanh differ by 4e-4


class NotASiteError(Exception):
    """Why a region is no site."""


def find_layout(program: Program, region: Region) -> Layout:
    """The units of `region`.

    Raises:
        RefusedError: it does not fall into equal units that can be removed one by one.
    """
    probe = _Dependencies(program, region)
    rows, columns = probe.first_unit()
    width = int(columns.sum())
    if width == probe.columns:
        raise NotASiteError("every input of the writer depends on every output before it")
    if probe.columns % width or not bool(columns[:width].all()):
        raise NotASiteError(f"the first unit owns {width} of {probe.columns} columns, not in one piece")
    units = probe.columns // width
    runs = _runs(region.producers, rows, units)
    runs += probe.tied(units, width)
    probe.prove(runs, units, width)
    node = region.attention
    shape = (0, 0) if node is None else tuple(node.meta["val"].shape[-2:])
    activation, gated = ("", False) if node is not None else probe.activation(runs, units)
    return Layout(
        units=units, width=width, runs=tuple(runs), attention=node is not None,
        head_dim=shape[1] if shape[1] and width % shape[1] == 0 else (width if node else 0),
        tokens=shape[0], causal=node is not None and probe.causal(shape[0]),
        activation=activation, gated=gated,
    )  # fmt: skip


def structure_key(region: Region) -> str:
    """Equal for regions that compute the same: operations, constants and shapes, no parameter names."""
    producers = [producer.node for producer in region.producers]
    order = {node: place for place, node in enumerate((*producers, *region.outside, *region.nodes))}
    lines = [str((p.out, p.rows, p.bias is None)) for p in region.producers]
    for node in region.outside:
        # A mask or a table of angles may differ between two places that look alike.
        lines.append(_shape(node) + ("" if node.op == "placeholder" else node.name))
    for node in region.nodes:
        arguments = map_arg((node.args, node.kwargs), lambda n: f"%{order[n]}")
        lines.append(f"{node.target}{arguments}{_shape(node)}")
    return "\n".join([*lines, f"{order.get(region.writer.input)} {region.writer.inner}"])


def _shape(node: Node) -> str:
    return str(getattr(node.meta.get("val"), "shape", ""))


def _runs(producers: Sequence[Linear], rows: Sequence[Tensor], units: int) -> list[Run]:
    """Runs of the first unit's rows, continued to all units; they must fill every producer."""
    runs: list[Run] = []
    for place, (producer, own) in enumerate(zip(producers, rows, strict=True)):
        edges = torch.diff(own.int(), prepend=torch.zeros(1), append=torch.zeros(1))
        starts, ends = (edges > 0).nonzero().flatten(), (edges < 0).nonzero().flatten()
        found = [Run(place, s, e - s) for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]
        position = 0
        for run in found:
            if run.start != position:
                raise NotASiteError(f"rows {position} to {run.start} of {producer.weight} fit no unit")
            position += units * run.width
        if position != producer.out:
            raise NotASiteError(f"{units} units own {position} of {producer.out} rows of {producer.weight}")
        runs += found
    return runs


class _Dependencies:
    """Runs one region on random values."""

    def __init__(self, program: Program, region: Region) -> None:
        self.program, self.region = program, region
        self.columns = region.writer.inner
        self.generator = torch.Generator().manual_seed(0)
        self.outside: dict[Node, object] = {n: program.value(n) for n in region.outside}
        # Positive values keep every relu open, values near 1 keep every softmax soft.
        traced = [producer.node.meta["val"] for producer in region.producers]
        self.values = [0.5 + torch.rand(tuple(v.shape), generator=self.generator).to(v.dtype) for v in traced]

    def run(self, values: Sequence[Tensor], changed: dict[Node, object] | None = None) -> Tensor:
        """The writer's input, [rows, columns]."""
        known = {**self.outside, **(changed or {})}
        # Copies, because an operation in the region may overwrite its input.
        known |= {p.node: v.clone() for p, v in zip(self.region.producers, values, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            for node in self.region.nodes:
                known[node] = evaluate(node, known, self.program.module)
        result = known[self.region.writer.input]
        assert isinstance(result, Tensor)
        return result.reshape(-1, self.columns)

    def reached(self, values: Sequence[Tensor], changed: dict[Node, object] | None = None) -> Tensor:
        """[columns] bool: which columns hold not-a-number in some row."""
        with torch.no_grad():
            return self.run(values, changed).isnan().any(dim=0)

    def with_nan_rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The producers' values with not-a-number in the features that `rows` mark."""
        return [v.masked_fill(own, math.nan) for v, own in zip(self.values, rows, strict=True)]

    def first_unit(self) -> tuple[list[Tensor], Tensor]:
        """Rows of each producer, and columns, that hang together with column 0."""
        with torch.enable_grad():
            leaves = [value.clone().requires_grad_() for value in self.values]
            result = self.run(leaves)
        columns = torch.zeros(self.columns, dtype=torch.bool)
        columns[0] = True
        rows: list[Tensor] = []
        for _ in range(4):
            weights = torch.rand(result.shape, generator=self.generator) * columns
            slopes = torch.autograd.grad(
                result, leaves, grad_outputs=weights, retain_graph=True, allow_unused=True
            )
            rows = [
                torch.zeros(leaf.shape[-1], dtype=torch.bool)
                if slope is None
                else (slope != 0).flatten(0, -2).any(dim=0)
                for leaf, slope in zip(leaves, slopes, strict=True)
            ]
            reached = columns | self.reached(self.with_nan_rows(rows))
            if torch.equal(reached, columns):
                break
            columns = reached
        return rows, columns

    def prove(self, runs: Sequence[Run], units: int, width: int) -> None:
        """Refuse unless unit u's rows reach unit u's columns and no others, for every u."""
        numbers = torch.arange(units)
        for bit in range((units - 1).bit_length()):
            for value in (0, 1):
                chosen = (numbers >> bit & 1) == value
                rows = [torch.zeros(p.out, dtype=torch.bool) for p in self.region.producers]
                changed: dict[Node, object] = {}
                for run in runs:
                    span = slice(run.start, run.start + units * run.width)
                    marked = chosen.repeat_interleave(run.width)
                    if run.outside:
                        node = self.region.outside[run.place]
                        changed[node] = _with_nan(self.outside[node], run.dim, marked)
                    else:
                        rows[run.place][span] = marked
                reached = self.reached(self.with_nan_rows(rows), changed)
                if not torch.equal(reached, chosen.repeat_interleave(width)):
                    raise NotASiteError(f"{units} equal units were tried, but they are not independent")

    def tied(self, units: int, width: int) -> list[Run]:
        """Runs of stored tensors from outside that hold something for each unit.

        Refuses when a value from outside does so and is not a stored tensor of this region alone: it
        would have to shrink too, and nothing here could make it.
        """
        runs: list[Run] = []
        for place, node in enumerate(self.region.outside):
            value = self.outside[node]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            for dim in range(value.ndim):
                length = value.shape[dim]
                if length == 1 or not self._is_tied(node, value, dim, units, width):
                    continue
                alone = all(user in self.region.nodes or not user.users for user in node.users)
                if node not in self.program.names or not alone or length % units:
                    origin = self.program.stored_behind(node)
                    raise NotASiteError(
                        f"a value made from {', '.join(origin) or 'constants'} holds one part for each "
                        f"of the {units} units and is also used outside of this place"
                    )
                runs.append(Run(place, 0, length // units, True, dim))
        return runs

    def _is_tied(self, node: Node, value: Tensor, dim: int, units: int, width: int) -> bool:
        marked = torch.arange(value.shape[dim]) == 0
        reached = self.reached(self.values, {node: _with_nan(value, dim, marked)})
        touched = reached.reshape(units, width).any(dim=1)
        return bool(touched.any()) and not bool(touched.all())

    def causal(self, tokens: int) -> bool:
        """Whether the last token is seen by itself alone."""
        if tokens < 2:
            return False
        other = []
        for value in self.values:
            if value.numel() // value.shape[-1] % tokens:
                return False
            moved = value.reshape(-1, tokens, value.shape[-1]).clone()
            moved[:, -1] += torch.rand(moved[:, -1].shape, generator=self.generator)
            other.append(moved.reshape(value.shape))
        with torch.no_grad():
            before, after = (
                self.run(values).reshape(-1, tokens, self.columns)[:, :-1] for values in (self.values, other)
            )
        return torch.equal(before, after)

    def activation(self, runs: Sequence[Run], units: int) -> tuple[str, bool]:
        """Name of the function between two layers, and whether a second run multiplies it."""
        if any(run.width != 1 or run.outside for run in runs):
            return "other", len(runs) > 1
        # Each run in turn takes every value while the others stay put.
        for moving in runs:
            values = [value.clone() for value in self.values]
            part = values[moving.place][..., moving.start : moving.start + units]
            part.copy_(torch.linspace(-6, 6, part.numel()).reshape(part.shape))
            with torch.no_grad():
                result = self.run(values)
            inputs = [values[r.place][..., r.start : r.start + units].reshape(-1) for r in runs]
            name = identify_activation(inputs, result.flatten())
            if name != "other":
                break
        return name, len(runs) > 1


def identify_activation(inputs: Sequence[Tensor], output: Tensor) -> str:
    """The function f with `output = f(inputs[0])`, or `f(one input) * other input`; else "other".

    >>> x = torch.linspace(-2, 2, 9)
    >>> identify_activation([x, x + 1], (x + 1) * torch.relu(x))
    'relu'
    """
    if len(inputs) > 2 or any(x.shape != output.shape for x in inputs):
        return "other"
    for x, factor in ((inputs[0], inputs[-1]), (inputs[-1], inputs[0])):
        for name, function in ACTIVATIONS.items():
            expected = function(x) if len(inputs) == 1 else function(x) * factor
            if torch.allclose(expected, output, rtol=1e-5, atol=ACTIVATION_TOLERANCE):
                return name
    return "other"


def _with_nan(value: object, dim: int, marked: Tensor) -> Tensor:
    """`value` with not-a-number at the marked indices of `dim`."""
    assert isinstance(value, Tensor)
    return value.movedim(dim, -1).masked_fill(marked, math.nan).movedim(-1, dim)
