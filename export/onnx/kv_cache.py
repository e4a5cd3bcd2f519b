"""The key-value cache of a decoder file as arrays: its names, the empty one of a prompt, one step.

A decoder file takes `past_key_values.<layer>.key` and `.value` and gives `present.<layer>.key` and
`.value`, both [batch, heads, tokens so far, width]. Sizes are read from the outputs, which state them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAST = "past_key_values."
PRESENT = "present."
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"

Array = NDArray[Any]
Sizes = Mapping[str, tuple[int | str | None, ...]]


def present(name: str) -> str:
    """The output that is the input `name` of the next step.

    >>> present("past_key_values.0.key")
    'present.0.key'
    """
    return f"{PRESENT}{name.removeprefix(PAST)}"


def widths(inputs: Mapping[str, object], outputs: Sizes) -> dict[str, tuple[int, int]]:
    """Heads and width of every cache input of a file; empty for a file without a cache."""
    found = {}
    for name in inputs:
        if name.startswith(PAST):
            shape = outputs[present(name)]
            found[name] = int(shape[1] or 0), int(shape[3] or 0)
    return found


def positions(mask: Array, tokens: int) -> Array:
    """[batch, tokens] how many real tokens stand before each of the last `tokens` ones."""
    counted = np.maximum(mask.astype(np.int64).cumsum(-1) - 1, 0)
    return np.ascontiguousarray(counted[:, mask.shape[1] - tokens :])


def complete(inputs: Mapping[str, Array], names: Mapping[str, object], outputs: Sizes) -> dict[str, Array]:
    """`inputs` of a decoder with what follows from them: positions, and an empty past for a prompt.

    Args:
        inputs: ids and mask at least; what is given stays.
        names: the inputs of the file.
        outputs: shapes of the outputs of the file.
    """
    known = dict(inputs)
    if IDS not in known or MASK not in known:
        return known
    batch, tokens = known[IDS].shape
    for name, (heads, width) in widths(names, outputs).items():
        known.setdefault(name, np.zeros((batch, heads, 0, width), dtype=np.float32))
    if POSITIONS in names and POSITIONS not in known:
        known[POSITIONS] = positions(known[MASK], tokens)
    return known


def step(ids: Array, past: int, names: Mapping[str, object], outputs: Sizes) -> dict[str, Array]:
    """Inputs for one new token of every sequence, each of which holds `past` tokens already.

    The cache is noise: what a step costs does not depend on what it holds.

    Args:
        ids: [batch, 1] the new tokens.
        past: tokens in the cache.
        names: the inputs of the file.
        outputs: shapes of the outputs of the file.
    """
    random = np.random.default_rng(0)
    known: dict[str, Array] = {IDS: ids, MASK: np.ones((len(ids), past + ids.shape[1]), dtype=np.int64)}
    for name, (heads, width) in widths(names, outputs).items():
        known[name] = random.standard_normal((len(ids), heads, past, width)).astype(np.float32)
    return complete(known, names, outputs)


def phase_inputs(
    prompt: Mapping[str, Array], phase: str, names: Mapping[str, object], outputs: Sizes
) -> dict[str, Array]:
    """What one run of a phase takes: the prompt in "prefill", one token after its length in "decode"."""
    if phase == "prefill":
        return complete(prompt, names, outputs)
    ids = prompt[IDS]
    return step(np.ascontiguousarray(ids[:, -1:]), ids.shape[1], names, outputs)
