"""Which layout of a block-sparse product is fastest on this machine: timed once for every shape, then kept.

All layouts of a shape are timed in turn with the dense product, on a few copies with weights and inputs of
their own. The table is stored with those of the sites; a row is one layout of one shape, its levels are the
blocks that a group keeps.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from compress.cost import latency_table
from compress.cost.latency_table import Rows, Table
from compress.errors import CompressError
from compress.export.backends import ort_chains
from compress.export.microbench import site_timing as sites
from compress.export.microbench.onnx_chain import IR_VERSION, OPSET, Graph, LayoutChooser, default_layout
from compress.export.microbench.site_timing import Tick
from compress.export.onnx import block_sparse
from compress.export.onnx.block_sparse import LAYOUTS, Array, Blocks
from compress.export.onnx.linear_lowering import Lowering, lower
from compress.measure import timing

COPIES = 2
COPIES_MB = 24
SECONDS = 0.2
DENSE = "dense"


class Shape(NamedTuple):
    """A product [rows, in] -> [rows, out] in blocks of `height` x `width`, `kept` of them a group."""

    rows: int
    out: int
    inner: int
    height: int
    width: int
    kept: int

    def key(self, layout: str) -> str:
        """The row of the table that holds one layout."""
        return f"product|{self.rows}x{self.out}x{self.inner}|{self.height}x{self.width}|{layout}"

    @property
    def layouts(self) -> tuple[str, ...]:
        """What can be timed: the dense product, then the layouts that blocks of this shape fit."""
        fitting = [f for f in LAYOUTS if block_sparse.fits(f, self.out, self.inner, self.height, self.width)]
        return (DENSE, *fitting)

    @property
    def contenders(self) -> tuple[str, ...]:
        """Those among which one is chosen: `sum` launches a product a block, and was never the fastest."""
        return tuple(layout for layout in self.layouts if layout != "sum")


def shape_of(rows: int, out: int, inner: int, pattern: str) -> Shape:
    """The shape of a product in a pattern.

    >>> shape_of(32, 1536, 384, "block:64x32@0.25")
    Shape(rows=32, out=1536, inner=384, height=64, width=32, kept=3)
    """
    height, width, density = block_sparse.parsed(pattern)
    return Shape(rows, out, inner, height, width, block_sparse.quota(density, math.ceil(inner / width)))


def table(shapes: Iterable[Shape], threads: int = 1, progress: Tick | None = None) -> Table:
    """This machine's table with all contenders of the shapes in it; what is known is not timed again."""
    wanted: dict[str, set[int]] = {}
    by_key: dict[tuple[str, int], Shape] = {}
    for shape in shapes:
        for layout in shape.contenders:
            wanted.setdefault(shape.key(layout), set()).add(shape.kept)
            by_key[shape.key(layout), shape.kept] = shape

    def measure(missing: dict[str, list[int]]) -> Rows:
        due = dict.fromkeys(by_key[key, kept] for key, levels in missing.items() for kept in levels)
        rows: Rows = {}
        for number, shape in enumerate(due):
            for layout, ms in measure_layouts(shape, threads).items():
                rows.setdefault(shape.key(layout), {})[shape.kept] = ms
            if progress is not None:
                progress(number + 1, len(due))
        return rows

    return latency_table.measure_missing(ort_chains.empty_table(threads), wanted, measure)


def measure_layouts(shape: Shape, threads: int = 1, clock: timing.Clock | None = None) -> dict[str, float]:
    """Milliseconds of one product of this shape, dense and in every layout that may be chosen."""
    timing.check_threads(threads)
    dense_mb = 4e-6 * shape.out * shape.inner
    copies = int(max(1, min(COPIES, COPIES_MB // dense_mb)))
    runners = [runner(product(shape, layout, copies), shape, threads) for layout in shape.contenders]
    times = sites.time_cycles(runners, SECONDS, clock or sites.clock_for(threads), lambda done, work: None)
    ratios = np.median(times / times[:, :1], axis=0)
    dense_ms = float(np.median(times[:, 0])) / copies
    return {layout: dense_ms * float(ratio) for layout, ratio in zip(shape.contenders, ratios, strict=True)}


def fastest_layout(found: Table, shape: Shape) -> tuple[str, float]:
    """The fastest layout of a shape in the table, and how many times faster than dense it is.

    Raises:
        CompressError: the shape is not in the table.
    """
    times = {layout: found.rows.get(shape.key(layout), {}).get(shape.kept) for layout in shape.contenders}
    known = {layout: ms for layout, ms in times.items() if ms is not None}
    dense_ms = known.pop(DENSE, None)
    if dense_ms is None or not known:
        raise CompressError(f"{shape} was not timed; ask layouts.table for it")
    layout = min(known, key=lambda name: known[name])
    return layout, dense_ms / known[layout]


def layout_chooser(known: Mapping[Shape, str]) -> LayoutChooser:
    """The fastest layout of any product: that of the timed shape with the same blocks that is nearest.

    Products whose blocks were not timed, or do not fit that layout, get the one that takes all shapes.
    """

    def choose(out: int, inner: int, blocks: Blocks) -> str:
        def apart(shape: Shape) -> float:
            pairs = ((shape.out, out), (shape.inner, inner), (shape.kept, blocks.widest))
            return sum(math.log(one / other) ** 2 for one, other in pairs)

        alike = [s for s in known if (s.height, s.width) == (blocks.rows, blocks.columns)]
        if not alike:
            return default_layout(out, inner, blocks)
        layout = known[min(alike, key=apart)]
        fitting = block_sparse.fits(layout, out, inner, blocks.rows, blocks.columns)
        return layout if fitting else default_layout(out, inner, blocks)

    return choose


def lowering(weight: Array, pattern: str, choose: LayoutChooser = default_layout) -> Lowering:
    """How a weight [out, in] that is zero outside of its blocks is written."""
    rows, columns, _ = block_sparse.parsed(pattern)
    blocks = block_sparse.find(weight, rows, columns)
    out, inner = weight.shape
    return Lowering(blocks, choose(out, inner, blocks))


def product(shape: Shape, layout: str, copies: int) -> bytes:
    """An ONNX file with products of one shape and layout, each with its own weights and input."""
    from onnx import TensorProto, helper

    graph = Graph(np.random.default_rng(0))
    names = [f"x{copy}" for copy in range(copies)]
    ends = [graph.linear(name, shape.inner, shape.out, bias=True) for name in names]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size]) for name in values]
        for values, size in ((names, shape.inner), (ends, shape.out))
    )
    whole = helper.make_graph(graph.nodes, "product", inputs, outputs, graph.weights)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(whole, opset_imports=opset, ir_version=IR_VERSION)
    if layout != DENSE:
        opened = ir.serde.deserialize_model(model)
        lower(opened, {name: _random_lowering(shape, layout, graph.random) for name in graph.products})
        model = ir.serde.serialize_model(opened)
    return bytes(model.SerializeToString())


def _random_lowering(shape: Shape, layout: str, random: np.random.Generator) -> Lowering:
    """Random weights in random blocks."""
    across = math.ceil(shape.inner / shape.width)
    kept = tuple(
        tuple(sorted(random.choice(across, shape.kept, replace=False).tolist()))
        for _ in range(math.ceil(shape.out / shape.height))
    )
    blocks = Blocks(shape.height, shape.width, kept)
    values = random.standard_normal((shape.out, shape.inner)).astype(np.float32)
    return Lowering(blocks, layout, sparse=values * blocks.mask(shape.out, shape.inner))


def runner(file: bytes, shape: Shape, threads: int) -> timing.Runner:
    """A call that runs such a file once, with inputs and outputs bound beforehand."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    loaded = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    binding = loaded.io_binding()
    random = np.random.default_rng(1)
    for value in loaded.get_inputs():
        x = random.standard_normal((shape.rows, shape.inner)).astype(np.float32)
        binding.bind_cpu_input(value.name, x)
    for value in loaded.get_outputs():
        binding.bind_output(value.name, "cpu")
    return lambda: loaded.run_with_iobinding(binding)
