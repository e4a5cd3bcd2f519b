"""Check that optimum's ORTModel classes load what `compress` writes, in an environment made here.

optimum-onnx needs a transformers below 4.58, which cannot be installed beside transformers 5; all other
packages, torch included, come from the environment that runs this. The models are written under both.

    python tools/check_optimum.py [--keep DIR] [OUT ...]

OUT are output directories of `compress` that are checked as well. Exit code 0: all loaded, same numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("optimum-onnx[onnxruntime]==0.1.0", "transformers>=4.57,<4.58")
DECODERS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral")
MOST = 1e-5  # of the largest difference to what the torch module gives


def make(folder: Path) -> Path:
    """The interpreter of an environment with optimum, transformers 4.57, and this one's other packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    place = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    found = [path for path in sys.path if path.endswith("site-packages")]
    # Hooks of editable installations are not followed from a path file, so that is a file of its own.
    (place / "borrowed.pth").write_text("".join(f"{path}\n" for path in found))
    (place / "compress_here.pth").write_text(f"import sys; sys.path.insert(0, {str(folder / 'source')!r})\n")
    source = folder / "source"
    source.mkdir()
    (source / "compress").mkdir()
    for path in (ROOT / "compress").iterdir():
        (source / "compress" / path.name).symlink_to(path)
    for name in ("export", "profiles"):
        (source / "compress" / name).symlink_to(ROOT / name)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def write(folder: Path) -> list[Path]:
    """The embedded default and small models, with unequal heads and dropped modules, as a run writes them."""
    import torch
    from transformers import logging

    from compress.export import huggingface
    from compress.export.onnx import decoder
    from compress.export.onnx import writer as onnx_writer
    from compress.sites import prune
    from compress.sites.discovery import find_sites
    from compress.tasks import loading

    sys.path.insert(0, str(ROOT / "tests"))
    from support import families

    logging.set_verbosity_error()
    demo = loading.load_task(None, None)
    models = {"demo": (demo.model, demo.example(2, 9))}
    models |= {name: families.build(name) for name in ("roberta", "vit", *DECODERS)}
    places = []
    for name, (model, example) in models.items():
        sites = find_sites(model, example).sites
        droppable = [site.name for site in sites if site.drop is not None]
        gone = {droppable[0], droppable[-1]}
        units = {
            site.name: 0 if site.name in gone else max(1, site.units // (1 + place % 3))
            for place, site in enumerate(sites)
        }
        removals = {key: prune.Removal(kept=torch.arange(count)) for key, count in units.items()}
        smaller = prune.shrink(model, sites, removals)
        place = folder / name
        huggingface.save(smaller, sites, units, place)
        with torch.inference_mode():
            answer = smaller(**example)
        output = "logits" if "logits" in answer else "last_hidden_state"
        if name in DECODERS:
            decoder.export(smaller, place / "model.onnx", output_name=output)
        else:
            onnx_writer.export(smaller, example, place / "model.onnx", outputs=(output,))
        inputs = {key: value.tolist() for key, value in example.items()}
        (place / "expected.json").write_text(
            json.dumps({"inputs": inputs, "output": output, "values": answer[output].tolist()})
        )
        places.append(place)
    return places


def load(place: Path) -> dict[str, object]:
    """Load one directory in every way, in the environment at hand; largest differences by loader."""
    import torch
    import transformers
    from optimum import onnxruntime as optimum

    import compress

    torch.manual_seed(0)
    words = json.loads((place / "config.json").read_text())
    autos = [name for name in words["auto_map"] if hasattr(optimum, f"ORT{name.removeprefix('Auto')}")]
    kind = "AutoModel" if "AutoModel" in words["auto_map"] else autos[0]
    optimum_name = "ORTModelForFeatureExtraction" if kind == "AutoModel" else f"ORT{kind[4:]}"
    from compress.export.backends.onnxruntime import OrtRunner
    from compress.export.onnx.kv_cache import PAST, POSITIONS

    with OrtRunner(place / "model.onnx", 1) as runner:
        names = [name for name in runner.inputs() if not name.startswith(PAST) and name != POSITIONS]
        first = next(iter(runner.outputs()))
    known = place / "expected.json"
    if known.is_file():
        stored = json.loads(known.read_text())
        inputs = {key: torch.tensor(value) for key, value in stored["inputs"].items()}
        output, expected = stored["output"], torch.tensor(stored["values"])
    else:
        inputs = {name: torch.randint(5, 90, (2, 9)) for name in names}
        inputs |= {name: torch.ones(2, 9, dtype=torch.int64) for name in names if name == "attention_mask"}
        inputs |= {name: torch.zeros(2, 9, dtype=torch.int64) for name in names if name == "token_type_ids"}
        output = first
        with torch.inference_mode():
            expected = compress.load(place)(**inputs)[output]
    feed = {key: value.numpy() for key, value in inputs.items() if key in names}
    with OrtRunner(place / "model.onnx", 1) as runner:
        found = {"onnxruntime": torch.from_numpy(runner.infer(feed)[output])}
    reader = getattr(optimum, optimum_name).from_pretrained(place, local_files_only=True)
    found[optimum_name] = reader(**inputs)[output]
    failures = {}
    for name, call in {
        "compress.load": lambda: compress.load(place),
        kind: lambda: getattr(transformers, kind).from_pretrained(place, trust_remote_code=True),
    }.items():
        try:
            with torch.inference_mode():
                found[name] = call()(**inputs)[output]
        except (ValueError, RuntimeError) as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    differences = {name: float((value - expected).abs().max()) for name, value in found.items()}
    if kind == "AutoModelForCausalLM":
        assert reader.can_use_cache
        inputs["attention_mask"][1, :3] = 0  # padding on the left
        prompt = {**inputs, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        same = torch.equal(reader.generate(**prompt), compress.load(place).generate(**prompt))
        differences["generate"] = 0.0 if same else 1.0
    return {"differences": differences, "failures": failures, "transformers": transformers.__version__}


def main() -> int:
    """Make the environment, write the models, load them there; a line for each loader."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("out", nargs="*", type=Path, help="output directories to check as well")
    words.add_argument("--keep", type=Path, help="where the environment stays, to be used again")
    words.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    words.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.write:
        write(given.write)
        return 0
    if given.load:
        sys.stdout.write(json.dumps(load(given.load)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        folder = (given.keep or Path(work) / "environment").resolve()
        python = folder / "bin" / "python"
        if not python.is_file():
            python = make(folder)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(work) / "home")}
        bad = 0
        for writer in (Path(sys.executable), python):
            place = Path(work) / ("written-here" if writer != python else "written-there")
            subprocess.run([str(writer), __file__, "--write", str(place)], check=True, env=environment)
            outs = [*sorted(place.iterdir()), *(given.out if writer != python else [])]
            for out in outs:
                call = [str(python), __file__, "--load", str(out)]
                done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
                if done.returncode:
                    print(f"{out.name} ({place.name}): {done.stderr.strip().splitlines()[-1]}")
                    bad += 1
                    continue
                said = json.loads(done.stdout)
                for name, difference in said["differences"].items():
                    bad += difference > MOST
                    print(f"{out.name} ({place.name}): {name} {difference:.1e}")
                for name, failure in said["failures"].items():
                    bad += writer == python
                    print(f"{out.name} ({place.name}): {name} refused: {failure}")
        return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
