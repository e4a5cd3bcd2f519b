"""Block-sparse products in standard ONNX operators, in the layouts that are fast in stock onnxruntime.

A weight is [out, in] and cut into blocks of `rows` outputs by `columns` inputs; the outputs of one row of
blocks are a *group*. What is not stored is not computed: every group multiplies only the inputs that its
kept blocks read. Picking those inputs is the price, paid once for all outputs of a group, so tall blocks
are cheap and flat ones are not. Which layout is fastest depends on the shape and is measured (see `layouts`):

    concat    cut x into pieces by column, join those of a group, one Gemm a group
    gather    pick the pieces of a group with a Gather, one Gemm a group
    sum       one Gemm a block, added up through its third operand
    batched   turn x, gather the blocks of all groups at once, one MatMul of [groups, ...], turn back
    conv      the same with one grouped convolution, which adds the bias on its way

The first three work on rows as they are and read weights that onnxruntime packs beforehand.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compress.errors import CompressError

Array = NDArray[Any]
PATTERN = re.compile(r"block:([1-9]\d*)x([1-9]\d*)@(0?\.\d+|1(?:\.0*)?)")


@dataclass(frozen=True)
class Blocks:
    """Which blocks of a weight are kept: for every group of `rows` outputs, block columns in order."""

    rows: int
    columns: int
    kept: tuple[tuple[int, ...], ...]

    @property
    def widest(self) -> int:
        """Most blocks that a group keeps."""
        return max(map(len, self.kept))

    def covers(self, out: int, inner: int) -> bool:
        """Do the groups and block columns fit a weight [out, inner]?"""
        groups, across = math.ceil(out / self.rows), math.ceil(inner / self.columns)
        return len(self.kept) == groups and all(
            list(row) == sorted(set(row)) and row and row[0] >= 0 and row[-1] < across for row in self.kept
        )

    def mask(self, out: int, inner: int) -> NDArray[np.bool_]:
        """[out, inner]: True where a weight is kept.

        >>> Blocks(1, 2, ((0,), (1,))).mask(2, 3).astype(int).tolist()
        [[1, 1, 0], [0, 0, 1]]
        """
        kept = np.zeros((len(self.kept), math.ceil(inner / self.columns)), dtype=bool)
        for group, row in enumerate(self.kept):
            kept[group, list(row)] = True
        return kept.repeat(self.rows, 0).repeat(self.columns, 1)[:out, :inner]

    def padded(self, inner: int) -> "Blocks":
        """The same with every group as wide as the widest; blocks that were not kept hold zeros."""
        across = range(math.ceil(inner / self.columns))
        rows = []
        for row in self.kept:
            others = [column for column in across if column not in row]
            rows.append(tuple(sorted([*row, *others[: self.widest - len(row)]])))
        return replace(self, kept=tuple(rows))


def parsed(pattern: str) -> tuple[int, int, float]:
    """Rows and columns of a block, and the density kept.

    >>> parsed("block:32x128@0.25")
    (32, 128, 0.25)
    """
    found = PATTERN.fullmatch(pattern)
    if found is None or not float(found[3]):
        raise CompressError(
            f"pattern {pattern!r} is no block pattern; write block:ROWSxCOLUMNS@DENSITY, such as "
            "block:64x64@0.25"
        )
    return int(found[1]), int(found[2]), float(found[3])


def quota(density: float, across: int) -> int:
    """How many of the blocks across a weight each group keeps: the nearest whole number, halves up.

    >>> quota(0.25, 12), quota(0.5, 5), quota(0.01, 3)
    (3, 3, 1)
    """
    return max(1, math.floor(density * across + 0.5))


def find(weight: Array, rows: int, columns: int) -> Blocks:
    """The blocks of a weight [out, in] that are not all zero; a group without any keeps its first.

    >>> find(np.array([[0, 0, 3.0], [0, 0, 0]]), 1, 2)
    Blocks(rows=1, columns=2, kept=((1,), (0,)))
    """
    out, inner = weight.shape
    full = np.zeros((math.ceil(out / rows) * rows, math.ceil(inner / columns) * columns), dtype=bool)
    full[:out, :inner] = weight != 0
    alive = np.asarray(full.reshape(-1, rows, full.shape[1] // columns, columns).any((1, 3)))
    kept = (tuple(int(column) for column in np.flatnonzero(row)) or (0,) for row in alive)
    return Blocks(rows, columns, tuple(kept))


def random(pattern: str, out: int, inner: int, generator: np.random.Generator) -> Blocks:
    """As many random blocks in every group as the pattern's density says, at least one.

    >>> random("block:4x2@0.5", 8, 8, np.random.default_rng(0)).kept
    ((2, 3), (0, 1))
    """
    rows, columns, density = parsed(pattern)
    across = math.ceil(inner / columns)
    count = quota(density, across)
    groups = range(math.ceil(out / rows))
    chosen = (sorted(generator.choice(across, count, replace=False).tolist()) for _ in groups)
    return Blocks(rows, columns, tuple(tuple(row) for row in chosen))


class Builder:
    """New nodes in front of `at`; tensors and values that several products need are made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.at: ir.Node | None = None
        self.made: dict[tuple[object, ...], list[ir.Value]] = {}

    def node(self, operator: str, *inputs: ir.Value, **numbers: int | Sequence[int]) -> ir.Value:
        """Add an operator with one output, or give that of the same one added before."""
        return self._node(operator, inputs, 1, numbers)[0]

    def cut(self, x: ir.Value, widths: Sequence[int]) -> list[ir.Value]:
        """The columns of x in parts of these widths."""
        return self._node("Split", (x, self.integers(*widths)), len(widths), {"axis": 1})

    def _node(
        self,
        operator: str,
        inputs: tuple[ir.Value, ...],
        outputs: int,
        numbers: Mapping[str, int | Sequence[int]],
    ) -> list[ir.Value]:
        key = (operator, inputs, outputs, *sorted((name, str(number)) for name, number in numbers.items()))
        if key not in self.made:
            attributes = [
                ir.AttrInt64(name, number) if isinstance(number, int) else ir.AttrInt64s(name, number)
                for name, number in numbers.items()
            ]
            made = ir.Node("", operator, inputs, attributes, num_outputs=outputs)
            assert self.at is not None, "there is no place for a node yet"
            self.graph.insert_before(self.at, made)
            self.made[key] = list(made.outputs)
        return self.made[key]

    def tensor(self, name: str, values: Array) -> ir.Value:
        """An initializer; one name always stands for the same values."""
        if name not in self.graph.initializers:
            held = ir.tensor(np.ascontiguousarray(values), name=name)
            shape = ir.Shape(held.shape.numpy())
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(held.dtype), const_value=held)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def integers(self, *numbers: int) -> ir.Value:
        """A short list of whole numbers."""
        return self.tensor("ints_" + "_".join(map(str, numbers)), np.array(numbers, dtype=np.int64))


@dataclass(frozen=True)
class Product:
    """`S x + b`, or `S x + L t + b` with `more = (t, L)`, t [rows, rank] and L [out, rank].

    `name` begins the names of all tensors, `weight` is S [out, in] with zeros, `bias` an initializer [out].
    """

    name: str
    weight: Array
    blocks: Blocks
    bias: ir.Value | None = None
    more: tuple[ir.Value, Array] | None = None

    def biases(self, build: Builder, part: slice) -> list[ir.Value]:
        """The bias of some outputs, as the operand that follows the weight; nothing without one."""
        if self.bias is None or part.stop - part.start == len(self.weight):
            return [] if self.bias is None else [self.bias]
        return [build.tensor(f"{self.bias.name}.{part.start}", values(self.bias)[part])]

    def columns(self, column: int) -> slice:
        """The inputs of a block column; the last may be narrower."""
        return slice(column * self.blocks.columns, (column + 1) * self.blocks.columns)

    def groups(self) -> list[tuple[slice, tuple[int, ...]]]:
        """Outputs and kept block columns of every group; neighbors that keep the same are one."""
        found: list[tuple[slice, tuple[int, ...]]] = []
        for group, kept in enumerate(self.blocks.kept):
            start = group * self.blocks.rows
            end = min(start + self.blocks.rows, len(self.weight))
            if found and found[-1][1] == kept:
                start = found.pop()[0].start
            found.append((slice(start, end), kept))
        return found


Layout = Callable[[Builder, ir.Value, Product], ir.Value]


def _concat(build: Builder, x: ir.Value, product: Product) -> ir.Value:
    pieces = _pieces(build, x, product)

    def pick(kept: tuple[int, ...]) -> list[ir.Value]:
        return [x] if len(kept) == len(pieces) else [pieces[column] for column in kept]

    return _grouped(build, product, pick)


def _gather(build: Builder, x: ir.Value, product: Product) -> ir.Value:
    columns = product.blocks.columns
    apart = build.node("Reshape", x, build.integers(-1, product.weight.shape[1] // columns, columns))

    def pick(kept: tuple[int, ...]) -> list[ir.Value]:
        if len(kept) * columns == product.weight.shape[1]:
            return [x]
        taken = build.node("Gather", apart, build.integers(*kept), axis=1)
        return [build.node("Reshape", taken, build.integers(-1, len(kept) * columns))]

    return _grouped(build, product, pick)


def _sum(build: Builder, x: ir.Value, product: Product) -> ir.Value:
    pieces = _pieces(build, x, product)
    outs = []
    for part, kept in product.groups():
        terms = [(pieces[column], product.weight[part, product.columns(column)]) for column in kept]
        if product.more is not None:
            terms.append((product.more[0], product.more[1][part]))
        total = product.biases(build, part)
        for number, (piece, block) in enumerate(terms):
            weight = build.tensor(f"{product.name}.{part.start}.{number}", block)
            total = [build.node("Gemm", piece, weight, *total, transB=1)]
        outs += total
    return _joined(build, outs)


def _batched(build: Builder, x: ir.Value, product: Product) -> ir.Value:
    taken, weight = _all_at_once(build, x, product)
    out, rows = len(product.weight), product.blocks.rows
    inside = build.node("Reshape", taken, build.integers(out // rows, weight.shape[1], -1))
    stored = build.tensor(f"{product.name}.blocks", weight.reshape(-1, rows, weight.shape[1]))
    turned = build.node("Reshape", build.node("MatMul", stored, inside), build.integers(out, -1))
    if product.bias is not None:
        bias = build.tensor(f"{product.bias.name}.column", values(product.bias)[:, None])
        turned = build.node("Add", turned, bias)
    return _and_more(build, build.node("Transpose", turned, perm=[1, 0]), product)


def _conv(build: Builder, x: ir.Value, product: Product) -> ir.Value:
    taken, weight = _all_at_once(build, x, product)
    out = len(product.weight)
    groups = out // product.blocks.rows
    inside = build.node("Reshape", taken, build.integers(1, groups * weight.shape[1], -1))
    stored = build.tensor(f"{product.name}.blocks", weight[:, :, None])
    bias = product.biases(build, slice(0, out))
    turned = build.node("Conv", inside, stored, *bias, group=groups, kernel_shape=[1])
    back = build.node("Transpose", build.node("Reshape", turned, build.integers(out, -1)), perm=[1, 0])
    return _and_more(build, back, product)


LAYOUTS: dict[str, Layout] = {
    "concat": _concat,
    "gather": _gather,
    "sum": _sum,
    "batched": _batched,
    "conv": _conv,
}
ALL_AT_ONCE = ("batched", "conv")  # every group is as wide as the widest


def fits(layout: str, out: int, inner: int, rows: int, columns: int) -> bool:
    """Can the layout hold blocks of this shape? `concat` and `sum` take ragged edges, others do not."""
    return layout in ("concat", "sum") or (inner % columns == 0 and (layout == "gather" or out % rows == 0))


def check(name: str, weight: Array, blocks: Blocks, layout: str) -> None:
    """Refuse what cannot be written.

    Raises:
        CompressError: there is no such layout, the blocks do not belong to a weight of this shape, a
            weight that is not zero lies outside of them, or the layout needs whole blocks.
    """
    out, inner = weight.shape
    if layout not in LAYOUTS:
        raise CompressError(f"{name}: no layout is called {layout!r}; known: {', '.join(LAYOUTS)}")
    if not blocks.covers(out, inner):
        raise CompressError(
            f"{name}: {len(blocks.kept)} groups of {blocks.rows}x{blocks.columns} blocks do not "
            f"belong to a weight [{out}, {inner}], or are not in order; find them with sparse.find"
        )
    lost = np.count_nonzero(weight[~blocks.mask(out, inner)])
    if lost:
        raise CompressError(
            f"{name}: {lost} weights outside of the kept {blocks.rows}x{blocks.columns} blocks are "
            "not zero; mask the weight first, or find its blocks with sparse.find"
        )
    if not fits(layout, out, inner, blocks.rows, blocks.columns):
        raise CompressError(
            f"{name}: layout {layout!r} needs whole blocks, but {blocks.rows}x{blocks.columns} does not "
            f"divide [{out}, {inner}]; use 'concat' or 'sum'"
        )


def values(initializer: ir.Value) -> Array:
    """What an initializer holds.

    Raises:
        CompressError: the value is computed, so nothing about it is known beforehand.
    """
    held = ir.convenience.get_const_tensor(initializer)
    if held is None:
        raise CompressError(f"{initializer.name} is computed in the file; only stored weights can be lowered")
    return held.numpy()


def stored_bytes(layout: str, out: int, inner: int, blocks: Blocks, item_bytes: int = 4) -> int:
    """Bytes of the weights that a layout stores, with the indices of `batched` and `conv`, without bias."""
    if layout in ALL_AT_ONCE:
        count = len(blocks.kept) * blocks.widest
        return count * blocks.rows * blocks.columns * item_bytes + 8 * count
    return int(blocks.mask(out, inner).sum()) * item_bytes


def _pieces(build: Builder, x: ir.Value, product: Product) -> list[ir.Value]:
    """The input [rows, in], cut by block columns."""
    inner, columns = product.weight.shape[1], product.blocks.columns
    if columns >= inner:
        return [x]
    widths = [min(columns, inner - start) for start in range(0, inner, columns)]
    return build.cut(x, widths)


def _joined(build: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    """Side by side."""
    return parts[0] if len(parts) == 1 else build.node("Concat", *parts, axis=1)


def _grouped(build: Builder, product: Product, pick: Callable[[tuple[int, ...]], list[ir.Value]]) -> ir.Value:
    """One Gemm a group, on the inputs that it keeps and, where there is more, on `t` beside them."""
    outs = []
    for part, kept in product.groups():
        inside = pick(kept)
        block = np.concatenate([product.weight[part, product.columns(column)] for column in kept], axis=1)
        if product.more is not None:
            inside = [*inside, product.more[0]]
            block = np.concatenate([block, product.more[1][part]], axis=1)
        weight = build.tensor(f"{product.name}.{part.start}", block)
        joined = _joined(build, inside)
        outs.append(build.node("Gemm", joined, weight, *product.biases(build, part), transB=1))
    return _joined(build, outs)


def _all_at_once(build: Builder, x: ir.Value, product: Product) -> tuple[ir.Value, Array]:
    """What all groups read, [groups * kept, columns * rows], and the weight on it, [out, in kept]."""
    inner = product.weight.shape[1]
    blocks = product.blocks.padded(inner)
    turned = build.node("Transpose", x, perm=[1, 0])
    whole = build.node("Reshape", turned, build.integers(inner // blocks.columns, -1))
    places = np.array(blocks.kept, dtype=np.int64)  # [groups, kept]
    taken = build.node("Gather", whole, build.tensor(f"{product.name}.kept", places.reshape(-1)), axis=0)
    columns = (places[:, :, None] * blocks.columns + np.arange(blocks.columns)).reshape(len(places), -1)
    rows = np.arange(len(product.weight))
    return taken, product.weight[rows[:, None], columns.repeat(blocks.rows, 0)]


def _and_more(build: Builder, total: ir.Value, product: Product) -> ir.Value:
    """`total + L t` where there is more."""
    if product.more is None:
        return total
    left = build.tensor(f"{product.name}.left", product.more[1])
    return build.node("Gemm", product.more[0], left, total, transB=1)
