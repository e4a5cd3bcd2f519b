"""Compile a decoder by the size of its file, and generate text with the model that comes out.

    python tools/examples/decoder.py --out out

The model is a small Llama at random weights: its text means nothing. A directory or hub id takes its place.
`speedup=2.0, phase="decode"` instead of a size asks for twice the tokens a second.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import compress

WORDS = ["[PAD]", "[UNK]", "[SEP]", "once", "there", "was", "a", "cat", "who", "liked", "red", "birds"]


def dense_model(folder: Path) -> Path:
    """A decoder with its tokenizer, beside a text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), intermediate_size=256, max_position_embeddings=64, **sizes,
                         bos_token_id=2, eos_token_id=2, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "text.txt").write_text("once there was a cat who liked red birds\n" * 600)
    return folder


def main() -> None:
    """Compile, then continue a sentence by five words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the result goes")
    out = parser.parse_args().out
    model = dense_model(out.with_name(f"{out.name}-dense"))
    quick = {"calibration": {"samples": 64}, "search": {"samples": 32, "generations": 1}}
    asked = {"target": "cpu", "budget": {"size_mb": 0.16}, "shapes": {"tokens": 16}}
    request = compress.Recipe.model_validate({**asked, **quick, "bench": {"block_ms": 2.0}})
    result = compress.compile(model, recipe=request, data=str(model / "text.txt"), out=str(out))
    print(result.verdict.status, result.report.compressed.file_bytes, "bytes")
    tokenizer = AutoTokenizer.from_pretrained(out)
    start = tokenizer("once there was", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        words = result.model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=5)
    print("text:", tokenizer.decode(words[0]))


if __name__ == "__main__":
    main()
