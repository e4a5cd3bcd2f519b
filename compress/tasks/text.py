"""What tasks on text share: tokenize, order by length, pad on the right.

Padding is on the right, under an attention mask, and enters no loss, divergence or score.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.tasks import pretrained
from compress.tasks.task import Batch, Pretrained, Request, Split

WINDOW = 16  # batches that are sorted by length together: little padding, and still mixed data
LONGEST = 512  # tokens of an input when nothing shorter is asked for or imposed by the model


class TextTask(Pretrained):
    """What tasks on text share: tokenize, order by length, pad on the right."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.tokenizer = pretrained.load_tokenizer(request.directory)
        limit = pretrained.position_limit(self.model) or LONGEST
        self.tokens = min(request.tokens or LONGEST, limit)
        config: Any = self.model.config
        self.vocabulary = int(config.vocab_size)
        self.rows: dict[str, list[tuple[str, ...]]] = {}
        self._encoded: dict[str, list[tuple[list[int], list[int]]]] = {}
        pads = (config.pad_token_id, self.tokenizer.pad_token_id, config.eos_token_id)
        pad = next((number for number in pads if isinstance(number, int)), 0)
        self.pad = pad if pad >= 0 else 0

    def _encode(self, split: Split, count: int) -> list[tuple[list[int], list[int]]]:
        """Token ids and segment ids of the first `count` rows, tokenized when first asked for."""
        done = self._encoded.setdefault(split, [])
        rows = self.rows[split][len(done) : count]
        if rows:
            columns = [list(column) for column in zip(*rows, strict=True)]
            with pretrained.quiet():
                found = self.tokenizer(*columns, truncation=True, max_length=self.tokens)
            ids = found["input_ids"]
            self._check_ids(max(map(max, filter(None, ids)), default=0))
            done += zip(ids, found.get("token_type_ids") or ids, strict=True)
        return done[:count]

    def _check_ids(self, highest: int) -> None:
        if highest >= self.vocabulary:
            raise CompressError(
                f"the tokenizer in {self.directory} gives token {highest}, but the model has "
                f"{self.vocabulary} embeddings; save the tokenizer that the model was trained with"
            )

    @property
    def _segments(self) -> bool:
        """Whether a pair's two parts are told apart by token_type_ids."""
        pair = len(next(iter(self.rows.values()))[0]) == 2
        config: Any = self.model.config
        names = self.tokenizer.model_input_names
        return pair and "token_type_ids" in names and getattr(config, "type_vocab_size", 0) > 1

    def example(self, batch: int, tokens: int) -> dict[str, Tensor]:
        """Random ids; of a pair of texts the second half is the second text."""
        inputs = super().example(batch, tokens)
        if self._segments:
            second = torch.arange(inputs["input_ids"].shape[1]) * 2 >= inputs["input_ids"].shape[1]
            inputs["token_type_ids"] = second.long().expand(batch, -1).contiguous()
        return inputs

    def indexed(self, split: Split, size: int, limit: int | None) -> Iterator[tuple[list[int], Batch]]:
        """Padded batches, each with the rows it holds."""
        encoded = self._encode(split, len(self.rows[split]) if limit is None else limit)
        for start in range(0, len(encoded), WINDOW * size):
            window = range(start, min(start + WINDOW * size, len(encoded)))
            order = sorted(window, key=lambda row: len(encoded[row][0]))  # stable
            for at in range(0, len(order), size):
                rows = order[at : at + size]
                yield rows, self._pad([encoded[row] for row in rows])

    def _pad(self, encoded: Sequence[tuple[list[int], list[int]]]) -> Batch:
        longest = max(1, *(len(ids) for ids, _ in encoded), 1)
        ids = torch.full((len(encoded), longest), self.pad)
        segments, real = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (words, kinds) in enumerate(encoded):
            ids[row, : len(words)] = torch.tensor(words, dtype=torch.int64)
            segments[row, : len(words)] = torch.tensor(kinds, dtype=torch.int64)
            real[row, : len(words)] = 1
        inputs = {"input_ids": ids, "attention_mask": real}
        if self._segments:
            inputs["token_type_ids"] = segments
        return Batch(inputs, real=real.bool())

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Padded texts."""
        for _, batch in self.indexed(split, size, limit):
            yield batch
