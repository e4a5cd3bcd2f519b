"""Lower the products of a plan's sites in an exported ONNX graph: block-sparse, low-rank, quantized."""

from collections.abc import Iterable, Mapping

import onnx_ir as ir
import torch

from compress.core import lowrank
from compress.core.fakequant import Quantized
from compress.export.microbench.onnx_chain import LayoutChooser, SiteLayouts, default_layouts
from compress.export.onnx import block_sparse, linear_lowering, quantized
from compress.export.onnx.linear_lowering import Lowering
from compress.ir import Option, Site
from compress.sites.prune import Removal, readers


def lower(
    graph: ir.Model,
    sites: Iterable[Site],
    removals: Mapping[str, Removal],
    written: SiteLayouts = default_layouts,
) -> None:
    """Rewrite the products of every site as its removal's option requires, in place.

    Args:
        graph: exported by `export.onnx.writer` from the model shrunk by the same removals.
        sites: those of the original model.
        removals: by site name; dense ones change nothing.
        written: chooses the layout of a site's block-sparse products.
    """
    products: dict[str, Lowering] = {}
    codes: dict[str, Quantized] = {}
    for site in sites:
        removal = removals.get(site.name)
        if removal is None or removal.form == "dense" or not len(removal.kept):
            continue
        option = Option.of(removal.form, None)
        codes |= removal.codes
        if option.blocked or option.rank:
            for name in (site.writer, *readers(site)):
                products[name] = _lowering(graph, name, option, removal, written(site))
    if products:
        linear_lowering.lower(graph, products)
    if codes:
        quantized.lower(graph, codes)


def _lowering(
    graph: ir.Model, name: str, option: Option, removal: Removal, choose: LayoutChooser
) -> Lowering:
    """The lowering of one product of a compressed model."""
    weight = block_sparse.values(graph.graph.initializers[name])
    left = right = rest = None
    if option.rank:
        factors = removal.factors[name]
        left, right = (part.numpy() for part in factors)
        if option.patterned:
            rest = lowrank.apart(torch.from_numpy(weight), *factors).numpy()
    if not option.patterned:
        return Lowering(left=left, right=right)
    out, inner = weight.shape
    blocks = block_sparse.find(weight if rest is None else rest, *option.block)
    return Lowering(blocks, choose(out, inner, blocks), left=left, right=right, sparse=rest)
