"""How a region of the traced program falls into units, and the module names that stand for one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Indices `[start + u * width, start + (u + 1) * width)` belong to unit u.

    They are output features of producer number `place`, or, where `outside` is True, indices along
    `dim` of the stored tensor that is number `place` of the region's inputs from outside.
    """

    place: int
    start: int
    width: int
    outside: bool = False
    dim: int = 0


@dataclass(frozen=True)
class Layout:
    """A region that falls into `units` independent units, each with `width` columns of the writer.

    Attributes:
        units: how many there are.
        width: columns of the writer that each unit owns.
        runs: which output features and stored values each unit owns.
        attention: whether the region multiplies activations with each other.
        head_dim: features of one head, 0 without attention.
        tokens: rows that attend to each other, 0 without attention.
        causal: whether later tokens are hidden from earlier ones.
        activation: name of the elementwise function, "identity" for none, "other" for an unknown one.
        gated: whether a second run of features multiplies the first.
    """

    units: int
    width: int
    runs: tuple[Run, ...]
    attention: bool = False
    head_dim: int = 0
    tokens: int = 0
    causal: bool = False
    activation: str = ""
    gated: bool = False


@dataclass(frozen=True)
class NamePattern:
    """Names of a site's producers and writer below one module, for models that cannot be traced.

    `parts` is the number of matrices that are fused into one producer.
    """

    producers: tuple[str, ...]
    writer: str
    parts: int = 1
