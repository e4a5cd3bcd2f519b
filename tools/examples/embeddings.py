"""Compile a sentence-transformers model, and compare sentences with the exported file.

    python tools/examples/embeddings.py --out out

`SentenceTransformer("out", trust_remote_code=True)` loads the result. The model is small, at random weights.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import compress

WORDS = ["[PAD]", "[UNK]", "[SEP]", "the", "cat", "dog", "sees", "likes", "a", "red", "blue", "bird"]
TEXTS = [f"the {a} {verb} a {b} bird" for a in WORDS[4:6] for verb in WORDS[6:8] for b in WORDS[9:11]]


def dense_model(folder: Path) -> Path:
    """An encoder with mean pooling, in the layout of sentence-transformers, beside sentences."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    fast.save_pretrained(folder)
    types = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{types[path]}"}
               for i, path in enumerate(types)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentences.csv").write_text("\n".join(["text", *(20 * TEXTS)]) + "\n")
    return folder


def main() -> None:
    """Compile to 0.55 MB of weights, then print how near two sentences are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the result goes")
    out = parser.parse_args().out
    model = dense_model(out.with_name(f"{out.name}-dense"))
    quick = {"search": {"samples": 32, "generations": 1}, "bench": {"block_ms": 2.0}}
    request = compress.Recipe.model_validate({"target": "cpu", "budget": {"size_mb": 0.55}, **quick})
    result = compress.compile(model, recipe=request, data=str(model / "sentences.csv"), out=str(out))
    print(result.verdict.status, result.report.compressed.file_bytes, "bytes")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    words = AutoTokenizer.from_pretrained(out)(TEXTS[:2], return_tensors="np")
    states = session.run(None, {tensor.name: words[tensor.name] for tensor in session.get_inputs()})[0]
    first, second = states.mean(1) if states.ndim == 3 else states
    print("cosine:", round(float(first @ second / np.linalg.norm(first) / np.linalg.norm(second)), 3))


if __name__ == "__main__":
    main()
