"""The known backends, and which of them runs a target on this machine."""

from compress import profiles
from compress.export.backends import torch_cuda
from compress.export.backends.backend import Backend
from compress.export.backends.onnx_file import OnnxRuntimeCpu, OnnxRuntimeCuda
from compress.export.backends.torch_module import TorchCuda
from compress.profiles import Profile

# In order of preference. A new runtime is one module with a `Backend` and one line here.
BACKENDS: dict[str, type[Backend]] = {
    "onnxruntime-cpu": OnnxRuntimeCpu,
    "onnxruntime-cuda": OnnxRuntimeCuda,
    "torch-cuda": TorchCuda,
}


def backend_for(profile: Profile, threads: int) -> Backend | None:
    """The first backend that runs the target on this machine; None where the target is another device."""
    found = (backend.available(profile, threads) for backend in BACKENDS.values())
    return next((backend for backend in found if backend is not None), None)


def device_here() -> str:
    """The GPU of this machine by name, for messages; that there is none where torch sees none."""
    gpu = torch_cuda.gpu()
    return "no GPU that torch sees" if gpu is None else gpu.name


def table_origins(profile: Profile) -> tuple[str, ...]:
    """The runtimes whose shipped cost tables price a target, the preferred one first."""
    return profile.runtime, torch_cuda.RUNTIME


def target_here() -> Profile:
    """The profile of the GPU of this machine where there is one, else of its processor."""
    return torch_cuda.local_target() or profiles.load("cpu")
