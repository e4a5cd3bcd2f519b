"""A trained model from a Hugging Face directory or hub id, in float32, with every fault explained.

Weights are read from safetensors only, never from a pickle, and no code that came with a model is run.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.errors import CompressError
from compress.recipe import TaskName
from compress.task_specs import TASKS, task_of_architectures

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Any one of these makes a tokenizer; the rest of a tokenizer's files explain it.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' notes and bars off standard error; what matters becomes an error here."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def resolve(model: str) -> Path:
    """The directory that a model's name stands for; a hub id is looked up in the cache or fetched.

    Raises:
        CompressError: there is no such directory, and no such model can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CompressError(f"{model} is a file; give the directory that holds config.json and {WEIGHTS}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise CompressError(
            f"{model} is no directory here; give a directory with config.json and {WEIGHTS}, "
            "a hub id such as owner/name, or package.module:factory"
        )
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        tried = "not asked, HF_HUB_OFFLINE is set" if offline else f"asked: {type(error).__name__}"
        raise CompressError(
            f"{model} is no directory here, is not in the Hugging Face cache, and could not be "
            f"fetched from the hub ({tried}); give a directory with config.json and {WEIGHTS}"
        ) from error


def read_config(directory: Path) -> Any:
    """The model's transformers configuration.

    Raises:
        CompressError: config.json is missing or damaged, or only remote code could run the model.
    """
    path = directory / "config.json"
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(
            f"{directory} has no readable config.json; give a Hugging Face model directory, "
            "as save_pretrained writes it"
        ) from error
    except ValueError as error:
        raise CompressError(f"{path} is not JSON ({error}); copy it again") from error
    kind = words.get("model_type") if isinstance(words, dict) else None
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if not known and isinstance(words, dict) and words.get("auto_map"):
        raise CompressError(
            f"{path} asks to run code that came with the model (auto_map); that is never done here. "
            "Wrap the model in a Task of your own and give package.module:factory"
        )
    if not known:
        raise CompressError(
            f"{path} has model_type {kind!r}, which transformers {transformers.__version__} does not "
            "know; upgrade transformers, or give package.module:factory"
        )
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # each family checks its own keys, with exceptions of its own
        raise CompressError(f"{path} is refused by transformers: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def task_of(config: Any) -> TaskName:
    """The task that a checkpoint was made for; one without a head gives features."""
    return task_of_architectures(tuple(getattr(config, "architectures", None) or ()))


def _check_weights(directory: Path) -> None:
    """Every weight file is there and whole, before anything large is built."""
    index = directory / INDEX
    files = [WEIGHTS]
    if index.is_file() and not (directory / WEIGHTS).is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompressError(f"{index} is not an index of shards; copy it again") from error
    for name in files:
        path = directory / name
        if not path.is_file():
            pickles = [item.name for item in sorted(directory.glob("*.bin"))]
            found = f"only {pickles[0]}, a pickle, which is never read" if pickles else "none"
            raise CompressError(
                f"{directory} has no {name} ({found}); write one with "
                "model.save_pretrained(directory, safe_serialization=True)"
            )
        try:
            with safe_open(path, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            raise CompressError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged ({error}); copy it again"
            ) from error


def check_finite(model: nn.Module, place: str) -> None:
    """Refuses NaN and infinity in a model's parameters, by the first tensor's name."""
    for name, tensor in model.named_parameters():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CompressError(
                f"{place}: {name} holds {bad} NaN or infinite values of {tensor.numel()}; "
                "save the model again from a sound checkpoint"
            )


def _model_class(config: Any, task: TaskName) -> Any:
    """The class that the checkpoint names if it fits the task, else transformers' choice for it."""
    fallback = TASKS[task].fallback
    if fallback and getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForTextEncoding
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        bare = name.endswith("Model") or not fallback
        if bare and task_of(config) == task and hasattr(found, "from_pretrained"):
            return found
    return getattr(transformers, TASKS[task].auto_class)


def load_weights(directory: Path, config: Any, task: TaskName) -> nn.Module:
    """The model of a directory for a task, in float32 and evaluation mode.

    Raises:
        CompressError: weights are missing, damaged, of other shapes, without the task's head, or NaN.
    """
    _check_weights(directory)
    missing: list[str] = []
    model = None
    for extra in ({}, {"add_pooling_layer": False}):  # an encoder may be saved without its pooler
        try:
            with quiet():
                model, notes = _model_class(config, task).from_pretrained(
                    str(directory),
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **extra,
                )
        except Exception as error:  # transformers raises many kinds; the weights file is whole
            raise CompressError(
                f"{directory} cannot be loaded for {task}: {_first_line(error)}; "
                "check --task, and that config.json belongs to these weights"
            ) from error
        missing = sorted(notes["missing_keys"])
        if not missing or not all("pooler" in name for name in missing):
            break
    if missing:
        raise CompressError(
            f"{directory} holds no weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}, which {task} needs; "
            "train the head first, or name another --task"
        )
    assert isinstance(model, nn.Module)
    check_finite(model, str(directory))
    return model.float().eval()


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        CompressError: its files are missing or damaged.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise CompressError(
            f"{directory} has no tokenizer: none of {', '.join(VOCABULARIES)} is there; "
            "save it beside the model with tokenizer.save_pretrained(directory)"
        )
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the Rust library raises bare Exception
        raise CompressError(
            f"the tokenizer in {directory} cannot be loaded: {_first_line(error)}; save it again"
        ) from error


def position_limit(model: nn.Module) -> int | None:
    """The longest input in tokens, None where positions are relative."""
    for name, module in model.named_modules():
        padded = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if padded and module.padding_idx is not None:
            # RoBERTa counts positions from the padding index on, so the first rows are unused.
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def image_shape(config: Any) -> tuple[int, int, int]:
    """`(channels, height, width)` of a vision model's input."""
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return int(getattr(config, "num_channels", None) or 3), int(height), int(width)


def example_inputs(model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    """Valid inputs from the model's configuration alone: the same every time, and no padding.

    Token ids keep clear of the special ones; `tokens` is cut to the model's positions, and an image
    model takes its own size instead.

    Raises:
        CompressError: the model is not of transformers, or takes neither tokens nor pixels.
    """
    config = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    if config is None or kind not in ("input_ids", "pixel_values"):
        raise CompressError(
            f"example inputs cannot be made for {type(model).__name__}, which takes {kind or 'unknown'} "
            "inputs; give package.module:factory that returns a Task with its own example()"
        )
    generator = torch.Generator().manual_seed(0)
    if kind == "pixel_values":
        return {"pixel_values": torch.randn(batch, *image_shape(config), generator=generator)}
    tokens = min(tokens, position_limit(model) or tokens)
    special: set[int | None] = set()
    for name in ("pad", "bos", "eos", "sep", "cls"):
        number = getattr(config, f"{name}_token_id", None)
        special.update(number if isinstance(number, list) else [number])
    usual = torch.tensor([number for number in range(config.vocab_size) if number not in special])
    chosen = torch.randint(len(usual), (batch, tokens), generator=generator)
    return {
        "input_ids": usual[chosen],
        "attention_mask": torch.ones(batch, tokens, dtype=torch.int64),
    }
