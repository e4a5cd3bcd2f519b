"""A task in one module: where an answer starts and ends in a text, on a small model with two outputs."""

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from compress.task_specs import ColumnRule, TaskSpec
from compress.tasks.task import SCORE_BATCH, Batch, Task, answer, kl

OUTPUTS = ("start_logits", "end_logits")
USAGE = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
print([value.name for value in session.get_outputs()])"""
SAMPLES, TOKENS, VOCABULARY = 48, 9, 30


class Spans(Task):
    """[batch, tokens] logits of the first and the last token of an answer, scored by exact matches."""

    name = "question-answering"
    metric = "exact_match"
    outputs = OUTPUTS

    def __init__(self, request=None):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=24, num_attention_heads=3, intermediate_size=40,
            num_hidden_layers=2, max_position_embeddings=40, initializer_range=0.3,
        )  # fmt: skip
        self.model = transformers.BertForQuestionAnswering(config).eval()
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (SAMPLES, TOKENS), generator=generator)
        with torch.no_grad():
            spans = self.logits(self.model(self.ids, torch.ones_like(self.ids)))
        self.spans = spans.argmax(1)  # the dense model is always right
        self.samples = dict.fromkeys(("calibration", "validation", "test"), SAMPLES)

    def example(self, batch, tokens):
        ids = self.ids[:1].repeat(batch, 4)[:, :tokens]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batches(self, split, size, limit=None):
        for ids, spans in zip(self.ids[:limit].split(size), self.spans[:limit].split(size), strict=True):
            real = torch.ones_like(ids)
            yield Batch({"input_ids": ids, "attention_mask": real}, spans, real.bool())

    def loss(self, logits, batch):
        return F.cross_entropy(self._masked(logits, batch), batch.labels)

    def divergence(self, logits, dense, batch):
        sides = (self._masked(side, batch).transpose(1, 2) for side in (logits, dense))
        return kl(*sides).mean()

    def outcomes(self, run, split="test", limit=None):
        right = [
            (answer(run, batch).argmax(1) == batch.labels.numpy()).all(1)
            for batch in self.batches(split, SCORE_BATCH, limit)
        ]
        return np.concatenate(right)[:, None].astype(np.float64)

    def _masked(self, logits, batch):
        """No answer lies in padding."""
        return logits.masked_fill(~batch.real[..., None], -1e4)


SPEC = TaskSpec(
    name=Spans.name,
    implementation="support.toy_task:Spans",
    auto_class="AutoModelForQuestionAnswering",
    heads=("ForQuestionAnswering",),
    main_input="input_ids",
    outputs=OUTPUTS,
    metric=Spans.metric,
    columns=(ColumnRule("--text", ("context",), "the column is missing, which is an error"),),
    usage=USAGE,
)


def task():
    """A factory, as `support.toy_task:task` names it."""
    return Spans()
