"""Calibration of a causal model whose weights do not fit: one block of them at a time, from safetensors.

The model is built without weights. What lies before the first block runs first, on every batch; then
one block after another gets its weights, reads every batch, and loses them again. What stays are the
activations between two blocks. The statistics are those that `activation_statistics.collect` takes.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.calibration import activation_statistics
from compress.calibration.moments import Moments
from compress.errors import CompressError
from compress.ir import Site
from compress.tasks import pretrained
from compress.tasks.task import Batch

META = torch.device("meta")
CPU = torch.device("cpu")
Tick = Callable[[int, int], None]


class _FirstBlockReached(Exception):  # noqa: N818  # no error: the way out of a model at its first block
    """The arguments of the first block."""

    def __init__(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        super().__init__()
        self.args_of, self.kwargs_of = args, kwargs


class Weights:
    """The tensors of a directory by name, read when asked for."""

    def __init__(self, directory: Path) -> None:
        """Find out which file holds what.

        Raises:
            CompressError: there is no safetensors file, or it is damaged.
        """
        self.directory = directory
        self.places: dict[str, Path] = {}
        index = directory / pretrained.INDEX
        try:
            if index.is_file() and not (directory / pretrained.WEIGHTS).is_file():
                words = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self.places = {name: directory / file for name, file in words.items()}
            else:
                path = directory / pretrained.WEIGHTS
                with safe_open(path, framework="pt") as file:
                    self.places = dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CompressError(
                f"{directory} has no readable {pretrained.WEIGHTS} or index of shards ({error}); "
                "copy it again"
            ) from error

    def whole(self, name: str) -> Tensor:
        """One tensor in float32."""
        with self._open(name) as (file, stored):
            found: Tensor = file.get_tensor(stored)
        return found.float()

    def rows(self, name: str, numbers: Tensor) -> Tensor:
        """[len(numbers), width] some rows of a table in float32; the rest stays on disk."""
        with self._open(name) as (file, stored):
            table = file.get_slice(stored)
            return torch.cat([table[row : row + 1] for row in numbers.tolist()]).float()

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file that holds a tensor, and its name there: checkpoints may leave the first step out."""
        stored = name if name in self.places else name.partition(".")[2]
        if stored not in self.places:
            raise CompressError(
                f"{self.directory} holds no weights {name}; check that config.json belongs to these weights"
            )
        try:
            with safe_open(self.places[stored], framework="pt") as file:
                yield file, stored
        except (OSError, SafetensorError) as error:
            raise CompressError(f"{self.places[stored]} is missing or damaged ({error})") from error


class Blockwise:
    """A causal model of transformers on the meta device, and the directory that its weights are in."""

    def __init__(self, directory: Path, device: torch.device = CPU) -> None:
        """Build it; no weight is read yet.

        Args:
            directory: holds config.json and safetensors, in one file or many.
            device: where activations are, and the block at work.

        Raises:
            CompressError: the directory cannot be read, or the blocks of the model differ in kind.
        """
        self.device, self.weights = device, Weights(directory)
        config = pretrained.read_config(directory)
        kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        if len(kinds) > 1:
            raise CompressError(
                f"{directory} has blocks of different kinds ({', '.join(kinds)}), which need different "
                "masks; calibrate it as a whole"
            )
        with _without_weights(), pretrained.quiet():
            self.model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.eval()
        for module in self.model.modules():
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else value.to(device)
        self.place, self.blocks = _blocks(self.model, int(config.num_hidden_layers))
        self.peak_bytes = 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights that are in memory now."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.device != META)

    def block_bytes(self, number: int) -> int:
        """Bytes of the weights of one block in float32."""
        return sum(p.numel() * p.element_size() for p in self.blocks[number].parameters())

    @contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """One block with its weights, which are gone afterwards."""
        block, prefix = self.blocks[number], f"{self.place}.{number}"
        self._load(prefix, block)
        try:
            yield block
        finally:
            _unload(block)

    def first_inputs(self, batches: Sequence[Batch]) -> list[tuple[tuple[object, ...], dict[str, object]]]:
        """What the first block is called with, for every batch; weights before it are gone afterwards."""
        inside = {module for block in self.blocks for module in block.modules()}
        handles, tables = [], []
        for name, module in self.model.named_modules():
            if module in inside or not module._parameters:
                continue
            if type(module) is nn.Embedding:
                module.forward = functools.partial(self._look_up, f"{name}.weight")  # type: ignore[method-assign]
                tables.append(module)
            else:
                handles.append(module.register_forward_pre_hook(functools.partial(self._late, name)))
        handles.append(self.blocks[0].register_forward_pre_hook(_leave, with_kwargs=True))
        found = []
        try:
            for batch in batches:
                inputs = {key: value.to(self.device) for key, value in batch.inputs.items()}
                try:
                    self.model(**inputs, use_cache=False)
                except _FirstBlockReached as reached:
                    found.append((reached.args_of, reached.kwargs_of))
        finally:
            for handle in handles:
                handle.remove()
            for table in tables:
                del table.forward
            _unload(self.model)
        return found

    def _look_up(self, name: str, ids: Tensor) -> Tensor:
        """What an embedding answers, from the rows that are asked for alone."""
        numbers, places = torch.unique(ids, return_inverse=True)
        return self.weights.rows(name, numbers).to(self.device)[places]

    def _late(self, name: str, module: nn.Module, _: object) -> None:
        """Give a module outside of the blocks its own weights when it is first called."""
        if any(p is not None and p.device == META for p in module._parameters.values()):
            self._load(name, module, own=True)

    def _load(self, prefix: str, module: nn.Module, *, own: bool = False) -> None:
        for name, value in list(module.named_parameters(recurse=not own)):
            if value.device == META:
                _put(module, name, self.weights.whole(f"{prefix}.{name}").to(self.device))
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)


@torch.no_grad()
def collect(
    blockwise: Blockwise,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    directory: Path,
    *,
    readers: bool = False,
    progress: Tick | None = None,
) -> None:
    """Write `directory/<index>.safetensors` for every site, as `activation_statistics.collect` does.

    The matrices of one block's sites are in memory at a time as well.

    Args:
        blockwise: the model.
        sites: whose writers are watched; each lies in one block.
        batches: calibration inputs.
        directory: holds one file a site, named by its index.
        readers: also collect the second moments of what the readers see.
        progress: called with blocks run and blocks in all, counted in batches.

    Raises:
        CompressError: no batch, a site outside of the blocks, missing weights, NaN or infinity.
    """
    if not batches:
        raise CompressError("there is no calibration data; give some with --data")
    homes = {index: _home(blockwise, site) for index, site in enumerate(sites)}
    calls = blockwise.first_inputs(batches)
    work = len(blockwise.blocks) * len(batches)
    for number in range(len(blockwise.blocks)):
        own = {index: Moments() for index, home in homes.items() if home == number}
        watched = [(sites[index].writer, sites[index], found) for index, found in own.items()]
        seen = {index: Moments() for index in own if readers}
        watched += [
            (activation_statistics.reader(sites[index]), sites[index], found) for index, found in seen.items()
        ]
        with blockwise.loaded(number) as block:
            for place, batch in enumerate(batches):
                with _watching(blockwise.model, watched, batch):
                    calls[place] = _through(block, *calls[place])
                if progress is not None:
                    progress(number * len(batches) + place + 1, work)
        for index, found in own.items():
            if not found.count:
                raise CompressError("no real token reached a site; the calibration data is all padding")
            tensors = found.tensors() | ({"reader": seen[index].tensors()["second"]} if readers else {})
            on_cpu = {name: value.cpu() for name, value in tensors.items()}
            activation_statistics.write(directory / f"{index:03d}.safetensors", on_cpu)


def _through(
    block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The call of the next block: that of this one with its answer in the place of the hidden state."""
    answer = block(*args, **kwargs)
    hidden = answer[0] if isinstance(answer, tuple) else answer
    if args:
        return (hidden, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": hidden}


@contextmanager
def _watching(model: nn.Module, watched: Sequence[tuple[str, Site, Moments]], batch: Batch) -> Iterator[None]:
    """Count what products read, by the names of their weights, while one batch runs."""

    def hook(site: Site, own: Moments, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        own.add(activation_statistics.finite_rows(site, arguments[0], batch))

    handles = [
        model.get_submodule(weight.rpartition(".")[0]).register_forward_pre_hook(
            functools.partial(hook, site, own)
        )
        for weight, site, own in watched
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_weights() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device; their buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, value)
        if value is not None and value.device != META:
            module._parameters[name] = nn.Parameter(value.detach().to(META), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _leave(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    raise _FirstBlockReached(args, kwargs)


def _blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The list of `count` modules of one class that a causal model consists of, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({*map(type, module)}) == 1:
            return name, module
    raise CompressError(
        f"{type(model).__name__} has no list of {count} equal blocks, so it cannot be read block by block"
    )


def _home(blockwise: Blockwise, site: Site) -> int:
    """The number of the block that a site lies in."""
    rest = site.writer.removeprefix(f"{blockwise.place}.")
    number = rest.partition(".")[0]
    if rest == site.writer or not number.isdecimal() or int(number) >= len(blockwise.blocks):
        raise CompressError(f"{site.name}: {site.writer} lies in none of the blocks {blockwise.place}")
    return int(number)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter by its dotted name."""
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=False)


def _unload(module: nn.Module) -> None:
    """Send all weights back to the meta device."""
    for name, value in list(module.named_parameters()):
        if value.device != META:
            _put(module, name, torch.empty_like(value, device=META))
