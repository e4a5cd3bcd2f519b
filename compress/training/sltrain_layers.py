"""Linear layers trained as sparse plus low rank: insert into a model, train, merge back to dense layers.

convert(model, names, rank=32, density=0.03)     train from scratch with less memory
train(model)
merge(model)                                     plain linear layers with equal outputs

adapt(model, {}, rank=16, density=0.03)          train an update of the existing, frozen weights
train(model)
merge_updates(model)                             the original layers with the update added
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from compress.core import sltrain
from compress.errors import CompressError

ALPHA = 16.0  # the product of the factors is scaled by ALPHA / rank
LAYERS = ("Linear", "Conv1D")  # Conv1D is GPT-2's and stores [in, out]


class SparseLowRank(nn.Module):
    """`x -> x (scale * left @ right + S)^T + b`, where S is sparse with a fixed support.

    Parameters are `left` [out, rank], `right` [rank, in], `values` [nonzeros] and optionally `bias` [out];
    the support is stored in buffers and part of the state dict.
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
        """The support of the sparse part."""
        return sltrain.Places(self.pointers, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., out] of inputs [..., in]."""
        found = sltrain.product(x, self.left, self.scale * self.right, self.values, self.places)
        return found if self.bias is None else found + self.bias

    def merged(self) -> nn.Linear:
        """The equivalent dense layer."""
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
        alpha: the product of the factors is scaled by `alpha / rank`.
        seed: of support and initial values; every layer draws its own.

    Raises:
        CompressError: a name is not a linear layer, or the rank or density is out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        old = model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise CompressError(f"{name} is a {type(old).__name__}, not a linear layer; leave it out")
        out, inner = old.weight.shape
        if not 1 <= rank <= min(out, inner):
            raise CompressError(
                f"{name} is [{out}, {inner}]: a rank of {rank} was requested; it must be at least 1 and "
                f"at most {min(out, inner)}"
            )
        places = sltrain.places_of(sltrain.random_mask(out, inner, density, generator))
        new = SparseLowRank(*sltrain.initial(out, inner, rank, places, generator), places, alpha / rank)
        new.bias = old.bias
        _place(model, name, new.to(old.weight))


def merge(model: nn.Module) -> int:
    """Replace every sparse plus low-rank layer by its dense equivalent, in place; their number."""
    found = [name for name, module in model.named_modules() if isinstance(module, SparseLowRank)]
    for name in found:
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLowRank)
        _place(model, name, layer.merged())
    return len(found)


class Updated(nn.Module):
    """A layer with a frozen weight and a trainable update of it: sparse plus low rank.

    Parameters are `left` [out, rank], `right` [rank, in], `values` [nonzeros], and the original weight
    (`base`) and bias.
    """

    pointers: Tensor
    columns: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, dense: nn.Module, rank: int, density: float, generator: torch.Generator, *, hold: bool
    ) -> None:
        """Start with an update of zero.

        Args:
            dense: a linear layer, or one that stores its weight as [in, out].
            rank: of the factors.
            density: share of the weights that the sparse part updates.
            generator: draws the support and the factors.
            hold: keep zeros of the weight zero.
        """
        super().__init__()
        self.original = (dense,)  # in a tuple, so that it is not registered as a submodule
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
        """The equivalent dense matrix [out, in]."""
        return sltrain.merged(*self._parts(), hold=self.hold)

    @property
    def _start(self) -> Tensor:
        """The frozen weight, [out, in]."""
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
        """The original layer with the update added to its weight."""
        self.base.copy_(self.weight.T if self.across else self.weight)
        return self.original[0]


def adapt(
    model: nn.Module, zeros: Mapping[str, Tensor], *, rank: int, density: float, seed: int = 0
) -> dict[str, Tensor]:
    """Replace linear layers by ones that train an update of a frozen weight, in place.

    Not replaced: layers that share their weight with another module, and layers for which the update would
    have at least as many parameters as the weight.

    Args:
        model: changed in place.
        zeros: by parameter name, a mask that is True where the parameter must stay zero.
        rank: of the factors.
        density: share of the weights that the sparse part updates, at random positions.
        seed: of support and initial values.

    Returns:
        The masks of parameters that were not replaced, which the caller has to enforce.
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
    """Put the original layers back with their trained updates added, in place; their number."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Updated)}
    for name, layer in found.items():
        _place(model, name, layer.finalized())
    return len(found)


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
