"""The forms of a plan's sites in an exported file: blocks, low rank and integers."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from compress.core.fakequant import Quantized
from compress.export import lowering, quantized, sparse
from compress.export.lowering import Lowering
from compress.ir import Option, Site
from compress.surgery import ROUNDING, Removal, readers


def lower(graph: ir.Model, sites: Iterable[Site], removals: Mapping[str, Removal]) -> None:
    """Write the products of every site in the form that its removal states, in place.

    Args:
        graph: as `export.onnx` writes it, of the model shrunk by the same removals.
        sites: those of the original model.
        removals: by site name; those without a form change nothing.
    """
    products: dict[str, Lowering] = {}
    codes: dict[str, Quantized] = {}
    for site in sites:
        removal = removals.get(site.name)
        if removal is None or removal.form == "dense" or not len(removal.kept):
            continue
        option = Option.of(removal.form, None)
        codes |= removal.codes
        if option.pattern.startswith("block:") or option.rank:
            for name in (site.writer, *readers(site)):
                products[name] = _lowering(graph, name, option, removal)
    if products:
        lowering.lower(graph, products)
    if codes:
        quantized.lower(graph, codes)


def _lowering(graph: ir.Model, name: str, option: Option, removal: Removal) -> Lowering:
    """How one product of a finished model is written."""
    weight = sparse.values(graph.graph.initializers[name])
    left = right = rest = None
    if option.rank:
        left, right = (part.numpy() for part in removal.factors[name])
        rest = None if option.pattern == "dense" else weight - left @ right
    blocks = None
    if option.pattern != "dense":
        rows, columns = option.block
        kept = weight if rest is None else np.where(np.abs(rest) > ROUNDING * np.abs(weight).max(), rest, 0.0)
        rest = None if rest is None else kept
        blocks = sparse.find(kept, rows, columns)
    return Lowering(blocks=blocks, left=left, right=right, sparse=rest)
