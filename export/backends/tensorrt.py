"""An ONNX file as a TensorRT engine for the GPU at hand, and the runner that executes it.

Networks are strongly typed, in TensorRT 10 as in 11: precision stands in the graph (casts, Q/DQ), never
in a flag. An engine fits the device and version it was built on, so a stamp is written beside it, and loading
it elsewhere is refused with both sides named. Memory, streams, events and graphs are torch's.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.export.backends.backend import Array
from compress.export.backends.onnxruntime import sha256
from compress.export.backends.tensorrt_engine import (
    EngineOptions,
    Machine,
    Stamp,
    mismatch,
    numbers,
    read_stamp,
    sparsity,
    stamp_path,
    write_bytes,
)

DEVICE = "cuda"
DRIVER = Path("/proc/driver/nvidia/version")
MAJORS = (10, 11)
WARM_UP = 3
TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
# Patterns of the builder's error messages, and what to do about them.
REMEDIES = {
    r"no importer registered|unsupported operator|plugin not found": (
        "TensorRT does not know an operator of this file; keep the ONNX and run it in onnxruntime"
    ),
    r"out of memory|outofmemory|insufficient memory|cuda.*alloc": (
        "the GPU has too little free memory; end other programs on it, or lower the largest batch and tokens"
    ),
    r"could not find any implementation": (
        "no kernel fits a layer in the memory it may use; raise workspace_mb, or export in another precision"
    ),
    r"optimization profile|profile.*shape|dynamic.*(dim|shape)": (
        "the shape ranges do not fit the file; give min <= opt <= max for batch and tokens"
    ),
}


def build(file: Path, engine: Path, options: EngineOptions, cache: Path | None = None) -> Stamp:
    """Build `engine` and its stamp from an ONNX file, on the GPU at hand.

    `cache` holds kernel timings of earlier builds; it is read where it fits and written afterwards.

    Raises:
        CompressError: no TensorRT 10 or 11, no GPU, no such file, or the builder refuses it.
    """
    if not file.is_file():
        raise CompressError(f"{file} does not exist; export the model first")
    trt = load(file)
    here = machine(trt)
    words: list[tuple[str, str]] = []
    listener = _listener(trt, words)
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(str(file)):
        found = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _refused(file, [*found, *_errors(words)])
    config = _config(trt, builder, network, options)
    _read_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(file, _errors(words))
    content = bytes(plan)
    write_bytes(engine, content)
    if cache is not None:
        write_bytes(cache, bytes(config.get_timing_cache().serialize()))
    stamp = Stamp(
        machine=here,
        options=options,
        onnx_sha256=sha256(file),
        engine_sha256=hashlib.sha256(content).hexdigest(),
        sparsity=sparsity(
            (text for _, text in words), _information(trt, _deserialize(trt, listener, content, options))
        ),
    )
    write_bytes(stamp_path(engine), stamp.model_dump_json(indent=1).encode())
    return stamp


def load(built: Path) -> ModuleType:
    """The TensorRT module; `built` is the file that serves without it.

    Raises:
        CompressError: it is not installed, or of a major version that is not known here.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise CompressError(
            f"an engine needs TensorRT 10 or 11, which cannot be loaded here ({error}).\n"
            "  On the GPU's machine: pip install tensorrt-cu13 (or -cu12); a Jetson has it from JetPack.\n"
            f"  {built} stands ready instead: it runs in onnxruntime, and an engine is built from it there"
        ) from error
    version = str(tensorrt.__version__)
    if numbers(version)[:1] not in [(major,) for major in MAJORS]:
        raise CompressError(
            f"TensorRT {version} is installed; this works with 10.x and 11.x: install one of them"
        )
    module: ModuleType = tensorrt
    return module


def machine(trt: ModuleType) -> Machine:
    """The GPU at hand and the versions on it.

    Raises:
        CompressError: torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise CompressError(
            f"torch {torch.__version__} sees no CUDA device; engines are built and run on the GPU itself"
        )
    major, minor = torch.cuda.get_device_capability()
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text()) if DRIVER.is_file() else None
    return Machine(
        device=torch.cuda.get_device_name(),
        compute_capability=(major, minor),
        tensorrt=str(trt.__version__),
        driver=found[0] if found else "unknown",
    )


class TensorRTRunner:
    """An engine behind the face of a runner; with `graphs` one inference is replayed as a CUDA graph."""

    def __init__(self, path: Path, graphs: bool = True) -> None:
        """Load the engine.

        Raises:
            CompressError: engine or stamp is missing or damaged, or was made for another machine.
        """
        stamp = read_stamp(path)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != stamp.engine_sha256:
            raise CompressError(
                f"{path} ({len(content)} bytes) is not what its stamp describes; build it again"
            )
        trt = load(path.with_suffix(".onnx"))
        self.machine = machine(trt)
        faults = mismatch(stamp, self.machine)
        if faults:
            raise CompressError(
                f"{path.name} was built for another machine: {'; '.join(faults)}.\n"
                "  Engines do not travel: build it again here from the ONNX file"
            )
        self.path, self.graphs, self.stamp = path, graphs, stamp
        engine = _deserialize(trt, _listener(trt, []), content, stamp.options)
        self._tensors = {
            name: (
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                TYPES[engine.get_tensor_dtype(name).name],
            )
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
        }
        self._engine: Any = engine
        self._context: Any = engine.create_execution_context()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context = self._engine = None

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; inputs that the engine does not take are left out.

        Raises:
            CompressError: an input is missing, or its shape lies outside the engine's range.
        """
        feed, outputs = self._bind(inputs)
        self._enqueue(feed)
        self._stream.synchronize()
        return {
            name: (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
            for name, value in outputs.items()
        }

    def timed(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        """One inference on inputs that lie on the GPU, ended by waiting for it, ready to be measured."""
        launch = self._launcher(inputs)
        stream = self._stream

        def call() -> None:
            launch()
            stream.synchronize()

        return call

    def device_ms(self, inputs: Mapping[str, Array], runs: int) -> NDArray[np.float64]:
        """Milliseconds of `runs` single inferences between CUDA events; the host's part is left out."""
        launch = self._launcher(inputs)
        pairs = []
        for _ in range(runs):
            before, after = (_event() for _ in range(2))
            before.record(self._stream)
            launch()
            after.record(self._stream)
            pairs.append((before, after))
        self._stream.synchronize()
        return np.array([before.elapsed_time(after) for before, after in pairs])

    def facts(self) -> dict[str, str | int]:
        """Runtime, versions, device and how it runs, for the report."""
        return {
            "runtime": "tensorrt",
            "version": self.machine.tensorrt,
            "provider": self.machine.device,
            "driver": self.machine.driver,
            "cuda_graph": "on" if self.graphs else "off",
            "sparse_layers": len(self.stamp.sparsity.picked),
        }

    def _bind(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors on the GPU for every input and output, their addresses given to the engine."""
        context = self._open()
        needed = [name for name, (is_input, _) in self._tensors.items() if is_input]
        missing = [name for name in needed if name not in inputs]
        if missing:
            raise CompressError(
                f"{self.path.name} needs input {', '.join(missing)}; given: {', '.join(inputs) or 'none'}"
            )
        feed = {}
        for name in needed:
            value = torch.from_numpy(np.ascontiguousarray(inputs[name]))
            feed[name] = value.to(device=DEVICE, dtype=self._tensors[name][1])
            if not context.set_input_shape(name, tuple(value.shape)):
                least, _, most = self._engine.get_tensor_profile_shape(name, 0)
                raise CompressError(
                    f"{self.path.name} takes {name} from {tuple(least)} to {tuple(most)}, not "
                    f"{tuple(value.shape)}; build the engine with a range that holds it"
                )
            context.set_tensor_address(name, feed[name].data_ptr())
        outputs = {}
        for name, (is_input, dtype) in self._tensors.items():
            if not is_input:
                shape = tuple(context.get_tensor_shape(name))
                outputs[name] = torch.empty(shape, dtype=dtype, device=DEVICE)
                context.set_tensor_address(name, outputs[name].data_ptr())
        # The copies run on torch's stream, the engine on its own.
        self._stream.wait_stream(torch.cuda.current_stream())
        return feed, outputs

    def _enqueue(self, kept: object) -> None:
        """Start one inference; `kept` is the memory it reads."""
        if not self._open().execute_async_v3(self._stream.cuda_stream):
            raise CompressError(f"TensorRT could not start {self.path.name}; build the engine again here")

    def _launcher(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        bound = self._bind(inputs)  # the closure keeps this memory alive
        for _ in range(WARM_UP):
            self._enqueue(bound)
        self._stream.synchronize()
        if not self.graphs:
            return lambda: self._enqueue(bound)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue(bound)
        stream = self._stream

        def replay(kept: object = bound) -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay

    def _open(self) -> Any:
        if self._context is None:
            raise CompressError(f"the runner of {self.path} is closed; use it inside its `with`")
        return self._context


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _config(trt: ModuleType, builder: Any, network: Any, options: EngineOptions) -> Any:
    """The builder's settings, with one profile: free axis 0 is the batch, other free axes the tokens."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }[options.hardware]
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * 2**20)
    profile = builder.create_optimization_profile()
    free = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            free = True
            least, best, most = _shapes(shape, options)
            profile.set_shape(tensor.name, least, best, most)
    if free:
        config.add_optimization_profile(profile)
    return config


def _shapes(shape: tuple[int, ...], options: EngineOptions) -> list[tuple[int, ...]]:
    ranges = [options.batch if axis == 0 else options.tokens for axis in range(len(shape))]
    return [
        tuple(ranges[axis][end] if size == -1 else size for axis, size in enumerate(shape))
        for end in range(3)
    ]


def _read_cache(config: Any, cache: Path | None) -> None:
    """Give the builder earlier timings; those of another device or version are set aside for none."""
    if cache is None:
        return
    content = cache.read_bytes() if cache.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(content), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _deserialize(trt: ModuleType, listener: Any, content: bytes, options: EngineOptions) -> Any:
    runtime = trt.Runtime(listener)
    # A version-compatible engine carries its own runtime, which is code.
    runtime.engine_host_code_allowed = options.version_compatible
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise CompressError(
            f"TensorRT {trt.__version__} cannot load this engine; build it again on this machine"
        )
    return engine


def _information(trt: ModuleType, engine: Any) -> str:
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _listener(trt: ModuleType, words: list[tuple[str, str]]) -> Any:
    """A logger that keeps (severity, line) and writes nothing."""

    class Listener(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            words.append((severity.name, msg))

    return Listener()


def _errors(words: list[tuple[str, str]]) -> list[str]:
    return [text for severity, text in words if severity in ("ERROR", "INTERNAL_ERROR")]


def _refused(file: Path, errors: list[str]) -> CompressError:
    """The builder's first error, and what helps against the errors it gave."""
    every = "\n".join(errors)
    fitting = (advice for words, advice in REMEDIES.items() if re.search(words, every, re.IGNORECASE))
    advice = next(fitting, "the ONNX file still runs in onnxruntime")
    return CompressError(
        f"TensorRT refuses {file}: {errors[0] if errors else 'it gave no reason'}\n  {advice}"
    )
