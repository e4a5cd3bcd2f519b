"""A float32 ONNX file as one whose products run in half precision; its inputs and outputs stay float32.

Weights, products, biases and what only moves or transforms one product's output are float16. Everything else
stays float32 between casts: norms, softmax, reductions and sums of two values, so the residual stream is
never rounded. Which products can be halved is decided by running the file: where a value comes within an
eighth of the largest float16, or so small that float16 has no more digits, the node around it stays as well.
Products of codes (Q/DQ, integers) keep what they read. Strongly typed engines compute in what is written.

onnxruntime on a processor runs such a file by casting to float32, and leaves out whatever casts follow on
each other, so that nothing is rounded and nothing overflows there. `answers` runs it with every float16 value
held as one, which is what a GPU that adds up in float32 computes.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compress import profiles
from compress.errors import CompressError
from compress.export.backends.backend import Array
from compress.export.backends.onnxruntime import CPU, OrtRunner
from compress.export.edge import bundle
from compress.export.onnx.writer import ONE_FILE_BYTES, save
from compress.export.output_dir import Finished, parts
from compress.ir import Half
from compress.report import render

MAX_MAGNITUDE = 65504 / 8  # other inputs than those that were tried may be larger
MIN_NORMAL = 2.0**-14  # below it float16 loses digits
TOLERANCE = 1e-2  # relative to the largest output
PRODUCTS = {"Gemm", "MatMul", "Conv"}
SUMS = {"Add", "Sub"}
ELEMENTWISE = {"Mul", "Relu", "Gelu", "Sigmoid", "Tanh", *SUMS}
LAYOUT_OPS = {
    *("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Concat"),
    *("Identity", "Flatten", "Gather"),
}


def export(output: Finished, destination: Path) -> list[Path]:
    """The compressed model as `model.onnx` in half precision; the report states so from then on.

    Raises:
        CompressError: as in `make`.
    """
    written, half = make(output, destination)
    render.write(output.report.model_copy(update={"half": half}), output.directory / "compression")
    return written


def make(output: Finished, destination: Path) -> tuple[list[Path], Half]:
    """The compressed model as `model.onnx` in half precision, and its entry in the report.

    Raises:
        CompressError: the target does not compute in fp16, or the outputs are not those of the
            verified file.
    """
    profile = profiles.load(output.report.target.name)
    if "fp16" not in profile.precisions:
        raise CompressError(
            f"{profile.name} computes in {', '.join(profile.precisions)}; a file in fp16 would be cast back "
            "there and gain nothing. Use --to onnx"
        )
    made = destination / "model.onnx"
    threads = output.recipe.bench.threads
    with OrtRunner(output.compressed, threads=threads) as reference:
        examples = list(bundle.examples(output.compressed, reference, output.report.target.shapes, reference))
        expected = [reference.infer(inputs) for inputs in examples]
    found = convert(output.compressed, made, examples)
    apart = distance(expected, emulated_outputs(made, examples))
    if not apart <= TOLERANCE:
        raise CompressError(
            f"in fp16 the outputs differ from {output.compressed} by up to {apart:.3g} of the largest one "
            f"(tolerance {TOLERANCE:g}); the file is not delivered.\n  Use --to onnx, which was verified."
        )
    half = Half(
        weight_bytes=weight_bytes(made),
        file_bytes=sum(path.stat().st_size for path in parts(made)),
        halved=len(found.halved),
        kept=found.kept,
        distance=apart,
        tolerance=TOLERANCE,
    )
    return parts(made), half


def distance(expected: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]) -> float:
    """The largest difference, relative to the largest value of each output (at least 1)."""
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        for name, value in one.items():
            apart = float(np.abs(other[name] - value).max()) / max(float(np.abs(value).max()), 1.0)
            worst = max(worst, apart if np.isfinite(apart) else np.inf)
    return worst


def emulated_outputs(file: Path, examples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Outputs of a file on this processor with every float16 value rounded to float16."""
    model = onnx.load(file)
    with _opened(_shown(model)) as session:
        halves = {value.name for value in session.get_outputs() if value.type == "tensor(float16)"}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        names = list(node.output)
        for index, name in enumerate(names):
            if name in halves:
                node.output[index] = f"{name}/free"
        nodes.append(node)
        for name in names:
            if name in halves:  # one node in float16 among casts would be made float32; two are left alone
                nodes.append(helper.make_node("Identity", [f"{name}/free"], [f"{name}/held"]))
                nodes.append(helper.make_node("Identity", [f"{name}/held"], [name]))
    _put(model.graph, nodes)
    with _opened(model) as session:
        takes = [value.name for value in session.get_inputs()]
        gives = [value.name for value in session.get_outputs()]
        feeds = ({name: inputs[name] for name in takes} for inputs in examples)
        return [dict(zip(gives, session.run(gives, feed), strict=True)) for feed in feeds]


def weight_bytes(file: Path) -> int:
    """Bytes of everything that a file stores."""
    stored = onnx.load(file).graph.initializer
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in stored)


@dataclass(frozen=True)
class Halved:
    """Weights, or outputs, of the products in float16, and of those that stay in float32."""

    halved: tuple[str, ...]
    kept: tuple[str, ...]


def convert(file: Path, destination: Path, examples: Sequence[Mapping[str, Array]]) -> Halved:
    """Write `file` with its products in half precision.

    Args:
        file: float32, of standard operators.
        destination: appears whole or not at all.
        examples: inputs; nodes that may overflow on them stay in float32.
    """
    model = onnx.load(file)
    rewrite = _Rewrite(model.graph, _largest(model, examples))
    rewrite.choose()
    rewrite.write()
    model.graph.ClearField("value_info")
    save(ir.serde.deserialize_model(model), destination)
    return Halved(tuple(rewrite.halved), tuple(rewrite.kept))


def _largest(model: ModelProto, examples: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """The largest magnitude of every float32 value that is computed or given, over the examples."""
    found: dict[str, float] = {}
    with _opened(_shown(model)) as session:
        takes = [value.name for value in session.get_inputs()]
        gives = [value.name for value in session.get_outputs()]
        for inputs in examples:
            feed = {name: inputs[name] for name in takes}
            values = {**feed, **dict(zip(gives, session.run(gives, feed), strict=True))}
            for name, value in values.items():
                if isinstance(value, np.ndarray) and value.dtype == np.float32:
                    size = float(np.abs(value).max()) if value.size else 0.0
                    found[name] = max(found.get(name, 0.0), size)
    return found


def _shown(model: ModelProto) -> ModelProto:
    """A copy of a model that gives every value that it computes."""
    shown = ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in shown.graph.output}
    names = [name for node in shown.graph.node for name in node.output if name and name not in known]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return shown


@contextmanager
def _opened(model: ModelProto) -> Iterator[onnxruntime.InferenceSession]:
    """A model in onnxruntime as it is written: nothing is fused or left out."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="compress-") as place:
        path = Path(place) / "model.onnx"
        onnx.save(model, path, save_as_external_data=model.ByteSize() > ONE_FILE_BYTES)
        yield onnxruntime.InferenceSession(str(path), options, providers=[CPU])


def _put(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Give a graph other nodes, its own among them."""
    whole = GraphProto(node=nodes)
    graph.ClearField("node")
    graph.node.extend(whole.node)


@dataclass
class _Rewrite:
    """Which nodes of a graph are halved, and the graph with the casts around them.

    `born` are values that halved nodes give; `largest` holds the float32 values.
    """

    graph: GraphProto
    largest: dict[str, float]
    halved: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    born: set[str] = field(default_factory=set)
    chosen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        floats = (tensor for tensor in self.graph.initializer if tensor.data_type == TensorProto.FLOAT)
        self.constants = {tensor.name: tensor for tensor in floats}
        for name, tensor in self.constants.items():
            values = np.abs(numpy_helper.to_array(tensor))
            self.largest[name] = float(values.max()) if values.size else 0.0
        self.captured = {name for node in self.graph.node for name in _captured(node)}
        self.coded = {
            name for node in self.graph.node if node.op_type == "DequantizeLinear" for name in node.output
        }

    def choose(self) -> None:
        """Decide for every node, in the order of the graph."""
        for place, node in enumerate(self.graph.node):
            halves = self._halves(node)
            if halves:
                self.chosen.add(place)
                self.born |= {name for name in node.output if name in self.largest}
            if node.op_type in PRODUCTS and node.output[0] in self.largest:
                stored = [name for name in node.input if name in self.constants]
                (self.halved if halves else self.kept).append((stored or list(node.output))[0])

    def _halves(self, node: NodeProto) -> bool:
        reads = [name for name in node.input if name in self.largest]
        values = [*reads, *(name for name in node.output if name in self.largest)]
        if node.domain or not reads or not all(map(self._fits, values)):
            return False
        if self.captured & set(node.output):
            return False
        moving = [name for name in reads if name not in self.constants]
        born = all(name in self.born for name in moving)
        if node.op_type in PRODUCTS:
            return not self.coded & set(reads)
        if node.op_type == "Gather" and not moving:
            return True
        if node.op_type in ELEMENTWISE:
            return bool(moving) and born and not (node.op_type in SUMS and len(moving) > 1)
        return node.op_type in LAYOUT_OPS and bool(moving) and born

    def _fits(self, name: str) -> bool:
        """Whether float16 holds a value with all of its digits."""
        size = self.largest[name]
        return size == 0 or MIN_NORMAL <= size <= MAX_MAGNITUDE

    def write(self) -> None:
        """Put the casts in, and store halved weights as such."""
        nodes, self.cast = list(self.graph.node), dict[str, str]()
        shown = {value.name for value in self.graph.output}
        read_whole = set(self.captured) | shown
        for place, node in enumerate(nodes):
            if place not in self.chosen:
                read_whole |= set(node.input)
        self.names = {
            name: f"{name}/half"
            for name in (*self.constants, *self.born)
            if name in (read_whole if name in self.constants else shown)
        }
        written: list[NodeProto] = []
        for place, node in enumerate(nodes):
            halves = place in self.chosen
            for index, name in enumerate(node.input):
                if name in self.largest and halves != (name in self.born):
                    node.input[index] = self._crossed(name, written, halves=halves)
                elif halves and name in self.names:
                    node.input[index] = self.names[name]
            written.append(node)
            for index, name in enumerate(node.output):
                if halves and name in self.names:
                    node.output[index] = self.names[name]
                    written.append(_cast(self.names[name], name, TensorProto.FLOAT))
        self._store({name for node in written for name in node.input} | read_whole)
        _put(self.graph, written)

    def _crossed(self, name: str, written: list[NodeProto], *, halves: bool) -> str:
        """The name of a value on the other side; its cast is written where it is first needed."""
        if name in self.constants:
            return self.names.get(name, name) if halves else name
        if not halves and name in self.names:
            return name  # an output of the graph, cast where it is born
        made = f"{name}/{'half' if halves else 'float'}"
        if made not in self.cast:
            self.cast[made] = name
            kind = TensorProto.FLOAT16 if halves else TensorProto.FLOAT
            written.append(_cast(self.names.get(name, name), made, kind))
        return made

    def _store(self, read: set[str]) -> None:
        """Weights in the types that are read."""
        halved = {name for place in self.chosen for name in self.graph.node[place].input}
        kept = {tensor.name: tensor for tensor in self.graph.initializer if tensor.name in read}
        for name, tensor in self.constants.items():
            own = self.names.get(name, name)
            if own in halved:
                kept[own] = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), own)
        whole = GraphProto(initializer=kept.values())
        self.graph.ClearField("initializer")
        self.graph.initializer.extend(whole.initializer)


def _cast(name: str, made: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [name], [made], name=f"{made}/cast", to=kind)


def _captured(node: NodeProto) -> Iterator[str]:
    """What the bodies of a node read, from outside among others."""
    for attribute in node.attribute:
        for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in body.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (value.name for value in body.output)
