"""Products in low precision, one by one against their file."""

import copy
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.toys import job_of
from torch import nn

from compress.core import fakequant
from compress.errors import CompressError
from compress.export.backends import parity
from compress.export.backends.onnxruntime import OrtRunner, TorchRunner
from compress.export.onnx import quantized
from compress.export.onnx.probes import watch
from compress.methods import quantized_layers, quantized_parity
from compress.pipeline import model_files

KINDS = ("int8-dynamic", "int8-static", "int4", "fp8")
RANGED = {"int8-static", "fp8"}


@cache
def made(family, kind):
    """A toy model with every product in low precision, in torch and as a file; to be read only."""
    folder = Path(mkdtemp())
    job = job_of(family, folder)
    job.task.outputs = ("logits",)
    layers = {f"{n}.weight": m for n, m in job.task.model.named_modules() if isinstance(m, nn.Linear)}
    span = (-3.0, 2.5) if kind in RANGED else None
    places = {
        name: quantized_layers.Place(fakequant.nearest(m.weight.detach(), kind, span))
        for name, m in layers.items()
    }
    codes = {name: place.quantized for name, place in places.items()}
    model_files.write(
        job, job.task.model, folder / "m.onnx", lower=lambda graph: quantized.lower(graph, codes)
    )
    quantized_layers.insert(job.task.model, places)
    return job, folder / "m.onnx", list(places)


def exported(family, kind, folder):
    """The same, with a file of its own."""
    job, path, names = made(family, kind)
    return job, Path(shutil.copy(path, folder)), names


def compared(job, path, *, shipped=None):
    task = job.task
    with (
        quantized_parity.LayerwiseParityRunner(task.model, path, task.output_tensors, threads=1) as reference,
        OrtRunner(shipped or path, 1) as runner,
    ):
        found = parity.parity(reference, runner, parity.padded_examples(task.example, 7))
    return found, reference


SLOW = pytest.mark.slow
OTHERS = [("vit", "int8-dynamic"), ("opt", "fp8"), ("llama", "int8-static"), ("phi3", "int4")]
PAIRS = [
    pytest.param(family, kind, marks=[] if (family, kind) == ("bert", "int8-dynamic") else SLOW)
    for family, kind in [*(("bert", kind) for kind in KINDS), *OTHERS]
]


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_every_product_is_the_one_of_the_file(family, kind, tmp_path):
    job, path, names = exported(family, kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    found, reference = compared(job, path)
    assert found.max_abs_difference <= found.tolerance == pytest.approx(1e-4, rel=9)
    assert reference.products == len(names)
    assert 0 < reference.apart < (1e-5 if kind != "int4" else 1e-2)
    assert sorted(tmp_path.iterdir()) == before
    assert not any(layer._forward_hooks for layer in job.task.model.modules())


def test_what_a_last_bit_becomes_is_no_difference(tmp_path):
    """The control: of the same two programs, left alone, some answers differ by a whole rounding error."""
    job, path, _ = exported("bert", "int8-dynamic", tmp_path)
    task = job.task
    examples = []
    for seed in range(200):
        words = task.example(3, 7)
        random = torch.Generator().manual_seed(seed)
        words["input_ids"] = torch.randint(0, 50, words["input_ids"].shape, generator=random)
        examples.append({name: value.numpy() for name, value in words.items()})
    with OrtRunner(path, 1) as runner:
        with (
            TorchRunner(task.model, task.output_tensors) as alone,
            pytest.raises(CompressError, match="disagree"),
        ):
            parity.parity(alone, runner, examples)
        with quantized_parity.LayerwiseParityRunner(task.model, path, task.output_tensors, threads=1) as led:
            found = parity.parity(led, runner, examples)
    assert (found.max_abs_difference, found.agreement) == (0.0, 1.0)
    assert led.apart < 1e-5


def edited(path, ending, change, number=0):
    """A file one of whose stored tensors is another."""
    model = onnx.load(path)
    stored = [tensor for tensor in model.graph.initializer if tensor.name.endswith(ending)][number]
    values = np.array(numpy_helper.to_array(stored))
    change(values)
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    wrong = path.with_name("wrong.onnx")
    onnx.save(model, wrong)
    return wrong


def one_code(values):
    values.reshape(-1)[int(np.abs(values.astype(int)).argmax())] //= 2


def first_up(values):
    values.reshape(-1)[0] += 0.03


def larger(values):
    values *= 1.01


def doubled(values):
    values *= 2


@pytest.mark.parametrize(
    ("kind", "ending", "change", "words"),
    [
        ("int8-dynamic", "query.weight_codes", one_code, "the output of .*query.weight differs"),
        ("int8-dynamic", "value.weight_step", larger, "the output of .*value.weight differs"),
        ("int8-dynamic", "value.bias", first_up, "the output of .*value.weight differs"),
        ("int8-dynamic", "LayerNorm.bias", first_up, "the input of .*weight differs"),
        pytest.param("int8-static", "intermediate.dense.weight_input_step", larger,
                     "output of .*dense.weight differs", marks=SLOW),
        pytest.param("int8-static", "intermediate.dense.weight_codes", one_code,
                     "output of .*dense.weight differs", marks=SLOW),
        pytest.param("int4", "value.weight_step", doubled, "output of .*value.weight differs", marks=SLOW),
    ],
)  # fmt: skip
def test_one_wrong_number_in_the_file_is_found(kind, ending, change, words, tmp_path):
    job, path, _ = exported("bert", kind, tmp_path)
    with pytest.raises(CompressError, match=words) as caught:
        compared(job, edited(path, ending, change))
    assert "tolerance 0.0" in str(caught.value)
    assert "not shipped" in str(caught.value)


def test_the_file_itself_must_answer_as_its_watched_copy(tmp_path):
    job, path, _ = exported("bert", "int8-dynamic", tmp_path)
    with pytest.raises(CompressError, match="torch model and the exported file disagree"):
        compared(job, path, shipped=edited(path, "classifier.weight_step", larger))


def test_products_that_only_one_side_has_are_refused(tmp_path):
    job, path, names = exported("bert", "int8-dynamic", tmp_path)
    twice = copy.deepcopy(job)
    quantized_layers.remove(twice.task.model, names[:1])
    with pytest.raises(CompressError, match=f"{names[0]} is quantized in the exported file but not"):
        compared(twice, path)
    plain = tmp_path / "plain.onnx"
    quantized_layers.remove(twice.task.model)
    model_files.write(twice, twice.task.model, plain)
    with pytest.raises(CompressError, match="less often than torch does"):
        compared(job, plain)


@pytest.mark.slow
def test_a_relu_before_e4m3_stays(tmp_path):
    """onnxruntime drops a Relu in front of bytes whose lowest code is 0, and takes e4m3 for such."""
    _, path, _ = exported("opt", "fp8", tmp_path)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "Max" in kinds
    assert "Relu" not in kinds
    _, path, _ = exported("opt", "int8-static", tmp_path)
    assert "Relu" in {node.op_type for node in onnx.load(path).graph.node}


def test_bytes_of_another_program_are_refused(tmp_path):
    _, path, _ = exported("bert", "int8-dynamic", tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = [name.replace("_codes", "_bytes") for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("_codes", "_bytes")
    onnx.save(model, path)
    with pytest.raises(CompressError, match="export the model again"):
        watch(path, tmp_path / "w.onnx")
