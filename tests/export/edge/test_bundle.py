import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import families
from support.outputs import ROWS, write_model, write_output
from support.reports import CPU

from compress.cli import main
from compress.errors import CompressError
from compress.export.backends import onnxruntime
from compress.export.delivery import deliver
from compress.export.edge import bundle
from compress.export.edge.bundle_schema import Bundle, identity
from compress.export.onnx import decoder
from compress.ir import Budget
from compress.measure import intervals, verify_on_device
from compress.recipe import Recipe
from compress.report import schema
from compress.sites.discovery import find_sites
from compress.sites.prune import Removal, shrink


@pytest.fixture
def out(tmp_path):
    write_output(tmp_path / "out")
    return tmp_path / "out"


def bundled(out, to="edge"):
    deliver.deliver(out, to)
    return out / to


def test_a_bundle_says_what_was_asked_and_what_every_file_hashes_to(out):
    folder = bundled(out)
    document = json.loads((folder / "bundle.json").read_text())
    digest = document.pop("digest")
    assert digest == verify_on_device.canonical_digest(document)
    found = Bundle.model_validate(document)
    assert (found.asked.speedup, found.target.name, found.target.kind) == (2.0, "rpi5", "cpu")
    assert found.shapes == {"batch": 1, "tokens": 16}
    assert (found.protocol["blocks"], found.protocol["block_ms"], found.protocol["threads"]) == (60, 2.0, 1)
    assert found.report == identity(schema.read(out))
    assert found.models.compressed.sha256 == onnxruntime.sha256(out / "model.onnx")
    assert found.models.dense.sha256 == onnxruntime.sha256(out / "compression" / "work" / "dense.onnx")
    assert set(found.files) == {"dense.onnx", "model.onnx", "examples.npz", "verify.py", "intervals.py"}
    assert {path.name for path in folder.iterdir()} == {*found.files, "bundle.json", deliver.MARK}
    for name, module in {"verify.py": verify_on_device, "intervals.py": intervals}.items():
        assert (folder / name).read_bytes() == Path(module.__file__).read_bytes()
    assert verify_on_device.read_bundle(folder)["digest"] == digest


def test_examples_have_several_shapes_padding_and_the_answers_of_both_models(out):
    folder = bundled(out)
    found = verify_on_device.read_examples(folder / "examples.npz")
    shapes = [example.inputs["input_ids"].shape for example in found]
    assert shapes == [(1, 16), (3, 8), (3, 16)]
    masks = [example.inputs["attention_mask"] for example in found]
    assert masks[0].all()
    assert masks[1].all()
    assert masks[2].sum(1).tolist() == [16, 11, 6]
    for example in found:
        assert example.inputs["input_ids"].max() < ROWS
        for side, name in (("dense", "dense.onnx"), ("compressed", "model.onnx")):
            with onnxruntime.OrtRunner(folder / name, threads=1) as runner:
                again = runner.infer(example.inputs)["logits"]
            assert np.array_equal(example.answers[side]["logits"], again)
    assert not np.allclose(found[0].answers["dense"]["logits"], found[0].answers["compressed"]["logits"])


def test_the_same_output_gives_the_same_bytes(out, tmp_path):
    one = deliver.deliver(out, "edge", tmp_path / "a" / "edge.tar.gz", archive=True)[0].read_bytes()
    for name in ("model.onnx", "compression/work/dense.onnx"):
        os.utime(out / name, (1, 1))
    two = deliver.deliver(out, "edge", tmp_path / "b" / "edge.tar.gz", archive=True)[0].read_bytes()
    assert one == two


def test_an_archive_unpacks_to_a_bundle_that_verifies(out, tmp_path):
    (archive,) = deliver.deliver(out, "edge", archive=True)
    assert archive == out / "edge.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    assert verify_on_device.read_bundle(tmp_path / "there" / "edge")["model"] == "demo"


def test_ort_files_come_along_when_asked_for_and_give_the_same_answers(out):
    folder = bundled(out, "edge+ort")
    assert {"dense.ort", "model.ort"} <= set(verify_on_device.read_bundle(folder)["files"])
    example = verify_on_device.read_examples(folder / "examples.npz")[2]
    for side, name in (("dense", "dense.ort"), ("compressed", "model.ort")):
        model = verify_on_device.OrtModel(folder / name, 1, verify_on_device.CPU)
        assert verify_on_device.agreement(model, side, [example], 1e-5)["passed"]


def test_tables_are_found_through_casts_and_quantization(tmp_path):
    ids = helper.make_tensor_value_info("ids", TensorProto.INT32, ["n"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Cast", ["ids"], ["long"], to=TensorProto.INT64),
        helper.make_node("DequantizeLinear", ["small", "scale"], ["table"]),
        helper.make_node("Gather", ["table", "long"], ["a"]),
        helper.make_node("Gather", ["wide", "long"], ["b"], axis=1),
        helper.make_node("ReduceSum", ["a"], ["c"]),
        helper.make_node("ReduceSum", ["b"], ["d"]),
        helper.make_node("Add", ["c", "d"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.ones((9, 2), np.int8), "small"),
        numpy_helper.from_array(np.float32(0.5).reshape(()), "scale"),
        numpy_helper.from_array(np.ones((30, 5), np.float32), "wide"),
    ]
    graph = helper.make_graph(nodes, "g", [ids], [out], weights)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    assert bundle.table_rows(path) == {"ids": 5}
    assert bundle.precision_of(path) == "int8"
    write_model(path, 4, 1)
    assert bundle.table_rows(path) == {"input_ids": ROWS}
    assert bundle.precision_of(path) == "fp32"


# The command line


def test_the_command_names_what_it_wrote(out, capfd):
    assert main.perform(["export", str(out), "--to", "edge"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert str(out / "edge" / "bundle.json") in lines
    assert main.perform(["export", str(out), "--to", "onnx", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document == {"format": "onnx", "files": [str(out / "onnx" / "model.onnx")]}


def test_a_bundle_a_measurement_and_a_merge_end_in_a_verdict(out, capfd):
    """The target is a Raspberry Pi; this machine is vouched for, which the report then says."""
    folder = bundled(out)
    done = subprocess.run([sys.executable, folder / "verify.py"], capture_output=True, check=False)
    assert done.returncode == 0
    words = ["report", str(out), "--merge", str(folder / "measured.json")]
    assert main.perform(words) == 2
    assert "--device-is-target" in capfd.readouterr().err
    assert schema.exit_code(schema.read(out)) == 3
    assert main.perform([*words, "--device-is-target"]) == 0
    assert "MET" in capfd.readouterr().out
    assert any("--device-is-target was given" in line for line in schema.read(out).warnings)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a whole compilation, and an environment from the network
def test_the_demo_is_measured_where_only_numpy_and_onnxruntime_are(tmp_path):
    """Compile, bundle, carry to a clean environment, measure, merge: the device comes to a verdict."""
    out, place = tmp_path / "out", tmp_path / "venv"
    clean = {"cwd": tmp_path, "env": {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}}
    compress = [sys.executable, "-m", "compress"]
    common = {"capture_output": True, "text": True, "check": False}
    compiled = subprocess.run([*compress, "--target", "cpu", "--speedup", "2x", "--out", out, "-q"], **common)
    assert compiled.returncode in (0, 1), compiled.stderr
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "numpy", "onnxruntime"]
    assert subprocess.run(install, check=False).returncode == 0
    assert subprocess.run([*compress, "export", out, "--to", "edge", "--archive"], **common).returncode == 0
    with tarfile.open(out / "edge.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    absent = subprocess.run([python, "-c", "import compress"], **common, **clean)
    assert "No module named 'compress'" in absent.stderr
    done = subprocess.run([python, tmp_path / "edge" / "verify.py"], **common, **clean)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "edge" / "measured.json").read_text())
    merge = [*compress, "report", out, "--merge", tmp_path / "edge" / "measured.json"]
    merged = subprocess.run(merge, **common)
    found = schema.read(out)
    assert merged.returncode == schema.exit_code(found) == (0 if measured["ratio"]["value"] >= 2 else 1)
    assert found.verdict.measured.speedup == pytest.approx(measured["ratio"]["value"])
    model = bytearray((tmp_path / "edge" / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (tmp_path / "edge" / "model.onnx").write_bytes(bytes(model))
    flipped = subprocess.run([python, tmp_path / "edge" / "verify.py"], **common, **clean)
    assert flipped.returncode == 2
    assert "model.onnx is damaged" in flipped.stderr


def test_a_decoder_is_bundled_with_prompts_that_fit_both_caches(tmp_path):
    """The compressed model has fewer heads in one layer, and no attention in the other."""
    model, example = families.build("llama")
    sites = find_sites(model, example).sites
    first, last = (site for site in sites if site.kind == "heads")
    removals = {first.name: Removal(torch.arange(0)), last.name: Removal(torch.arange(1))}
    files = {"dense": tmp_path / "dense.onnx", "compressed": tmp_path / "model.onnx"}
    decoder.export(model, files["dense"])
    decoder.export(shrink(model, sites, removals), files["compressed"])
    target = CPU.model_copy(update={"shapes": {"batch": 2, "tokens": 6}, "phase": "prefill"})
    output = SimpleNamespace(
        **files,
        recipe=Recipe(target="cpu", budget=Budget(speedup=2.0)),
        report=SimpleNamespace(target=target),
    )
    bundle.write_examples(output, files, tmp_path / "examples.npz")
    found = verify_on_device.read_examples(tmp_path / "examples.npz")
    assert [example.inputs["input_ids"].shape for example in found] == [(2, 6), (3, 3), (3, 6)]
    for side, path in files.items():
        assert all(set(example.answers[side]) == {"logits"} for example in found)
        loaded = verify_on_device.OrtModel(path, 1, verify_on_device.CPU)
        assert verify_on_device.agreement(loaded, side, found, 1e-5)["passed"]
    other = verify_on_device.OrtModel(files["dense"], 1, verify_on_device.CPU)
    assert not verify_on_device.agreement(other, "compressed", found, 1e-5)["passed"]


def test_a_step_is_not_bundled(out):
    path = out / "compression" / "report.json"
    words = json.loads(path.read_text())
    words["target"]["phase"] = "decode"
    path.write_text(json.dumps(words))
    with pytest.raises(CompressError, match="compress with --phase prefill"):
        deliver.deliver(out, "edge")
