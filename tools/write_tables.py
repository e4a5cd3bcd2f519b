"""Write the tables of the guides that come from the code: devices, errors of estimates, recipe keys.

    python tools/write_tables.py            rewrites every block between its two marks
    python tools/write_tables.py --check    writes nothing; exits with 1 when a block is out of date

A block begins with `<!-- table NAME: written by tools/write_tables.py -->`.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from compress import profiles
from compress.cli import recipe_reference
from compress.cost import published_latencies

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end of table -->"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def devices() -> str:
    """One row for each profile but `cpu`, whose facts are those of the machine that asks."""
    header = (
        "name",
        "device",
        "runtime",
        "dense baseline",
        "peak TFLOP/s",
        "bandwidth GB/s",
        "memory GB",
        "sparsity that pays",
    )
    rows = []
    for name in profiles.names():
        if name == "cpu":
            continue
        found = profiles.load(name)
        patterns = ", ".join(pattern for pattern in found.patterns if pattern != "dense") or "none"
        peak = found.peak_tflops[found.baseline_precision]
        rows.append(
            (
                f"`{name}`",
                found.description,
                found.runtime,
                found.baseline_precision,
                f"{peak:g}",
                f"{found.bandwidth_gb_s:g}",
                f"{found.memory_gb:g}",
                patterns,
            )
        )
    return markdown(header, rows)


def roofline() -> str:
    """One row for each device and series with published latencies: points, mean and largest error, bias."""
    header = ("device", "model and format", "points", "mean error", "largest error", "bias")
    rows = [
        (
            f"`{name}`",
            check.series,
            check.points,
            f"{100 * check.mean_error:.0f} %",
            f"{100 * check.max_error:.0f} %",
            f"{100 * check.bias:+.0f} %",
        )
        for name in profiles.names()
        for check in published_latencies.checks(name)
    ]
    return markdown(header, rows)


def recipe() -> str:
    """One row for each key of a recipe: its table, type, default and meaning."""
    header = ("table", "key", "type", "default", "meaning")
    rows = [
        (f"`[{key.table}]`" if key.table else "top level", f"`{key.key}`", key.type, key.default, key.meaning)
        for key in recipe_reference.list_keys()
    ]
    return markdown(header, rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "devices": (ROOT / "profiles" / "README.md", devices),
    "roofline": (ROOT / "profiles" / "README.md", roofline),
    "recipe": (ROOT / "compress" / "README.md", recipe),
}


def replaced(guide: str, name: str, table: str) -> str:
    """The guide with the block of this name rewritten.

    Raises:
        ValueError: the guide has no such block.
    """
    begin = f"<!-- table {name}: written by tools/write_tables.py -->"
    head, mark, rest = guide.partition(begin)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the guide needs {begin!r} and {END!r} around the table")
    return f"{head}{begin}\n{table}\n{END}{tail}"


def main() -> int:
    """Rewrite the blocks, or compare them with the code."""
    parser = argparse.ArgumentParser(description="write the tables of the guides")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when out of date")
    check = parser.parse_args().check
    stale = 0
    for name, (path, make) in TABLES.items():
        before = path.read_text(encoding="utf-8")
        after = replaced(before, name, make())
        if after == before:
            continue
        stale += 1
        if check:
            print(
                f"table {name} in {path.relative_to(ROOT)} is out of date: run python tools/write_tables.py"
            )
        else:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {name} rewritten")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
