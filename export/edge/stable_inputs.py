"""Inputs that a file which rounds answers the same wherever it runs.

Another processor adds in another order. Where a file rounds to bytes, a last bit that differs may turn a
value between two bytes into the other one, and with it the whole answer into another draw of rounding
errors (see `watch`): a tenth of the largest answer and more. Most inputs are not at such a border. Of
several that are drawn the steadiest is taken: its answers move the least while the numbers of the file
are changed by as much as float sums may differ.
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
COPIES = 3  # changed files
CHANGE = 1e-6  # of every number
ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulNBits")


def rounds(path: Path) -> bool:
    """Does a file turn values into bytes while it runs?"""
    return any(node.op_type in ROUNDING for node in ir.load(path).graph)


@contextmanager
def changed(path: Path, threads: int) -> Iterator[list[OrtRunner]]:
    """The file several times, each with all its stored float numbers a little different."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runners = []
        for seed in range(COPIES):
            random, model = np.random.default_rng(seed), ir.load(path)
            for name, value in model.graph.initializers.items():
                if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                    stored = value.const_value.numpy()
                    noise = CHANGE * random.standard_normal(stored.shape, dtype=np.float32)
                    value.const_value = ir.tensor((stored * (1 + noise)).astype(np.float32), name=name)
            save(model, folder / f"{seed}.onnx")
            runners.append(stack.enter_context(OrtRunner(folder / f"{seed}.onnx", threads)))
        yield runners


def steadiest(
    runner: OrtRunner, others: list[OrtRunner], inputs: Sequence[Mapping[str, Array]]
) -> tuple[Mapping[str, Array], float]:
    """The input whose answers the other runners give, too, and how far apart they are at most.

    The distance is a share of the largest answer (at least 1).
    """
    found = [(_apart(runner, others, one), number) for number, one in enumerate(inputs)]
    least, number = min(found)
    return inputs[number], least


def _apart(runner: OrtRunner, others: list[OrtRunner], inputs: Mapping[str, Array]) -> float:
    expected, worst = runner.infer(inputs), 0.0
    for other in others:
        answers = other.infer(inputs)
        for name, answer in expected.items():
            if not name.startswith(kv_cache.PRESENT):
                largest = max(1.0, float(np.abs(answer).max()))
                worst = max(worst, float(np.abs(answers[name] - answer).max()) / largest)
    return worst
