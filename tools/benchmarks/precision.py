"""Post-training 8 and 4 bits, ours beside onnxruntime's own quantizer, on every product of a model."""

import argparse
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from compress.core import fakequant, ranges
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx import quantized
from compress.export.onnx.writer import export, save
from compress.measure import timing
from compress.methods import quantized_layers
from compress.pipeline import smoothquant
from compress.sites import discovery
from compress.tasks import task as task_module
from compress.tasks.loading import Batch, Task, load_task

Row = dict[str, object]
OURS = {"dynamic": "ours int8-dynamic, smoothed", "static": "ours int8-static, smoothed"}
RULES: tuple[ranges.Rule, ...] = ("mse", "max", "percentile", "entropy")
INPUTS = 32  # of a batch


def run(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Post-training quantization of all products, ours and onnxruntime's: score, bytes, interleaved time.

    Scores are of the test split and, as far as there is one, the validation split, which nothing here has
    seen; differences are paired, input by input.
    """
    model = None if arguments.model is None else str(arguments.model)
    task = load_task(model, data=model)
    files = {"float32": out / "dense.onnx"}
    example = task.example(1, arguments.tokens)
    export(task.model, example, files["float32"], outputs=task.outputs, tensors=task.output_tensors)
    batches = list(task.batches("calibration", INPUTS, 512))
    files |= _ours(task, batches, files["float32"], out, words="")
    smoothed = copy.copy(task)
    smoothed.model = copy.deepcopy(task.model)
    for spot in smoothquant.find_pairs(task, discovery.find_sites(task.model, example).sites, batches):
        smoothquant.apply(smoothed.model, spot, torch.tensor(spot.divide, dtype=torch.float64))
    path = out / "smoothed.onnx"
    export(smoothed.model, example, path, outputs=task.outputs, tensors=task.output_tensors)
    files |= _ours(smoothed, batches, path, out, words=", smoothed")
    files |= _theirs(task, batches, files["float32"], out)
    runners = {name: OrtRunner(path, 1) for name, path in files.items()}
    inputs = {name: tensor.numpy() for name, tensor in example.items()}
    timed = timing.compare({name: runner.timed(inputs) for name, runner in runners.items()}, block_ms=20)
    answers = _answers(task, runners)
    rows: list[Row] = []
    for name, found in answers.items():
        ratio = timed.ratio(name)
        rows.append(
            {
                "how": name,
                "score": round(100 * found.right.mean(), 2),
                "n": len(found.right),
                "divergence": round(float(found.apart.mean()), 6),
                "ours_better_by": _paired(answers, name),
                "file_mb": round(files[name].stat().st_size / 1e6, 2),
                "speedup": round(ratio.value, 3),
                "low": round(ratio.interval.low, 3),
                "high": round(ratio.interval.high, 3),
                "products": dict(_products(files[name])),
            }
        )
    return rows


@dataclass(frozen=True)
class Answers:
    """For every input, whether an answer was right, and its divergence from the dense model's."""

    right: np.ndarray
    apart: np.ndarray


def _answers(task: Task, runners: Mapping[str, OrtRunner]) -> dict[str, Answers]:
    """What files say to every input of the test and the validation split."""
    right: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    apart: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    for split in ("test", "validation"):
        for batch in task.batches(split, INPUTS):
            assert batch.labels is not None
            feed = {name: value.numpy() for name, value in batch.inputs.items()}
            with torch.inference_mode():
                dense = task.logits(task.model(**batch.inputs))
            for name, runner in runners.items():
                found = torch.from_numpy(runner.infer(feed)[task.outputs[0]])
                right[name].append((found.argmax(-1) == batch.labels).numpy())
                apart[name].append(task_module.kl(found, dense).numpy())
    return {name: Answers(np.concatenate(right[name]), np.concatenate(apart[name])) for name in runners}


def _paired(answers: Mapping[str, Answers], name: str) -> str:
    """Points by which ours of the same kind is better than a file of theirs, with its 95 % interval."""
    kind = next((kind for kind in OURS if name.startswith(f"onnxruntime {kind}")), None)
    if kind is None:
        return ""
    better = 100 * (answers[OURS[kind]].right.astype(float) - answers[name].right)
    half = 1.96 * better.std(ddof=1) / len(better) ** 0.5
    return f"{better.mean():.2f} [{better.mean() - half:.2f}, {better.mean() + half:.2f}]"


def _products(path: Path) -> Counter[str]:
    """How many products of each kind a file holds."""
    kinds = ("Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "QuantizeLinear", "DynamicQuantizeLinear")
    return Counter(node.op_type for node in onnx.load(path).graph.node if node.op_type in kinds)


def _ours(task: Task, batches: Sequence[Batch], dense: Path, out: Path, *, words: str) -> dict[str, Path]:
    """Every product rounded with the moments of its input; of a plain model also in ways that are not ours.

    Those are rounding to the nearest, and other rules for the range of an input.
    """
    weights = quantized.product_weights(ir.load(dense))
    seen = quantized_layers.observe(task, weights, batches)
    files = {}

    rounded: dict[tuple[str, str], quantized_layers.Place] = {}

    def round_one(weight: str, kind: str, *, nearest: bool) -> quantized_layers.Place:
        """A product with bytes of each run, whose codes are those of fixed ranges as well, or with 4 bits."""
        layer = task.model.get_submodule(weight.removesuffix(".weight"))
        how = "int4" if kind == "int4" else "int8-dynamic"
        if nearest:
            return quantized_layers.Place(fakequant.nearest(layer.weight.detach(), how))
        if (weight, how) not in rounded:
            found, _ = quantized_layers.round_linear(layer, how, seen[weight].second, seen[weight].mean)
            rounded[weight, how] = found
        return rounded[weight, how]

    def write(name: str, kind: str, rule: ranges.Rule = "mse", *, nearest: bool = False) -> None:
        graph = ir.load(dense)
        codes = {}
        for weight in weights:
            place = round_one(weight, kind, nearest=nearest)
            codes[weight] = place.quantized
            if kind == "int8-static":
                span = ranges.span(seen[weight].histogram, rule)
                codes[weight] = fakequant.packed(kind, codes[weight].codes, codes[weight].step, span)
            if place.bias is not None:
                bias = graph.graph.initializers[weight.removesuffix("weight") + "bias"]
                bias.const_value = ir.tensor(place.bias.numpy(), name=bias.name)
        quantized.lower(graph, codes)
        files[f"{name}{words}"] = path = out / f"ours-{len(files)}{words}.onnx"
        save(graph, path)

    kinds: tuple[str, ...] = ("int8-dynamic", "int8-static", "int4")
    for kind in kinds:
        write(f"ours {kind}", kind)
        if not words:
            write(f"nearest {kind}", kind, nearest=True)
    if not words:
        for rule in RULES[1:]:
            write(f"ours int8-static, range by {rule}", "int8-static", rule)
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
