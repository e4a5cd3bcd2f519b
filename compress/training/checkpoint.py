"""Write a file of named tensors one tensor at a time, so that no two need to be in memory at once.

The format is safetensors: eight bytes with the length of a JSON header, which gives type, shape and offsets
of every tensor, then the tensors. A text, `state`, is stored in the metadata.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its state text, its tensor names and the file to read from."""

    state: str
    names: frozenset[str]
    file: Any

    def read(self, name: str) -> Tensor:
        """One tensor."""
        found: Tensor = self.file.get_tensor(name)
        return found


def write(
    path: Path,
    state: str,
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
) -> None:
    """Write a checkpoint atomically.

    Args:
        path: replaced once all is written.
        state: text stored with the tensors.
        shapes: floating-point type and shape by name.
        tensors: in the same order; each is requested after the previous one was written.
    """
    header: dict[str, object] = {"__metadata__": {"state": state}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    with half.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for tensor in tensors:
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    half.replace(path)


def open_checkpoint(path: Path, stack: ExitStack) -> Checkpoint | None:
    """Open a checkpoint until the stack closes; None if there is no complete one."""
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        return Checkpoint(file.metadata()["state"], frozenset(file.keys()), file)
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
