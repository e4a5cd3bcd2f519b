"""Block-sparse products in every layout beside their dense Gemm, interleaved, on one thread's own clock."""

import argparse
import sys
from pathlib import Path

from compress import bench
from compress.export import layouts
from compress.export.blocks import clock_for

Row = dict[str, object]
PATTERNS = ",".join(
    f"block:{shape}@{density}"
    for density in (0.25, 0.5)
    for shape in ("32x32", "32x64", "32x192", "64x32", "64x64", "128x64")
)


def run(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Every layout of a product in blocks against the dense one, interleaved, on one thread's own clock."""
    rows: list[Row] = []
    for size in arguments.products.split(","):
        wide, inner = (int(number) for number in size.split("x"))
        for tokens in arguments.rows:
            for pattern in arguments.patterns.split(","):
                rows += _layouts(layouts.shape_of(tokens, wide, inner, pattern), pattern)
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _layouts(shape: layouts.Shape, pattern: str) -> list[Row]:
    """All layouts of one shape, the fastest last."""
    runners = {
        layout: layouts.runner(layouts.product(shape, layout, 1), shape, 1) for layout in shape.layouts
    }
    found = bench.compare(runners, blocks=30, block_ms=1.0, clock=clock_for(1))
    ratios = {layout: found.ratio(layout) for layout in shape.layouts[1:]}
    return [
        {
            "product": f"{shape.out}x{shape.inner}",
            "rows": shape.rows,
            "pattern": pattern,
            "density": round(shape.kept * shape.width / shape.inner, 4),
            "layout": layout,
            "dense_ms": round(found.latency(layouts.DENSE).p50, 3),
            "speedup": round(ratio.value, 2),
            "low": round(ratio.low, 2),
            "high": round(ratio.high, 2),
        }
        for layout, ratio in sorted(ratios.items(), key=lambda entry: entry[1].value)
    ]
