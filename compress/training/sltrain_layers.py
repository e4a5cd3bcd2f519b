"""Linear layers trained as sparse plus low rank: put into a model, trained, merged back to dense.

convert(model, names, rank=32, density=0.03)     from scratch, within less memory
train(model)
merge(model)                                     plain linear layers, equal outputs

adapt(model, {}, rank=16, density=0.03)          from the weights that are there, which stay
train(model)
fold(model)                                      the same layers as before, with what was learned
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from compress.core import sltrain
from compress.errors import CompressError

ALPHA = 16.0  # factors count ALPHA / rank
LAYERS = ("Linear", "Conv1D")  # the second is GPT-2's, and stores [in, out]


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
    alpha: float = ALPHA,
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


class Updated(nn.Module):
    """A trained layer whose weight stays while an update of it is learned: sparse, plus low rank.

    Parameters are `left` [out, rank], `right` [rank, in], `values` [places], and the layer's weight (`base`)
    and bias.
    """

    pointers: Tensor
    columns: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, dense: nn.Module, rank: int, density: float, generator: torch.Generator, *, hold: bool
    ) -> None:
        """Begin at the layer as it is.

        Args:
            dense: a linear layer, or one that stores its weight as [in, out].
            rank: of the factors.
            density: share of the weights that the sparse part moves.
            generator: draws places and factors.
            hold: zeros of the weight stay zeros.
        """
        super().__init__()
        self.original = (dense,)  # in a tuple, so that it is no part of this module
        self.across, self.hold = not isinstance(dense, nn.Linear), hold
        self.base = dense.get_parameter("weight")
        self.register_parameter("bias", getattr(dense, "bias", None))
        start = self._start
        out, inner = start.shape
        mask = sltrain.random_mask(out, inner, density, generator)
        places = sltrain.places_of(mask & (start != 0) if hold else mask)
        left, right, values = sltrain.initial(out, inner, rank, places, generator)
        self.left = nn.Parameter(left.to(start))
        self.right = nn.Parameter(right.to(start))
        self.values = nn.Parameter(torch.zeros_like(values).to(start))
        self.scale = ALPHA / rank
        self.register_buffer("pointers", places.pointers)
        self.register_buffer("columns", places.columns)

    @property
    def weight(self) -> Tensor:
        """The one matrix [out, in] that computes the same."""
        return sltrain.merged(*self._parts(), hold=self.hold)

    @property
    def _start(self) -> Tensor:
        """The weight that stays, [out, in]."""
        return self.base.detach().T if self.across else self.base.detach()

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, sltrain.Places, Tensor]:
        places = sltrain.Places(self.pointers, self.columns)
        return self.left, self.scale * self.right, self.values, places, self._start

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        found = sltrain.product(input, *self._parts(), hold=self.hold)
        return found if self.bias is None else found + self.bias

    @torch.no_grad()
    def finalized(self) -> nn.Module:
        """The layer that was there before, with what was learned."""
        self.base.copy_(self.weight.T if self.across else self.weight)
        return self.original[0]


def adapt(
    model: nn.Module, zeros: Mapping[str, Tensor], *, rank: int, density: float, seed: int = 0
) -> dict[str, Tensor]:
    """Let updates of a model's linear layers be learned in the place of the layers, in place.

    Left as they are: layers that share their weight with another module, and those for which the update
    would hold as many numbers as the weight does.

    Args:
        model: changed in place.
        zeros: by parameter name, a mask that is True where it is, and stays, zero.
        rank: of the factors, where a layer allows it.
        density: share of the weights that the sparse part moves, at random places.
        seed: of places and starting values.

    Returns:
        The masks that are left for somebody else to hold.
    """
    generator = torch.Generator().manual_seed(seed)
    uses = Counter(
        value
        for module in model.modules()
        for name, value in module.named_parameters(recurse=False)
        if name == "weight"
    )
    left = dict(zeros)
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ not in LAYERS or uses[layer.get_parameter("weight")] > 1:
            continue
        weight = layer.get_parameter("weight")
        out, inner = weight.shape
        if sltrain.account(out, inner, rank, density).parameters >= weight.numel():
            continue
        mask = left.pop(f"{name}.weight", None)
        if mask is not None:
            weight.detach().masked_fill_(mask, 0)
        made = Updated(layer, rank, density, generator, hold=mask is not None)
        _place(model, name, made.train(layer.training))
    return left


def merge_updates(model: nn.Module) -> int:
    """Put the layers back that `adapt` took, with what was learned, in place; how many there were."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Updated)}
    for name, layer in found.items():
        _place(model, name, layer.finalized())
    return len(found)


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
