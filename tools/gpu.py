"""Measure everything that needs a GPU in one run, into one JSON file.

.venv/bin/python tools/gpu.py --out h100.torch-cuda.json          on a machine with an H100
python tools/gpu.py --device cpu --quick --out try.json      the same steps on toy models anywhere

Parts: `tables` (every site of a BERT-base and a ViT-B of random weights at its levels, in every form that
torch multiplies in), `compile` (`compress --speedup 2x` on both, synthetic data, by structure and by forms:
asked, predicted, measured), `layers` and `models` (2:4, blocks, int8 and fp8 against dense over batch
sizes), `energy` (millijoules of one run from the GPU's counter), `decode` (cache and peak memory, time per
token), `files` (both models as files in onnxruntime's CUDA provider, where it starts). The file is written
after every part, so that finished parts are kept. It has the format of a shipped table: stored as
`profiles/<target>.torch-cuda.json`, it prices later compilations.
"""

import argparse
import contextlib
import copy
import inspect
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from compress import profiles
from compress.cost import energy, latency_table
from compress.cost.latency_table import Table
from compress.errors import CompressError
from compress.export.backends import onnxruntime, torch_cuda, torch_kernels
from compress.export.backends.torch_cuda import CudaRunner
from compress.export.backends.torch_module import TorchCuda
from compress.export.microbench import site_timing
from compress.export.onnx import writer
from compress.export.onnx.kv_cache import IDS, MASK
from compress.measure import timing
from compress.measure.verify_on_device import Nvml
from compress.methods import apply
from compress.pipeline.pricing import FORM_LEVELS
from compress.sites import discovery, prune
from compress.sites.modeling import CACHES
from compress.sites.prune import Removal
from compress.tasks.loading import Batch, Task

FORMS = ("2:4", "int8-dynamic", "fp8", "block:64x64@0.5")
MOVES = {"structure": ["structure"], "forms": ["2:4", "int8", "fp8", "block"]}
REPEATS = 8  # times that a layer runs in one timed call, so that the call itself does not count
Call = Callable[[], object]
QUICK = os.environ.get("COMPRESS_GPU_QUICK") == "1"  # the factories below are called by their name only


class Synthetic(Task):
    """A model of random weights with random inputs and labels: what time and energy can be had from."""

    def __init__(
        self, model: nn.Module, labels: int, make: Callable[[int, int, int], dict[str, torch.Tensor]]
    ):
        self.model, self.labels, self.make = model.eval(), labels, make
        self.samples = {"calibration": 32, "validation": 16, "test": 32}

    def example(self, batch: int, tokens: int) -> dict[str, torch.Tensor]:
        """Seeded inputs without padding."""
        return self.make(batch, tokens, 0)

    def batches(self, split: str, size: int, limit: int | None = None):
        """The same few inputs every time."""
        left = min(self.samples[split], limit or self.samples[split])
        for number in range(0, left, size):
            inputs = self.make(min(size, left - number), 32, number + 1)
            count = len(next(iter(inputs.values())))
            yield Batch(inputs, torch.arange(count) % self.labels)


def bert_base() -> Synthetic:
    """BERT-base, or a toy of its shape."""
    sizes = (
        {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
        if QUICK
        else {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        }
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=1000 if QUICK else 30522, num_labels=8, **sizes)

    def make(batch: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(
            3, config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed)
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Synthetic(transformers.BertForSequenceClassification(config), 8, make)


def vit_base() -> Synthetic:
    """ViT-B/16 at 224 pixels, or a toy of its shape."""
    sizes = (
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": 32,
            "patch_size": 8,
        }
        if QUICK
        else {}
    )
    torch.manual_seed(0)
    config = transformers.ViTConfig(num_labels=8, **sizes)

    def make(batch: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
        shape = (batch, 3, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}

    return Synthetic(transformers.ViTForImageClassification(config), 8, make)


MODELS = {"bert-base": bert_base, "vit-b": vit_base}


def here(device: str) -> Callable[[profiles.Profile, int], TorchCuda | None]:
    """What says where a target is timed: torch on the GPU at hand or, to try it, on the processor."""
    if device == "cuda":
        return TorchCuda.available
    return partial(TorchCuda, device="cpu", graphs=False)


def tables(options: argparse.Namespace, document: dict) -> list[dict]:
    """Every site of both models at the levels and in the forms that a compilation would ask for."""
    spot = spot_of(options)
    rows = []
    for name, factory in MODELS.items():
        task, began = factory(), time.perf_counter()
        example = task.example(options.batch, tokens_of(options))
        inputs = {key: value.numpy() for key, value in example.items()}
        suited = spot.adapted(task.model, task.output_tensors, inputs)
        sites = {site.shape: site for site in discovery.find_sites(task.model, example).sites}
        wanted = {}
        for shape, site in sites.items():
            align = spot.profile.align_units if site.kind == "ffn" else 1
            levels = latency_table.grid(site, align)
            wanted[shape] = site_timing.sample_levels(levels)
            for form in apply.offered_forms(site, MOVES["forms"], spot):
                fitting = apply.levels(site, form, levels, spot)
                wanted[latency_table.row_key(site, form)] = site_timing.sample_levels(fitting, FORM_LEVELS)
        measure = partial(site_timing.measure, list(sites.values()), rig=suited.rig())
        table = latency_table.measure_missing(suited.empty_table(), wanted, measure)
        before = document["table"]
        document["table"] = (
            table if before is None else Table.model_validate(before).merged(table.rows)
        ).model_dump(mode="json")
        rows.append(
            {
                "model": name,
                "shapes": list(sites),
                "untimed": [key for key, units in wanted.items() if units and key not in table.rows],
                "graphs": suited.graphs,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    return rows


def spot_of(options: argparse.Namespace) -> TorchCuda:
    """Where everything is timed."""
    spot = here(options.device)(profiles.load(options.target), 1)
    if spot is None:
        raise CompressError(
            f"the GPU here is not {options.target}; leave out --target, or add a profile of it"
        )
    return spot if options.graphs else replace(spot, graphs=False)


def tokens_of(options: argparse.Namespace) -> int:
    """Length of a text."""
    return 32 if options.quick else 128


def compile_models(options: argparse.Namespace, _: dict) -> list[dict]:
    """`compress --speedup 2x` on both models, by structure and by forms, through its own pipeline."""
    from compress.pipeline import compilation, job
    from compress.recipe import Recipe
    from compress.report import progress

    job.backend_for = lambda profile, threads: spot_of(options)
    rows = []
    for (name, factory), (moves, allowed) in itertools.product(MODELS.items(), MOVES.items()):
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe.model_validate(
                {
                    "model": f"gpu:{factory.__name__}",
                    "target": options.target,
                    "budget": {"speedup": options.speedup},
                    "out": f"{folder}/out",
                    "shapes": {"batch": options.batch, "tokens": tokens_of(options)},
                    # Weights are random, so quality says nothing: only as much as a plan needs is computed.
                    "options": {"score": "magnitude", "moves": allowed},
                    "calibration": {"samples": 16, "batch": 8, "refit": False},
                    "search": {"samples": 8, "generations": 1, "offspring": 2},
                    "bench": {"blocks": 30, "block_ms": 2.0 if options.quick else 60.0},
                }
            )
            began = time.perf_counter()
            try:
                found = compilation.run(recipe, progress.Quiet())
            except CompressError as error:
                asked = {"model": name, "moves": moves, "asked": options.speedup}
                rows.append({**asked, "error": str(error)})
                continue
            verdict = found.verdict
            rows.append(
                {
                    "model": name,
                    "moves": moves,
                    "options": sorted({f"{s.option.pattern} {s.option.precision}" for s in found.sites}),
                    "forms": [line for line in found.attribution if ":" in line],
                    "shapes": found.target.shapes,
                    "precision": found.target.precision,
                    "asked": options.speedup,
                    "predicted": round(verdict.predicted.speedup or 0.0, 4),
                    "measured": None if verdict.measured is None else verdict.measured.model_dump(),
                    "status": verdict.status,
                    "dense_ms": found.baseline.latency_ms.p50 if found.baseline.latency_ms else None,
                    "compressed_ms": found.compressed.latency_ms.p50 if found.compressed.latency_ms else None,
                    "rounds": [turn.model_dump(exclude_none=True) for turn in found.rounds],
                    "environment": found.environment,
                    "warnings": found.warnings,
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
    return rows


def layers(options: argparse.Namespace, _: dict) -> list[dict]:
    """One linear layer in every form, over numbers of rows; ratios are to dense, interleaved."""
    shapes = [(128, 64)] if options.quick else [(768, 768), (3072, 768), (768, 3072), (4096, 4096)]
    counts = [1, 64] if options.quick else [1, 16, 128, 512, 2048, 8192, 32768]
    rows = []
    for (out, inner), count in itertools.product(shapes, counts):
        torch.manual_seed(0)
        dtype = torch_cuda.DTYPES[options.precision]
        dense = nn.Linear(inner, out).to(options.device, dtype).eval()
        x = torch.randn(count, inner, device=options.device, dtype=dtype)
        row = {"out": out, "in": inner, "rows": count}

        def call(form: str | None, graphs: bool, dense: nn.Linear = dense, x: torch.Tensor = x) -> Call:
            return repeated(dense if form is None else formed(dense, form), x, options.device, graphs)

        rows += in_all_forms(row, call, options, REPEATS)
    return rows


def in_all_forms(
    row: dict, call: Callable[[str | None, bool], Call], options: argparse.Namespace, parts: int = 1
) -> list[dict]:
    """Dense and every form timed in turn; once more without graphs where a graph does not hold a form."""
    rows = []
    for graphs in (True, False) if options.graphs else (False,):
        calls: dict[str, Call] = {}
        faults: dict[str, str] = {}
        for form in (None, *FORMS):
            try:
                calls[form or "dense"] = call(form, graphs)
            except (CompressError, RuntimeError, NotImplementedError) as error:
                faults[form or "dense"] = str(error).splitlines()[0][:200]
        figures = timed(calls, options, parts) if "dense" in calls else {}
        rows.append({**row, "graphs": graphs, **figures, "not": faults})
        if not any("captured" in words for words in faults.values()):
            break
    return rows


def formed(layer: nn.Linear, form: str) -> nn.Module:
    """A copy of a layer in another form."""
    box = nn.Sequential(copy.deepcopy(layer))
    if torch_kernels.convert(box, form):
        raise CompressError(f"{form} does not fit {tuple(layer.weight.shape)}")
    return box


def repeated(layer: nn.Module, x: torch.Tensor, device: str, graphs: bool) -> Call:
    """A call that runs a layer several times and waits for it."""

    def forward() -> object:
        with torch.inference_mode():
            return [layer(x) for _ in range(REPEATS)]

    launch = torch_cuda.capture_graph(forward) if graphs else forward

    def call() -> None:
        launch()
        torch_cuda.wait(device)

    call()
    return call


def timed(calls: dict, options: argparse.Namespace, parts: int = 1) -> dict[str, object]:
    """Milliseconds of the first call and the speedups of all others, with their intervals."""
    found = timing.compare(calls, blocks=30, block_ms=1.0 if options.quick else 10.0)
    first = next(iter(calls))
    ratios = {name: found.ratio(name) for name in calls if name != first}
    return {
        "dense_ms": found.latency(first).p50 / parts,
        "speedup": {
            name: [round(part, 4) for part in (r.value, *r.interval.ends)] for name, r in ratios.items()
        },
        "drift": round(found.drift, 4),
    }


def runner(task: Synthetic, options: argparse.Namespace, form: str | None, *, graphs: bool) -> CudaRunner:
    """A model on the device, its linear layers in one form where it fits."""

    def change(model: nn.Module) -> nn.Module:
        if form is not None:
            torch_kernels.convert(model, form)
        return model

    return CudaRunner(
        task.model,
        task.output_tensors,
        device=options.device,
        precision=options.precision,
        graphs=graphs,
        change=change,
    )


def models(options: argparse.Namespace, _: dict) -> list[dict]:
    """Both models in every form over batch sizes, interleaved with dense."""
    rows = []
    sizes = [1, 4] if options.quick else [1, 8, 32, 128, 256]
    for (name, factory), batch in itertools.product(MODELS.items(), sizes):
        task = factory()
        inputs = {key: value.numpy() for key, value in task.example(batch, tokens_of(options)).items()}

        def call(form: str | None, graphs: bool, task: Synthetic = task, inputs: dict = inputs) -> Call:
            return runner(task, options, form, graphs=graphs).timed(inputs)

        rows += in_all_forms({"model": name, "batch": batch}, call, options)
    return rows


def halved(model: nn.Module, example: dict[str, torch.Tensor]) -> nn.Module:
    """The model with the first half of every site's units."""
    sites = discovery.find_sites(model, example).sites
    removals = {site.name: Removal(kept=torch.arange(max(1, site.units // 2))) for site in sites}
    return prune.shrink(model, sites, removals)


def energies(options: argparse.Namespace, _: dict) -> list[dict]:
    """Millijoules above idle of one run, from the GPU's counter: dense, halved, and 2:4."""
    meter, rows = Nvml(), []
    for name, factory in MODELS.items():
        task = factory()
        example = task.example(options.batch, tokens_of(options))
        inputs = {key: value.numpy() for key, value in example.items()}
        half = Synthetic(halved(task.model, example), task.labels, task.make)
        for label, one, form in (("dense", task, None), ("half", half, None), ("2:4", task, "2:4")):
            row: dict[str, object] = {"model": name, "what": label, "batch": options.batch}
            try:
                with runner(one, options, form, graphs=options.graphs) as loaded:
                    run = loaded.timed(inputs)
                    used = None
                    if options.device == "cuda":
                        used = energy.measure_energy(run, meter=meter, seconds=1.0 if options.quick else 5.0)
                    row["device_ms"] = float(sorted(loaded.device_ms(inputs, 20))[10])
                    row["conditions"] = torch_cuda.conditions() if options.device == "cuda" else {}
                    row["energy"] = "no counter" if used is None else used.model_dump()
            except (CompressError, RuntimeError) as error:
                row["error"] = str(error).splitlines()[0][:200]
            rows.append(row)
    return rows


def decode(options: argparse.Namespace, _: dict) -> list[dict]:
    """A grouped-query decoder, dense and with half its groups: cache, peak memory, time per token."""
    sizes = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        if options.quick
        else {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    )
    heads = (
        {"num_attention_heads": 8, "num_key_value_heads": 4}
        if options.quick
        else {
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
    )
    context, batch, steps = (16, 2, 4) if options.quick else (2048, 8, 64)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000 if options.quick else 32000, max_position_embeddings=context + steps, **sizes, **heads
    )
    dense = transformers.LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    rows, halves = [], {"dense": dense, "half": halved(dense, example)}
    for label, model in halves.items():
        placed = copy.deepcopy(model).to(options.device, torch_cuda.DTYPES[options.precision]).eval()
        rows.append({"what": label, **decoded(placed, batch, context, steps, options)})
        del placed
    prompt = {name: torch.ones(batch, context, dtype=torch.long).numpy() for name in (IDS, MASK)}
    with contextlib.ExitStack() as stack:
        calls = {}
        for label, model in halves.items():
            task = Synthetic(model, 1, lambda batch, tokens, seed: example)
            loaded = stack.enter_context(runner(task, options, None, graphs=False))
            calls[label] = loaded.timed_step(prompt)
        rows.append({"what": "one more token, interleaved", "graphs": False, **timed(calls, options)})
    return rows


def files(options: argparse.Namespace, _: dict) -> list[dict]:
    """Both models, dense and halved, as ONNX files in onnxruntime: on the GPU where its provider starts."""
    provider = onnxruntime.CUDA if options.device == "cuda" else onnxruntime.CPU
    if not onnxruntime.provider_starts(provider):
        return [{"provider": provider, "not": "onnxruntime here does not have it, or cannot start it"}]
    rows = []
    for name, factory in MODELS.items():
        task = factory()
        example = task.example(options.batch, tokens_of(options))
        inputs = {key: value.numpy() for key, value in example.items()}
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            calls = {}
            for label, model in (("dense", task.model), ("half", halved(task.model, example))):
                path = Path(folder) / f"{label}.onnx"
                writer.export(model, example, path, tensors=task.output_tensors)
                loaded = stack.enter_context(onnxruntime.OrtRunner(path, 1, provider))
                calls[label] = loaded.timed(inputs)
            rows.append({"model": name, "provider": provider, **timed(calls, options)})
    return rows


def _cache(answer: Mapping[str, Any]) -> Any:
    """The key-value cache in an answer, whatever this version of transformers calls it."""
    return next(answer[name] for name in CACHES if name in answer)


def decoded(
    model: nn.Module, batch: int, context: int, steps: int, options: argparse.Namespace
) -> dict[str, object]:
    """Time to the first token, time per token, bytes of the cache, and what torch held at most."""
    ids = torch.ones(batch, context, dtype=torch.long, device=options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model(input_ids=ids[:, :8], use_cache=True)
        torch_cuda.wait(options.device)
        began = time.perf_counter()
        past = _cache(model(input_ids=ids, use_cache=True, logits_to_keep=1))
        torch_cuda.wait(options.device)
        first_ms = 1e3 * (time.perf_counter() - began)
        began = time.perf_counter()
        name = next(name for name in CACHES if name in inspect.signature(model.forward).parameters)
        for _ in range(steps):
            past = _cache(model(input_ids=ids[:, :1], use_cache=True, **{name: past}))
        torch_cuda.wait(options.device)
        token_ms = 1e3 * (time.perf_counter() - began) / steps
    cache = sum(part.nbytes for layer in past.layers for part in (layer.keys, layer.values))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "context": context,
        "first_token_ms": first_ms,
        "token_ms": token_ms,
        "cache_mb": cache / 1e6,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if options.device == "cuda" else None,
    }


PARTS = {
    "tables": tables,
    "compile": compile_models,
    "layers": layers,
    "models": models,
    "energy": energies,
    "decode": decode,
    "files": files,
}


def described(options: argparse.Namespace) -> dict[str, object]:
    """The head of the document: what was measured where, when and how."""
    found = torch_cuda.gpu() if options.device == "cuda" else None
    what = (
        "the processor, to try the script: no figure here says anything of a GPU"
        if found is None
        else found.name
    )
    return {
        "title": f"sites and models in torch {torch.__version__} on {what}",
        "source": f"tools/gpu.py, {datetime.now(UTC).isoformat(timespec='seconds')}, {options.precision}, "
        f"CUDA graphs {'on' if options.graphs else 'off'}, random weights, interleaved with dense",
        "target": options.target,
        "device": options.device,
        "gpu": None if found is None else found.model_dump(),
        "environment": timing.environment(),
        "conditions": {"before": torch_cuda.conditions() if found is not None else {}},
        "table": None,
    }


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The command line, with what the machine says where it is silent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy models and short timings")
    parser.add_argument("--target", help="the GPU at hand unless given")
    parser.add_argument("--speedup", type=float, default=2.0, help="of `compile`")
    parser.add_argument("--batch", type=int, default=1, help="of `compile` and `energy`")
    parser.add_argument("--precision", default="fp16", choices=tuple(torch_cuda.DTYPES))
    parser.add_argument("--no-graphs", dest="graphs", action="store_false")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only these; all unless given")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    options.graphs = options.graphs and options.device == "cuda"
    if options.device == "cuda" and torch_cuda.gpu() is None:
        parser.error("torch sees no CUDA device; --device cpu --quick tries the script without one")
    if options.target is None:
        found = torch_cuda.local_target()
        if options.device == "cuda" and found is None:
            parser.error(f"no profile describes {torch_cuda.gpu().name}; name the nearest with --target")
        options.target = "h100" if found is None else found.name
    return options


def main(words: list[str] | None = None) -> int:
    """Run the parts; 1 when one of them failed."""
    options = parsed(words)
    os.environ["COMPRESS_GPU_QUICK"] = "1" if options.quick else "0"
    os.environ.setdefault("COMPRESS_CACHE", tempfile.mkdtemp(prefix="compress-gpu-"))
    global QUICK
    QUICK = options.quick
    if options.quick:
        site_timing.CYCLE_LIMITS = (3, 6)
    document, failed = described(options), []
    if options.part and options.out.is_file():  # parts may come from several calls
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        document = {**document, **{key: earlier[key] for key in ("table", *PARTS) if key in earlier}}
    for name in options.part or PARTS:
        began = time.perf_counter()
        try:
            document[name] = PARTS[name](options, document)
        except Exception as error:  # one part must not cost the others
            document[name] = {"error": f"{type(error).__name__}: {error}"}
            failed.append(name)
        print(
            f"{name}: {'FAILED' if name in failed else 'done'} in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        document["conditions"]["after"] = torch_cuda.conditions() if options.device == "cuda" else {}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
