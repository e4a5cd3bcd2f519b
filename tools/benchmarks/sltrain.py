"""The benchmark `sltrain`: a small Llama trained dense, low-rank, and sparse plus low-rank, at equal steps.

All begin from nothing, on the same windows of WikiText-2 in byte-level pieces that are learned from its
training text. Two low-rank models are controls: one of the same rank as the sparse plus low-rank model, and
one of the rank that takes as many parameters. Factors alone must not start at zero as they do beside a sparse
part: with all products zero no gradient reaches them. They start alike, so that their product varies as the
dense weight in their place. Bytes are counted on the tensors that are there after a step.

Data lies in a directory with `wikitext2/`.
"""

import argparse
import gzip
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from compress.core.sltrain import account
from compress.training import sltrain_layers

Row = dict[str, object]
STEPS = 500
PIECES = 1024
LENGTH = 128
WINDOWS = 8  # a step
HELD = 128  # windows of the validation text
LEARNED = 30_000  # lines of the training text, of which there are about 36,000
RANK, DENSITY, ALPHA = 32, 0.03, 16.0  # a quarter of the width, as the paper has it
RATE, WARMUP, LEAST = (
    3e-3,
    0.1,
    0.1,
)  # the rate rises over a tenth of the steps and falls to a tenth of itself
WIDTH, INNER, LAYERS, HEADS = 128, 352, 4, 4


@dataclass(frozen=True)
class Text:
    """Pieces of the training text in a row, and [windows, LENGTH] of the validation text."""

    known: Tensor
    held: Tensor


def read(folder: Path) -> Text:
    """WikiText-2 in pieces."""
    lines = list(islice(_lines(folder / "train.txt.gz"), LEARNED))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines[: LEARNED // 10], trainer)
    known, held = (
        torch.tensor([piece for line in text for piece in tokenizer.encode(line).ids])
        for text in (lines, _lines(folder / "valid.txt.gz"))
    )
    windows = min(HELD, len(held) // LENGTH)
    return Text(known, held[: windows * LENGTH].reshape(windows, LENGTH))


def _lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return file.readlines()


def model(seed: int) -> nn.Module:
    """A Llama of 0.9 million parameters."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=PIECES, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=INNER, max_position_embeddings=LENGTH, use_cache=False,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config)
    return made


def products(net: nn.Module) -> list[str]:
    """Names of the linear layers inside of the blocks."""
    return [name for name, part in net.named_modules() if isinstance(part, nn.Linear) and ".layers." in name]


class Thin(nn.Module):
    """`x -> x (left right)^T` of two factors alone; the product's entries vary as those of a dense weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inner = weight.shape
        spread = float((weight.detach().std() * rank**-0.5).sqrt())
        self.right = nn.Parameter(torch.randn(rank, inner) * spread)
        self.left = nn.Parameter(torch.randn(out, rank) * spread)

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., out] of inputs [..., in]."""
        return F.linear(F.linear(x, self.right), self.left)


def thin(net: nn.Module, *, same_parameters: bool) -> None:
    """Low rank alone, in place: of RANK, or of the rank with as many parameters as RANK and DENSITY."""
    for name in products(net):
        weight = net.get_submodule(name).weight
        rank = RANK
        if same_parameters:
            rank = round(account(*weight.shape, RANK, DENSITY).parameters / sum(weight.shape))
        net.set_submodule(name, Thin(weight, rank))


def mixed(net: nn.Module, seed: int) -> None:
    """Sparse plus low rank, in place."""
    sltrain_layers.convert(net, products(net), rank=RANK, density=DENSITY, alpha=ALPHA, seed=seed)


METHODS: dict[str, Callable[[nn.Module, int], None]] = {
    "dense": lambda net, seed: None,
    "sparse + low rank": mixed,
    "low rank": lambda net, seed: thin(net, same_parameters=False),
    "low rank of as many parameters": lambda net, seed: thin(net, same_parameters=True),
}


def run(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Perplexity and bytes of every method and seed."""
    text = read(arguments.data / "wikitext2")
    rows: list[Row] = []
    for seed in range(arguments.seeds or 1):
        for name in arguments.methods.split(",") if arguments.methods else METHODS:
            began = time.perf_counter()
            net = model(seed)
            METHODS[name](net, seed)
            optimizer = fit(net, text.known, seed, arguments.steps or STEPS)
            row: Row = {"method": name, "seed": seed, "perplexity": round(perplexity(net, text.held), 2)}
            row |= megabytes(net, optimizer, text.held[:WINDOWS])
            rows.append(row | {"seconds": round(time.perf_counter() - began, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def fit(net: nn.Module, known: Tensor, seed: int, steps: int) -> torch.optim.Optimizer:
    """Train all parameters on random windows, the same for every method; gives the optimizer."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    net.train()
    for _ in range(steps):
        starts = torch.randint(0, len(known) - LENGTH, (WINDOWS,), generator=random)
        optimizer.zero_grad(set_to_none=True)
        loss(net, known[starts[:, None] + torch.arange(LENGTH)]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    net.eval()
    return optimizer


def pace(step: int, steps: int) -> float:
    """The share of the rate at a step: up along a line, then down along a cosine."""
    up = max(1, round(WARMUP * steps))
    if step < up:
        return (step + 1) / up
    return LEAST + (1 - LEAST) * (1 + math.cos(math.pi * (step - up) / max(1, steps - up))) / 2


def loss(net: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats a piece of [windows, LENGTH]."""
    logits = net(input_ids=windows).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def perplexity(net: nn.Module, held: Tensor) -> float:
    """Of a piece, over all windows."""
    parts = held.split(WINDOWS)
    return math.exp(sum(float(loss(net, part)) * len(part) for part in parts) / len(held))


def megabytes(net: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor) -> Row:
    """What a step holds: all tensors of the model, gradients, states, and what the backward pass waits for.

    `temporary` is beside it for a moment: the dense rows of a weight and its gradient, in the largest layer.
    """
    own = {value.untyped_storage().data_ptr() for value in [*net.parameters(), *net.buffers()]}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    optimizer.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        objective = loss(net, windows)
    objective.backward()
    states = [value for held in optimizer.state.values() for value in held.values()]
    found = {
        "weights": _bytes(net.parameters()),
        "indices": _bytes(net.buffers()),
        "gradients": _bytes(value.grad for value in net.parameters()),
        "optimizer": _bytes(states),
    }
    layers = [part for part in net.modules() if isinstance(part, sltrain_layers.SparseLowRank)]
    temporary = max(
        (account(len(x.left), x.right.shape[1], RANK, DENSITY).temporary_bytes for x in layers), default=0
    )
    row: Row = {"parameters": sum(value.numel() for value in net.parameters())}
    row |= {f"{name}_mb": round(size / 1e6, 3) for name, size in found.items()}
    row["held_mb"] = round(sum(found.values()) / 1e6, 3)
    row["kept_for_backward_mb"] = round(sum(kept.values()) / 1e6, 3)
    return row | {"temporary_mb": round(temporary / 1e6, 3)}


def _bytes(values: object) -> int:
    return sum(value.numel() * value.element_size() for value in values if value is not None)
