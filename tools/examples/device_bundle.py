"""Compile for a Raspberry Pi 5 that is not here, and write the bundle that measures on it.

    python tools/examples/device_bundle.py --out out

Copy out/edge.tar.gz to the device, unpack it, run `python3 verify.py`, bring measured.json back, and run
`compress report out --merge measured.json`: that report holds the verdict.
"""

import argparse
import tarfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import compress


def dense_model() -> nn.Module:
    """A small classifier of 64 numbers into four classes."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 1024), nn.GELU(), nn.Linear(1024, 128)]
    return nn.Sequential(*layers, nn.LayerNorm(128), nn.Linear(128, 4)).eval()


def main() -> None:
    """Compile, export the bundle, and list what the device gets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the result goes")
    out = parser.parse_args().out
    model, inputs = dense_model(), torch.randn(256, 64)
    loader = DataLoader(TensorDataset(inputs, model(inputs).argmax(-1)), batch_size=32)
    quick = {"search": {"samples": 32, "generations": 1}, "bench": {"block_ms": 2.0}}
    request = compress.Recipe.model_validate({"target": "rpi5", "budget": {"speedup": 1.5}, **quick})
    result = compress.compile(
        model, example_inputs=inputs[:1], data_loader=loader, recipe=request, out=str(out)
    )
    predicted = result.verdict.predicted
    print(result.verdict.status, "" if predicted is None else f"(estimated {predicted.speedup:.2f}x)")
    (archive,) = compress.export_files(out, to="edge", archive=True)
    with tarfile.open(archive) as bundle:
        print("\n".join(sorted(bundle.getnames())))


if __name__ == "__main__":
    main()
