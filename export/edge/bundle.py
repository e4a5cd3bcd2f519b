"""An edge bundle: everything that a device which is not here needs to be measured, in one folder.

Both models as ONNX (a speedup needs the dense one too), inputs with the outputs of both here,
`bundle.json` with what was asked, how to time it and the hash of every file, and `verify.py` with
`intervals.py`, which need only numpy and a runtime and write the `measured.json` that
`compress report --merge` takes.
"""

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from compress import __version__, profiles
from compress.errors import CompressError
from compress.export import ort_format
from compress.export.backends import onnxruntime
from compress.export.backends.backend import Array
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.edge import stable_inputs
from compress.export.edge.bundle_schema import Bundle, BundledModel, Device, Pair, identity
from compress.export.onnx import kv_cache
from compress.export.output_dir import Finished, parts
from compress.measure import timing, verify_on_device

EXAMPLES = "examples.npz"
# What runs on the device, by its name there: modules of `compress.measure`.
SCRIPTS = {"verify.py": "verify_on_device.py", "intervals.py": "intervals.py"}
# Operators that hand on which row of a table is meant.
PASSING = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand"}
Precision = Literal["fp32", "fp16", "int8"]


def export_with_ort(output: Finished, destination: Path) -> list[Path]:
    """The bundle with both models in onnxruntime's own format as well, at twice the size."""
    return export(output, destination, with_ort=True)


def export(output: Finished, destination: Path, *, with_ort: bool = False) -> list[Path]:
    """Write the bundle of a finished output; the files of the bundle.

    Raises:
        CompressError: one of the models refuses the inputs that are generated for it.
    """
    if output.report.target.phase == "decode":
        raise CompressError(
            "an edge bundle times one run of the same inputs on both models, which a step over caches of "
            "different widths is not; compress with --phase prefill for a device that is not here"
        )
    models = {"dense": output.dense, "compressed": output.compressed}
    entries = {}
    files: list[Path] = []
    for side, path in models.items():
        files += [Path(shutil.copyfile(part, destination / part.name)) for part in parts(path)]
        converted = destination / f"{path.stem}.ort" if with_ort else None
        if converted is not None:
            files.append(ort_format.convert(path, converted))
        entries[side] = BundledModel(
            onnx=path.name,
            ort=None if converted is None else converted.name,
            sha256=onnxruntime.sha256(path),
            precision=precision_of(path),
        )
    files.append(destination / EXAMPLES)
    write_examples(output, models, destination / EXAMPLES)
    for name, module in SCRIPTS.items():
        files.append(destination / name)
        files[-1].write_bytes((resources.files("compress.measure") / module).read_bytes())
    bundle = describe(output, Pair[BundledModel](**entries), files).model_dump(mode="json", exclude_none=True)
    described = destination / "bundle.json"
    sealed = {**bundle, "digest": verify_on_device.canonical_digest(bundle)}
    described.write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    return [*files, described]


def describe(output: Finished, models: Pair[BundledModel], files: list[Path]) -> Bundle:
    """What `verify.py` must know: the request, the protocol of the proof, and the hash of every file."""
    profile, wanted = profiles.load(output.report.target.name), output.recipe.bench
    return Bundle(
        compress=__version__,
        model=output.report.model,
        asked=output.report.verdict.asked,
        target=Device(
            name=profile.name,
            kind=profile.kind,
            runtime=profile.runtime,
            precision=profile.baseline_precision,
        ),
        shapes=output.report.target.shapes,
        protocol=timing.Protocol(
            blocks=timing.FINAL_BLOCKS * wanted.blocks,
            block_ms=wanted.block_ms,
            threads=wanted.threads,
            seed=output.recipe.search.seed,
        ).model_dump(),
        examples=EXAMPLES,
        models=models,
        files={path.name: verify_on_device.sha256(path) for path in files},
        report=identity(output.report),
    )


def write_examples(output: Finished, models: dict[str, Path], path: Path) -> None:
    """Inputs of several shapes with the outputs of both models, under the names that `verify.py` reads."""
    arrays: dict[str, Array] = {}
    threads = output.recipe.bench.threads
    with (
        OrtRunner(models["dense"], threads=threads) as dense,
        OrtRunner(models["compressed"], threads=threads) as compressed,
    ):
        shapes = output.report.target.shapes
        for number, inputs in enumerate(examples(output.dense, dense, shapes, compressed)):
            arrays |= {f"{number}.in.{name}": value for name, value in inputs.items()}
            for side, runner in (("dense", dense), ("compressed", compressed)):
                outputs = runner.infer(inputs)
                for name in [name for name in outputs if not name.startswith(kv_cache.PRESENT)]:
                    output_array = outputs[name]
                    if not np.isfinite(output_array).all():
                        raise CompressError(
                            f"output {name!r} of the {side} model is not finite; no device can be compared "
                            "with that"
                        )
                    arrays[f"{number}.{side}.{name}"] = output_array
    np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own options


def examples(
    path: Path, runner: OrtRunner, shapes: dict[str, int], judge: OrtRunner
) -> Iterator[dict[str, Array]]:
    """Inputs for a file: at the timed shape, at three shorter inputs, and at three of which two are padded.

    Values are random from a fixed seed; integers stay inside of the tables that they index. Where the file
    of `judge`, which takes the same inputs, quantizes, the most stable of several inputs is used.
    """
    random = np.random.default_rng(0)
    limits = table_rows(path)
    sizes = list(shapes.values())
    batch, length = sizes[0], sizes[1] if len(sizes) == 2 else 1
    wanted = ((batch, length, False), (3, max(2, length // 2), False), (3, length, True))
    if not stable_inputs.quantizes(judge.path):
        for one in wanted:
            yield _inputs(runner, limits, *one, random)
        return
    with stable_inputs.perturbed(judge.path, judge.threads) as others:
        for one in wanted:
            drawn = [_inputs(runner, limits, *one, random) for _ in range(stable_inputs.DRAWS)]
            yield dict(stable_inputs.most_stable(judge, others, drawn)[0])


def _inputs(
    runner: OrtRunner,
    limits: dict[str, int],
    items: int,
    tokens: int,
    padded: bool,
    random: np.random.Generator,
) -> dict[str, Array]:
    inputs = {}
    for name, (kind, shape) in runner.inputs().items():
        if name.startswith(kv_cache.PAST) or name == kv_cache.POSITIONS:
            continue
        free = (items, *[tokens] * len(shape))
        # The first size is the batch; every other one that is free is a length.
        full = [
            size if isinstance(size, int) else next_size for size, next_size in zip(shape, free, strict=False)
        ]
        inputs[name] = _values(kind, full, limits.get(name), random)
        if padded and name == "attention_mask" and len(full) == 2:
            for row in range(1, full[0]):
                inputs[name][row, max(1, full[1] - row * full[1] // 3) :] = 0
    return kv_cache.complete(inputs, runner.inputs(), runner.outputs())


def _values(
    kind: np.dtype[np.generic], shape: list[int], limit: int | None, random: np.random.Generator
) -> Array:
    if np.issubdtype(kind, np.floating):
        return random.standard_normal(shape).astype(kind)
    return np.ones(shape, kind) if limit is None else random.integers(0, limit, shape).astype(kind)


def table_rows(path: Path) -> dict[str, int]:
    """By integer input, how many rows the smallest table has that it picks from."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    origin = {value.name: value.name for value in graph.input}
    rows: dict[str, int] = {}
    for node in graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type == "Gather" and node.input[1] in origin and first in shapes:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            name, found = origin[node.input[1]], shapes[first][axis]
            rows[name] = min(found, rows.get(name, found))
        elif node.op_type in PASSING and first in origin:
            origin[node.output[0]] = origin[first]
        elif node.op_type in {"Cast", "DequantizeLinear"} and first in shapes:
            shapes[node.output[0]] = shapes[first]
    return rows


def precision_of(path: Path) -> Precision:
    """What the matrix products of a file compute in, as far as its nodes and weights show."""
    graph = onnx.load(path, load_external_data=False).graph
    if any("quantize" in node.op_type.lower() or "Integer" in node.op_type for node in graph.node):
        return "int8"
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
    return "fp16" if half else "fp32"
