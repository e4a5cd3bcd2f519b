"""A finished output directory with two tiny models, and measurements of it, without a compilation."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.export.backends import onnxruntime
from compress.export.edge.bundle_schema import Golden, Measurement, Pair, Runtime, Span, Timings, identity
from compress.ir import Budget
from compress.measure import timing
from compress.measure.intervals import paired_ratio
from compress.measure.timing import thin
from compress.recipe import Bench, Recipe, to_toml
from compress.report import render
from compress.report.schema import MOST_SAMPLES
from support.reports import CPU, report

ROWS, LABELS = 20, 3
RASPBERRY = {"model": "Raspberry Pi 5 Model B Rev 1.0", "cpu": "arm 0x41 0xd0b", "machine": "aarch64"}


def write_model(path, width, layers):
    """Token ids and a mask to labels: a table, `layers` products of `width`, a masked mean, a head."""
    random = np.random.default_rng(width)

    def weight(name, *shape):
        values = (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return numpy_helper.from_array(values, name)

    weights = [weight("table", ROWS, width), weight("head", width, LABELS)]
    weights += [weight(f"w{k}", width, width) for k in range(layers)]
    weights.append(numpy_helper.from_array(np.array([1]), "one"))
    weights.append(numpy_helper.from_array(np.array([-1]), "last"))
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x0"])]
    for k in range(layers):
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"y{k}"]))
        nodes.append(helper.make_node("Tanh", [f"y{k}"], [f"x{k + 1}"]))
    nodes += [
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "last"], ["column"]),
        helper.make_node("Mul", [f"x{layers}", "column"], ["kept"]),
        helper.make_node("ReduceMean", ["kept", "one"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask")
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", LABELS])
    graph = helper.make_graph(nodes, "tiny", [ids, mask], [logits], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def write_output(out, *, target=None, asked=None, measured=None, card=False, **more):
    """An output directory of a run for `target` that was not measured; its report."""
    folder = out / "compression"
    (folder / "work").mkdir(parents=True)
    write_model(folder / "work" / "dense.onnx", 192, 6)
    write_model(out / "model.onnx", 16, 1)
    asked = asked or Budget(speedup=2.0)
    target = target or CPU.model_copy(update={"name": "rpi5", "shapes": {"batch": 1, "tokens": 16}})
    recipe = Recipe(target=target.name, budget=asked, bench=Bench(blocks=30, block_ms=2.0))
    (folder / "recipe.toml").write_text(to_toml(recipe))
    found = report(
        asked,
        measured=measured,
        target=target,
        inputs={
            "file_sha256": onnxruntime.sha256(out / "model.onnx"),
            "dense_sha256": onnxruntime.sha256(folder / "work" / "dense.onnx"),
        },
        **more,
    )
    (folder / "report.json").write_text(found.model_dump_json())
    if card:
        (out / "README.md").write_text(render.card(found, name="compress-demo"))
    return found


def measurement(
    found, *, dense_ms=4.0, now_ms=1.6, blocks=30, device=None, runtime=None, energy=None, **more
):
    """What a device might answer to the bundle of a report: every block a little off, as real ones are."""
    random = np.random.default_rng(3)
    times, timings = {}, {}
    for side, ms in (("dense", dense_ms), ("compressed", now_ms)):
        times[side] = tuple(ms * random.uniform(0.98, 1.02, 4) for _ in range(blocks))
        timings[side] = Timings(
            latency_ms=timing.summarize(np.concatenate(times[side])),
            block_medians_ms=tuple(float(np.median(block)) for block in times[side]),
            samples_ms=thin(np.concatenate(times[side]).tolist(), MOST_SAMPLES),
            settled=True,
            energy=energy,
        )
    ratio = paired_ratio(times["dense"], times["compressed"], 0)
    good = Golden(passed=True, max_abs_difference=1e-6, tolerance=1e-3, agreement=1.0, examples=3)
    values = {
        "schema_version": 1,
        "created": "2026-01-02T00:00:00+00:00",
        "report": identity(found),
        "models": Pair[str](dense=found.inputs["dense_sha256"], compressed=found.inputs["file_sha256"]),
        "shapes": found.target.shapes,
        "runtime": runtime or PI_RUNTIME,
        "device": RASPBERRY if device is None else device,
        "golden": Pair[Golden](dense=good, compressed=good),
        "protocol": {"blocks": blocks, "seed": 0, "threads": 1, "threads_asked": 1},
        "ratio": Span(value=ratio.value, low=ratio.interval.low, high=ratio.interval.high),
        "drift": 0.001,
        "timings": Pair[Timings](**timings),
    }
    return Measurement(**(values | more))


PI_RUNTIME = Runtime(
    name="onnxruntime",
    version="1.23.0",
    provider="CPUExecutionProvider",
    kind="cpu",
    threads=1,
    precision="fp32",
    format="onnx",
)
GPU_RUNTIME = PI_RUNTIME.model_copy(
    update={
        "name": "tensorrt",
        "version": "10.3.0",
        "provider": "tensorrt",
        "kind": "gpu",
        "precision": "fp16",
    }
)
