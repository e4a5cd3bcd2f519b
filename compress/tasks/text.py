"""Tasks on text: classification, sentence embeddings, causal language modelling.

Padding is on the right, under an attention mask, and enters no loss, divergence or score.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.tasks import pretrained
from compress.tasks.datasets import label_column, label_numbers, numbers, score_column, text_columns, texts
from compress.tasks.readers import Table
from compress.tasks.task import SCORE_BATCH, Batch, Pretrained, Request, Run, Split, answer, kl

WINDOW = 16  # batches that are sorted by length together: little padding, and still mixed data
LONGEST = 512  # tokens of an input when nothing shorter is asked for or imposed by the model
CALIBRATION_BLOCKS = 4096  # running text beyond this is not read for calibration
LOGITS_AT_ONCE = 2**26  # numbers in one batch of language-model logits, 256 MB
CHUNK = 8192  # characters of running text that are tokenized at once


class _Text(Pretrained):
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
        for _, batch in self.indexed(split, size, limit):
            yield batch


class TextClassification(_Text):
    """One label for a text or a pair of texts."""

    name = "text-classification"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.check_head()
        config: Any = self.model.config
        if config.pad_token_id is None:
            config.pad_token_id = self.pad  # decoders with a classifier refuse batches without one
        tables = request.splits.tables
        columns = text_columns(tables["calibration"], request.text)
        label = label_column(tables["calibration"], columns, self.id2label, request.label)
        self.labels: dict[str, Tensor] = {}
        for split, table in tables.items():
            self.rows[split] = list(zip(*(texts(table, name) for name in columns), strict=True))
            self.labels[split] = torch.tensor(label_numbers(table, label, self.id2label))

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Padded texts with their labels."""
        for rows, batch in self.indexed(split, size, limit):
            yield Batch(batch.inputs, self.labels[split][rows], batch.real)


class FeatureExtraction(_Text):
    """Sentence embeddings: the last hidden state, averaged over real tokens.

    The score is Spearman's rank correlation with the scores of sentence pairs where the data has
    them, else the mean cosine to the dense model's embeddings.
    """

    name = "feature-extraction"
    metric = "cosine"
    labelled = False
    outputs = ("last_hidden_state",)

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        tables = request.splits.tables
        columns = text_columns(tables["calibration"], request.text)
        scored = score_column(tables["calibration"], columns, request.label)
        if len(columns) == 2 and scored is not None:
            self.metric = "spearman"
            self.scores = {split: numbers(table, scored) for split, table in tables.items()}
        for split, table in tables.items():
            pairs = zip(*(texts(table, name) for name in columns), strict=True)
            self.rows[split] = [(text,) for row in pairs for text in row if text.strip()]
        counts = {split: len(rows) for split, rows in self.rows.items()}
        self.samples = counts if self.metric == "cosine" else self.samples  # texts, or pairs
        self._dense: dict[tuple[str, int | None], NDArray[Any]] = {}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """There is none; `divergence` says how far an embedding has moved."""
        raise CompressError(
            "feature extraction has no labels, so no loss; rank units by obs, wanda or magnitude"
        )

    def divergence(self, logits: Tensor, dense: Tensor, batch: Batch) -> Tensor:
        """Mean of 1 - cosine between sentence embeddings."""
        real = batch.real
        return 1 - F.cosine_similarity(pooled(logits, real), pooled(dense, real), dim=-1).mean()

    def _embed(self, run: Run, split: Split, limit: int | None) -> NDArray[Any]:
        """[texts, hidden] embeddings of unit length, in the order of the rows."""
        found: dict[int, Tensor] = {}
        for rows, batch in self.indexed(split, SCORE_BATCH, limit):
            hidden = torch.from_numpy(answer(run, batch))
            found.update(zip(rows, F.normalize(pooled(hidden, batch.real), dim=-1), strict=True))
        return torch.stack([found[row] for row in range(len(found))]).numpy()

    def _run_dense(self, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        device = next(self.model.parameters()).device
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        with torch.inference_mode():
            return self.logits(self.model(**tensors)).cpu().numpy()

    def outcomes(self, run: Run, split: Split = "test", limit: int | None = None) -> NDArray[Any]:
        """[pairs, 2] cosine and true score, or [texts, 1] cosine to the dense embedding."""
        if self.metric == "spearman":
            pairs = self._embed(run, split, None if limit is None else 2 * limit)
            cosines = (pairs[0::2] * pairs[1::2]).sum(-1)
            return np.stack([cosines, np.array(self.scores[split][: len(cosines)])], 1)
        key = (split, limit)
        if key not in self._dense:
            self._dense[key] = self._embed(self._run_dense, split, limit)
        cosine: NDArray[Any] = (self._embed(run, split, limit) * self._dense[key]).sum(-1, keepdims=True)
        return cosine

    def scored(self, outcomes: NDArray[Any]) -> float:
        """Spearman of cosines against the pairs' scores, or the mean cosine."""
        return _spearman(*outcomes.T) if self.metric == "spearman" else float(outcomes.mean())


def pooled(hidden: Tensor, real: Tensor | None) -> Tensor:
    """[batch, hidden] mean over the real tokens of [batch, tokens, hidden]."""
    if real is None:
        return hidden.mean(1)
    weight = real.to(hidden)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count + 1) / 2)[place]


def _spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Spearman's rank correlation, 0 when one side does not vary."""
    ranks = np.stack([_ranks(first), _ranks(second)])
    ranks -= ranks.mean(1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(1)).prod()
    return float(ranks.prod(0).sum() / norm) if norm else 0.0


class TextGeneration(_Text):
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
