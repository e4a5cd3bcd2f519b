"""Runners: an ONNX file in an onnxruntime session, and the torch model in float32 as the reference.

A runner is a context manager with `infer`, from arrays by input name to arrays by output name. `timed`
returns a call without arguments that does nothing but the runtime's own work, for timing.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import Tensor, nn

from compress.errors import CompressError
from compress.export.backends.backend import Array, Tensors
from compress.export.onnx import kv_cache

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
CHUNK_BYTES = 2**20
TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}
RUNTIME_ERRORS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)


class OrtRunner:
    """An ONNX file in onnxruntime: sequential, all graph optimizations, weights packed beforehand."""

    def __init__(self, path: Path, threads: int, provider: str = CPU) -> None:
        """Load the file.

        Raises:
            CompressError: it is missing or no ONNX file, or the provider is not in this onnxruntime.
        """
        if not Path(path).is_file():
            raise CompressError(f"{path} does not exist; export the model first")
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise CompressError(
                f"onnxruntime {onnxruntime.__version__} here has no {provider}; it has {', '.join(available)}"
            )
        self.path, self.threads, self.provider = Path(path), threads, provider
        try:
            session = onnxruntime.InferenceSession(str(path), _options(threads), providers=[provider])
        except RUNTIME_ERRORS as error:
            words = str(error).splitlines()[0]
            raise CompressError(
                f"onnxruntime cannot load {path} ({Path(path).stat().st_size} bytes): {words}\n"
                "  The file is damaged or of a newer format; export it again."
            ) from error
        _require_provider(session, provider)
        self._session: onnxruntime.InferenceSession | None = session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None

    def inputs(self) -> dict[str, tuple[np.dtype[Any], tuple[int | str | None, ...]]]:
        """Type and shape of every input; free sizes are names."""
        return {
            value.name: (TYPES.get(value.type, np.dtype(np.float32)), tuple(value.shape))
            for value in self._open().get_inputs()
        }

    def outputs(self) -> dict[str, tuple[int | str | None, ...]]:
        """Shape of every output; free sizes are names."""
        return {value.name: tuple(value.shape) for value in self._open().get_outputs()}

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; inputs that the file does not take are left out.

        A decoder with a cache needs no more than ids and mask: the past is empty then.

        Raises:
            CompressError: an input is missing, or the file does not accept a shape or type.
        """
        session = self._open()
        names = [value.name for value in session.get_outputs()]
        feed = self._feed(inputs)
        try:
            return dict(zip(names, session.run(names, feed), strict=True))
        except RUNTIME_ERRORS as error:
            raise self._refusal(feed, error) from error

    def timed(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        """One inference with inputs and outputs bound beforehand where it computes, ready to be measured.

        The call keeps the session alive after the runner is closed.

        Raises:
            CompressError: an input is missing, or the file does not accept a shape or type.
        """
        feed = self._feed(inputs)
        call = bind_call(self._open(), feed, self.provider)
        try:
            call()  # refuses a shape that does not fit now, not in the middle of a measurement
        except (*RUNTIME_ERRORS, RuntimeError) as error:  # bound runs raise the plain one
            raise self._refusal(feed, error) from error
        return call

    def timed_phase(self, prompt: Mapping[str, Array], phase: str) -> Callable[[], object]:
        """One phase of a decoder file: "prefill" of the prompt, or "decode" of one token after it."""
        return self.timed(kv_cache.phase_inputs(prompt, phase, self.inputs(), self.outputs()))

    def facts(self) -> dict[str, str | int]:
        """Runtime, version, provider and threading, for the report."""
        return {**facts(), "provider": self.provider, "threads": self.threads}

    def _open(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise CompressError(f"the runner of {self.path} is closed; use it inside its `with`")
        return self._session

    def _refusal(self, feed: Mapping[str, Array], error: Exception) -> CompressError:
        given = ", ".join(f"{name} {value.shape} {value.dtype}" for name, value in feed.items())
        return CompressError(f"{self.path.name} refuses {given}: {str(error).splitlines()[0]}")

    def _feed(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [value.name for value in self._open().get_inputs()]
        if any(name not in inputs for name in names):
            inputs = kv_cache.complete(inputs, dict.fromkeys(names), self.outputs())
        missing = [name for name in names if name not in inputs]
        if missing:
            raise CompressError(
                f"{self.path.name} needs input {', '.join(missing)}; given: {', '.join(inputs) or 'none'}"
            )
        return {name: inputs[name] for name in names}


class TorchRunner:
    """The model in torch; `tensors` gives its outputs by name, of what it returns."""

    def __init__(self, model: nn.Module, tensors: Tensors) -> None:
        self.model, self.tensors = model, tensors
        self._modes: dict[nn.Module, bool] = {}

    def __enter__(self) -> Self:
        self._modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for module, training in self._modes.items():
            module.training = training

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        with torch.inference_mode():
            found = self.tensors(self.model(**_tensors(inputs)))
        return {name: tensor.numpy() for name, tensor in found.items()}

    def timed(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        """One forward pass on tensors that are made beforehand."""
        tensors = _tensors(inputs)

        def call() -> None:
            with torch.inference_mode():
                self.model(**tensors)

        return call

    def facts(self) -> dict[str, str | int]:
        """Runtime, version, device and threads, for the report."""
        return {
            "runtime": "torch",
            "version": torch.__version__,
            "provider": "cpu",
            "threads": torch.get_num_threads(),
        }


def bind_call(
    session: onnxruntime.InferenceSession, feed: Mapping[str, Array], provider: str
) -> Callable[[], None]:
    """A call that runs a session on inputs in the memory of the provider's device, and waits for it."""
    binding = session.io_binding()
    device = "cpu" if provider == CPU else "cuda"
    for name, value in feed.items():
        whole = np.ascontiguousarray(value)
        if device == "cpu":
            binding.bind_cpu_input(name, whole)
        else:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(whole, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def call() -> None:
        session.run_with_iobinding(binding)
        if device != "cpu":
            binding.synchronize_outputs()

    return call


def provider_starts(provider: str) -> bool:
    """Whether onnxruntime has a provider and can start it; it also lists those whose libraries it lacks."""
    if provider not in onnxruntime.get_available_providers():
        return False
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "one", value[:1], value[1:])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    try:
        session = onnxruntime.InferenceSession(file.SerializeToString(), _options(1), providers=[provider])
        _require_provider(session, provider)
    except (*RUNTIME_ERRORS, RuntimeError, CompressError):
        return False
    return True


def _require_provider(session: onnxruntime.InferenceSession, provider: str) -> None:
    """Refuse a session that silently fell back to the processor.

    Raises:
        CompressError: the provider did not start.
    """
    found = session.get_providers()
    if provider not in found:
        raise CompressError(
            f"onnxruntime {onnxruntime.__version__} names {provider} but could not start it, and would run "
            f"on {', '.join(found)}: libraries of CUDA or cuDNN of its versions are missing"
        )


def facts() -> dict[str, str | int]:
    """The runtime that files are measured in, and how it is set."""
    return {
        "runtime": "onnxruntime",
        "version": onnxruntime.__version__,
        "graph_optimization": "all",
        "execution": "sequential",
        "inter_op_threads": 1,
        "spinning": "on",
        "prepacking": "on",
    }


def sha256(path: Path) -> str:
    """The SHA-256 of a file, its external weights included."""
    total = hashlib.sha256()
    beside = path.with_name(f"{path.name}.data")
    for part in (path, beside) if beside.is_file() else (path,):
        with part.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                total.update(chunk)
    return total.hexdigest()


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.disable_prepacking", "0")
    return options


def _tensors(inputs: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
