"""The inverse of shrinking: a tuned small model's weights at the dense shape, where more can be removed.

A family is pruned gradually (ZipLM's gradual mode, arXiv 2302.04089): the next member starts from the
recovered weights of the last one. Removed units come back as zeros, so that all sites, costs and
candidates of the dense model stay valid, and a unit that was removed costs nothing to remove again.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from compress.core.units import remaining
from compress.ir import Site, Slice
from compress.sites import prune
from compress.sites.modeling import owner
from compress.sites.prune import Removal


def expand(
    dense: nn.Module, sites: Iterable[Site], kept: Mapping[str, Tensor], small: nn.Module
) -> nn.Module:
    """A model of the shapes of `dense` that computes what `small` computes.

    Args:
        dense: the model that was shrunk; untouched.
        sites: its sites.
        kept: by site, the sorted units that `small` still has; a site without an entry has all.
        small: what `prune.shrink` made of `dense`, with any weights.
    """
    listed = {site.name: site for site in sites}
    big = copy.deepcopy(dense)
    cuts: dict[int, list[tuple[Slice, Site]]] = {}
    for name in kept:
        for part in listed[name].slices:
            value = big.get_parameter(part.tensor)
            cuts.setdefault(id(value), []).append((part, listed[name]))
    places = dict(big.named_parameters(remove_duplicate=False)) | dict(big.named_buffers())
    for name, value in small.state_dict().items():
        if name in places:
            _copy_into(places[name].detach(), value, cuts.get(id(places[name]), []), kept)
    for name, units in kept.items():
        if len(units):
            _copy_gained_bias(big, listed[name], small)
        else:
            _zero_out(big, listed[name], small)
    return big


def _copy_into(
    target: Tensor, value: Tensor, cuts: list[tuple[Slice, Site]], kept: Mapping[str, Tensor]
) -> None:
    """Write a small tensor into the rows and columns of a large one that it came from, zeros elsewhere."""
    where = []
    for dim in range(target.ndim):
        own = {site.name: site for part, site in cuts if part.dim == dim and len(kept[site.name])}
        stay = torch.arange(target.shape[dim])
        for site in own.values():
            parts = {(part.start, part.width): part for part, at in cuts if at is site and part.dim == dim}
            left = remaining(parts.values(), kept[site.name], units=site.units, length=target.shape[dim])
            stay = stay[torch.isin(stay, left)]
        where.append(stay.reshape(-1, *[1] * (target.ndim - 1 - dim)))
    target.zero_()
    target[tuple(where)] = value.to(target)


def _copy_gained_bias(big: nn.Module, site: Site, small: nn.Module) -> None:
    """The bias that a writer has gained, if it has."""
    writer, own = (model.get_submodule(owner(site.writer)) for model in (small, big))
    bias = getattr(writer, "bias", None)
    if isinstance(bias, nn.Parameter) and getattr(own, "bias", None) is None:
        own.register_parameter("bias", nn.Parameter(bias.detach().clone()))


def _zero_out(big: nn.Module, site: Site, small: nn.Module) -> None:
    """A site that was dropped: its writer reads nothing, and has the bias of the stand-in."""
    drop = prune.require_drop(site)
    stand_in = small.get_submodule(f"{drop.module}.inner" if drop.writer else owner(site.writer))
    bias = getattr(stand_in, "bias", None)
    value = bias.detach() if isinstance(bias, Tensor) else None
    out = prune.writer_columns(big, site).shape[0]
    prune.write_weights(big, site, Removal(torch.arange(0), torch.zeros(out, 0), value))
