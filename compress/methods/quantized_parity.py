"""Compare a quantized torch model with its exported file layer by layer, on the file's own layer inputs.

Two correct programs that round agree only until one value falls on the other side of a rounding threshold
(see `export.onnx.probes`). Layers are therefore compared one by one: the input that torch computes must match
the file's input, the output that torch computes from the file's input must match the file's output, and torch
continues with the file's output. Every remaining difference is one of floating-point summation, so the
tolerance is the one of files without rounding.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from compress.calibration.activation_statistics import real_rows
from compress.errors import CompressError
from compress.export.backends import parity
from compress.export.backends.backend import Array, Tensors
from compress.export.backends.onnxruntime import OrtRunner, TorchRunner
from compress.export.onnx.probes import Watched, watch
from compress.methods.quantized_layers import QuantizedLinear
from compress.tasks.loading import Batch

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
AGAIN = "the file is not shipped. Export again, and report this model if the error persists"


class LayerwiseParityRunner:
    """A runner of the torch model whose quantized layers continue with the outputs of the exported file.

    `products` counts the compared layers. `apart` is the largest absolute difference from the file, relative
    to the largest value of the tensor (at least 1).
    """

    def __init__(self, model: nn.Module, file: Path, tensors: Tensors, *, threads: int) -> None:
        self.layers = {
            f"{owner}.weight": layer
            for owner, layer in model.named_modules()
            if isinstance(layer, QuantizedLinear) and layer.format.rounds_inputs
        }
        self.file, self.threads = file, threads
        self.torch = TorchRunner(model, tensors)
        self.apart = 0.0
        self._open = ExitStack()
        self._watched: tuple[Watched, ...] = ()

    @property
    def products(self) -> int:
        """The number of low-precision products in the file."""
        return len(self._watched)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=self.file.parent))
            copy = Path(folder) / self.file.name
            self._watched = watch(self.file, copy)
            self._runner = stack.enter_context(OrtRunner(copy, self.threads))
            stack.enter_context(self.torch)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of the torch model, as from `TorchRunner.infer`.

        Raises:
            CompressError: the input or the output of a layer differs from the file.
        """
        seen = self._runner.infer(inputs)
        mask = inputs.get("attention_mask")
        batch = Batch({}, real=None if mask is None else torch.from_numpy(mask).bool())
        waiting: dict[str, list[tuple[Array, Array]]] = {name: [] for name in self.layers}
        for product in self._watched:
            if product.weight not in waiting:
                raise CompressError(
                    f"{product.weight} is quantized in the exported file but not in torch; {AGAIN}"
                )
            waiting[product.weight].append((seen[product.reads], seen[product.answers]))
        hooks = [
            layer.register_forward_hook(self._comparing_hook(name, waiting[name], batch))
            for name, layer in self.layers.items()
        ]
        try:
            found = self.torch.infer(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        left = [name for name, more in waiting.items() if more]
        if left:
            raise CompressError(f"the exported file runs {left[0]} more often than torch does; {AGAIN}")
        return found

    def _comparing_hook(self, name: str, waiting: list[tuple[Array, Array]], batch: Batch) -> Hook:
        """A forward hook that compares one layer with the file and returns the file's output."""

        def compare(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(layer, QuantizedLinear)
            if not waiting:
                raise CompressError(f"the exported file runs {name} less often than torch does; {AGAIN}")
            reads, answers = (torch.from_numpy(part) for part in waiting.pop(0))
            if (reads.numel(), answers.numel()) != (inputs[0].numel(), output.numel()):
                raise CompressError(
                    f"{name} maps {reads.numel()} values to {answers.numel()} in the exported file, and "
                    f"{inputs[0].numel()} to {output.numel()} in torch; {AGAIN}"
                )
            # Padded rows may differ in the file; they only affect the dynamic range of the input.
            given = reads.reshape(inputs[0].shape)
            pairs = (real_rows(inputs[0], batch), real_rows(given, batch))
            self._compare(f"the input of {name}", *pairs, parity.TOLERANCE)
            answer = answers.reshape(output.shape)
            self._compare(
                f"the output of {name}",
                layer.forward(given),
                answer,
                layer.format.tolerance or parity.TOLERANCE,
            )
            return answer

        return compare

    def _compare(self, what: str, expected: Tensor, found: Tensor, relative: float) -> None:
        apart = (expected - found).abs()
        share = float(apart.max()) / max(1.0, float(expected.abs().max()))
        if not share <= relative:  # also true for NaN
            place = int(apart.nan_to_num(torch.inf).argmax())
            raise CompressError(
                f"{what} differs between the exported file and torch: "
                f"{float(found.flatten()[place]):.6g} instead of {float(expected.flatten()[place]):.6g}, "
                f"{share:.2g} of the largest value, tolerance {relative:.2g}; {AGAIN}"
            )
        self.apart = max(self.apart, share)
