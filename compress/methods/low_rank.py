"""Two thin factors in place of a weight, or beside blocks of it that were found together with them."""

from collections.abc import Sequence

from torch import nn

from compress import formats
from compress.core import lowrank
from compress.core.support import Block, prepare
from compress.export.backends.backend import Capabilities
from compress.export.backends.torch_kernels import Kernel, LowRankLinear
from compress.ir import Option, Site
from compress.methods.move import InputStatistics, Move, WeightUnderOption

RANK_SHARES = (0.25, 0.125)  # of the hidden width
RANK_SHARE_BESIDE_BLOCKS = 0.0625


class LowRank(Move):
    """Factors L [out, rank] and R [rank, in]."""

    def options(self, site: Site, runtime: Capabilities, blocks: Sequence[str]) -> list[Option]:
        """Two ranks."""
        return [Option(rank=_rank(site, share)) for share in RANK_SHARES]

    def joint_options(
        self, site: Site, runtime: Capabilities, blocks: Sequence[str], moves: Sequence[str]
    ) -> list[Option]:
        """A small rank beside the sparsest blocks, where blocks are asked for and pay as well."""
        if not blocks or not runtime.pairs_blocks_with_rank or not _asks_for_blocks(moves):
            return []
        sparsest = min(blocks, key=lambda pattern: Option(pattern=pattern).density)
        return [Option(pattern=sparsest, rank=_rank(site, RANK_SHARE_BESIDE_BLOCKS))]

    def applies(self, option: Option) -> bool:
        """Whether there are factors."""
        return option.rank > 0

    def solve(self, option: Option, made: WeightUnderOption, inputs: InputStatistics) -> WeightUnderOption:
        """The matrix as factors, or as blocks plus factors."""
        layer = prepare(made.values, inputs.second, inputs.mean, inputs.damping)
        if option.patterned:
            split = lowrank.decompose(layer, Block(*option.block, option.density), option.rank)
        else:
            split = lowrank.factor(layer, option.rank)
        factors = split.left.float(), split.right.float()
        return WeightUnderOption(split.merged, split.shift, split.error, factors)

    def torch_kernel(self, option: Option) -> Kernel | None:
        """Two thin products; torch has none of blocks and factors together."""
        if option.patterned:
            return None

        def timed(layer: nn.Linear) -> nn.Module:
            weight = layer.weight.detach()
            out, inner = weight.shape
            left, right = weight[:, :1].expand(out, option.rank), weight[:1].expand(option.rank, inner)
            return LowRankLinear(left, right, layer.bias)

        def deploy(weights: object, layer: nn.Linear) -> nn.Module:
            assert isinstance(weights, tuple)
            left, right = (part.to(layer.weight) for part in weights)
            return LowRankLinear(left, right, layer.bias)

        return Kernel(1, 1, timed, deploy)


def _rank(site: Site, share: float) -> int:
    """A rank as a share of the hidden width."""
    hidden = next(m.out for m in site.matmuls if m.weight == site.writer)
    return max(1, round(share * hidden))


def _asks_for_blocks(moves: Sequence[str]) -> bool:
    return formats.BLOCKS in moves


MOVE = LowRank()
