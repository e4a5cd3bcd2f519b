"""What the tests of several modules share: taken out of test_channels."""

import functools

import torch
import transformers

from compress.sites.discovery import find_sites

SMALL = {"vocab_size": 30, "max_position_embeddings": 32, "initializer_range": 0.3}


FAMILIES = {
    "separate": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **SMALL
        )
    ),
    "fused": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_inner=24, pad_token_id=0, **SMALL)
    ),
    "grouped": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=24, pad_token_id=0, **SMALL,
        )
    ),
}  # fmt: skip


@functools.cache
def family(name):
    """A small model whose every tensor is noise, its input and its sites."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn(value.shape))
    ids = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(1))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = find_sites(model, example)
    return model, example, {site.kind: site for site in found.sites}
