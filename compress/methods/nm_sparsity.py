"""Two zeros in every four weights of a row (2:4), solved together with what makes up for them."""

from collections.abc import Sequence

from torch import Tensor, nn

from compress.core import factorization, nm
from compress.core.support import prepare
from compress.export.backends.backend import Capabilities
from compress.export.backends.torch_kernels import Kernel, SparseLinear, prune_24
from compress.ir import Option, Site
from compress.methods.move import InputStatistics, Move, WeightUnderOption
from compress.sites import permutation

PATTERN = "2:4"


class NmSparsity(Move):
    """2:4 zeros."""

    def options(self, site: Site, runtime: Capabilities, blocks: Sequence[str]) -> list[Option]:
        """The pattern."""
        return [Option(pattern=PATTERN)]

    def applies(self, option: Option) -> bool:
        """Whether the pattern is 2:4, and no rank stands beside it."""
        return option.pattern == PATTERN and not option.rank

    def solve(self, option: Option, made: WeightUnderOption, inputs: InputStatistics) -> WeightUnderOption:
        """The matrix with its zeros, and the rest solved again."""
        sparse = nm.solve(prepare(made.values, inputs.second, inputs.mean, inputs.damping))
        return WeightUnderOption(sparse.values, sparse.shift, sparse.error)

    def column_order(
        self, option: Option, site: Site, weight: Tensor, inputs: InputStatistics
    ) -> Tensor | None:
        """An order in which 2:4 keeps more, since it depends on which columns are neighbors."""
        if option.form != PATTERN or not site.channels:
            return None
        layer = prepare(weight, inputs.second, inputs.mean, inputs.damping)
        return permutation.find_order(
            site, layer.signal.square() / factorization.invert(layer.damped).diagonal()
        )

    def torch_kernel(self, option: Option) -> Kernel:
        """Torch's semi-structured product, whose sizes are multiples of 32 and 64."""

        def timed(layer: nn.Linear) -> nn.Module:
            return SparseLinear(prune_24(layer.weight.detach()), layer.bias)

        def deploy(weights: object, layer: nn.Linear) -> nn.Module:
            return SparseLinear(layer.weight, layer.bias)

        return Kernel(32, 64, timed, deploy)


MOVE = NmSparsity()
