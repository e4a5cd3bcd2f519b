"""Train a small ViT on CIFAR-10, for the benchmarks.

    python tools/train_vit.py --data cifar10 --out vit-cifar10

Needs the folder of CIFAR-10 that `benchmarks/hidden_width.py` reads. The result is a Hugging Face
directory beside `train.npz` and `dev.npz`, what `compress` expects of a user.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from benchmarks import hidden_width
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from compress.tasks.task import Batch

RATE = 1e-3
HELD = 4000
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RULES = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def moved(pixels: Tensor, random: torch.Generator) -> Tensor:
    """[n, 3, 32, 32] pictures, each flipped or not and shifted by up to four pixels."""
    flipped = torch.rand(len(pixels), generator=random) < 0.5
    pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
    padded = functional.pad(pixels, (4, 4, 4, 4), mode="reflect")
    corners = torch.randint(0, 9, (len(pixels), 2), generator=random).tolist()
    return torch.stack([one[:, y : y + 32, x : x + 32] for one, (y, x) in zip(padded, corners, strict=True)])


def main() -> None:
    """Train for a fixed number of steps, save, print the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--parts", type=int, default=5, help="of the five training files")
    arguments = parser.parse_args()
    labels = np.load(arguments.data / "labels.npz")
    x = torch.cat([hidden_width.cifar(arguments.data / f"train_{n + 1}.xz") for n in range(arguments.parts)])
    y = torch.tensor(labels["train"][: len(x)], dtype=torch.long)
    held = hidden_width.cifar(arguments.data / "test.xz")[:HELD]
    truth = torch.tensor(labels["test"][:HELD], dtype=torch.long)
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    lesson = replace(hidden_width.pictures(arguments.data, 64), model=model)

    def drawn() -> Iterator[Batch]:
        random = torch.Generator().manual_seed(0)
        while True:
            chosen = torch.randint(0, len(x), (64,), generator=random)
            yield Batch({"pixel_values": moved(x[chosen], random)}, y[chosen])

    began = time.perf_counter()
    hidden_width.fit(model, lesson, drawn(), arguments.steps, RATE)
    with torch.no_grad():
        found = torch.cat([model(pixel_values=part).logits for part in held.split(250)])
    score = float((found.argmax(-1) == truth).float().mean())
    print(f"{arguments.steps} steps, {time.perf_counter() - began:.0f} s: held-out accuracy {score:.4f}")
    model.save_pretrained(arguments.out)
    (arguments.out / "preprocessor_config.json").write_text(json.dumps(RULES, indent=1) + "\n")
    for name, pixels, classes in (("train", x[:20000], y[:20000]), ("dev", held, truth)):
        bytes_ = ((pixels + 1) * 127.5).round().to(torch.uint8)
        np.savez_compressed(arguments.out / f"{name}.npz", x=bytes_.numpy(), y=classes.numpy())


if __name__ == "__main__":
    main()
