"""Post-training 8 and 4 bits, ours beside onnxruntime's own quantizer, on every product of a model."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from compress import bench, quantize
from compress.core import fakequant, ranges
from compress.core.fakequant import Precision
from compress.export import quantized
from compress.export.onnx import export, save
from compress.export.runners import OrtRunner
from compress.task import Batch, Task, load_task

Row = dict[str, object]


def run(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Post-training quantization of all products, ours and onnxruntime's: score, bytes, interleaved time."""
    model = None if arguments.model is None else str(arguments.model)
    data = None if model is None else str(arguments.model / "train.csv")
    task = load_task(model, data, test=None if model is None else str(arguments.model / "dev.csv"))
    files = {"float32": out / "dense.onnx"}
    example = task.example(1, arguments.tokens)
    export(task.model, example, files["float32"], output_name=task.output_name, logits=task.logits)
    batches = list(task.batches("calibration", 32, 512))
    files |= _ours(task, batches, files["float32"], out) | _theirs(task, batches, files["float32"], out)
    runners = {name: OrtRunner(path, 1) for name, path in files.items()}
    inputs = {name: tensor.numpy() for name, tensor in example.items()}
    timed = bench.compare({name: runner.timed(inputs) for name, runner in runners.items()}, block_ms=20)
    rows: list[Row] = []
    for name, runner in runners.items():
        ratio = timed.ratio(name)

        def run(feed: dict[str, np.ndarray], runner: OrtRunner = runner) -> np.ndarray:
            return runner.infer(feed)[task.output_name]

        rows.append(
            {
                "how": name,
                "score": round(task.score(run), 4),
                "divergence": round(_divergence(task, run), 6),
                "file_mb": round(files[name].stat().st_size / 1e6, 2),
                "speedup": round(ratio.value, 3),
                "low": round(ratio.low, 3),
                "high": round(ratio.high, 3),
                "products": dict(_products(files[name])),
            }
        )
    return rows


def _products(path: Path) -> Counter[str]:
    """How many products of each kind a file holds."""
    kinds = ("Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "QuantizeLinear", "DynamicQuantizeLinear")
    return Counter(node.op_type for node in onnx.load(path).graph.node if node.op_type in kinds)


def _divergence(task: Task, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> float:
    """Mean divergence from the dense model over the test split."""
    total = samples = 0.0
    for batch in task.batches("test", 32):
        with torch.inference_mode():
            dense = task.logits(task.model(**batch.inputs))
        found = torch.from_numpy(run({name: value.numpy() for name, value in batch.inputs.items()}))
        total += len(dense) * float(task.divergence(found, dense, batch))
        samples += len(dense)
    return total / samples


def _ours(task: Task, batches: Sequence[Batch], dense: Path, out: Path) -> dict[str, Path]:
    """Every product rounded with the moments of its input, and by rounding to the nearest."""
    weights = quantized.product_weights(ir.load(dense))
    seen = quantize.observe(task, weights, batches)
    files = {}
    kinds: tuple[Precision, ...] = ("int8-dynamic", "int8-static", "int4")
    for kind in kinds:
        for how in ("GPTQ", "nearest"):
            graph = ir.load(dense)
            codes = {}
            for name in weights:
                layer = task.model.get_submodule(name.removesuffix(".weight"))
                span = ranges.span(seen[name].histogram, "mse") if kind == "int8-static" else None
                if how == "nearest":
                    codes[name] = fakequant.nearest(layer.weight.detach(), kind, span)
                    continue
                place, _ = quantize.round_linear(layer, kind, seen[name].second, seen[name].mean, span=span)
                codes[name] = place.quantized
                if place.bias is not None:
                    bias = graph.graph.initializers[name.removesuffix("weight") + "bias"]
                    bias.const_value = ir.tensor(place.bias.numpy(), name=bias.name)
            quantized.lower(graph, codes)
            files[f"ours {kind} {how}"] = path = out / f"{kind}-{how}.onnx"
            save(graph, path)
    return files


class _Reader(quantization.CalibrationDataReader):
    """Calibration batches as onnxruntime's quantizer asks for them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.left = [{name: value.numpy() for name, value in batch.inputs.items()} for batch in batches]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop(0) if self.left else None


def _theirs(task: Task, batches: Sequence[Batch], dense: Path, out: Path) -> dict[str, Path]:
    """The quantizer of onnxruntime on the products with weights, as it comes and as its manual advises."""
    ready = out / "ready.onnx"
    quant_pre_process(dense, ready, skip_symbolic_shape=True)
    files = {}
    linear = ["Gemm", "MatMul"]
    for words, options in (
        ("default", {}),
        ("by channel", {"per_channel": True}),
        ("by channel, 7 bits", {"per_channel": True, "reduce_range": True}),
    ):
        path = files[f"onnxruntime dynamic {words}"] = out / f"dynamic-{len(files)}.onnx"
        quantization.quantize_dynamic(ready, path, op_types_to_quantize=linear, **options)
        path = files[f"onnxruntime static {words}"] = out / f"static-{len(files)}.onnx"
        products = [node.name for node in onnx.load(ready).graph.node if node.op_type == "Gemm"]
        quantization.quantize_static(
            ready,
            path,
            _Reader(batches),
            op_types_to_quantize=["Gemm"],
            nodes_to_quantize=products,
            activation_type=quantization.QuantType.QUInt8,
            **options,
        )
    return files
