"""Kinds of site: what is particular to attention heads, neurons, the hidden width.

Everything that depends on the kind of a site stands here, one module per kind: how it is recognized in the
traced program or by module names, which numbers of units are priced, which operators run besides its
products, how it is timed alone, which of its columns may change places, its label and colors in reports.
It may import `errors` and `ir` only, without torch, so that every other room can import it. To add a
kind, write one module with a subclass of `Kind` and add one line to `KINDS`.
"""

from compress.errors import CompressError
from compress.ir import Site
from compress.sites.kinds.attention import ATTENTION
from compress.sites.kinds.feed_forward import FEED_FORWARD
from compress.sites.kinds.kind import Kind
from compress.sites.kinds.layout import Layout
from compress.sites.kinds.residual import RESIDUAL

# A region of the traced program belongs to the first kind that matches it.
KINDS: dict[str, Kind] = {
    "heads": ATTENTION,
    "ffn": FEED_FORWARD,
    "residual": RESIDUAL,
}


def kind_of(site: Site) -> Kind:
    """The kind of a site."""
    return KINDS[known(site.kind)]


def known(name: str) -> str:
    """`name`, after making sure that it is a kind.

    Raises:
        CompressError: there is no kind of that name.
    """
    if name not in KINDS:
        raise CompressError(f"there is no kind of site {name!r}; known: {', '.join(KINDS)}")
    return name


def searched() -> tuple[str, ...]:
    """Names of the kinds whose units the search chooses site by site."""
    return tuple(name for name, kind in KINDS.items() if kind.searched)


def match(layout: Layout) -> Kind | None:
    """The kind of a region with this layout, None where there is none."""
    return next((kind for kind in KINDS.values() if kind.matches(layout)), None)


def decode_step(site: Site) -> Site:
    """The site in decoding: one new token for every sequence, after as many as the example has."""
    return kind_of(site).step(site)
