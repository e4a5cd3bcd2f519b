"""A canvas whose unit is one pixel, and what is drawn on it as SVG text without dates or scripts.

A drawing comes twice: `render` takes its colors from the style sheet of the page around it (light,
dark, print), `file` stands alone. The palette is Okabe and Ito's, which the common forms of color
blindness can tell apart. Matplotlib is loaded by the first drawing, not by importing this module:
reading a report and printing its verdict must not wait for it.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from compress.sites.kinds import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 560
LABEL = 22  # characters of a label; longer ones lose their middle
CHARACTER = 7.7  # widest digit of the usual fonts at 12 pixels
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
PALETTE = {
    "surface": "#ffffff",
    "ink": "#1b2330",
    "muted": "#5b6678",
    "line": "#dfe4ec",
    "track": "#edf0f5",
    "dense": "#97a1b2",
    "now": "#0072b2",
    "worse": "#c84e00",
    **{name: kind.color for name, kind in KINDS.items()},
}
DARK_KINDS = {name: kind.dark_color for name, kind in KINDS.items()}


class Chart(NamedTuple):
    """One plot: `render` is themed by the page it stands in, `file` stands alone."""

    name: str
    title: str
    page: str
    file: str


class Canvas:
    """`WIDTH x height` pixels to draw on, with the origin at the top left."""

    def __init__(self, height: int) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor=PALETTE["surface"])
        self.sheet = self.figure.add_axes((0, 0, 1, 1))
        self.sheet.set_xlim(0, WIDTH)
        self.sheet.set_ylim(height, 0)
        self.sheet.axis("off")

    def axes(self, left: float, top: float, wide: float, high: float) -> "Axes":
        """Axes in a pixel box, with a bottom line only."""
        place = (left / WIDTH, 1 - (top + high) / self.height, wide / WIDTH, high / self.height)
        axes = self.figure.add_axes(place, facecolor="none")
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(PALETTE["line"])
        axes.tick_params(length=0, pad=6, labelsize=12, labelcolor=PALETTE["muted"])
        axes.set_axisbelow(True)
        return axes

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        align: str = "left",
        color: str = "muted",
        size: int = 12,
        turn: int = 0,
    ) -> None:
        """One line of text on the base line `y`; a dollar sign in a name is no formula."""
        self.sheet.text(
            x,
            y,
            text,
            ha=align,
            va="baseline",
            fontsize=size,
            color=PALETTE[color],
            rotation=turn,
            rotation_mode="anchor",
            parse_math=False,
        )

    def box(self, x: float, y: float, wide: float, color: str) -> None:
        """A filled bar, 14 pixels high."""
        from matplotlib.patches import Rectangle

        if wide > 0:
            shape = Rectangle((x, y), wide, 14, facecolor=PALETTE[color], edgecolor="none")
            self.sheet.add_patch(shape)

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        """A thin straight line."""
        xs, ys = zip(start, end, strict=True)
        self.sheet.plot(xs, ys, color=PALETTE[color], linewidth=1.2)

    def dot(self, x: float, y: float, color: str, *, size: float = 7, hollow: bool = False) -> None:
        """A disc, or a ring."""
        fill = "none" if hollow else "full"
        self.sheet.plot(
            [x],
            [y],
            marker="o",
            color=PALETTE[color],
            markersize=size,
            fillstyle=fill,
            markeredgewidth=1.8,
        )


def ticks(axes: "Axes", side: str, low: float, high: float, *, log: bool, unit: str = "") -> None:
    """At most seven round numbers on one side of `axes`."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(decades) < 4 else (1,)
        marks = [step * 10.0**power for power in decades for step in steps]
    else:
        locator = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        marks = [float(mark) for mark in locator.tick_values(low, high)]
    marks = [mark for mark in marks if low <= mark <= high]
    line = axes.xaxis if side == "x" else axes.yaxis
    line.set_ticks(marks, labels=[f"{round(mark, 9):g}{unit}" for mark in marks])
    line.set_minor_locator(NullLocator())


def finish(canvas: Canvas, name: str, title: str) -> Chart:
    """The drawing as SVG text: ids of its own, no metadata, and colors by name for the page."""
    from matplotlib import style

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": name}]):
        canvas.figure.savefig(stream, format="svg", metadata=nothing)
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(stream.getvalue())
    for child in root.findall(f"{{{SVG}}}metadata"):
        root.remove(child)
    for place in root.iter(f"{{{SVG}}}defs"):
        for sheet in place.findall(f"{{{SVG}}}style"):
            place.remove(sheet)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", title)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for node in root.iter():
        _own(node, name)
    file = ET.tostring(root, encoding="unicode").replace("matplotlib.", "")
    for node in root.iter():
        if "style" in node.attrib:
            node.set("style", _themed(node.attrib["style"]))
    return Chart(name, title, ET.tostring(root, encoding="unicode"), file + "\n")


def _own(node: ET.Element, name: str) -> None:
    """Make ids and references unique to this chart, and let text follow the reader's fonts."""
    href = f"{{{XLINK}}}href"
    if "id" in node.attrib:
        node.set("id", f"{name}-{node.attrib['id']}")
    if href in node.attrib:
        node.set(href, node.attrib[href].replace("#", f"#{name}-"))
    if "clip-path" in node.attrib:
        node.set("clip-path", node.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
    if "style" in node.attrib:
        # Matplotlib writes either the shorthand or, in newer releases, one property each.
        own = re.sub(r"(font: [^;]*?px) [^;]*", rf"\1 {FONT}", node.attrib["style"])
        node.set("style", re.sub(r"font-family: [^;]*", f"font-family: {FONT}", own))


def _themed(style: str) -> str:
    """A style whose palette colors are variables of the page."""
    for role, color in PALETTE.items():
        style = style.replace(color, f"var(--{role})")
    return style


def fit(text: str) -> str:
    """A label of bounded length; the middle gives way, because both ends tell sites apart."""
    if len(text) <= LABEL:
        return text
    return text[: LABEL - LABEL // 2 - 1] + "…" + text[-(LABEL // 2) :]


def gutter(texts: Sequence[str]) -> float:
    """Pixels that the longest of some texts needs beside the bars."""
    return CHARACTER * max(map(len, texts)) + 22
