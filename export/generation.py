"""Decoders at work: token after token from a file with a cache, and what the two phases take.

*Prefill* reads a prompt and gives the first token; its time is the time to first token. *Decode* gives
one more token for every sequence, over a cache of a stated length; its time is the time per token.
"""

from collections.abc import Callable, Mapping

import numpy as np

from compress.errors import CompressError
from compress.export.backends.backend import Array
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx import kv_cache
from compress.export.onnx.kv_cache import IDS, MASK, PAST
from compress.measure import timing
from compress.measure.timing import Comparison
from compress.recipe import Phase

Tick = Callable[[int, int], None]


class Stepwise:
    """A decoder file that reads a part of its input as a prompt and the rest token by token.

    Its output for a whole input must equal that of the model without a cache.
    """

    def __init__(self, runner: OrtRunner, output: str = "logits") -> None:
        self.runner, self.output = runner, output

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The output [batch, tokens, ...] for all tokens, from several runs."""
        tokens = inputs[IDS].shape[1]
        start = max(1, tokens // 2)
        past: dict[str, Array] = {}
        parts = []
        for first, last in [(0, start), *((place, place + 1) for place in range(start, tokens))]:
            new = {IDS: inputs[IDS][:, first:last], MASK: inputs[MASK][:, :last]}
            outputs = self.runner.infer({**new, **past})
            parts.append(outputs[self.output])
            past = following(self.runner, outputs)
        return {self.output: np.concatenate(parts, axis=1)}


def following(runner: OrtRunner, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The past of the next step: the cache that one step returned."""
    return {name: outputs[kv_cache.present(name)] for name in runner.inputs() if name.startswith(PAST)}


def generate(runner: OrtRunner, inputs: Mapping[str, Array], tokens: int, output: str = "logits") -> Array:
    """[batch, tokens] the most likely continuation of prompts that are padded on the left, if at all.

    Raises:
        CompressError: a prompt ends in padding, so that its last column is no token to go on from.
    """
    ids, mask = inputs[IDS], inputs[MASK]
    if not mask[:, -1].all():
        raise CompressError("prompts that end in padding cannot be continued; pad them on the left")
    past: dict[str, Array] = {}
    made = []
    for _ in range(tokens):
        outputs = runner.infer({IDS: ids, MASK: mask, **past})
        ids = outputs[output][:, -1:].argmax(-1)
        made.append(ids)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        past = following(runner, outputs)
    return np.concatenate(made, axis=1)


def inputs_of(runner: OrtRunner, prompt: Mapping[str, Array], phase: Phase) -> dict[str, Array]:
    """What one run of a phase takes: the prompt itself, or one token after a past of its length."""
    return kv_cache.phase_inputs(prompt, phase, runner.inputs(), runner.outputs())


def compare(
    runners: Mapping[str, OrtRunner],
    prompt: Mapping[str, Array],
    phase: Phase,
    *,
    blocks: int,
    block_ms: float,
    threads: int,
    seed: int = 0,
    progress: Tick | None = None,
) -> Comparison:
    """Time one phase of several files in turn; the first one is the baseline.

    Args:
        runners: open files, by name.
        prompt: ids and mask; their length is that of the prompt in prefill, of the past in decode.
        phase: "prefill" for the time to first token, "decode" for the time per token.
        blocks: as in `timing.compare`, as are the rest.
        block_ms: length of a block.
        threads: of the runners.
        seed: of the bootstrap.
        progress: called with blocks done and blocks in all.
    """
    calls = {name: runner.timed(inputs_of(runner, prompt, phase)) for name, runner in runners.items()}
    return timing.compare(
        calls, blocks=blocks, block_ms=block_ms, threads=threads, seed=seed, progress=progress
    )
