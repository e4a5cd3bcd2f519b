"""Every model family at toy size: two layers, seeded random weights, eval mode, with example inputs.

Widths are unlike one another, so that no count can be mistaken for another: 20 hidden features, 4
heads of 6 (or 5, where a family ties the width to the heads), 36 neurons.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = 2
HIDDEN = 20
HEADS = 4
GROUPS = 2
NEURONS = 36
VOCABULARY = 50
BATCH, TOKENS = 2, 7


@dataclass(frozen=True)
class Expected:
    """What the sites of one layer of a family are: units of heads and ffn, and facts about them."""

    heads: int = HEADS
    head_dim: int = 5
    queries: int = 1
    activation: str = "gelu"
    gated: bool = False
    causal: bool = False
    biased: bool = True
    fused: bool = False
    ffn: int = NEURONS


def tokens(seed: int = 0, *, batch: int = BATCH, length: int = TOKENS) -> dict[str, Tensor]:
    """Token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pixels(seed: int = 0) -> dict[str, Tensor]:
    """Images of 8 x 8, which models here read as 4 patches and a class token."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator)}


def _bert_like(config: str, model: str, **more: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        own = getattr(transformers, config)(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=NEURONS, max_position_embeddings=40, **more,
        )  # fmt: skip
        return getattr(transformers, model)(own)

    return build


def _vit_like(config: str, model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        own = getattr(transformers, config)(
            image_size=8, patch_size=4, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=NEURONS, num_labels=3,
        )  # fmt: skip
        return getattr(transformers, model)(own)

    return build


def _llama_like(config: str, model: str, **more: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        own = getattr(transformers, config)(
            vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, intermediate_size=NEURONS, max_position_embeddings=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
        )  # fmt: skip
        return getattr(transformers, model)(own)

    return build


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=NEURONS,
        max_position_embeddings=40,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
        n_inner=NEURONS, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, ffn_dim=NEURONS,
        num_attention_heads=HEADS, max_position_embeddings=40, word_embed_proj_dim=HIDDEN,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _t5(**more: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=6, d_ff=NEURONS, num_layers=LAYERS,
            num_heads=HEADS, **more,
        )  # fmt: skip
        return transformers.T5EncoderModel(config)

    return build


class FusedBlock(nn.Module):
    """A user's own pre-norm block: fused query, key and value, matmul, softmax, matmul."""

    def __init__(self, *, scores: int = 0) -> None:
        super().__init__()
        self.h = HEADS
        self.inner = HEADS * 6
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.mix = nn.Linear(HIDDEN, 3 * self.inner)
        self.back = nn.Linear(self.inner, HIDDEN, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, NEURONS), nn.GELU(), nn.Dropout(0.1), nn.Linear(NEURONS, HIDDEN)
        )
        self.table = nn.Parameter(torch.randn(scores, scores, HEADS)) if scores else None

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.mix(x).reshape(b, t, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if self.table is not None:
            scores = scores + self.table[:t, :t].permute(2, 0, 1)[None]
        return self.back((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, self.inner))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fused(nn.Module):
    """A user's own encoder of `FusedBlock`s over token ids; `scores` > 0 adds a bias per head."""

    def __init__(self, *, scores: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList([FusedBlock(scores=scores) for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Separate projections, interleaved heads from one matrix `[head, 3, 6]`, torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(HIDDEN, HEADS * 18)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(HEADS * 6, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, self.num_heads, 18).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)), None


class Gated(nn.Module):
    """A gated feed-forward with a squared relu, halves of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * NEURONS)
        self.down = nn.Linear(NEURONS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).split(self.down.in_features, -1)
        return self.down(F.relu(gate) ** 2 * value)


class Interleaved(nn.Module):
    """A user's own post-norm decoder over float features: no embedding, no mask argument."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList([Attention() for _ in range(LAYERS)])
        self.feed = nn.ModuleList([Gated() for _ in range(LAYERS)])
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(LAYERS)])

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        for attention, feed, norm in zip(self.attention, self.feed, self.norms, strict=True):
            features = norm(features + attention(features)[0])
            features = features + feed(features)
        return {"out": features}


def features(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"features": torch.randn(BATCH, TOKENS, HIDDEN, generator=generator)}


def _grouped(*, head_dim: int = 6, biased: bool = True, fused: bool = False) -> Expected:
    """Two groups of two query heads, a gated feed-forward, causal."""
    return Expected(
        heads=GROUPS, head_dim=head_dim, queries=2, activation="silu", gated=True, causal=True,
        biased=biased, fused=fused,
    )  # fmt: skip


Family = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], Expected]

FAMILIES: dict[str, Family] = {
    "bert": (_bert_like("BertConfig", "BertForSequenceClassification"), tokens, Expected()),
    "roberta": (_bert_like("RobertaConfig", "RobertaModel"), tokens, Expected()),
    "electra": (_bert_like("ElectraConfig", "ElectraModel", embedding_size=16), tokens, Expected()),
    "distilbert": (_distilbert, tokens, Expected()),
    "vit": (_vit_like("ViTConfig", "ViTForImageClassification"), pixels, Expected()),
    "deit": (_vit_like("DeiTConfig", "DeiTModel"), pixels, Expected()),
    "gpt2": (_gpt2, tokens, Expected(activation="gelu_tanh", causal=True, fused=True)),
    "opt": (_opt, tokens, Expected(activation="relu", causal=True)),
    "llama": (
        _llama_like("LlamaConfig", "LlamaForCausalLM"), tokens,
        _grouped(biased=False),
    ),
    "mistral": (
        _llama_like("MistralConfig", "MistralForCausalLM"), tokens,
        _grouped(biased=False),
    ),
    "qwen2": (
        _llama_like("Qwen2Config", "Qwen2ForCausalLM"), tokens,
        _grouped(),
    ),
    "qwen3": (
        _llama_like("Qwen3Config", "Qwen3ForCausalLM", head_dim=10), tokens,
        _grouped(head_dim=10, biased=False),
    ),
    "phi3": (
        _llama_like("Phi3Config", "Phi3ForCausalLM"), tokens,
        _grouped(biased=False, fused=True),
    ),
    "t5": (_t5(), tokens, Expected(heads=0, activation="relu", biased=False)),
    "t5_gated": (
        _t5(feed_forward_proj="gated-gelu"), tokens,
        Expected(heads=0, activation="gelu_tanh", gated=True, biased=False),
    ),
    "fused": (Fused, tokens, Expected(head_dim=6, fused=True)),
    "biased_scores": (lambda: Fused(scores=9), tokens, Expected(head_dim=6, fused=True)),
    "interleaved": (
        Interleaved, features,
        Expected(head_dim=6, activation="relu_squared", gated=True, causal=True, fused=True),
    ),
}  # fmt: skip
NAMES = tuple(FAMILIES)


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the family and its example inputs."""
    make, inputs, _ = FAMILIES[name]
    torch.manual_seed(seed)
    return make().eval(), inputs()


def expected(name: str) -> Expected:
    """What must be found in it."""
    return FAMILIES[name][2]
