"""Linear layers trained as sparse plus low rank: put into a model, trained, merged back to dense.

convert(model, names, rank=32, density=0.03)     from scratch, within less memory
train(model)
merge(model)                                             plain linear layers, equal outputs
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compress.core import sltrain
from compress.errors import CompressError


class SparseLowRank(nn.Module):
    """`x -> x (scale * left @ right + S)^T + b`, where S has fixed places.

    Parameters are `left` [out, rank], `right` [rank, in], `values` [places] and maybe `bias` [out];
    the places are buffers and travel with the state dict.
    """

    pointers: Tensor
    columns: Tensor

    def __init__(
        self, left: Tensor, right: Tensor, values: Tensor, places: sltrain.Places, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.values = nn.Parameter(values)
        self.scale = scale
        self.bias: nn.Parameter | None = None
        self.register_buffer("pointers", places.pointers)
        self.register_buffer("columns", places.columns)

    @property
    def places(self) -> sltrain.Places:
        """Where the sparse values stand."""
        return sltrain.Places(self.pointers, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., out] of inputs [..., in]."""
        found = sltrain.product(x, self.left, self.scale * self.right, self.values, self.places)
        return found if self.bias is None else found + self.bias

    def merged(self) -> nn.Linear:
        """The dense layer that computes the same."""
        with torch.no_grad():
            weight = sltrain.merged(self.left, self.scale * self.right, self.values, self.places)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


def from_parts(
    values: Tensor, mask: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None
) -> SparseLowRank:
    """A layer that starts from a solution of `core.lowrank`: sparse part, its support, factors.

    `mask` is [out, in]; the dtype is that of `values`.
    """
    layer = SparseLowRank(left.clone(), right.clone(), values[mask], sltrain.places_of(mask))
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer


def convert(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    density: float,
    alpha: float = 16.0,
    seed: int = 0,
) -> None:
    """Replace linear layers by fresh ones of rank and density, to be trained from scratch.

    Args:
        model: changed in place.
        names: dotted names of `nn.Linear` modules.
        rank: of the factors.
        density: share of the weights that the sparse part holds, at random places.
        alpha: the factors count `alpha / rank`.
        seed: of places and starting values; every layer draws its own.

    Raises:
        CompressError: a name is no linear layer, or the rank or density is out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        old = model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise CompressError(f"{name} is a {type(old).__name__}, not a linear layer; leave it out")
        out, inner = old.weight.shape
        if not 1 <= rank <= min(out, inner):
            raise CompressError(
                f"{name} is [{out}, {inner}]: a rank of {rank} is asked for; it must be at least 1 and "
                f"at most {min(out, inner)}"
            )
        places = sltrain.places_of(sltrain.random_mask(out, inner, density, generator))
        new = SparseLowRank(*sltrain.initial(out, inner, rank, places, generator), places, alpha / rank)
        new.bias = old.bias
        _place(model, name, new.to(old.weight))


def merge(model: nn.Module) -> int:
    """Replace every sparse plus low-rank layer by its dense equal, in place; how many there were."""
    found = [name for name, module in model.named_modules() if isinstance(module, SparseLowRank)]
    for name in found:
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLowRank)
        _place(model, name, layer.merged())
    return len(found)


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
