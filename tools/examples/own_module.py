"""Compile an nn.Module of your own from Python: example inputs, a data loader, no task to write.

python tools/examples/own_module.py --out out
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compress


class Block(nn.Module):
    """A feed-forward block with a residual connection."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width] to [batch, width]."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Gestures(nn.Module):
    """Three gestures from 64 readings of a sensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block(64, 512) for _ in range(3))), nn.Linear(64, 3)

    def forward(self, signal: Tensor) -> Tensor:
        """Logits [batch, 3] of `signal` [batch, 64]."""
        return self.head(self.blocks(signal))


def main() -> None:
    """Compile to half the size, then compare the loaded model with the dense one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the result goes")
    out = parser.parse_args().out
    torch.manual_seed(0)
    model, signals = Gestures().eval(), torch.randn(256, 64)
    loader = DataLoader(TensorDataset(signals, model(signals).argmax(-1)), batch_size=32)
    quick = {"search": {"samples": 32, "generations": 1}, "bench": {"block_ms": 2.0}}
    request = compress.Recipe.model_validate({"target": "cpu", "budget": {"size_mb": 0.45}, **quick})
    result = compress.compile(
        model, example_inputs=signals[:1], data_loader=loader, recipe=request, out=str(out)
    )
    print(result.verdict.status, result.report.compressed.file_bytes, "bytes")
    loaded = compress.load(out, factory=Gestures)
    same = loaded(signals).argmax(-1) == model(signals).argmax(-1)
    print(f"same class for {100 * same.float().mean():.0f} % of the signals")


if __name__ == "__main__":
    main()
