"""A shrunk model whose linear layers are trained in the formats in which they are deployed.

A quantized matrix is rounded in every forward pass, with learned steps (`quantized_layers`). A low-rank
matrix is trained as its two factors, plus a sparse part where the option has a pattern too. A matrix with a
sparsity pattern is trained directly; the masks of its zeros are returned so that the trainer can keep them
zero. `insert` puts such layers into the model. `finalize` replaces them by plain layers with the equivalent
weights, and returns the codes and factors that the file is written from.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.core import lowrank
from compress.ir import Option, Site
from compress.methods import quantized_layers
from compress.sites.modeling import owner
from compress.sites.prune import Removal, readers


class FactoredLinear(nn.Module):
    """`S x + L (R x) + b` in the place of a linear layer; without `sparse` there is no S."""

    sparse: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, dense: nn.Module, factors: tuple[Tensor, Tensor], *, across: bool, sparse: bool
    ) -> None:
        """Take a layer apart.

        Args:
            dense: has a weight that is S + L R, and a bias or None, which stays the same parameter.
            factors: L [out, rank] and R [rank, in].
            across: the weight is stored as [in, out].
            sparse: there is an S.
        """
        super().__init__()
        self.original = (dense,)  # in a tuple, so that it is no part of this module
        self.across = across
        stored = dense.get_parameter("weight").detach()
        self.left, self.right = (nn.Parameter(part.to(stored, copy=True)) for part in factors)
        rest = lowrank.apart(stored.T if across else stored, self.left.detach(), self.right.detach())
        self.register_parameter("sparse", nn.Parameter(rest) if sparse else None)
        self.register_parameter("bias", getattr(dense, "bias", None))

    @property
    def weight(self) -> Tensor:
        """The one matrix [out, in] that computes the same."""
        merged = self.left @ self.right
        return merged if self.sparse is None else self.sparse + merged

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        found = F.linear(F.linear(input, self.right), self.left, self.bias)
        return found if self.sparse is None else found + F.linear(input, self.sparse)

    @torch.no_grad()
    def finalized(self) -> nn.Module:
        """The layer that was there before, with what was learned."""
        dense = self.original[0]
        dense.get_parameter("weight").copy_(self.weight.T if self.across else self.weight)
        return dense

    def factors(self) -> tuple[Tensor, Tensor]:
        """L [out, rank] and R [rank, in] as they are now."""
        return self.left.detach().clone(), self.right.detach().clone()


def insert(model: nn.Module, sites: Iterable[Site], removals: Mapping[str, Removal]) -> dict[str, Tensor]:
    """Let the products of a shrunk model learn in their forms, in place; the zeros that must be held.

    Args:
        model: what `prune.shrink` gave for `removals`.
        sites: of the original model.
        removals: by site name.

    Returns:
        A bool mask by the name of a parameter, True where it is zero by its pattern. A weight of a pattern
        that was rounded to zero counts as one of its zeros.
    """
    zeros: dict[str, Tensor] = {}
    for site in sites:
        removal = removals.get(site.name)
        if removal is None or removal.form == "dense" or not len(removal.kept):
            continue
        option = Option.of(removal.form, None)
        found = quantized_layers.places(model, site, removal, masked=False)
        quantized_layers.insert(model, found, learn=_is_trainable(option))
        if option.number_format is not None and option.number_format.range == "calibrated":
            quantized_layers.share_input(model, readers(site))
        patterned = option.patterned
        for name, factors in removal.factors.items():
            dense = model.get_submodule(owner(name))
            made = FactoredLinear(dense, factors, across=_across(site, name), sparse=patterned)
            model.set_submodule(owner(name), made.train(dense.training))
        if patterned:
            for name in (site.writer, *readers(site)):
                held = f"{owner(name)}.sparse" if name in removal.factors else name
                zeros[held] = model.get_parameter(held).detach() == 0
    return zeros


def finalize(model: nn.Module, sites: Iterable[Site], removals: Mapping[str, Removal]) -> dict[str, Removal]:
    """Put plain layers with the learned weights back; the removals with learned codes and factors.

    Args:
        model: with layers that `insert` put in; afterwards it is shaped as it was before.
        sites: of the original model.
        removals: those that `insert` was given. Their weights, biases and readers say what was tuned from.
    """
    codes = quantized_layers.finalize(model)
    found = dict(removals)
    for site in sites:
        removal = removals.get(site.name)
        if removal is None:
            continue
        factors = {}
        for name in removal.factors:
            layer = model.get_submodule(owner(name))
            assert isinstance(layer, FactoredLinear)
            factors[name] = layer.factors()
            model.set_submodule(owner(name), layer.finalized())
        found[site.name] = replace(
            removal, factors=factors, codes={name: codes[name] for name in removal.codes}
        )
    return found


def fingerprint(removals: Mapping[str, Removal]) -> list[bytes | str]:
    """What learning in these forms starts from besides the weights: forms, steps and factors."""
    parts: list[bytes | str] = []
    for name, one in removals.items():
        parts += [name, one.form]
        for found in one.codes.values():
            parts += [str(found.input_step), found.step.numpy().tobytes()]
        for factors in one.factors.values():
            parts += [part.numpy().tobytes() for part in factors]
    return parts


def _is_trainable(option: Option) -> bool:
    """Whether the steps of its number format can be learned; without one there are none."""
    return option.number_format is None or option.number_format.trainable


def _across(site: Site, name: str) -> bool:
    """Whether a matrix of the site is stored as [in, out]."""
    dim = next(part.dim for part in site.slices if part.tensor == name)
    return dim == (0 if name == site.writer else 1)
