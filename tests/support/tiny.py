"""Tiny Hugging Face directories at random weights: what the tests of tasks and models load."""

import json

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # so that a change of the weights changes the answers
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}


def save_tokenizer(directory, special=True):
    """A tokenizer of whole words; with `special`, `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`."""
    table = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "eos_token": "[SEP]",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def save(model, directory, tokenizer=True):
    directory.mkdir(exist_ok=True)
    model.save_pretrained(directory)
    if tokenizer:
        save_tokenizer(directory)
    return directory


def classifier(directory, names=("off", "on"), **changes):
    torch.manual_seed(0)
    names = dict(enumerate(names))
    config = transformers.BertConfig(**{**SIZES, "id2label": names, **changes})
    config.label2id = {name: number for number, name in names.items()}
    return save(transformers.BertForSequenceClassification(config), directory)


def encoder(directory):
    torch.manual_seed(1)
    return save(transformers.BertModel(transformers.BertConfig(**SIZES)), directory)


def decoder(directory, **changes):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**{**SIZES, "bos_token_id": 2, "eos_token_id": 3, **changes})
    return save(transformers.LlamaForCausalLM(config), directory)


def vision(directory, **rules):
    torch.manual_seed(3)
    config = transformers.ViTConfig(**VISION, id2label={0: "cat", 1: "dog", 2: "bird"})
    save(transformers.ViTForImageClassification(config), directory, tokenizer=False)
    rules = {"size": {"height": 8, "width": 8}, **rules}
    (directory / "preprocessor_config.json").write_text(json.dumps(rules))
    return directory
