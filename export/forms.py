"""The forms of a plan's sites in an exported file, and in the small graphs that price them.

One rewrite serves both, so that what is timed is what ships: products in blocks or with a low-rank part
(`lowering`), products on integers (`quantized`).
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from compress.export import lowering, quantized, sparse
from compress.export.lowering import Lowering
from compress.ir import Option, Site
from compress.surgery import Removal, readers


def lower(graph: ir.Model, sites: Iterable[Site], removals: Mapping[str, Removal]) -> None:
    """Write the products of every site in the form that its removal states, in place.

    Args:
        graph: as `export.onnx` writes it, of the model shrunk by the same removals.
        sites: those of the original model.
        removals: by site name; those without a form change nothing.
    """
    products: dict[str, Lowering] = {}
    codes = {}
    for site in sites:
        removal = removals.get(site.name)
        if removal is None or removal.form == "dense" or not len(removal.kept):
            continue
        option = Option.of(removal.form, None)
        codes |= removal.codes
        if option.pattern != "dense" or option.rank:
            for name in (site.writer, *readers(site)):
                products[name] = _lowering(graph, name, option, removal)
    if products:
        lowering.lower(graph, products)
    if codes:
        quantized.lower(graph, codes)


def chain(file: bytes, form: str) -> bytes:
    """A chain of `export.chains` with every product in a form, at random zeros, factors and codes."""
    option = Option.of(form, None)
    if option.precision != "fp32":
        return quantized.lower_chain(file, quantized.PRECISIONS[option.precision])
    graph = ir.serde.deserialize_model(onnx.load_from_string(file))
    random = np.random.default_rng(0)
    products = {}
    for name in quantized.product_weights(graph):
        stored = graph.graph.initializers[name]
        out, inner = sparse.values(stored).shape
        products[name] = _random(option, out, inner, random, stored)
    lowering.lower(graph, products)
    return bytes(ir.serde.serialize_model(graph).SerializeToString())


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
        kept = weight if rest is None else np.where(np.abs(rest) > 1e-7 * np.abs(weight).max(), rest, 0.0)
        rest = None if rest is None else kept
        blocks = sparse.find(kept, rows, columns)
    return Lowering(blocks=blocks, left=left, right=right, sparse=rest)


def _random(option: Option, out: int, inner: int, random: np.random.Generator, stored: ir.Value) -> Lowering:
    """How one product of a chain is written, with the zeros of a random pattern put into its weight."""
    left = right = rest = blocks = None
    if option.rank:
        left = random.standard_normal((out, option.rank)).astype(np.float32)
        right = random.standard_normal((option.rank, inner)).astype(np.float32)
    if option.pattern != "dense":
        blocks = sparse.random(option.pattern, out, inner, random)
        masked = np.where(blocks.mask(out, inner), sparse.values(stored), np.float32(0))
        if option.rank:
            rest = masked
        else:
            stored.const_value = ir.tensor(masked, name=stored.name)
    return Lowering(blocks=blocks, left=left, right=right, sparse=rest)
