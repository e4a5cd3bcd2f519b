"""Every figure that the project states, measured here: one table on the screen and one JSON file.

    python tools/benchmark.py demo                      the embedded default at 1.5x, 2x and 3x, three times
    python tools/benchmark.py methods --model DIR       ZipLM with search against uniform baselines
    python tools/benchmark.py families --model DIR      recovered families: ours, by magnitude, labels alone
    python tools/benchmark.py moves --model DIR         every move alone, and all of them in one search
    python tools/benchmark.py database --model DIR      time and memory of the candidates
    python tools/benchmark.py prediction --model DIR    predicted against measured time of random plans
    python tools/benchmark.py precision                 our 8 and 4 bits against onnxruntime's own quantizer
    python tools/benchmark.py smoothing --data DATA     int8 and int4 with and without SmoothQuant
    python tools/benchmark.py blocks                    block-sparse products against their dense Gemm
    python tools/benchmark.py encoder                   an encoder whose products are all block-sparse
    python tools/benchmark.py pat --data DATA           the hidden width, pruned while training or before
    python tools/benchmark.py sltrain --data DATA       trained dense, low-rank, or sparse plus low-rank
    python tools/benchmark.py gpusq --data DATA         2:4 on 8 bits, with and without each distillation term

DIR is what `tools/finetune_sst2.py` or `tools/train_vit.py` wrote: a Hugging Face directory beside
`train.csv`, `validation.csv` and `test.csv`, or `train.npz` and `dev.npz`.
DATA holds public data sets in folders: `cifar10`, `tinyshakespeare`, `wikitext2`, `stories260k`.
"""

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from benchmarks import blocks, candidates, compiled, gpusq, hidden_width, precision, sltrain, smoothed
from rich.console import Console
from rich.table import Table

from compress import artifacts
from compress.measure import timing

BENCHMARKS = {
    "demo": compiled.demo,
    "methods": compiled.methods,
    "families": compiled.families,
    "moves": compiled.moves,
    "database": candidates.build_database,
    "prediction": candidates.prediction,
    "precision": precision.run,
    "smoothing": smoothed.run,
    "blocks": blocks.run,
    "encoder": blocks.encoder,
    "pat": hidden_width.run,
    "sltrain": sltrain.run,
    "gpusq": gpusq.run,
}


def main() -> None:
    """Run one benchmark; print its table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--model", type=Path, help="a directory of tools/finetune_sst2.py or train_vit.py")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0])
    known = [*compiled.METHODS, *compiled.FAMILIES, *compiled.MOVES, *sltrain.METHODS]
    parser.add_argument("--methods", help=f"comma list of {', '.join(known)}")
    parser.add_argument("--recover", choices=("fast", "full"), default="full", help="for families")
    parser.add_argument("--epochs", type=int, default=4, help="a course of recovery, for families")
    parser.add_argument("--samples", type=int, default=16384, help="inputs of an epoch, for families")
    parser.add_argument("--products", default="3072x768,768x3072", help="comma list of OUTxIN, for blocks")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128], help="rows of x, for blocks")
    parser.add_argument(
        "--patterns", default=blocks.PATTERNS, help="comma list of block patterns, for blocks"
    )
    parser.add_argument(
        "--data", type=Path, help="a directory with the data sets, for pat, sltrain, gpusq and smoothing"
    )
    parser.add_argument("--dense-steps", type=int, help="from scratch, for pat (600) and gpusq (1500)")
    parser.add_argument(
        "--steps", type=int, help="for pat (200), sltrain (500) and each stage of gpusq (100)"
    )
    parser.add_argument("--seeds", type=int, help="for sltrain (1) and gpusq (2)")
    parser.add_argument("--batch", type=int, default=64, help="inputs a step, for pat and gpusq")
    parser.add_argument("--threads", type=int, default=timing.physical_cores())
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = BENCHMARKS[arguments.benchmark](arguments, Path(folder))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=arguments.benchmark)
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in columns))
    Console().print(table)
    document = {
        "benchmark": arguments.benchmark,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": timing.environment(),
        "rows": rows,
    }
    artifacts.write_text(arguments.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
