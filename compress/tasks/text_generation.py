"""Causal language modelling on running text, scored by perplexity."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.tasks import pretrained
from compress.tasks.datasets import text_columns, texts
from compress.tasks.readers import Table
from compress.tasks.task import SCORE_BATCH, Batch, Request, Run, Split, answer, kl
from compress.tasks.text import TextTask

CALIBRATION_BLOCKS = 4096  # running text beyond this is not read for calibration
LOGITS_AT_ONCE = 2**26  # numbers in one batch of language-model logits, 256 MB
CHUNK = 8192  # characters of running text that are tokenized at once


class TextGeneration(TextTask):
    """Causal language modelling on running text, cut into blocks without padding."""

    name = "text-generation"
    metric = "perplexity"
    higher_is_better = False

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        tables = request.splits.tables
        column = text_columns(tables["calibration"], request.text)[0]
        self.blocks: dict[str, Tensor] = {}
        for split, table in tables.items():
            documents = texts(table, column)
            pieces = _chunks(documents) if table.plain else documents
            if split == "calibration":
                order = np.random.default_rng(0).permutation(len(pieces))
                pieces = [pieces[at] for at in order]
            most = CALIBRATION_BLOCKS if split == "calibration" else None
            self.blocks[split] = self._cut(pieces, table, most)
        self.samples = {split: len(blocks) for split, blocks in self.blocks.items()}

    def _cut(self, pieces: Sequence[str], table: Table, most: int | None) -> Tensor:
        """[blocks, tokens] ids of the texts one after another; the rest of the last is left out."""
        stream: list[int] = []
        end = [] if table.plain or self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        for start in range(0, len(pieces), 64):
            with pretrained.quiet():
                found = self.tokenizer(list(pieces[start : start + 64]), add_special_tokens=not table.plain)
            for ids in found["input_ids"]:
                stream += ids if ids[-1:] == end else ids + end
            if most is not None and len(stream) >= most * self.tokens:
                break
        count = min(len(stream) // self.tokens, most or len(stream))
        if not count:
            raise CompressError(
                f"{table.place} has {len(stream)} tokens in one split, less than one block of "
                f"{self.tokens}; give more text or fewer tokens per block"
            )
        self._check_ids(max(stream))
        return torch.tensor(stream[: count * self.tokens]).reshape(count, self.tokens)

    @property
    def _segments(self) -> bool:
        return False

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Blocks of ids, which are their own labels."""
        blocks = self.blocks[split][:limit]
        for start in range(0, len(blocks), size):
            ids = blocks[start : start + size]
            real = torch.ones_like(ids)
            yield Batch({"input_ids": ids, "attention_mask": real}, ids, real.bool())

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of each real token given those before it, in nats."""
        losses, known = _token_losses(logits, batch)
        return losses.sum() / known.sum()

    def divergence(self, logits: Tensor, dense: Tensor, batch: Batch) -> Tensor:
        """KL(dense || logits) of the next token, mean over real tokens."""
        each = kl(logits, dense)
        return (each if batch.real is None else each[batch.real]).mean()

    def outcomes(self, run: Run, split: Split = "test", limit: int | None = None) -> NDArray[Any]:
        """[blocks, 2] the summed loss of a block's tokens, and how many they are."""
        size = max(1, min(SCORE_BATCH, LOGITS_AT_ONCE // (self.tokens * self.vocabulary)))
        found = []
        for batch in self.batches(split, size, limit):
            losses, known = _token_losses(torch.from_numpy(answer(run, batch)), batch)
            found.append(torch.stack([losses.double().sum(1), known.double().sum(1)], 1))
        return torch.cat(found).numpy()

    def scored(self, outcomes: NDArray[Any]) -> float:
        """Perplexity per token: e to the mean loss; lower is better."""
        total, seen = outcomes.sum(0)
        return float(np.exp(total / seen))


def _token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[batch, tokens - 1] losses of all tokens but the first, 0 where one is not real, and which are."""
    ids = batch.inputs["input_ids"] if batch.labels is None else batch.labels
    real = torch.ones_like(ids, dtype=torch.bool) if batch.real is None else batch.real
    known = real[:, 1:] & real[:, :-1]
    losses = torch.zeros(known.shape, dtype=logits.dtype)
    losses[known] = F.cross_entropy(logits[:, :-1][known], ids[:, 1:][known], reduction="none")
    return losses, known


def _chunks(lines: Iterable[str]) -> list[str]:
    """Running text in pieces of whole lines, so that it need not be tokenized all at once."""
    pieces, held, size = [], list[str](), 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= CHUNK:
            pieces.append("".join(held))
            held, size = [], 0
    return [*pieces, "".join(held)] if held else pieces
