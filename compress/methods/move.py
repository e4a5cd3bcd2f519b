"""The seam for moves: what one does to a site, its weights, its layers and its files.

A move is one module of this folder with a subclass of `Move` as `MOVE`, and one line in `formats.MOVES`,
which states its facts. An option may hold parts of several moves (a pattern, a rank, a number format); each
move treats its own part: what makes zeros or factors comes before what rounds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.core.fakequant import Quantized
from compress.ir import Option, Site

if TYPE_CHECKING:
    import onnx_ir as ir

    from compress.calibration.activation_statistics import Statistics
    from compress.export.backends.backend import Capabilities
    from compress.export.backends.torch_kernels import Kernel
    from compress.export.onnx.quantized import GraphWriter
    from compress.methods.quantized_layers import Place, QuantizedLinear
    from compress.sites.prune import Removal


@dataclass(frozen=True)
class WeightUnderOption:
    """One matrix after some parts of an option.

    Attributes:
        values: [out, in] float64 that the layer computes with.
        shift: [out] what its bias gains.
        error: added squared output error relative to the dense output about its mean.
        factors: L [out, rank] and R [rank, in], where `values` holds their product.
        codes: what `values` are stored as, where they are in a number format.
    """

    values: Tensor
    shift: Tensor
    error: float = 0.0
    factors: tuple[Tensor, Tensor] | None = None
    codes: Quantized | None = None

    @classmethod
    def dense(cls, weight: Tensor) -> "WeightUnderOption":
        """The matrix before any part."""
        return cls(weight, torch.zeros(len(weight), dtype=weight.dtype))

    def error_with(self, more: float) -> float:
        """The error together with that of another part."""
        return 1 - (1 - min(self.error, 1.0)) * (1 - min(more, 1.0))


@dataclass(frozen=True)
class InputStatistics:
    """What a matrix is solved against.

    Attributes:
        second: [in, in] `E[x x^T]` of its inputs, not centered.
        mean: [in] `E[x]`; zeros where the bias must not change.
        damping: relative to each diagonal entry of `second`.
        saliency: [samples, rows, columns] effects of tiles of the matrix, where they were collected.
    """

    second: Tensor
    mean: Tensor
    damping: float
    saliency: Tensor | None = None


class Move:
    """One thing that may be done to a site; a subclass overrides what it brings."""

    def options(self, site: Site, runtime: "Capabilities", blocks: Sequence[str]) -> list[Option]:
        """What to try on a site; `blocks` are the block patterns that pay on the runtime."""
        return []

    def joint_options(
        self, site: Site, runtime: "Capabilities", blocks: Sequence[str], moves: Sequence[str]
    ) -> list[Option]:
        """What to try together with the other moves that were asked for."""
        return []

    def applies(self, option: Option) -> bool:
        """Whether a part of the option is this move's."""
        raise TypeError(f"{type(self).__name__} does not say which options are its own")

    def solve(self, option: Option, made: WeightUnderOption, inputs: InputStatistics) -> WeightUnderOption:
        """The matrix with this move's part of the option, solved so that outputs change least."""
        raise TypeError(f"{type(self).__name__} does not say what becomes of a weight")

    def column_order(
        self, option: Option, site: Site, weight: Tensor, inputs: InputStatistics
    ) -> Tensor | None:
        """An order of the writer's columns to try, where their neighborhood matters; else None."""
        return None

    def from_twin(self, site: Site, twin: "Removal", statistics: "Statistics") -> "Removal":
        """The compressed site from that in the format with the same codes (`NumberFormat.codes_of`)."""
        raise TypeError(f"{type(self).__name__} shares its codes with no other format")

    def layer(self, dense: nn.Linear, place: "Place", *, learn: bool) -> "QuantizedLinear":
        """A layer that computes what a runtime computes, in training as well."""
        from compress.methods.quantized_layers import QuantizedLinear

        return QuantizedLinear(dense, place, learn=learn)

    def write(self, graph: "GraphWriter", node: "ir.Node", name: str, codes: Quantized) -> "ir.Value":
        """Write one product in place of a Gemm into an ONNX graph, and return its output."""
        raise TypeError(f"{type(self).__name__} has no product in ONNX")

    def torch_kernel(self, option: Option) -> "Kernel | None":
        """The kernel that torch runs on a GPU for an option, None where it has none."""
        return None
