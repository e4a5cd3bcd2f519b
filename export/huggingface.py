"""A compressed model as a directory, and back: Hugging Face shaped, checked wherever it is read.

`config.json` keeps what it said about the original architecture and gains one key, `compression`: every
site with the units it keeps. Loading builds the original architecture, reduces it by those sites, and
fills it from `model.safetensors`. Nothing is unpickled, and no code that lies in the directory is run:
`modeling_compressed.py` is there for transformers' AutoModel, which runs it for those who trust it.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress import artifacts
from compress.errors import CompressError
from compress.ir import SCHEMA_VERSION, Document, Site
from compress.sites import modeling
from compress.sites.prune import Sites, check, require_drop

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
KEY = "compression"
MODELING = "modeling_compressed.py"
# What transformers would follow to code or kernels outside of itself.
UNTRUSTED = {
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "quantization_config",
}

# The end of the modelling file, for the class NAME of transformers.
_CLASS = '''

class NAME(transformers.NAME):
    """transformers' own class, without the units that config.json says were removed."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        record = getattr(config, "compression", None)
        if not isinstance(record, dict) or "sites" not in record:
            raise ValueError("config.json has no 'compression' with 'sites'; it belongs to another model")
        reduce(self, record["sites"])
'''


class Kept(Document):
    """One site of the original model, the units it keeps, and whether its writer has gained a bias."""

    site: Site
    units: int = Field(ge=0)
    gained_bias: bool = False


class Record(Document):
    """What `read` needs; it stands under one key of `config.json`."""

    schema_version: int
    sites: tuple[Kept, ...]


def save(
    model: nn.Module,
    sites: Sites,
    units: Mapping[str, int],
    directory: Path,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write a shrunk model; each file appears whole or not at all.

    Args:
        model: what `prune.shrink` gave.
        sites: those of the original model.
        units: units kept by site; a site without an entry keeps all.
        directory: is made if it is not there.
        extra: more to say under the key `compression`; plain JSON values, not read by `read`.
    """
    listed = list(sites.values() if isinstance(sites, Mapping) else sites)
    names = set(model.state_dict())
    record = Record(
        schema_version=SCHEMA_VERSION,
        sites=tuple(_kept(site, units.get(site.name, site.units), names) for site in listed),
    )
    clash = sorted(set(extra or {}) & set(Record.model_fields))
    if clash:
        raise CompressError(f"extra {clash} would replace what load needs; use other names")
    config = _config_of(model)
    config[KEY] = {**record.model_dump(mode="json"), **(extra or {})}
    autos = _auto_classes(model)
    if autos:
        config["auto_map"] = {auto: f"{Path(MODELING).stem}.{type(model).__name__}" for auto in autos}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if autos:
            artifacts.write_text(directory / MODELING, _modeling(type(model).__name__))
        _write_weights(_weights(model), directory / WEIGHTS)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            plain = _public(_portable(json.loads(generation.to_json_string())))
            artifacts.write_text(directory / GENERATION, _text(plain))
        artifacts.write_text(directory / CONFIG, _text(config))
    except OSError as error:
        raise CompressError(
            f"{directory} cannot be written ({error.strerror or error}); give a directory with room"
        ) from error


def read(directory: Path, factory: Callable[[], nn.Module] | None) -> nn.Module:
    """What `compress.load` gives."""
    config = _read_object(directory / CONFIG)
    if KEY not in config:
        raise CompressError(
            f"{directory / CONFIG} has no key {KEY!r}, so this is an ordinary model; load it with "
            "transformers' from_pretrained"
        )
    record = _read_record(config.pop(KEY), directory / CONFIG)
    model = _built(config, directory / CONFIG) if factory is None else factory()
    try:
        _reduce(model, record)
    except ValueError as error:
        stated, own = config.get("transformers_version"), metadata.version("transformers")
        hint = f" (written under transformers {stated}, this is {own})" if stated not in (None, own) else ""
        raise CompressError(f"{directory / CONFIG} does not fit its own model: {error}{hint}") from error
    _fill(model, directory / WEIGHTS)
    _set_generation(model, directory / GENERATION)
    return model.eval()


def _reduce(model: nn.Module, record: Record) -> None:
    """Take away what the record says is gone, after making sure that the model has it."""
    check(model, [kept.site for kept in record.sites])
    for kept in record.sites:
        if kept.units > kept.site.units:
            raise CompressError(f"{kept.site.name} keeps {kept.units} units of {kept.site.units}")
        if kept.units == 0:
            require_drop(kept.site)
        if kept.gained_bias and not isinstance(
            model.get_submodule(modeling.owner(kept.site.writer)), nn.Linear
        ):
            raise CompressError(
                f"{kept.site.name}: {kept.site.writer} lies in no nn.Linear, which gains no bias"
            )
    modeling.reduce(model, [kept.model_dump(mode="json") for kept in record.sites])


def _kept(site: Site, units: int, names: set[str]) -> Kept:
    """What is recorded of one site; `names` are the tensors of the shrunk model."""
    if not 0 <= units <= site.units:
        raise CompressError(f"{site.name} cannot keep {units} units; it has {site.units}")
    inside = units == 0 and require_drop(site).writer
    place = f"{require_drop(site).module}.inner" if inside else site.writer.rpartition(".")[0]
    return Kept(site=site, units=units, gained_bias=site.bias is None and f"{place}.bias" in names)


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration of a Hugging Face model, as its own `save_pretrained` words it; else nothing."""
    worded = getattr(getattr(model, "config", None), "to_json_string", None)
    if worded is None:
        return {}
    words = _portable(json.loads(worded()))
    words["architectures"] = [type(model).__name__]
    dtypes = [value.dtype for value in model.parameters() if value.is_floating_point()]
    if dtypes:
        words["dtype"] = str(dtypes[0]).removeprefix("torch.")
    return words


def _portable(words: dict[str, Any]) -> dict[str, Any]:
    """Without the path of the machine that the model was read from, and without ways to other code."""
    return {key: value for key, value in words.items() if key not in ("_name_or_path", "auto_map")}


def _public(words: dict[str, Any]) -> dict[str, Any]:
    """Without what one version of transformers notes for itself, which another one misreads."""
    return {key: value for key, value in words.items() if not key.startswith("_")}


def _auto_classes(model: nn.Module) -> list[str]:
    """Names of transformers' Auto classes that stand for the class of `model`; none for other models."""
    if not type(model).__module__.startswith("transformers."):
        return []
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or name == "AutoModelWithLMHead":  # deprecated before transformers 4.56
            continue
        classes = mapping.get(type(model.config), ())
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            found.append(name)
    return sorted(found)


def _modeling(name: str) -> str:
    """The file for AutoModel: `compress.sites.modeling` as it is, and the class `name` with less in it."""
    source = Path(modeling.__file__).read_text(encoding="utf-8")
    source = source.replace("import torch\n", "import torch\nimport transformers\n", 1)
    return source + _CLASS.replace("NAME", name)


def _text(words: Mapping[str, object]) -> str:
    return json.dumps(words, indent=2, sort_keys=True) + "\n"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Every persistent tensor once, under its first name, contiguous and in memory of its own."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    memory: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CompressError(f"{name} is a {type(value).__name__}; only tensors can be saved")
        if id(value) in seen:
            continue
        seen.add(id(value))
        plain = value.detach().contiguous()
        place = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if place in memory else plain
        memory.add(place)
    return tensors


def _write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the file beside its place, then move it there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        try:
            save_file(tensors, name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CompressError(f"{path} cannot be written ({error}); give a directory with room") from error
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(
            f"{path} cannot be read ({error.strerror}); give a directory that compress wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CompressError(f"{path} is not JSON ({error}); write the model again") from error
    if not isinstance(words, dict):
        raise CompressError(f"{path} holds a {type(words).__name__}, not an object; write it again")
    return words


def _read_record(words: object, path: Path) -> Record:
    """The record under our key; keys that `read` does not need are left alone."""
    if not isinstance(words, dict):
        raise CompressError(f"{path}: {KEY!r} is a {type(words).__name__}, not an object")
    version = words.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CompressError(
            f"{path}: {KEY} has schema_version {version!r}, this program reads {SCHEMA_VERSION}; "
            "use the version of compress that wrote it, or compress the model again"
        )
    try:
        return Record.model_validate({key: words[key] for key in Record.model_fields if key in words})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise CompressError(
            f"{path}: {KEY}.{place}: {first['msg']} ({error.error_count()} faults); write the model again"
        ) from error


def _built(words: dict[str, Any], path: Path) -> nn.Module:
    """The original architecture with arbitrary weights; only classes of transformers itself."""
    import transformers

    kind, named = words.get("model_type"), words.get("architectures")
    if kind is None:
        raise CompressError(
            f"{path} names no model_type, so this is a model of your own: pass compress.load(..., "
            "factory=...) a function that gives a fresh instance of the original architecture"
        )
    name = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CompressError(
            f"{path}: architecture {name!r} is no model class of transformers "
            f"{transformers.__version__}; pass compress.load(..., factory=...)"
        )
    if kind not in transformers.CONFIG_MAPPING:
        raise CompressError(f"{path}: transformers {transformers.__version__} has no {kind!r}")
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(_trusted(words))
        with torch.random.fork_rng(devices=[]):  # loading leaves the caller's random numbers alone
            model: nn.Module = found(config)
    except Exception as error:  # whatever a configuration can make a constructor raise
        raise CompressError(
            f"{path}: {name} cannot be built from it ({type(error).__name__}: {error}); "
            "restore the configuration of the original model"
        ) from error
    return model


def _trusted(words: dict[str, Any]) -> dict[str, Any]:
    """Without keys that lead outside of transformers, at any depth."""
    return {
        key: _trusted(value) if isinstance(value, dict) else value
        for key, value in words.items()
        if key not in UNTRUSTED
    }


def _fill(model: nn.Module, path: Path) -> None:
    """Give every tensor of the model its contents and dtype from the file, and use all of the file."""
    places: dict[int, tuple[Tensor, list[str]]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        places.setdefault(id(value), (value, []))[1].append(name)
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            unknown = stored - {name for _, names in places.values() for name in names}
            if unknown:
                raise CompressError(
                    f"{path} holds {len(unknown)} tensors that the model of config.json has no place "
                    f"for, the first is {min(unknown)!r}; the two files do not belong together"
                )
            for value, names in places.values():
                _set_contents(value, _stored(file, stored, names, value, path))
    except (OSError, SafetensorError) as error:
        raise CompressError(
            f"{path} cannot be read ({error}); it is missing or damaged, write the model again"
        ) from error


def _stored(file: Any, stored: set[str], names: list[str], value: Tensor, path: Path) -> Tensor:
    """The stored contents of one tensor, which may go by any of its names."""
    name = next((name for name in names if name in stored), None)
    if name is None:
        raise CompressError(
            f"{path} holds {len(stored)} tensors but not {names[0]!r}, which the model of config.json "
            "needs; the two files do not belong together"
        )
    shape = file.get_slice(name).get_shape()
    if shape != list(value.shape):
        raise CompressError(
            f"{path}: {name} is {shape}, the model of config.json needs {list(value.shape)}; "
            "the two files do not belong together"
        )
    contents: Tensor = file.get_tensor(name)
    if contents.is_floating_point() != value.is_floating_point():
        raise CompressError(f"{path}: {name} is {contents.dtype}, the model needs {value.dtype}")
    return contents


def _set_contents(value: Tensor, contents: Tensor) -> None:
    """Swap what a tensor holds; the object stays, so that what shares it keeps sharing it."""
    value.data = contents.to(value.device)


def _set_generation(model: nn.Module, path: Path) -> None:
    """The defaults of `generate`, where the model has any."""
    if not path.is_file() or not hasattr(model, "generation_config"):
        return
    from transformers import GenerationConfig

    words = _public(_trusted(_read_object(path)))
    try:
        model.generation_config = GenerationConfig.from_dict(words)
    except (TypeError, ValueError, AttributeError) as error:
        raise CompressError(f"{path} holds no generation defaults ({error})") from error
