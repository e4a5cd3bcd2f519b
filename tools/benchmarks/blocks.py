"""Block-sparse products in every layout beside their dense Gemm, interleaved, on one thread's own clock."""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

from compress.export.backends import block_layouts, onnxruntime
from compress.export.microbench.site_timing import clock_for
from compress.export.onnx import block_sparse, writer
from compress.export.onnx.block_sparse import Blocks
from compress.export.onnx.linear_lowering import Lowered, lower
from compress.measure import timing

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
                rows += _layouts(block_layouts.shape_of(tokens, wide, inner, pattern), pattern)
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _layouts(shape: block_layouts.Shape, pattern: str) -> list[Row]:
    """All layouts of one shape, the fastest last."""
    runners = {
        layout: block_layouts.runner(block_layouts.product(shape, layout, 1), shape, 1)
        for layout in shape.layouts
    }
    found = timing.compare(runners, blocks=30, block_ms=1.0, clock=clock_for(1))
    ratios = {layout: found.ratio(layout) for layout in shape.layouts[1:]}
    return [
        {
            "product": f"{shape.out}x{shape.inner}",
            "rows": shape.rows,
            "pattern": pattern,
            "density": round(shape.kept * shape.width / shape.inner, 4),
            "layout": layout,
            "dense_ms": round(found.latency(block_layouts.DENSE).p50, 3),
            "speedup": round(ratio.value, 2),
            "low": round(ratio.interval.low, 2),
            "high": round(ratio.interval.high, 2),
        }
        for layout, ratio in sorted(ratios.items(), key=lambda entry: entry[1].value)
    ]


def encoder(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """A MiniLM-shaped encoder, or that in `--model`, whose products all keep their largest blocks.

    Nothing is refitted: this is about time, and about the file saying what the masked model says.
    """
    torch.manual_seed(0)
    small = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    dense = BertModel.from_pretrained(arguments.model) if arguments.model else BertModel(small)
    dense = dense.eval()
    rows: list[Row] = []
    for pattern in arguments.patterns.split(","):
        masked = copy.deepcopy(dense)
        kept = {
            name: _largest(weight, pattern)
            for name, weight in masked.named_parameters()
            if weight.ndim == 2 and name.startswith("encoder.")
        }
        for tokens in arguments.rows:
            rows += _whole(dense, masked, kept, pattern, tokens, out)
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _largest(weight: torch.nn.Parameter, pattern: str) -> Blocks:
    """Keep the blocks of the largest norm in every group, in place; equally many in each."""
    height, width, _ = block_sparse.parsed(pattern)
    size, inner = weight.shape
    norms = weight.detach().reshape(size // height, height, inner // width, width).square().sum((1, 3))
    count = block_layouts.shape_of(1, size, inner, pattern).kept
    places = norms.topk(count).indices.sort().values.tolist()
    blocks = Blocks(height, width, tuple(map(tuple, places)))
    weight.data.mul_(torch.from_numpy(blocks.mask(size, inner)))
    return blocks


def _whole(
    dense: torch.nn.Module,
    masked: torch.nn.Module,
    kept: dict[str, Blocks],
    pattern: str,
    tokens: int,
    out: Path,
) -> list[Row]:
    """One row: the encoder in blocks against the dense file, one sentence of so many tokens."""
    shapes = {block_layouts.shape_of(tokens, *masked.get_parameter(name).shape, pattern) for name in kept}
    timed = block_layouts.table(shapes)
    choose = block_layouts.layout_chooser(
        {shape: block_layouts.fastest_layout(timed, shape)[0] for shape in shapes}
    )
    wanted = {
        name: block_layouts.lowering(masked.get_parameter(name).detach().numpy(), pattern, choose)
        for name in kept
    }
    ids = torch.randint(1000, 30000, (1, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    files = out / "dense.onnx", out / "blocks.onnx"
    writer.export(dense, inputs, files[0], outputs=("last_hidden_state",))
    report: dict[str, Lowered] = {}
    writer.export(
        masked,
        inputs,
        files[1],
        outputs=("last_hidden_state",),
        lower=lambda graph: report.update(lower(graph, wanted)),
    )
    arrays = {name: value.numpy() for name, value in inputs.items()}
    with onnxruntime.OrtRunner(files[0], 1) as first, onnxruntime.OrtRunner(files[1], 1) as second:
        with torch.no_grad():
            expected = masked(**inputs).last_hidden_state.numpy()
        apart = float(np.abs(second.infer(arrays)["last_hidden_state"] - expected).max())
        calls = {"dense": first.timed(arrays), "blocks": second.timed(arrays)}
        found = timing.compare(calls, blocks=40, block_ms=40.0, clock=clock_for(1))
    ratio = found.ratio("blocks")
    return [
        {
            "pattern": pattern,
            "tokens": tokens,
            "layouts": ", ".join(sorted({one.layout for one in report.values()})),
            "weights_kept": round(
                sum(one.weight_bytes for one in report.values())
                / sum(one.dense_bytes for one in report.values()),
                4,
            ),
            "parity": f"{apart:.1e}",
            "dense_ms": round(found.latency("dense").p50, 2),
            "speedup": round(ratio.value, 2),
            "low": round(ratio.interval.low, 2),
            "high": round(ratio.interval.high, 2),
        }
    ]
