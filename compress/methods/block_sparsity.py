"""Zeros in whole blocks of weights, so that what is left runs as smaller dense products (LPViT)."""

from collections.abc import Sequence

from torch import Tensor, nn

from compress.core import block
from compress.export.backends.backend import Capabilities
from compress.export.backends.torch_kernels import Kernel, block_layer, prune_blocks
from compress.ir import Option, Site
from compress.methods.move import InputStatistics, Move, WeightUnderOption


class BlockSparsity(Move):
    """Blocks of zeros."""

    def options(self, site: Site, runtime: Capabilities, blocks: Sequence[str]) -> list[Option]:
        """The block patterns that pay."""
        return [Option(pattern=pattern) for pattern in blocks]

    def applies(self, option: Option) -> bool:
        """Whether the pattern is one of blocks, and no rank stands beside it."""
        return option.blocked and not option.rank

    def solve(self, option: Option, made: WeightUnderOption, inputs: InputStatistics) -> WeightUnderOption:
        """The matrix without the blocks that matter least, and the rest of their rows solved again."""
        weight, moments = made.values, (inputs.second, inputs.mean)
        if inputs.saliency is None:
            cut = block.solve(weight, *moments, option.block, option.density, damping=inputs.damping)
        else:
            kept = block.choose(_saliency_of_blocks(option, weight, inputs.saliency), option.density)
            cut = block.fit(weight, *moments, option.block, kept, damping=inputs.damping)
        return WeightUnderOption(cut.values, cut.shift, cut.error)

    def torch_kernel(self, option: Option) -> Kernel:
        """Batched or block-sparse products in torch, whose sizes are multiples of the block's."""
        rows, columns = option.block

        def timed(layer: nn.Linear) -> nn.Module:
            pruned = prune_blocks(layer.weight.detach(), rows, columns, option.density)
            return block_layer(pruned, layer.bias, rows, columns)

        def deploy(weights: object, layer: nn.Linear) -> nn.Module:
            return block_layer(layer.weight.detach(), layer.bias, rows, columns)

        return Kernel(rows, columns, timed, deploy)


def _saliency_of_blocks(option: Option, weight: Tensor, tiles: Tensor) -> Tensor:
    """[groups, blocks] saliency of the option's blocks, from the effects of smaller tiles of this weight."""
    (rows, columns), (out, inner) = option.block, weight.shape
    return block.pooled(tiles, (rows * tiles.shape[1] // out, columns * tiles.shape[2] // inner))


MOVE = BlockSparsity()
