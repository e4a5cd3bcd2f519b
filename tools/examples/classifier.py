"""Compile a text classifier for this machine, then classify a sentence with the exported file.

    python tools/examples/classifier.py --out out

The model is a small BERT at random weights; a directory or hub id of your own takes its place.
"""

import argparse
from pathlib import Path

import onnxruntime
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import compress

WORDS = ["[PAD]", "[UNK]", "[SEP]", "good", "bad", "film", "very", "not", "a", "dull", "bright", "plot"]
ROWS = ["a very good film,good", "a bad film,bad", "a bright plot,good", "not good a dull plot,bad"]


def dense_model(folder: Path) -> Path:
    """A classifier with its tokenizer and data, as Hugging Face saves one."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    labels = {0: "bad", 1: "good"}
    config = BertConfig(vocab_size=len(WORDS), id2label=labels, label2id={"bad": 0, "good": 1}, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "train.csv").write_text("\n".join(["text,label", *(40 * ROWS)]) + "\n")
    return folder


def main() -> None:
    """Compile, print the verdict, and use the exported file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the result goes")
    out = parser.parse_args().out
    model = dense_model(out.with_name(f"{out.name}-dense"))
    quick = {"samples": 64}, {"samples": 32, "generations": 1}, {"block_ms": 2.0, "rounds": 2}
    recipe = dict(zip(("calibration", "search", "bench"), quick, strict=True))  # leave out for real models
    request = compress.Recipe.model_validate({"target": "cpu", "budget": {"speedup": 1.2}, **recipe})
    result = compress.compile(model, recipe=request, data=str(model / "train.csv"), out=str(out))
    print(result.verdict.status, result.verdict.measured)

    session = onnxruntime.InferenceSession(out / "model.onnx")
    words = AutoTokenizer.from_pretrained(out)("a very good film", return_tensors="np")
    logits = session.run(None, {tensor.name: words[tensor.name] for tensor in session.get_inputs()})[0]
    print("class:", ["bad", "good"][int(logits.argmax())])


if __name__ == "__main__":
    main()
