"""Stamps: which machines an engine may be loaded on, and how sparse layers are read."""

import pytest
from pydantic import ValidationError

from compress.export.backends.tensorrt_engine import (
    EngineOptions,
    Machine,
    Sparsity,
    Stamp,
    mismatch,
    sparsity,
)

H100 = Machine(device="H100", compute_capability=(9, 0), tensorrt="10.9.0", driver="580.1")


def faults(options, **here):
    stamp = Stamp(
        machine=H100, options=EngineOptions(**options), onnx_sha256="", engine_sha256="", sparsity=Sparsity()
    )
    return [fault.split()[0] for fault in mismatch(stamp, H100.model_copy(update=here))]


@pytest.mark.parametrize(
    ("options", "here", "expected"),
    [
        ({}, {}, []),
        ({}, {"device": "H200"}, ["GPU"]),
        ({"hardware": "same_compute_capability"}, {"device": "H200"}, []),
        ({"hardware": "same_compute_capability"}, {"compute_capability": (8, 9)}, ["GPU"]),
        ({"hardware": "ampere_plus"}, {"device": "A100", "compute_capability": (8, 0)}, []),
        ({"hardware": "ampere_plus"}, {"device": "T4", "compute_capability": (7, 5)}, ["GPU"]),
        ({}, {"tensorrt": "10.13.0"}, ["TensorRT"]),
        ({"version_compatible": True}, {"tensorrt": "10.13.0"}, []),
        ({"version_compatible": True}, {"tensorrt": "10.8.0"}, ["TensorRT"]),
        ({"version_compatible": True}, {"tensorrt": "11.0.0"}, ["TensorRT"]),
        ({}, {"driver": "590.0"}, ["driver"]),
        ({}, {"device": "A100", "tensorrt": "11.0.0", "driver": "1.0"}, ["GPU", "TensorRT", "driver"]),
    ],
)
def test_an_engine_is_refused_where_it_does_not_fit(options, here, expected):
    assert faults(options, **here) == expected


@pytest.mark.parametrize("batch", [(0, 1, 1), (2, 1, 3), (1, 3, 2)])
def test_ranges_are_ordered(batch):
    with pytest.raises(ValidationError, match="min <= opt <= max"):
        EngineOptions(batch=batch)


def test_sparse_layers_are_read_from_both_wordings():
    log = [
        "(Sparsity) Layers eligible for sparse math: a, b",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: a",
        "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: c",
        "(Sparsity) Chose 1 layer(s) using sparse tactics: c",
        "Layers eligible for nothing: d",
    ]
    assert sparsity(log, '{"Layers": ["e"]}') == Sparsity(eligible=("a", "b", "c"), picked=("a", "c"))
