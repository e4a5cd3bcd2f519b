"""Inputs for which a quantized file gives the same outputs on every device.

Other processors sum in another order. In a file that quantizes activations, a difference in the last bit can
move a value across a rounding border, which changes all later rounding errors: a tenth of the largest output
and more (see `probes`). Most inputs are far from such borders. Of several random inputs the most stable one
is taken: its outputs change least when the weights are perturbed by as much as float sums may differ.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compress.export.backends.backend import Array
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx import kv_cache
from compress.export.onnx.writer import save

DRAWS = 8  # inputs of a shape
PERTURBED_COPIES = 3  # perturbed files
PERTURBATION = 1e-6  # of every number
QUANTIZING_OPS = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulNBits")


def quantizes(path: Path) -> bool:
    """Whether a file quantizes values at run time."""
    return any(node.op_type in QUANTIZING_OPS for node in ir.load(path).graph)


@contextmanager
def perturbed(path: Path, threads: int) -> Iterator[list[OrtRunner]]:
    """Runners of several copies of a file, each with slightly perturbed float weights."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runners = []
        for seed in range(PERTURBED_COPIES):
            random, model = np.random.default_rng(seed), ir.load(path)
            for name, value in model.graph.initializers.items():
                if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                    stored = value.const_value.numpy()
                    noise = PERTURBATION * random.standard_normal(stored.shape, dtype=np.float32)
                    value.const_value = ir.tensor((stored * (1 + noise)).astype(np.float32), name=name)
            save(model, folder / f"{seed}.onnx")
            runners.append(stack.enter_context(OrtRunner(folder / f"{seed}.onnx", threads)))
        yield runners


def most_stable(
    runner: OrtRunner, others: list[OrtRunner], inputs: Sequence[Mapping[str, Array]]
) -> tuple[Mapping[str, Array], float]:
    """The input on which the runners differ least, and by how much.

    The difference is relative to the largest output (at least 1).
    """
    found = [(_apart(runner, others, one), number) for number, one in enumerate(inputs)]
    least, number = min(found)
    return inputs[number], least


def _apart(runner: OrtRunner, others: list[OrtRunner], inputs: Mapping[str, Array]) -> float:
    expected, worst = runner.infer(inputs), 0.0
    for other in others:
        outputs = other.infer(inputs)
        for name, array in expected.items():
            if not name.startswith(kv_cache.PRESENT):
                largest = max(1.0, float(np.abs(array).max()))
                worst = max(worst, float(np.abs(outputs[name] - array).max()) / largest)
    return worst
