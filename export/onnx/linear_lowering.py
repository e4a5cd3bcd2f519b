"""An exported file whose products are written as blocks, as low-rank factors, or as their sum.

A linear layer stands in a file as one Gemm on rows (see `flatten`). `lower` finds it by the name of its
weight and writes `S x + L (R x) + b` in its place. All first factors R that read the same x, such as those
of query, key and value, become one product; equal ones are stored once.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.errors import CompressError
from compress.export.onnx import block_sparse
from compress.export.onnx.block_sparse import Array, Blocks, Builder, Product
from compress.export.onnx.transpose_elimination import open_seams
from compress.ir import Document


@dataclass(frozen=True)
class Lowering:
    """How one product `W x + b` is written: `S x + L (R x) + b`, where either part may be missing.

    Attributes:
        blocks: where S is not zero; None leaves it one Gemm.
        layout: one of `sparse.LAYOUTS`, for blocks.
        left: L [out, rank]; without factors there is no second part.
        right: R [rank, in].
        sparse: S [out, in]. Without factors it is the weight in the file; with them, None means that
            there is no S.
    """

    blocks: Blocks | None = None
    layout: str = "concat"
    left: Array | None = None
    right: Array | None = None
    sparse: Array | None = None

    @property
    def rank(self) -> int:
        """Rank of the second part, 0 without one."""
        return 0 if self.right is None else len(self.right)

    @property
    def has_sparse(self) -> bool:
        """Is there an S?"""
        return self.right is None or self.sparse is not None

    def weight_bytes(self, out: int, inner: int, item_bytes: int = 4) -> int:
        """Bytes of the weights and indices of a product of this shape, without its bias."""
        factors = self.rank * (out + inner) * item_bytes
        if not self.has_sparse:
            return factors
        if self.blocks is None:
            return factors + out * inner * item_bytes
        return factors + block_sparse.stored_bytes(self.layout, out, inner, self.blocks, item_bytes)


class Lowered(Document):
    """What became of one product; a first factor that several share counts for the first of them."""

    layout: str
    rank: int
    weight_bytes: int
    dense_bytes: int


def lower(model: ir.Model, products: Mapping[str, Lowering]) -> dict[str, Lowered]:
    """Write products in place in the way that is asked for; what became of each, by weight.

    Args:
        model: as `export.onnx.writer` writes it; its other nodes and all free sizes stay as they are.
        products: by the name of the weight; every Gemm that reads it is written anew.

    Raises:
        CompressError: a weight is missing or no plain Gemm reads it, factors do not fit it, or its blocks
            cannot be written (see `sparse.check`).
    """
    graph = model.graph
    asked = {node: name for name in products for node in _readers(graph, name)}
    found = [(node, asked[node]) for node in graph if node in asked]
    for node, name in found:
        _check(node, name, products[name])
    report = _report(found, products)
    first = _first_factors(found, products)
    build = Builder(graph)
    for node, name in found:
        build.at = node
        result = _written(build, node, Named(name, products[name]), first.get(node, []))
        _replace(node, result)
    open_seams(model)
    return report


@dataclass(frozen=True)
class Named:
    """A lowering and the weight that it is for."""

    name: str
    lowering: Lowering


def _readers(graph: ir.Graph, name: str) -> list[ir.Node]:
    """The Gemms whose second operand is the weight."""
    value = graph.initializers.get(name)
    if value is None:
        near = difflib.get_close_matches(name, list(graph.initializers), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CompressError(f"the file stores no weight {name!r}{hint}")
    found = [node for node, place in value.uses() if node.op_type == "Gemm" and place == 1]
    if not found:
        users = sorted({node.op_type for node, _ in value.uses()}) or ["nothing"]
        raise CompressError(f"{name}: read by {', '.join(users)}, not by a Gemm; it cannot be lowered")
    return found


def _weight(node: ir.Node) -> Array:
    """The weight of a Gemm as [out, in]."""
    assert node.inputs[1] is not None
    stored = block_sparse.values(node.inputs[1])
    return stored if node.attributes.get_int("transB", 0) else stored.T


def _check(node: ir.Node, name: str, lowering: Lowering) -> None:
    scales = [node.attributes.get_float(key, 1.0) for key in ("alpha", "beta")]
    if node.attributes.get_int("transA", 0) or scales != [1.0, 1.0]:
        raise CompressError(f"{name}: its Gemm turns or scales its operands, which no linear layer does")
    out, inner = _weight(node).shape
    rank = lowering.rank
    for what, part, shape in (
        ("left", lowering.left, (out, rank)),
        ("right", lowering.right, (rank, inner)),
        ("sparse", lowering.sparse, (out, inner)),
    ):
        missing = part is None and rank and what == "left"
        if missing or (part is not None and part.shape != shape):
            given = "missing" if part is None else f"{list(part.shape)}"
            raise CompressError(
                f"{name}: {what} is {given}, but a weight [{out}, {inner}] at rank {rank} needs {list(shape)}"
            )
    if lowering.has_sparse and lowering.blocks is not None:
        weight = _weight(node) if lowering.sparse is None else lowering.sparse
        block_sparse.check(name, weight, lowering.blocks, lowering.layout)


def _report(found: Sequence[tuple[ir.Node, str]], products: Mapping[str, Lowering]) -> dict[str, Lowered]:
    """Forms and bytes; a first factor that was met before costs nothing more."""
    report: dict[str, Lowered] = {}
    met: dict[ir.Value | None, list[Array]] = {}
    for node, name in found:
        lowering = products[name]
        out, inner = _weight(node).shape
        item_bytes = _weight(node).itemsize
        weight_bytes = lowering.weight_bytes(out, inner, item_bytes)
        known = met.setdefault(node.inputs[0], [])
        if lowering.right is not None:
            if any(np.array_equal(lowering.right, other) for other in known):
                weight_bytes -= lowering.right.size * item_bytes
            known.append(lowering.right)
        layout = (
            "none" if not lowering.has_sparse else "dense" if lowering.blocks is None else lowering.layout
        )
        report.setdefault(
            name,
            Lowered(
                layout=layout,
                rank=lowering.rank,
                weight_bytes=weight_bytes,
                dense_bytes=out * inner * item_bytes,
            ),
        )
    return report


def _first_factors(
    found: Sequence[tuple[ir.Node, str]], products: Mapping[str, Lowering]
) -> dict[ir.Node, list[Named]]:
    """For every product with factors, those on the same x whose R differ, in order."""
    shared: dict[ir.Value | None, list[Named]] = {}
    first: dict[ir.Node, list[Named]] = {}
    for node, name in found:
        right = products[name].right
        if right is None:
            continue
        others = shared.setdefault(node.inputs[0], [])
        if not any(np.array_equal(right, _right(other)) for other in others):
            others.append(Named(name, products[name]))
        first[node] = others
    return first


def _right(named: Named) -> Array:
    assert named.lowering.right is not None
    return named.lowering.right


def _inside(build: Builder, x: ir.Value, right: Array, others: Sequence[Named], like: Array) -> ir.Value:
    """R x [rows, rank]: a part of what all first factors on this x give."""
    stack = np.concatenate([_right(other) for other in others]).astype(like.dtype)
    name = "+".join(other.name for other in others)
    whole = build.node("Gemm", x, build.tensor(f"{name}.right", stack), transB=1)
    if len(others) == 1:
        return whole
    parts = build.cut(whole, [len(_right(other)) for other in others])
    return next(
        part for part, other in zip(parts, others, strict=True) if np.array_equal(right, _right(other))
    )


def _written(build: Builder, node: ir.Node, named: Named, others: Sequence[Named]) -> ir.Value:
    """The product in its new layout, [rows, out]."""
    name, lowering = named.name, named.lowering
    x, stored, bias = [*node.inputs, None][:3]
    assert x is not None
    assert stored is not None
    weight = _weight(node)
    more = None
    if lowering.left is not None and lowering.right is not None:
        left = lowering.left.astype(weight.dtype)
        more = _inside(build, x, lowering.right, others, weight), left
    if lowering.sparse is not None:
        weight = lowering.sparse.astype(weight.dtype)
    if lowering.has_sparse and lowering.blocks is not None:
        product = Product(name, weight, lowering.blocks, bias, more)
        return block_sparse.LAYOUTS[lowering.layout](build, x, product)
    total = [] if bias is None else [bias]
    if lowering.has_sparse:
        if lowering.sparse is not None or not node.attributes.get_int("transB", 0):
            stored = build.tensor(f"{name}.sparse", weight)
        total = [build.node("Gemm", x, stored, *total, transB=1)]
    if more is not None:
        total = [build.node("Gemm", more[0], build.tensor(f"{name}.left", more[1]), *total, transB=1)]
    return total[0]


def _replace(node: ir.Node, result: ir.Value) -> None:
    """Let `result` stand for what the node gave, as the file's output too."""
    old, graph = node.outputs[0], node.graph
    assert graph is not None
    ends = old.is_graph_output()
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    if ends:
        result.shape, result.type = old.shape, old.type
        result.name, old.name = old.name, f"{old.name}_before"
    graph.remove(node, safe=True)
