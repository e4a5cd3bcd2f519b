"""Draw which room of the source imports which, from the syntax trees: one SVG and one table.

    python tools/draw_rooms.py            writes tools/pictures/rooms.svg and the table in compress/README.md
    python tools/draw_rooms.py --check    writes nothing; exits with 1 when either is out of date

A room is a folder with modules, or a module at the top of `compress`. The output depends on nothing but the
source, so a test compares it with what is stored.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"compress": "", "export": "export", "profiles": "profiles"}
PICTURE = ROOT / "tools" / "pictures" / "rooms.svg"
GUIDE = ROOT / "compress" / "README.md"
BEGIN, END = "<!-- rooms: written by tools/draw_rooms.py -->", "<!-- end of rooms -->"
WIDTH, ROW, BOX_HEIGHT, MARGIN = 1080, 78, 34, 24  # pixels
SWEEPS = 12  # passes over the rows that place a box near the boxes it is joined to

OUTSIDE = ("", "__main__")  # the package itself imports lazily, `__main__` starts the command line

Rooms = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module that ships, by its dotted name below `compress`; the package itself is "" ."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            names = [part for part in (prefix, *parts) if part and part != "__init__"]
            found[".".join(names)] = path
    return found


def room_of(name: str, files: dict[str, Path]) -> str:
    """The room of a module: its folder, or the module itself at the top of `compress`."""
    if files[name].name == "__init__.py" or "." not in name:
        return name
    return name.rpartition(".")[0]


def imported(path: Path, files: dict[str, Path]) -> Iterator[str]:
    """The modules of this project that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "compress":
                short = name.removeprefix("compress").removeprefix(".")
                while short not in files:
                    short = short.rpartition(".")[0]
                yield short


def import_graph(files: dict[str, Path]) -> Rooms:
    """For each room the other rooms that it imports, without the modules in `OUTSIDE`."""
    graph: Rooms = {room_of(name, files): set() for name in files if name not in OUTSIDE}
    for name, path in files.items():
        if name not in OUTSIDE:
            here = room_of(name, files)
            graph[here] |= {room_of(other, files) for other in imported(path, files) if other} - {here}
    return graph


def levels(graph: Rooms) -> dict[str, int]:
    """The height of each room: 0 imports no other, else one above the highest room that it imports.

    Raises:
        ValueError: some rooms import each other in a circle; they are named.
    """
    height: dict[str, int] = {}
    while len(height) < len(graph):
        ready = [name for name in graph if name not in height and graph[name] <= height.keys()]
        if not ready:
            raise ValueError(f"these rooms import each other: {', '.join(sorted(graph.keys() - height))}")
        for name in ready:
            height[name] = max((height[other] + 1 for other in graph[name]), default=0)
    return height


def direct(graph: Rooms) -> Rooms:
    """The arrows that no longer path implies (the transitive reduction of an acyclic graph)."""
    reached: Rooms = {}

    def below(name: str) -> set[str]:
        if name not in reached:
            reached[name] = set().union(*({other} | below(other) for other in graph[name]))
        return reached[name]

    return {
        name: {other for other in others if not any(other in below(near) for near in others)}
        for name, others in graph.items()
    }


def placed(graph: Rooms) -> dict[str, tuple[float, float]]:
    """The center of each room's box, rows by level, boxes of a row near the boxes they are joined to."""
    height = levels(graph)
    top = max(height.values())
    rows = [sorted(name for name in graph if height[name] == level) for level in range(top, -1, -1)]
    joined = {name: set(graph[name]) for name in graph}
    for name, others in graph.items():
        for other in others:
            joined[other].add(name)
    across: dict[str, float] = {}

    def spread() -> None:
        for row in rows:
            widths = [box_width(name) for name in row]
            gap = (WIDTH - 2 * MARGIN - sum(widths)) / (len(row) + 1)
            left = MARGIN + gap
            for name, width in zip(row, widths, strict=True):
                across[name] = left + width / 2
                left += width + gap

    spread()
    for _ in range(SWEEPS):
        for row in rows:
            near = {n: sum(across[o] for o in joined[n]) / max(1, len(joined[n])) for n in row}
            row.sort(key=lambda name: (round(near[name], 3), name))
        spread()
    return {
        name: (across[name], MARGIN + BOX_HEIGHT / 2 + ROW * number)
        for number, row in enumerate(rows)
        for name in row
    }


def box_width(name: str) -> float:
    """Pixels of a box around a name in 14-pixel type."""
    return 8.2 * len(name) + 24


def draw(graph: Rooms) -> str:
    """The graph as SVG: dark arrows that nothing else implies, light ones for the rest."""
    places = placed(graph)
    kept = direct(graph)
    bottom = max(y for _, y in places.values()) + BOX_HEIGHT / 2 + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:.0f}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">',
        "<title>Which room imports which; every arrow points down</title>",
        f'<rect width="{WIDTH}" height="{bottom:.0f}" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>',
    ]
    arrows = [(name, other, other in kept[name]) for name in sorted(graph) for other in sorted(graph[name])]
    for name, other, needed in sorted(arrows, key=lambda arrow: arrow[2]):
        (x1, y1), (x2, y2) = places[name], places[other]
        y1, y2 = y1 + BOX_HEIGHT / 2, y2 - BOX_HEIGHT / 2 - 2
        bend = max(24.0, 0.4 * (y2 - y1))
        style = 'stroke="#33475b" stroke-width="1.4"' if needed else 'stroke="#d5dde5" stroke-width="1"'
        lines.append(
            f'<path d="M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} '
            f'{x2:.1f} {y2:.1f}" '
            f'fill="none" {style} marker-end="url(#tip)"/>'
        )
    for name in sorted(graph):
        x, y = places[name]
        width = box_width(name)
        lines.append(
            f'<rect x="{x - width / 2:.1f}" y="{y - BOX_HEIGHT / 2:.1f}" width="{width:.1f}" '
            f'height="{BOX_HEIGHT}" rx="6" fill="#eef4fb" stroke="#5b7fa6"/>'
            f'<text x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle" fill="#16212e">{escape(name)}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def purpose(name: str, files: dict[str, Path]) -> str:
    """The first line of a room's docstring."""
    text = ast.get_docstring(ast.parse(files[name].read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def table(graph: Rooms, files: dict[str, Path]) -> str:
    """One row for each room, the highest first: purpose, modules, and the rooms it imports."""
    height = levels(graph)
    lines = ["| room | what it is for | modules | imports |", "|---|---|---|---|"]
    for name in sorted(graph, key=lambda room: (-height[room], room)):
        inside = sum(room_of(module, files) == name for module in files if module not in OUTSIDE)
        uses = ", ".join(f"`{other}`" for other in sorted(graph[name])) or "no other room"
        lines.append(f"| `{name}` | {purpose(name, files)} | {inside} | {uses} |")
    return "\n".join(lines)


def with_table(guide: str, rows: str) -> str:
    """The guide with the table between its two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    if BEGIN not in guide or END not in guide:
        raise ValueError(f"{GUIDE.name} needs the marks {BEGIN!r} and {END!r} around the table")
    head, _, rest = guide.partition(BEGIN)
    return f"{head}{BEGIN}\n{rows}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Write the drawing and the table, or compare them with what is stored."""
    parser = argparse.ArgumentParser(description="draw which room of the source imports which")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when out of date")
    files = modules()
    graph = import_graph(files)
    guide = GUIDE.read_text(encoding="utf-8")
    wanted = {PICTURE: draw(graph), GUIDE: with_table(guide, table(graph, files))}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    if parser.parse_args().check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run python tools/draw_rooms.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    arrows = sum(map(len, graph.values()))
    print(f"{len(graph)} rooms, {arrows} arrows, {len(stale)} files written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
