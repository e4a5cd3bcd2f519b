"""Compile a trained PyTorch model to a budget on a named device, and measure that it was met."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(directory: str | Path, factory: "Callable[[], nn.Module] | None" = None) -> "nn.Module":
    """The compressed model in the output directory of a run, ready to run or to train further.

    Args:
        directory: holds config.json and model.safetensors.
        factory: gives a fresh instance of the original architecture; needed only for a model that is
            none of transformers' own.

    Raises:
        CompressError: a file is missing, damaged, or does not fit the others.
    """
    from compress.export import huggingface

    return huggingface.read(Path(directory), factory)
