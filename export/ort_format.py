"""An ONNX file in onnxruntime's own format, which loads faster and in builds without an ONNX parser."""

from pathlib import Path

import onnxruntime

from compress.errors import CompressError
from compress.export.backends.onnxruntime import CPU, RUNTIME_ERRORS
from compress.export.output_dir import Finished


def convert(file: Path, destination: Path) -> Path:
    """Write `file` as `.ort`, optimized only in ways that suit every processor.

    The highest optimization level would lay tensors out for the instruction set of this machine.

    Raises:
        CompressError: onnxruntime cannot load the file.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(destination)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(file), options, providers=[CPU])
    except RUNTIME_ERRORS as error:
        raise CompressError(f"{file} cannot be written as .ort: {str(error).splitlines()[0]}") from error
    return destination


def export(output: Finished, destination: Path) -> list[Path]:
    """The compressed model as `model.ort` in `destination`."""
    return [convert(output.compressed, destination / "model.ort")]
