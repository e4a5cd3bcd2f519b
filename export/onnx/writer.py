"""A model as an ONNX file of standard operators, in the form that runs fastest in stock onnxruntime.

The program comes from `torch.export` with symbolic batch and tokens. Two translations are ours: linear
layers as Gemm on rows (see `flatten`), and attention without the guard against rows that are masked
throughout. The file is the same, byte for byte, whenever and wherever the same model is exported: no
source lines, paths or stack traces stay in it. torch's older exporter steps in where the first fails.
"""

import inspect
import logging
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from compress import __version__
from compress.errors import CompressError
from compress.export.onnx.flatten import flatten, linear
from compress.export.onnx.sdpa import attention
from compress.ir import Document
from compress.sites.trace import plain_attention

OPSET = 20  # Gelu came with it; onnxruntime 1.17 and later run it
ONE_FILE_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GB; the rest is for the graph
Names = Mapping[str, Mapping[int, str]]
Lower = Callable[[ir.Model], object]
Tensors = Callable[[object], Mapping[str, Tensor]]
Program = torch.export.ExportedProgram


class Exported(Document):
    """How a file came about. `fixed` lists sizes that the model ties to those of the example."""

    exporter: str
    opset: int
    operators: int
    fixed: tuple[str, ...]
    files: tuple[str, ...]
    seconds: float
    note: str | None = None


class _Positional(nn.Module):
    """The model with positional tensors, which returns the outputs of the file in their order."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], tensors: Tensors) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.tensors = tensors
        parameters = inspect.signature(model.forward).parameters
        self.more = {"use_cache": False} if "use_cache" in parameters else {}

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The tensor, or the tensors, that become the outputs of the file."""
        inputs = dict(zip(self.names, tensors, strict=True))
        found = tuple(self.tensors(self.model(**inputs, **self.more)).values())
        return found[0] if len(found) == 1 else found


def export(
    model: nn.Module,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    outputs: Sequence[str] = ("logits",),
    tensors: Tensors | None = None,
    dynamic: Names | None = None,
    lower: Lower | None = None,
) -> Exported:
    """Write `model` to `path`; inputs are named as the model's arguments are.

    Args:
        model: its mode and those of its modules are as before afterwards.
        example: one valid input; only names, types and fixed sizes matter.
        path: appears whole or not at all; weights beyond 2 GB go to `<path>.data`.
        outputs: names of the outputs.
        tensors: the outputs by name, of what the model returns; by default what it holds under these names.
        dynamic: free dimensions, by input: `{"input_ids": {0: "batch", 1: "tokens"}}`. By default
            the first of every input, and the second of matrices of integers.
        lower: changes the finished graph before it is written (see `lowering.lower`).

    Raises:
        CompressError: neither exporter can; names the operator and the module where it can be told.
    """
    free = free_dimensions(example) if dynamic is None else dynamic
    positional = _Positional(model, tuple(example), tensors or _named(outputs))
    return write(positional, example, path, outputs=outputs, dynamic=free, lower=lower)


def write(
    answer: nn.Module,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    outputs: Sequence[str],
    dynamic: Names,
    loose: Names | None = None,
    lower: Lower | None = None,
) -> Exported:
    """Write a module that takes its inputs in order and gives the outputs in order.

    Args:
        answer: `forward(*tensors)`; names of weights lose the prefix `model.`.
        example: its inputs by the names that they get in the file.
        path: as in `export`.
        outputs: names of what it returns, a tensor or a tuple of them.
        dynamic: free dimensions, by input.
        loose: dimensions that the file takes any number for, though the model knows theirs.
        lower: as in `export`.

    Raises:
        CompressError: as in `export`.
    """
    began = time.perf_counter()
    inputs = {name: _widened(tensor, dynamic.get(name, {})) for name, tensor in example.items()}
    with _evaluating(answer), _quiet(), torch.no_grad(), plain_attention():
        try:
            graph, exporter, note = _exported(answer, inputs, dynamic), "torch.export", None
        except CompressError as error:
            try:
                graph = _traced(answer, inputs, dynamic, outputs)
            except Exception as second:
                raise CompressError(
                    f"{error}\n  torch's older exporter fails as well: {_first_line(second)}"
                ) from error
            exporter, note = "torchscript", str(error)
    fixed = _finish(graph, inputs, dynamic, outputs, loose or {})
    if lower is not None:
        lower(graph)
    files = save(graph, path)
    return Exported(
        exporter=exporter,
        opset=graph.opset_imports[""],
        operators=len(graph.graph),
        fixed=fixed,
        files=files,
        seconds=round(time.perf_counter() - began, 3),
        note=note,
    )


def free_dimensions(example: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Batch for every input, tokens for matrices of integers (ids, masks, types).

    >>> free_dimensions({"input_ids": torch.ones(1, 4, dtype=torch.long)})
    {'input_ids': {0: 'batch', 1: 'tokens'}}
    """
    free = {}
    for name, tensor in example.items():
        free[name] = {0: "batch"} if tensor.ndim else {}
        if tensor.ndim == 2 and not tensor.is_floating_point():
            free[name][1] = "tokens"
    return free


TRANSLATIONS: dict[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}


def _exported(answer: nn.Module, inputs: Mapping[str, Tensor], free: Names) -> ir.Model:
    """Through `torch.export`, in the fast form."""
    auto = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(free.get(name, {}), auto) for name in inputs)
    try:
        program = torch.export.export(
            answer, tuple(inputs.values()), dynamic_shapes={"tensors": shapes}, strict=False
        )
    except Exception as error:
        raise CompressError(
            f"the model cannot be traced for export: {_first_line(error)}\n"
            "  Its forward must not branch on values of tensors; `compress inspect` says what was found."
        ) from error
    try:
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table=TRANSLATIONS,
        )
    except Exception as error:
        raise CompressError(_blamed(error, program)) from error
    if made is None:
        raise CompressError("torch.onnx.export returned nothing for a traced program; update torch")
    graph = made.model
    passes.InlinePass()(graph)
    optimizer.fold_constants(graph)
    passes.RemoveUnusedNodesPass()(graph)
    passes.CommonSubexpressionEliminationPass()(graph)
    flatten(graph)
    return graph


def _traced(answer: nn.Module, inputs: Mapping[str, Tensor], free: Names, outputs: Sequence[str]) -> ir.Model:
    """Through the older exporter: one run is recorded."""
    # It writes its graph down when it fails; standard output is for one document.
    torch._C._jit_set_onnx_log_output_stream("stderr")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "traced.onnx"
        torch.onnx.export(
            answer,
            tuple(inputs.values()),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in free.items()},
        )
        return ir.serde.deserialize_model(onnx.load(file))


def _finish(
    model: ir.Model, inputs: Mapping[str, Tensor], free: Names, outputs: Sequence[str], loose: Names
) -> tuple[str, ...]:
    """Names, constants and traces in order; the sizes that stayed fixed though they should be free."""
    graph = model.graph
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)
    # Shapes inside would let onnxruntime fuse what is slower fused, and they cost bytes.
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    fixed = []
    symbols: dict[str, str] = {}
    for value, (name, tensor) in zip(graph.inputs, inputs.items(), strict=True):
        sizes: list[int | str | ir.SymbolicDim] = [_number(size) for size in value.shape or tensor.shape]
        for dim, symbol in free.get(name, {}).items():
            if isinstance(sizes[dim], int):
                fixed.append(f"{name}: {symbol} = {sizes[dim]}")
            else:
                symbols[str(sizes[dim])] = symbol
                sizes[dim] = symbol
        for dim, symbol in loose.get(name, {}).items():
            sizes[dim] = symbol
        value.shape, value.name = ir.Shape(sizes), name
    if any(": batch = " in words for words in fixed):
        raise CompressError(
            f"the model works for one batch size only ({'; '.join(fixed)}); its forward must not write "
            "the batch size down as a number"
        )
    for output, name in zip(graph.outputs, outputs, strict=True):
        output.name = name
        if output.shape is not None:
            numbers = [_number(size) for size in output.shape]
            known = [size if isinstance(size, int) else symbols.get(str(size)) for size in numbers]
            output.shape = ir.Shape(known)
    passes.ClearMetadataAndDocStringPass()(model)
    for name in [name for name in graph.initializers if name.startswith("model.")]:
        weight = graph.initializers.pop(name)
        weight.name = name.removeprefix("model.")
        graph.register_initializer(weight)
    model.producer_name, model.producer_version = "compress", __version__
    model.metadata_props["compress"] = __version__
    return tuple(fixed)


def _number(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """A size that tracing fixed is a number, though torch writes it as a symbol of that name."""
    words = str(size)
    return int(words) if words.isdecimal() else size


def save(model: ir.Model, path: Path) -> tuple[str, ...]:
    """Write the file, check it, and only then give it its name.

    Raises:
        CompressError: the graph is not valid ONNX.
    """
    weight_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    data = None if weight_bytes < ONE_FILE_BYTES else f"{path.name}.data"
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        ir.save(model, work / path.name, external_data=data)
        try:
            onnx.checker.check_model(str(work / path.name))
        except onnx.checker.ValidationError as error:
            raise CompressError(f"the exported file is not valid ONNX: {_first_line(error)}") from error
        names = (path.name,) if data is None else (data, path.name)
        for name in names:  # the file that names the other comes last
            (work / name).replace(path.parent / name)
        if data is None:
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return tuple(sorted(names))


def _named(outputs: Sequence[str]) -> Tensors:
    """Picks outputs by name; a lone tensor, or the first of a tuple without names, is the first output."""

    def pick(output: object) -> dict[str, Tensor]:
        found = {name: _output(output, name, position) for position, name in enumerate(outputs)}
        missing = [name for name, tensor in found.items() if not isinstance(tensor, Tensor)]
        if missing:
            raise CompressError(
                f"the model returns {type(output).__name__} without {missing[0]!r}; "
                "say which tensors to keep with `tensors`"
            )
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}

    return pick


def _output(output: object, name: str, position: int) -> object:
    """One output of a model: by name, else by position; None where there is none."""
    if isinstance(output, Tensor):
        return output if position == 0 else None
    found = getattr(output, name, None)
    if found is None and isinstance(output, Mapping):
        return output.get(name)
    if found is None and isinstance(output, (tuple, list)):
        return output[position] if position < len(output) else None
    return found


def _widened(tensor: Tensor, free: Mapping[int, str]) -> Tensor:
    """The tensor twice along free dimensions of 1, which tracing would take for fixed."""
    for dim in free:
        if tensor.shape[dim] == 1:
            tensor = torch.cat([tensor, tensor], dim)
    return tensor


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules, and the modes that they had afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their own deprecations, and log what they skip."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _blamed(error: Exception, program: Program) -> str:
    """The operator that has no translation and the module that calls it."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = " ".join(str(part) for part in chain)
    if "No ONNX function" not in text:
        return f"the model cannot be written as ONNX: {_first_line(chain[-1])}"
    # The exporter splits operators into simpler ones first, and complains about those.
    for node in (*program.graph.nodes, *program.run_decompositions().graph.nodes):
        words = str(node.target)
        found = re.search(rf"(?<![\w.]){re.escape(words.rpartition('.')[0])}(?![\w])", text)
        if node.op == "call_function" and "." in words and found:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            place = stack[-1][0].removeprefix("model.") if stack else "the model"
            return (
                f"ONNX has no translation for operator {words}, which {place} calls.\n"
                "  Write that module with standard operators, or replace it before compressing."
            )
    return f"the model cannot be written as ONNX: {_first_line(chain[-1])}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
