"""What the tests of several modules share: taken out of test_surgery."""

import torch
from torch import nn

from compress.ir import Count, Drop, Site, Slice
from compress.sites.prune import Removal


def rows(name, width, bias=True):
    """A producer: units own rows of its weight, and entries of its bias."""
    yield Slice(tensor=f"{name}.weight", dim=0, width=width)
    if bias:
        yield Slice(tensor=f"{name}.bias", dim=0, width=width)


def bert_sites():
    sites = []
    for layer in range(2):
        place = f"bert.encoder.layer.{layer}"
        attention, writer = f"{place}.attention.self", f"{place}.attention.output.dense"
        sites.append(
            Site(
                name=f"{layer}.heads",
                kind="heads",
                units=4,
                slices=(
                    *rows(f"{attention}.query", 8),
                    *rows(f"{attention}.key", 8),
                    *rows(f"{attention}.value", 8),
                    Slice(tensor=f"{writer}.weight", dim=1, width=8),
                ),
                counts=(
                    Count(module=attention, attribute="num_attention_heads", per_unit=1),
                    Count(module=attention, attribute="all_head_size", per_unit=8),
                ),
                writer=f"{writer}.weight",
                bias=f"{writer}.bias",
                drop=Drop(module=attention, writer=False, output=0, outputs=2),
            )
        )
        sites.append(
            Site(
                name=f"{layer}.ffn",
                kind="ffn",
                units=64,
                slices=(
                    *rows(f"{place}.intermediate.dense", 1),
                    Slice(tensor=f"{place}.output.dense.weight", dim=1, width=1),
                ),
                writer=f"{place}.output.dense.weight",
                bias=f"{place}.output.dense.bias",
                drop=Drop(module=f"{place}.intermediate", writer=False),
            )
        )
    return tuple(sites)


def llama_sites():
    sites = []
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        sites.append(
            Site(
                name=f"{layer}.heads",
                kind="heads",
                units=2,
                slices=(
                    *rows(f"{attention}.q_proj", 16, bias=False),
                    *rows(f"{attention}.k_proj", 8, bias=False),
                    *rows(f"{attention}.v_proj", 8, bias=False),
                    Slice(tensor=f"{attention}.o_proj.weight", dim=1, width=16),
                ),
                writer=f"{attention}.o_proj.weight",
                drop=Drop(module=attention, writer=True, output=0, outputs=2),
            )
        )
        sites.append(
            Site(
                name=f"{layer}.ffn",
                kind="ffn",
                units=64,
                slices=(
                    *rows(f"{mlp}.gate_proj", 1, bias=False),
                    *rows(f"{mlp}.up_proj", 1, bias=False),
                    Slice(tensor=f"{mlp}.down_proj.weight", dim=1, width=1),
                ),
                writer=f"{mlp}.down_proj.weight",
                drop=Drop(module=mlp, writer=True),
            )
        )
    return tuple(sites)


def randomized(model):
    """Weights and biases of size one in effect, so that every part of the model matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
    )
    return randomized(BertForSequenceClassification(config))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return randomized(LlamaForCausalLM(config))


MODELS = {"bert": (bert, bert_sites), "llama": (llama, llama_sites)}


def tokens():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 50, (2, 7), generator=generator)
    attention = torch.ones(2, 7, dtype=torch.int64)
    attention[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": attention}


@torch.inference_mode()
def logits(model, inputs=None):
    return model(**(inputs or tokens())).logits


def removal(model, site, kept, seed=0, weight=True, bias=True):
    generator = torch.Generator().manual_seed(seed)
    out = model.get_parameter(site.writer).shape[1 - site.column.dim]
    return Removal(
        kept=torch.tensor(kept, dtype=torch.int64),
        weight=torch.randn(out, len(kept) * site.column.width, generator=generator) if weight else None,
        bias=torch.randn(out, generator=generator) if bias else None,
    )


def some_removals(model, sites, seed=0, **keywords):
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for index, site in enumerate(sites):
        count = max(1, site.units // 2 - index % 2)
        kept = sorted(torch.randperm(site.units, generator=generator)[:count].tolist())
        result[site.name] = removal(model, site, kept, seed + index, **keywords)
    return result


class Fused(nn.Module):
    """Query, key and value in one matrix, with two rows before them that belong to no head."""

    def __init__(self):
        super().__init__()
        self.heads = 3
        self.qkv = nn.Linear(6, 2 + 3 * 6, bias=True)
        self.out = nn.Linear(6, 6, bias=False)

    def forward(self, hidden):
        extra, fused = self.qkv(hidden).split([2, 6 * self.heads], -1)
        batch, count, _ = hidden.shape
        q, k, v = fused.view(batch, count, 3, self.heads, 2).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2)) + extra.sum(-1, keepdim=True)


FUSED = Site(
    name="fused",
    kind="heads",
    units=3,
    slices=(
        *(Slice(tensor="qkv.weight", dim=0, width=2, start=2 + 6 * i) for i in range(3)),
        *(Slice(tensor="qkv.bias", dim=0, width=2, start=2 + 6 * i) for i in range(3)),
        Slice(tensor="out.weight", dim=1, width=2),
    ),
    counts=(Count(module="", attribute="heads", per_unit=1),),
    writer="out.weight",
)


class Tied(nn.Module):
    """Two layers that share both matrices."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.ones(1))
        self.up2, self.down2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.up2.weight, self.up2.bias, self.down2.weight = (
            self.up.weight,
            self.up.bias,
            self.down.weight,
        )

    def forward(self, hidden):
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return hidden + self.down2(torch.relu(self.up2(hidden)))


TIED = Site(
    name="tied",
    kind="ffn",
    units=6,
    slices=(
        *rows("up", 1),
        *rows("up2", 1),
        Slice(tensor="down.weight", dim=1, width=1),
        Slice(tensor="down2.weight", dim=1, width=1),
    ),
    writer="down.weight",
    bias="down.bias",
)
