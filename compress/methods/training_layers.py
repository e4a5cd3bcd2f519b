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
    """Computes `S x + L (R x) + b` in place of a linear layer; S is absent if `sparse` is None."""

    sparse: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, dense: nn.Module, factors: tuple[Tensor, Tensor], *, across: bool, sparse: bool
    ) -> None:
        """Split a layer into its parts.

        Args:
            dense: its weight is S + L R; its bias (or None) is used as the same parameter.
            factors: L [out, rank] and R [rank, in].
            across: the weight is stored as [in, out].
            sparse: whether there is an S.
        """
        super().__init__()
        self.original = (dense,)  # in a tuple, so that it is not registered as a submodule
        self.across = across
        stored = dense.get_parameter("weight").detach()
        self.left, self.right = (nn.Parameter(part.to(stored, copy=True)) for part in factors)
        rest = lowrank.apart(stored.T if across else stored, self.left.detach(), self.right.detach())
        self.register_parameter("sparse", nn.Parameter(rest) if sparse else None)
        self.register_parameter("bias", getattr(dense, "bias", None))

    @property
    def weight(self) -> Tensor:
        """The equivalent dense matrix [out, in]."""
        merged = self.left @ self.right
        return merged if self.sparse is None else self.sparse + merged

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        found = F.linear(F.linear(input, self.right), self.left, self.bias)
        return found if self.sparse is None else found + F.linear(input, self.sparse)

    @torch.no_grad()
    def finalized(self) -> nn.Module:
        """The original layer with the trained weight."""
        dense = self.original[0]
        dense.get_parameter("weight").copy_(self.weight.T if self.across else self.weight)
        return dense

    def factors(self) -> tuple[Tensor, Tensor]:
        """Copies of the current L [out, rank] and R [rank, in]."""
        return self.left.detach().clone(), self.right.detach().clone()


def insert(model: nn.Module, sites: Iterable[Site], removals: Mapping[str, Removal]) -> dict[str, Tensor]:
    """Make the layers of a shrunk model trainable in their options, in place; masks of zeros to keep.

    Args:
        model: the result of `prune.shrink` for `removals`.
        sites: of the original model.
        removals: by site name.

    Returns:
        By parameter name, a bool mask that is True where the parameter is zero by its pattern. A kept weight
        that was rounded to zero counts as zero too.
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
    """Put plain layers with the trained weights back; the removals with trained codes and factors.

    Args:
        model: with the layers of `insert`; afterwards it has the same modules as before `insert`.
        sites: of the original model.
        removals: the ones passed to `insert`. Their weights, biases and readers are returned unchanged: they
            are the values before training.
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
    """The initial state of training besides the weights (forms, steps, factors), for hashing."""
    parts: list[bytes | str] = []
    for name, one in removals.items():
        parts += [name, one.form]
        for found in one.codes.values():
            parts += [str(found.input_step), found.step.numpy().tobytes()]
        for factors in one.factors.values():
            parts += [part.numpy().tobytes() for part in factors]
    return parts


def _is_trainable(option: Option) -> bool:
    """Whether the steps of its number format can be trained; True without a number format."""
    return option.number_format is None or option.number_format.trainable


def _across(site: Site, name: str) -> bool:
    """Whether a matrix of the site is stored as [in, out]."""
    dim = next(part.dim for part in site.slices if part.tensor == name)
    return dim == (0 if name == site.writer else 1)
