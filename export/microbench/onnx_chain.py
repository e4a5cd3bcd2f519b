"""Small ONNX graphs with the operators that the exported model has for one site.

A chain holds a few copies of the site, each with its own weights, so that caches do not flatter it and
the cost of a call divides out. Residual sums and norms stand between the copies; with 0 units only they
are left, so that the difference of two chains is what the site costs. With a pattern or a rank the products
are lowered as those of the exported file are (see `lowering`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compress.export.onnx import block_sparse
from compress.export.onnx.block_sparse import Blocks
from compress.export.onnx.linear_lowering import Lowering, lower
from compress.ir import Matmul, Site
from compress.sites.kinds import kind_of

if TYPE_CHECKING:
    import onnx

OPSET = 20
IR_VERSION = 10
LayoutChooser = Callable[
    [int, int, Blocks], str
]  # out, inner and blocks of a product -> one of `sparse.LAYOUTS`
SiteLayouts = Callable[[Site], LayoutChooser]  # how the products of each site are written


def default_layout(out: int, inner: int, blocks: Blocks) -> str:
    """The layout that takes blocks of every shape."""
    return "concat"


def default_layouts(site: Site) -> LayoutChooser:
    """What writes the products of a site whose layouts were not timed."""
    return default_layout


@dataclass
class Graph:
    """Nodes and weights of a graph that is being written down."""

    random: np.random.Generator
    nodes: list["onnx.NodeProto"] = field(default_factory=list)
    weights: list["onnx.TensorProto"] = field(default_factory=list)
    known: dict[tuple[int, ...], str] = field(default_factory=dict)
    pasts: dict[str, str] = field(default_factory=dict)
    masked: bool = False
    products: dict[str, tuple[int, int]] = field(default_factory=dict)  # out and inner by weight

    def node(self, operator: str, *inputs: str, **attributes: int | float | str | list[int]) -> str:
        """Add an operator; gives the name of its output."""
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, values: NDArray[np.float32] | NDArray[np.int64]) -> str:
        """Add a tensor; gives its name."""
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def number(self, value: float) -> str:
        """A scalar."""
        return self.constant(np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> str:
        """A short list of whole numbers, stored once."""
        if values not in self.known:
            self.known[values] = self.constant(np.array(values, dtype=np.int64))
        return self.known[values]

    def linear(self, x: str, inner: int, out: int, *, bias: bool) -> str:
        """A product with its bias, on `[rows, inner]`, from a weight stored as `[out, inner]`."""
        scale = 1 / math.sqrt(inner)
        weight = (self.random.standard_normal((out, inner)) * scale).astype(np.float32)
        parts = [x, self.constant(weight)]
        self.products[parts[1]] = out, inner
        if bias:
            parts.append(self.vector(out))
        return self.node("Gemm", *parts, transB=1)

    def vector(self, length: int) -> str:
        """Small random numbers: a bias."""
        return self.constant((self.random.standard_normal(length) * 0.1).astype(np.float32))

    def extended(self, part: str) -> str:
        """Keys or values [batch, heads, past + tokens, width], after those of an input of its own."""
        name = f"past{len(self.pasts)}"
        self.pasts[name] = self.node("Concat", name, part, axis=2)
        return self.pasts[name]

    def split(self, x: str, widths: Sequence[int]) -> list[str]:
        """The parts of the last axis."""
        first = self.node("Split", x, self.integers(*widths), axis=-1)
        others = [f"{first}_{k}" for k in range(1, len(widths))]
        self.nodes[-1].output.extend(others)
        return [first, *others]


def chain(
    site: Site,
    units: int,
    copies: int,
    *,
    pattern: str = "dense",
    rank: int = 0,
    choose: LayoutChooser = default_layout,
) -> bytes:
    """An ONNX file: `copies` times the site at `units`, each followed by residual sum and norm.

    Everything works on `[rows, features]` and sizes are symbolic, as in the exported model (see
    `flatten`); units 0 leaves only what is around. A site with a past reads a cache of its own in every
    copy and gives it back longer by the new tokens.

    Args:
        site: whose products are written.
        units: units kept.
        copies: how often, each with weights of its own.
        pattern: "dense", or blocks such as "block:64x64@0.25", which are drawn at random.
        rank: of low-rank factors beside the blocks, or in the place of dense weights.
        choose: the layout of a product in blocks.

    Raises:
        CompressError: the kind of the site cannot be timed alone, or its products are not understood, or
            the pattern cannot be lowered.
    """
    from onnx import TensorProto, helper

    kind = kind_of(site)
    writer, readers = kind.parts(site)
    hidden = writer.out
    graph = Graph(np.random.default_rng(units))
    norm = graph.constant(np.ones(hidden, dtype=np.float32)), graph.vector(hidden)
    builder = _OnnxBuilder(graph, site, readers, units)
    stream = "x"
    for _ in range(copies):
        if units:
            inside = kind.body(builder, stream, site, units)
            branch = graph.linear(inside, writer.features(units)[1], writer.out, bias=writer.bias)
        else:
            branch = graph.vector(hidden)
        total = graph.node("Add", branch, stream)
        stream = graph.node("LayerNormalization", total, *norm, axis=-1, epsilon=1e-5)
    names = ["rows", hidden]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, names)]
    outputs = [helper.make_tensor_value_info(stream, TensorProto.FLOAT, names)]
    if graph.masked:
        seen = ["batch", 1, "tokens", "whole" if site.past else "tokens"]
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, seen))
    for past, present in graph.pasts.items():
        held = ["batch", units, "past", site.head_dim]
        inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, held))
        held = ["batch", units, "whole", site.head_dim]
        outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, held))
    body_graph = helper.make_graph(graph.nodes, "site", inputs, outputs, graph.weights)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(body_graph, opset_imports=opset, ir_version=IR_VERSION)
    if pattern != "dense" or rank:
        model = _lowered(model, graph, pattern, rank, choose)
    return bytes(model.SerializeToString())


def _lowered(
    model: "onnx.ModelProto", graph: Graph, pattern: str, rank: int, choose: LayoutChooser
) -> "onnx.ModelProto":
    """The chain with its products in blocks, of low rank, or both; all values are random."""
    found = {}
    for name, (out, inner) in graph.products.items():
        factors = min(rank, out, inner)
        left, right = (
            (graph.random.standard_normal(shape) * 0.1).astype(np.float32) if factors else None
            for shape in ((out, factors), (factors, inner))
        )
        if pattern == "dense":
            found[name] = Lowering(left=left, right=right)
            continue
        blocks = block_sparse.random(pattern, out, inner, graph.random)
        values = (graph.random.standard_normal((out, inner)) * 0.1).astype(np.float32)
        values *= blocks.mask(out, inner)
        layout = choose(out, inner, blocks)
        found[name] = Lowering(blocks, layout, left=left, right=right, sparse=values)
    opened = ir.serde.deserialize_model(model)
    lower(opened, found)
    return ir.serde.serialize_model(opened)


def _activation(graph: Graph, x: str, name: str) -> str:
    """The operators that an exported activation consists of; an unknown one costs what Gelu does."""
    simple = {
        "relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "mish": "Mish",
        "hardswish": "HardSwish", "elu": "Elu", "leaky_relu": "LeakyRelu",
    }  # fmt: skip
    if name in simple:
        return graph.node(simple[name], x)
    if name in ("identity", ""):
        return x
    if name == "silu":
        return graph.node("Mul", x, graph.node("Sigmoid", x))
    if name == "quick_gelu":
        return graph.node("Mul", x, graph.node("Sigmoid", graph.node("Mul", x, graph.number(1.702))))
    if name == "relu_squared":
        return graph.node("Pow", graph.node("Relu", x), graph.number(2.0))
    if name == "gelu_tanh":
        cubic = graph.node("Mul", graph.node("Pow", x, graph.number(3.0)), graph.number(0.044715))
        inner = graph.node("Mul", graph.node("Add", x, cubic), graph.number(math.sqrt(2 / math.pi)))
        outer = graph.node("Add", graph.node("Tanh", inner), graph.number(1.0))
        return graph.node("Mul", graph.node("Mul", x, graph.number(0.5)), outer)
    return graph.node("Gelu", x)


@dataclass(frozen=True)
class _OnnxBuilder:
    """Writes the operators of one site into a graph, as the exporter does; values are their names."""

    graph: Graph
    site: Site
    readers: Sequence[Matmul]
    units: int

    def product(self, x: str, reader: int) -> str:
        matmul = self.readers[reader]
        return self.graph.linear(x, matmul.inner, matmul.features(self.units)[0], bias=matmul.bias)

    def split(self, x: str, widths: Sequence[int]) -> list[str]:
        return self.graph.split(x, widths)

    def activation(self, x: str, name: str) -> str:
        return _activation(self.graph, x, name)

    def multiply(self, a: str, b: str) -> str:
        return self.graph.node("Mul", a, b)

    def attention(self, query: str, key: str, value: str) -> str:
        """Scores, masked softmax and context."""
        graph, site, width = self.graph, self.site, self.site.head_dim
        graph.masked = True
        shape = graph.node("Shape", "mask")
        batch = graph.node("Slice", shape, graph.integers(0), graph.integers(1))
        tokens = graph.node("Slice", shape, graph.integers(2), graph.integers(3))
        place = [batch, tokens]
        split = graph.node("Concat", *place, graph.integers(-1), graph.integers(width), axis=0)
        query, key, value = (
            graph.node("Transpose", graph.node("Reshape", out, split), perm=[0, 2, 1, 3])
            for out in (query, key, value)
        )
        if site.past:
            key, value = (graph.extended(part) for part in (key, value))
            place[1] = graph.node("Slice", shape, graph.integers(3), graph.integers(4))
        if site.queries > 1:
            key, value = (_repeated(graph, part, place, site, self.units) for part in (key, value))
        key = graph.node("Transpose", key, perm=[0, 1, 3, 2])
        scores = graph.node("Mul", graph.node("MatMul", query, key), graph.number(width**-0.5))
        weights = graph.node("Softmax", graph.node("Add", scores, "mask"), axis=-1)
        context = graph.node("Transpose", graph.node("MatMul", weights, value), perm=[0, 2, 1, 3])
        features = self.units * site.queries * width
        return graph.node("Reshape", context, graph.integers(-1, features))


def _repeated(graph: Graph, part: str, place: Sequence[str], site: Site, units: int) -> str:
    """Keys or values of a group, once for each of its queries."""
    size = graph.integers(site.head_dim)
    apart = graph.node("Unsqueeze", part, graph.integers(2))
    wide = (place[0], graph.integers(units), graph.integers(site.queries), place[1], size)
    whole = (place[0], graph.integers(units * site.queries), place[1], size)
    spread = graph.node("Expand", apart, graph.node("Concat", *wide, axis=0))
    return graph.node("Reshape", spread, graph.node("Concat", *whole, axis=0))
