"""Reorders the columns of writers so that 2:4 keeps more of them, without changing what the model computes.

2:4 keeps two of every four neighbouring inputs of a matrix, so their order decides what is lost. The
inputs of a site's writer may be reordered: neurons anywhere, values within their head. The rows that make
them, and their biases, follow (`Site.channels`, checked by `equivalence`). Query and key channels could
be reordered as well, but no matrix reads them, so no group of four would change; the inputs of readers
are the residual stream, which has one order for the whole model.

References: Pool, Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.core import permute
from compress.core.units import index_of
from compress.ir import Site
from compress.sites import prune
from compress.sites.kinds import kind_of

MAX_SCORE_ROWS = (
    192  # of the writer that a search looks at; all of a wide one would take longer than solving it
)
ROUNDS = 24  # in which every group meets another one
MAX_SWAP_COLUMNS = 512  # columns up to which single swaps are affordable as well
SWAP_PASSES = 8


def find_order(site: Site, score: Tensor) -> Tensor:
    """An order of the writer's columns, legal for the site, in which 2:4 keeps more of a score.

    Args:
        site: without channels, or where no fours fit, the order stays.
        score: [out, in] importance of each weight in the writer's kept columns.
    """
    columns = score.shape[1]
    part = kind_of(site).free_columns(site, columns)
    stay = torch.arange(columns)
    if not site.channels or part % permute.GROUP:
        return stay
    looked = score[:: max(1, len(score) // MAX_SCORE_ROWS)]
    passes = SWAP_PASSES if part <= MAX_SWAP_COLUMNS else 0
    found = []
    for unit in _groups(site, columns):
        # All queries of a unit read the same values, so they are moved together.
        own = looked[:, unit].transpose(0, 1).reshape(-1, part)
        found.append(unit[:, permute.search(own, rounds=ROUNDS, passes=passes)].flatten())
    return torch.cat(found)


def random_order(site: Site, seed: int = 0) -> Tensor:
    """A random order of all the writer's columns that is as legal as those of `order`."""
    generator = torch.Generator().manual_seed(seed)
    groups = _groups(site, site.units * site.column.width)
    return torch.cat(
        [group[:, torch.randperm(group.shape[1], generator=generator)].flatten() for group in groups]
    )


def _groups(site: Site, columns: int) -> Tensor:
    """[groups, copies, part] the writer's columns: those of a group change places, its copies alike.

    Copies are the query heads of a unit, which all read the same values.
    """
    part = kind_of(site).free_columns(site, columns)
    return torch.arange(columns).reshape(-1, max(1, site.column.width // part), part)


def permute_readers(
    model: nn.Module, site: Site, kept: Tensor, columns: Tensor, readers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values of `Removal.readers` that go with the writer's kept columns in another order.

    Args:
        model: where values that nothing else changes are taken from.
        site: with the channels that follow.
        kept: units, sorted.
        columns: [kept * width] the order, of the kept columns.
        readers: new values so far, in the old order.
    """
    found = dict(readers)
    for name in dict.fromkeys(part.tensor for part in site.channels):
        dim = next(part.dim for part in site.channels if part.tensor == name)
        value = found.get(name)
        if value is None:
            value = prune.kept_reader_weight(model, site, name, kept)
        stay = prune.kept_positions(model, site, name, kept)
        source = torch.arange(int(stay.max()) + 1)
        for part in site.channels:
            if part.tensor == name:
                own = index_of(part, kept)
                source[own] = own[_feature_order(site, columns)]
        found[name] = value.index_select(dim, torch.searchsorted(stay, source[stay]))
    return found


def _feature_order(site: Site, columns: Tensor) -> Tensor:
    """The order of the features that make the columns: of heads each once, whatever the queries."""
    groups, copies, part = _groups(site, len(columns)).shape
    first = columns.reshape(groups, copies * part)[:, :part]
    before = torch.arange(groups)[:, None]
    return (first - before * copies * part + before * part).flatten()
