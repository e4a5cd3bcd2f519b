"""The torch model beside its file where products round: each product reads what the file's product reads.

Two correct programs that round agree only until one number is on the other side of a rounding border (see
`export.onnx.probes`). So products are compared one by one: the torch model runs up to a product, what it
would read must be what the file reads, what it makes of the file's input must be what the file answers, and
it goes on with that answer. Every difference is then one of float sums, and the tolerance is the one of files
without rounding.
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
AGAIN = "the file is not shipped. Export again, and report this model if it stays"


class LayerwiseParityRunner:
    """A runner: the torch model, its products in low precision led by those of a file.

    `products` is how many there are, `apart` how far any was from the file's, as a share of the largest
    value there (at least 1).
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
        """How many products in low precision the file has."""
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
        """The outputs of the torch model, as `TorchRunner.infer` gives it.

        Raises:
            CompressError: a product reads or answers something else than in the file.
        """
        seen = self._runner.infer(inputs)
        mask = inputs.get("attention_mask")
        batch = Batch({}, real=None if mask is None else torch.from_numpy(mask).bool())
        waiting: dict[str, list[tuple[Array, Array]]] = {name: [] for name in self.layers}
        for product in self._watched:
            if product.weight not in waiting:
                raise CompressError(
                    f"{product.weight} is in low precision in the exported file and not in torch; {AGAIN}"
                )
            waiting[product.weight].append((seen[product.reads], seen[product.answers]))
        hooks = [
            layer.register_forward_hook(self._led(name, waiting[name], batch))
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

    def _led(self, name: str, waiting: list[tuple[Array, Array]], batch: Batch) -> Hook:
        """A hook that compares one product with the file's and goes on with the answer of the file."""

        def led(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(layer, QuantizedLinear)
            if not waiting:
                raise CompressError(f"the exported file runs {name} less often than torch does; {AGAIN}")
            reads, answers = (torch.from_numpy(part) for part in waiting.pop(0))
            if (reads.numel(), answers.numel()) != (inputs[0].numel(), output.numel()):
                raise CompressError(
                    f"{name} makes {answers.numel()} numbers of {reads.numel()} in the exported file, and "
                    f"{output.numel()} of {inputs[0].numel()} in torch; {AGAIN}"
                )
            # What is padding may be anything in the file, and matters to nothing but the range of bytes.
            given = reads.reshape(inputs[0].shape)
            pairs = (real_rows(inputs[0], batch), real_rows(given, batch))
            self._compare(f"{name} reads", *pairs, parity.TOLERANCE)
            answer = answers.reshape(output.shape)
            self._compare(
                f"{name} answers", layer.forward(given), answer, layer.format.tolerance or parity.TOLERANCE
            )
            return answer

        return led

    def _compare(self, what: str, expected: Tensor, found: Tensor, relative: float) -> None:
        apart = (expected - found).abs()
        share = float(apart.max()) / max(1.0, float(expected.abs().max()))
        if not share <= relative:  # what is no number is not
            place = int(apart.nan_to_num(torch.inf).argmax())
            raise CompressError(
                f"{what} something else in the exported file than in torch: "
                f"{float(found.flatten()[place]):.6g}, not {float(expected.flatten()[place]):.6g}, "
                f"{share:.2g} of the largest apart, tolerance {relative:.2g}; {AGAIN}"
            )
        self.apart = max(self.apart, share)
