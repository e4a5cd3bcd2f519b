"""Verify and time an edge bundle on the device it was made for; needs only numpy and a runtime.

It is copied into every bundle as `verify.py`, with `intervals.py` beside it, and runs where nothing else
of compress is, from Python 3.9 on. It checks the checksums, compares the outputs of both models with the
stored ones, times dense and compressed in turn, reads energy where the device has a meter,
and writes `measured.json`, which `compress report OUT --merge measured.json` turns into a verdict.

Exit codes: 0 measured; 2 the bundle or the request is faulty; 4 the device computes other numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA_VERSION = 1
SIDES = ("dense", "compressed")
BAD_REQUEST, DISAGREES = 2, 4

# The protocol of compress.bench; tests hold both to the same figures.
MIN_BLOCKS = 30
WARM_UP_SPREAD = 0.02
WINDOW_RUNS = 5
WINDOWS = 3
MOST_SAMPLES = 600
ENERGY_S = 5.0

# Relative to the largest output. Kernels of other devices add in another order and round elsewhere.
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 3e-2, "bf16": 1e-1, "int8": 5e-2, "fp8": 1.2e-1}
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "sve", "sve2"),
)
ROOT = Path("/")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

Arrays = Mapping[str, Any]
Run = Callable[[], object]
Clock = Callable[[], float]


class BundleError(Exception):
    """The bundle or the request is faulty; the message states what to do."""


class Example:
    """One stored input, and the outputs of both models for it where the bundle was made."""

    def __init__(self, inputs: Arrays, answers: Mapping[str, Arrays]) -> None:
        self.inputs, self.answers = inputs, answers


# The bundle


def read_bundle(folder: Path) -> dict[str, Any]:
    """The description of the bundle, after every file in it was found whole.

    Raises:
        BundleError: a file is missing or damaged, or the bundle is of another version.
    """
    again = "copy the bundle to this device again"
    try:
        bundle: dict[str, Any] = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        rest = {key: value for key, value in bundle.items() if key != "digest"}
        version, digest, files = bundle["schema_version"], bundle["digest"], bundle["files"]
    except OSError as error:
        raise BundleError(f"{folder / 'bundle.json'} cannot be read ({error.strerror}); {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / 'bundle.json'} is damaged ({error!r}); {again}") from error
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema {version}, this verify.py reads {SCHEMA_VERSION}; export it again"
        )
    if digest != canonical_digest(rest):
        raise BundleError(f"bundle.json is damaged: it does not match its own digest; {again}")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise BundleError(f"{name} is not in the bundle, though bundle.json lists it; {again}")
        found = sha256(path)
        if found != expected:
            raise BundleError(
                f"{name} is damaged: its sha256 is {found[:16]}..., bundle.json says {expected[:16]}...; "
                f"{again}"
            )
    return bundle


def canonical_digest(document: Mapping[str, Any]) -> str:
    """The sha256 of a JSON document, whatever its layout and order of keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(*paths: Path) -> str:
    """The hash of one or more files, read one after the other."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(2**20), b""):
                total.update(chunk)
    return total.hexdigest()


def read_examples(path: Path) -> list[Example]:
    """The stored inputs and outputs; arrays are named `<number>.<in|dense|compressed>.<name>`."""
    parts: dict[int, dict[str, dict[str, Any]]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            number, role, name = key.split(".", 2)
            parts.setdefault(int(number), {}).setdefault(role, {})[name] = stored[key]
    return [
        Example(parts[number]["in"], {side: parts[number][side] for side in SIDES})
        for number in sorted(parts)
    ]


def agreement(model: Any, side: str, examples: Sequence[Example], relative: float) -> dict[str, Any]:
    """How far a model's outputs here are from the stored ones; padded positions do not count."""
    worst, largest, same = 0.0, 1.0, []
    for example in examples:
        answers = model.infer(example.inputs)
        for name, expected in example.answers[side].items():
            found = answers.get(name)
            largest = max(largest, float(np.abs(expected).max()))
            if found is None or found.shape != expected.shape:
                worst = float("inf")
                continue
            mask = example.inputs.get("attention_mask")
            if mask is not None and expected.ndim >= 3 and mask.shape == expected.shape[:2]:
                expected, found = expected[mask.astype(bool)], found[mask.astype(bool)]
            gap = np.abs(expected.astype(np.float64) - found.astype(np.float64)).max()
            worst = float("inf") if not np.isfinite(gap) else max(worst, float(gap))
            same.append((expected.argmax(-1) == found.argmax(-1)).ravel())
    tolerance = relative * largest
    return {
        "passed": worst <= tolerance,
        "max_abs_difference": worst if np.isfinite(worst) else None,
        "tolerance": tolerance,
        "agreement": float(np.concatenate(same).mean()) if same else 0.0,
        "examples": len(examples),
    }


# Runtimes


class OrtModel:
    """An ONNX or ORT file in onnxruntime, set as compress sets it: sequential, all optimizations."""

    runtime = "onnxruntime"
    precision = "fp32"

    def __init__(self, path: Path, threads: int, provider: str) -> None:
        ort = needed("onnxruntime", "pip install onnxruntime (on Jetson: the onnxruntime-gpu of JetPack)")
        if provider not in ort.get_available_providers():
            have = ", ".join(ort.get_available_providers())
            raise BundleError(f"onnxruntime {ort.__version__} here has no {provider}; it has {have}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.disable_prepacking", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # the classes of its errors differ between releases
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot load {path.name}: {first_line(error)}\n"
                "  It needs onnxruntime 1.18 or newer."
            ) from error
        if self._session.get_providers()[0] != provider:
            raise BundleError(
                f"onnxruntime fell back from {provider} to {self._session.get_providers()[0]}; its CUDA or "
                "cuDNN libraries are missing. Install them, or use --provider CPUExecutionProvider"
            )
        self.provider, self.version = provider, str(ort.__version__)
        self._device = "cuda" if provider == CUDA else "cpu"
        self._ort = ort

    def infer(self, inputs: Arrays) -> dict[str, Any]:
        """Outputs by name."""
        names = [output.name for output in self._session.get_outputs()]
        feed = {value.name: inputs[value.name] for value in self._session.get_inputs()}
        return dict(zip(names, self._session.run(names, feed)))

    def timed(self, inputs: Arrays) -> Run:
        """One inference whose inputs and outputs are in device memory."""
        binding = self._session.io_binding()
        for value in self._session.get_inputs():
            array = np.ascontiguousarray(inputs[value.name])
            if self._device == "cpu":
                binding.bind_cpu_input(value.name, array)
            else:
                placed = self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
                binding.bind_ortvalue_input(value.name, placed)
        for output in self._session.get_outputs():
            binding.bind_output(output.name, self._device)
        run, session = self._session.run_with_iobinding, self._session
        if self._device == "cpu":
            return lambda: run(binding)

        def call() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return call


class TensorrtModel:
    """An ONNX file built into a TensorRT engine here, and run on buffers of its own."""

    runtime = "tensorrt"
    provider = "tensorrt"

    def __init__(self, path: Path, examples: Sequence[Example], precision: str) -> None:
        trt = needed("tensorrt", "it is part of JetPack; elsewhere: pip install tensorrt")
        self._trt, self.version = trt, str(trt.__version__)
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise BundleError(f"TensorRT {self.version} cannot read {path.name}: {errors}")
        config = builder.create_builder_config()
        # TensorRT 11 knows only strongly typed networks: the precision is the file's own.
        self.precision = precision if precision != "fp16" or hasattr(trt.BuilderFlag, "FP16") else "fp32"
        if self.precision == "fp16":
            config.set_flag(trt.BuilderFlag.FP16)
        elif self.precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            shapes = np.array([example.inputs[name].shape for example in examples])
            profile.set_shape(
                name, *(tuple(size.tolist()) for size in (shapes.min(0), shapes[0], shapes.max(0)))
            )
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BundleError(f"TensorRT {self.version} built no engine from {path.name}; see its log above")
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        self._cuda = Cuda()

    def infer(self, inputs: Arrays) -> dict[str, Any]:
        """Outputs by name."""
        outputs = self._bind(inputs)
        self._run()
        return {name: self._cuda.fetch(place, array) for name, (place, array) in outputs.items()}

    def timed(self, inputs: Arrays) -> Run:
        """One run of the engine and the wait for its end; inputs are in device memory."""
        self._bind(inputs)
        return self._run

    def _bind(self, inputs: Arrays) -> dict[str, tuple[int, Any]]:
        engine, context = self._engine, self._context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        takes = [n for n in names if engine.get_tensor_mode(n) == self._trt.TensorIOMode.INPUT]
        for name in takes:
            kind = self._trt.nptype(engine.get_tensor_dtype(name))
            array = np.ascontiguousarray(inputs[name], dtype=kind)
            context.set_input_shape(name, array.shape)
            context.set_tensor_address(name, self._cuda.place(name, array))
        outputs = {}
        for name in names:
            if name not in takes:
                kind = self._trt.nptype(engine.get_tensor_dtype(name))
                array = np.empty(tuple(context.get_tensor_shape(name)), dtype=kind)
                outputs[name] = (self._cuda.place(name, array), array)
                context.set_tensor_address(name, outputs[name][0])
        return outputs

    def _run(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise BundleError("TensorRT could not run the engine; see its log above")
        self._cuda.wait()


class Cuda:
    """The few calls of the CUDA runtime that an engine needs, so that no other package is needed."""

    TO_DEVICE, TO_HOST = 1, 2

    def __init__(self) -> None:
        names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", ctypes.util.find_library("cudart")]
        library = next((found for name in names if name for found in [opened(name)] if found), None)
        if library is None:
            raise BundleError("libcudart.so was not found; add the CUDA runtime to LD_LIBRARY_PATH")
        self._library = library
        self._places: dict[str, tuple[int, int]] = {}
        handle = ctypes.c_void_p()
        self._do("cudaStreamCreate", ctypes.byref(handle))
        self.stream = int(handle.value or 0)

    def place(self, name: str, array: Any) -> int:
        """The device address of a copy of `array`; one buffer a name, renewed when it grows."""
        address, room = self._places.get(name, (0, 0))
        if array.nbytes > room:
            if address:
                self._do("cudaFree", ctypes.c_void_p(address))
            fresh = ctypes.c_void_p()
            self._do("cudaMalloc", ctypes.byref(fresh), ctypes.c_size_t(array.nbytes))
            address = int(fresh.value or 0)
            self._places[name] = (address, array.nbytes)
        self._copy(address, array.ctypes.data, array.nbytes, self.TO_DEVICE)
        return address

    def fetch(self, address: int, array: Any) -> Any:
        """`array` filled from the device."""
        self._copy(array.ctypes.data, address, array.nbytes, self.TO_HOST)
        return array

    def wait(self) -> None:
        """Until everything on the stream is done."""
        self._do("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def _copy(self, to: int, source: int, size: int, way: int) -> None:
        self._do("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), way)

    def _do(self, call: str, *words: Any) -> None:
        code = getattr(self._library, call)(*words)
        if code:
            raise BundleError(f"{call} failed with CUDA error {code}; see nvidia-smi or tegrastats")


def needed(package: str, how: str) -> Any:
    """A package that is imported only when it is used."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BundleError(f"{package} cannot be imported ({error}); {how}") from error


def opened(library: str) -> Any:
    """A shared library, None where there is none of that name."""
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None


def first_line(error: BaseException) -> str:
    """The message of an error, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# Time, as in compress.bench


def compare(
    runners: Mapping[str, Run],
    *,
    blocks: int,
    block_ms: float,
    clock: Clock = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time every runner in interleaved blocks (A B B A); the first one is the baseline.

    Returns:
        Single latencies in milliseconds by runner and block, the drift of the baseline, and by runner
        whether its warm-up settled.
    """
    blocks += blocks % 2
    names = list(runners)
    first = names[0]
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        warm = {name: warm_up(runners[name], clock, 10 * block_ms) for name in names}
        runs = {name: max(3, round(block_ms / max(warm[name][0], 1e-6))) for name in names}
        taken: dict[str, list[Any]] = {name: [] for name in names}
        tail = max(3, blocks // 10)
        for block in range(blocks):
            for name in names if block % 2 == 0 else reversed(names):
                taken[name].append(timed_block(runners[name], runs[name], clock))
            if progress is not None:
                progress(block + 1, blocks)
        again = [timed_block(runners[first], runs[first], clock) for _ in range(tail)]
    finally:
        if was_on:
            gc.enable()
    start = median_of(taken[first][:tail])
    return {
        "samples_ms": taken,
        "drift": float(median_of(again) / start - 1),
        "settled": {name: warm[name][1] for name in names},
    }


def median_of(blocks: Sequence[Any]) -> float:
    """The median of the medians of blocks."""
    return float(np.median([np.median(block) for block in blocks]))


def timed_block(run: Run, runs: int, clock: Clock) -> Any:
    """Single latencies of `runs` runs in milliseconds, after one run that is not counted."""
    run()
    stamps = [clock()]
    for _ in range(runs):
        run()
        stamps.append(clock())
    return np.array([1e3 * (after - before) for before, after in zip(stamps, stamps[1:])])


def warm_up(run: Run, clock: Clock, bound_ms: float) -> tuple[float, bool]:
    """Run until three windows agree within 2 %: the last median, and whether they did."""
    began = clock()
    medians: list[float] = []
    while True:
        medians.append(float(np.median(timed_block(run, WINDOW_RUNS, clock))))
        last = medians[-WINDOWS:]
        if len(last) == WINDOWS and max(last) <= min(last) * (1 + WARM_UP_SPREAD):
            return last[-1], True
        if 1e3 * (clock() - began) >= bound_ms:
            return last[-1], False


def load_intervals() -> Any:
    """The module `intervals.py` beside this file, in a bundle as in the package."""
    path = Path(__file__).with_name("intervals.py")
    found: Any = importlib.util.spec_from_file_location("intervals", path)
    module = importlib.util.module_from_spec(found)
    sys.modules["intervals"] = module  # dataclasses look up their own module
    found.loader.exec_module(module)
    return module


def thin(samples: Sequence[float], most: int = MOST_SAMPLES) -> list[float]:
    """At most `most` samples of the same distribution: evenly spaced ranks, both ends kept."""
    ordered = sorted(float(value) for value in samples)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


# Energy


class Rapl:
    """The processor's own counters (Linux powercap): packages and their memory."""

    def __init__(self, root: Path) -> None:
        self.name = "RAPL"
        self._last: dict[Path, int] = {}
        self._range: dict[Path, int] = {}
        self._total_uj = 0
        for path in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
            numbers = [text(path / name) for name in ("energy_uj", "max_energy_range_uj")]
            if re.fullmatch(r"package-\d+(-die-\d+)?|dram", text(path / "name")) and all(numbers):
                self._last[path], self._range[path] = int(numbers[0]), int(numbers[1])
        self.found = bool(self._last)

    def joules(self) -> float:
        """Joules since this object was made."""
        for path, before in self._last.items():
            now = int(text(path / "energy_uj") or before)
            self._total_uj += now - before if now >= before else now - before + self._range[path] + 1
            self._last[path] = now
        return self._total_uj / 1e6


class Rails:
    """The power rails of a board (INA3221, as on Jetson), summed up over time by a thread."""

    def __init__(self, root: Path, every_s: float = 0.01) -> None:
        rails: dict[str, tuple[Path, Path]] = {}
        for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
            if text(chip / "name") == "ina3221":
                for channel in (1, 2, 3):
                    label = text(chip / f"in{channel}_label")
                    pair = (chip / f"in{channel}_input", chip / f"curr{channel}_input")
                    if label and label != "NC" and all(text(path) for path in pair):
                        rails[label] = pair
        whole: list[str] = [label for label in ("VDD_IN", "POM_5V_IN") if label in rails]
        chosen = whole[:1] or sorted(rails)  # the supply of the whole board holds all the others
        self.name = "INA3221 " + " + ".join(chosen)
        self.found = bool(chosen)
        self._pairs = [rails[label] for label in chosen]
        self._every_s = every_s
        self._total_j = 0.0
        self._thread: threading.Thread | None = None

    def watts(self) -> float:
        """What the rails carry now; the files are in millivolts and milliamperes."""
        return sum(int(text(volt) or 0) * int(text(ampere) or 0) for volt, ampere in self._pairs) / 1e6

    def joules(self) -> float:
        """Joules since the first call."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self._total_j

    def _watch(self) -> None:
        last = time.perf_counter()
        while True:
            time.sleep(self._every_s)
            watts, now = self.watts(), time.perf_counter()
            self._total_j += watts * (now - last)
            last = now


class Nvml:
    """The GPU's own energy counter, name, clock and temperature, from the driver's library."""

    def __init__(self, library: Any = None) -> None:
        self.name = "NVML"
        self._library = opened("libnvidia-ml.so.1") if library is None else library
        self._handle = ctypes.c_void_p()
        self.found = self._library is not None and not self._library.nvmlInit_v2() and not self._open()
        self.found = self.found and self.joules() > 0

    def _open(self) -> int:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        handle = ctypes.byref(self._handle)
        if chosen.isdigit():
            return int(self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(chosen)), handle))
        return int(self._library.nvmlDeviceGetHandleByUUID(chosen.encode(), handle))

    def joules(self) -> float:
        """Joules since the driver was loaded, 0 where the GPU does not count them."""
        total = ctypes.c_ulonglong()
        code = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(total))
        return 0.0 if code else total.value / 1e3

    def facts(self) -> dict[str, Any]:
        """Name, driver, clock and temperature; empty without an NVIDIA driver."""
        if self._library is None or not self._handle.value:
            return {}
        name, driver = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
        clock, heat = ctypes.c_uint(), ctypes.c_uint()
        self._library.nvmlDeviceGetName(self._handle, name, ctypes.c_uint(96))
        self._library.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(96))
        self._library.nvmlDeviceGetClockInfo(self._handle, 1, ctypes.byref(clock))
        self._library.nvmlDeviceGetTemperature(self._handle, 0, ctypes.byref(heat))
        return {
            "gpu": name.value.decode(errors="replace") or None,
            "driver": driver.value.decode(errors="replace") or None,
            "gpu_mhz": clock.value or None,
            "gpu_temperature_c": heat.value or None,
        }


def meter_for(kind: str, root: Path = ROOT) -> Any:
    """The meter that sees the device which ran: a GPU's own or the board's, a processor's or the board's."""
    own: Any = Nvml() if kind == "gpu" else Rapl(root)
    board = Rails(root)
    return own if own.found else board if board.found else None


def energy_of(
    run: Run,
    meter: Any,
    seconds: float,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Any] | None:
    """Energy of one run above idle; None where load does not exceed idle."""
    idle_w, _, _ = watts_of(lambda: sleep(min(0.5, seconds)), meter, seconds, clock)
    load_w, runs, took = watts_of(run, meter, seconds, clock)
    if load_w <= idle_w:
        return None
    return {
        "energy_mj": 1e3 * (load_w - idle_w) * took / runs,
        "power_w": load_w,
        "idle_w": idle_w,
        "runs": runs,
        "seconds": took,
        "meter": meter.name,
    }


def watts_of(run: Run, meter: Any, seconds: float, clock: Clock) -> tuple[float, int, float]:
    """Mean power, runs and seconds; the meter is read every second, since counters wrap."""
    before, began, runs = meter.joules(), clock(), 0
    last = began
    while clock() - began < seconds:
        run()
        runs += 1
        if clock() - last > 1:
            meter.joules()
            last = clock()
    took = clock() - began
    return (meter.joules() - before) / took, runs, took


# The device


def text(path: Path) -> str:
    """The text of a small file of the system, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ")
    except OSError:
        return ""


def physical_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for number in usable:
        place = root / f"sys/devices/system/cpu/cpu{number}/topology"
        cores.add((text(place / "physical_package_id"), text(place / "core_id") or f"cpu{number}"))
    return max(1, len(cores))


def processor(cpuinfo: str) -> tuple[str, list[str]]:
    """The model name and the flags of interest in the text of `/proc/cpuinfo`."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    part = (
        f"arm {fields['cpu implementer']} {fields.get('cpu part', '')}" if "cpu implementer" in fields else ""
    )
    name = fields.get("model name") or fields.get("model") or part or platform.processor() or "unknown"
    present = set((fields.get("flags") or fields.get("features") or "").split())
    return name, [flag for flag in FLAGS if flag in present]


def device_facts(root: Path = ROOT) -> dict[str, Any]:
    """What places a number measured here: the board, its processor, memory, system and settings."""
    cpu, flags = processor(text(root / "proc/cpuinfo"))
    board = text(root / "proc/device-tree/model") or text(root / "sys/class/dmi/id/product_name")
    memory = re.search(r"MemTotal:\s*(\d+) kB", text(root / "proc/meminfo"))
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    return {
        "model": board or None,
        "cpu": cpu,
        "flags": " ".join(flags),
        "physical_cores": physical_cores(root),
        "logical_cores": os.cpu_count(),
        "memory_gb": round(int(memory[1]) * 1024 / 1e9, 1) if memory else None,
        "os": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "governor": text(frequency / "scaling_governor") or None,
        "power_mode": text(root / "var/lib/nvpmodel/status") or None,
        **state(root),
    }


def state(root: Path = ROOT) -> dict[str, Any]:
    """What changes while it runs: load, clock and temperature."""
    khz = text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    zones = (text(path) for path in (root / "sys/class/thermal").glob("thermal_zone*/temp"))
    heat = [int(value) / 1e3 for value in zones if re.fullmatch(r"-?\d+", value)]
    return {
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_mhz": int(khz) / 1e3 if khz.isdigit() else None,
        "temperature_c": max(heat) if heat else None,
    }


# The whole measurement


def measure(folder: Path, words: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Check, compare and time the bundle in `folder`; the document that `measured.json` holds.

    Raises:
        BundleError: the bundle is damaged, or the request cannot be carried out here.
    """
    bundle = read_bundle(folder)
    say(f"checksums: {len(bundle['files'])} files are whole")
    protocol = dict(bundle["protocol"])
    protocol["threads_asked"] = protocol["threads"]
    protocol["threads"] = words.threads or protocol["threads"]
    check_threads(protocol["threads"])
    examples = read_examples(folder / bundle["examples"])
    models = load(folder, bundle, examples, words, protocol["threads"], say)
    one = models["dense"]
    kind = "cpu" if one.provider == CPU else "gpu"
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "report": bundle["report"],
        "models": {side: bundle["models"][side]["sha256"] for side in SIDES},
        "shapes": bundle["shapes"],
        "runtime": {
            "name": one.runtime,
            "version": one.version,
            "provider": one.provider,
            "kind": kind,
            "threads": protocol["threads"],
            "precision": one.precision,
            "format": words.format,
        },
        "device": {**device_facts(), **(Nvml().facts() if kind == "gpu" else {})},
        "golden": {},
        "protocol": protocol,
    }
    for side, model in models.items():
        stored = bundle["models"][side]["precision"]
        relative = max(TOLERANCES[stored], TOLERANCES[model.precision])
        document["golden"][side] = agreement(model, side, examples, relative)
        say(f"numbers: {side} {describe_agreement(document['golden'][side])}")
    if all(found["passed"] for found in document["golden"].values()):
        document.update(timings(models, examples[0], protocol, words.seconds, kind, say))
        document["device"].update({f"{key}_after": value for key, value in state().items()})
    return document


def load(
    folder: Path,
    bundle: Mapping[str, Any],
    examples: Sequence[Example],
    words: argparse.Namespace,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Both models in the runtime that was asked for, else in the best one for the target."""
    target = bundle["target"]
    runtime = words.runtime
    if runtime is None:
        there = target["runtime"] == "tensorrt" and importlib.util.find_spec("tensorrt") is not None
        runtime = "tensorrt" if there else "onnxruntime"
    entry = {side: bundle["models"][side] for side in SIDES}
    if entry["dense"].get(words.format) is None:
        raise BundleError(
            "this bundle holds no .ort files; export it with --to edge+ort, or leave out --format ort"
        )
    if runtime == "tensorrt":
        precision = words.precision or target["precision"]
        made = {s: TensorrtModel(folder / entry[s]["onnx"], examples, precision) for s in SIDES}
        if made["dense"].precision != precision:
            say(f"TensorRT {made['dense'].version} takes the precision from the file: fp32, not {precision}")
        return made
    ort = needed("onnxruntime", "pip install onnxruntime")
    gpu = target["kind"] == "gpu"
    provider = words.provider or (CUDA if gpu and CUDA in ort.get_available_providers() else CPU)
    if gpu and provider == CPU:
        say(
            f"the target {target['name']} is a GPU, but this is a measurement of the CPU: it gives no verdict"
        )
    return {side: OrtModel(folder / entry[side][words.format], threads, provider) for side in SIDES}


def timings(
    models: Mapping[str, Any],
    example: Example,
    protocol: Mapping[str, Any],
    seconds: float | None,
    kind: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The timed and metered part of the document."""
    calls = {side: model.timed(example.inputs) for side, model in models.items()}
    blocks = max(MIN_BLOCKS, protocol["blocks"])
    block_ms = protocol["block_ms"] if seconds is None else 1e3 * seconds / (2 * blocks)
    found = compare(calls, blocks=blocks, block_ms=block_ms, progress=ticker(say))
    samples = {side: np.concatenate(found["samples_ms"][side]) for side in SIDES}
    medians = {side: [float(np.median(b)) for b in found["samples_ms"][side]] for side in SIDES}
    intervals = load_intervals()
    both = (found["samples_ms"][side] for side in SIDES)
    ratio = intervals.paired_ratio(*both, protocol["seed"])
    meter = meter_for(kind)
    used: dict[str, Any] = dict.fromkeys(SIDES)
    if meter is not None:
        length = min(ENERGY_S, seconds / 4) if seconds else ENERGY_S
        say(f"energy: reading {meter.name}, {4 * length:.0f} s")
        used = {side: energy_of(calls[side], meter, length) for side in SIDES}
    return {
        "protocol": {**protocol, "blocks": len(medians["dense"]), "block_ms": block_ms},
        "ratio": {"value": ratio.value, "low": ratio.interval.low, "high": ratio.interval.high},
        "drift": found["drift"],
        "timings": {
            side: {
                "latency_ms": intervals.describe(samples[side]),
                "block_medians_ms": medians[side],
                "samples_ms": thin(samples[side].tolist()),
                "settled": found["settled"][side],
                "energy": used[side],
            }
            for side in SIDES
        },
    }


def check_threads(threads: int) -> None:
    """Refuse more threads than there are physical cores.

    Raises:
        BundleError: fewer than 1, or too many.
    """
    cores = physical_cores()
    if not 1 <= threads <= cores:
        raise BundleError(
            f"{threads} threads cannot be timed: this process may use {cores} physical cores; "
            f"use --threads with 1 to {cores}"
        )


def ticker(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Progress between blocks, a line a quarter."""

    def tick(done: int, work: int) -> None:
        if done * 4 // work > (done - 1) * 4 // work:
            say(f"timing: {done} of {work} blocks")

    return tick


def describe_agreement(found: Mapping[str, Any]) -> str:
    """How well stored and computed outputs agree, as a sentence."""
    gap = found["max_abs_difference"]
    size = "cannot be compared" if gap is None else f"differs by at most {gap:.1e}"
    return f"{size} (tolerance {found['tolerance']:.1e}), {found['agreement']:.1%} of the predictions agree"


def summary(document: Mapping[str, Any]) -> str:
    """The measurement in two lines."""
    ratio, timed = document["ratio"], document["timings"]
    dense_ms, now_ms = (timed[side]["latency_ms"]["p50"] for side in SIDES)
    line = (
        f"measured: dense {dense_ms:.4g} ms, compressed {now_ms:.4g} ms: "
        f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}], "
        f"{document['protocol']['blocks']} blocks each, drift {document['drift']:+.1%}"
    )
    used = timed["compressed"]["energy"]
    if used is None:
        return line + "\nenergy: not measured, no meter of this device can be read"
    return line + f"\nenergy: compressed {used['energy_mj']:.4g} mJ above idle ({used['meter']})"


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Verify and time this bundle on this device.")
    parser.add_argument(
        "--runtime", choices=("onnxruntime", "tensorrt"), help="default: the runtime of the target"
    )
    parser.add_argument("--provider", metavar="NAME", help="of onnxruntime, e.g. CUDAExecutionProvider")
    parser.add_argument("--precision", choices=("fp32", "tf32", "fp16"), help="of TensorRT engines")
    parser.add_argument("--format", choices=("onnx", "ort"), default="onnx", help="which files to load")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as compiled")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long to time; 10 unless given")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: measured.json beside this file")
    parser.add_argument("--json", action="store_true", help="the measurement on standard output")
    found = parser.parse_args(words)
    if found.seconds is not None and not 0 < found.seconds < 1e5:
        parser.error(f"--seconds {found.seconds:g} is not a length of time")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write the measurement; the exit code."""
    asked = arguments(words)
    stream = sys.stderr if asked.json else sys.stdout

    def say(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    folder = Path(__file__).resolve().parent
    place = asked.out or folder / "measured.json"
    try:
        document = measure(folder, asked, say)
        place.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except BundleError as error:
        return report_failure(str(error), asked.json)
    except OSError as error:
        return report_failure(
            f"{error.filename}: {error.strerror}; choose another path with --out", asked.json
        )
    if asked.json:
        sys.stdout.write(json.dumps(document) + "\n")
    if "ratio" not in document:
        sys.stderr.write(
            "verify: this device computes other numbers than the bundle holds, so nothing was timed. Try "
            "another runtime or precision; if that fails too, the runtime here is faulty.\n"
        )
        return DISAGREES
    say(summary(document))
    say(f"written: {place}; where the bundle was made: compress report OUT --merge {place.name}")
    return 0


def report_failure(message: str, as_json: bool) -> int:
    """Report an error in the bundle or the request; the exit code."""
    sys.stderr.write(f"verify: {message}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_code": BAD_REQUEST}) + "\n")
    return BAD_REQUEST


if __name__ == "__main__":
    sys.exit(main())
