"""A torch model on the GPU of this machine as a runner: one precision, CUDA events, CUDA graphs.

It measures a GPU target wherever there is that GPU, without any other runtime. On the device "cpu" the
same code runs without graphs and with the wall clock in the place of events.
"""

import copy
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import profiles
from compress.errors import CompressError
from compress.export.backends.backend import Array, Change, Tensors
from compress.export.onnx import decoder
from compress.ir import Document
from compress.measure.verify_on_device import Nvml
from compress.profiles import Profile

RUNTIME = "torch-cuda"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODEL = Path("/proc/device-tree/model")
WARM_UP = 3


class Gpu(Document):
    """The GPU that torch would use: the name its driver gives, and what decides its speed."""

    name: str
    capability: tuple[int, int]
    processors: int
    memory_gb: float
    torch: str
    cuda: str


def gpu() -> Gpu | None:
    """The GPU at hand, None when torch sees none."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return Gpu(
        name=facts.name,
        capability=(facts.major, facts.minor),
        processors=facts.multi_processor_count,
        memory_gb=round(facts.total_memory / 1e9, 1),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
    )


def is_local_gpu(profile: Profile) -> bool:
    """Whether the GPU of this machine is the one that the profile describes."""
    found = gpu() if profile.kind == "gpu" else None
    return found is not None and profiles.means(profile.name, f"{found.name} {_board()}")


def local_target() -> Profile | None:
    """The profile of the GPU of this machine, None when there is no GPU or no profile of it."""
    known = (profiles.load(name) for name in profiles.names())
    return next((profile for profile in known if is_local_gpu(profile)), None)


def _board() -> str:
    """What a board calls itself: a Jetson's GPU is just `Orin`, whichever Orin it is."""
    try:
        return MODEL.read_text(encoding="utf-8", errors="replace").strip("\x00\n ")
    except OSError:
        return ""


class CudaRunner:
    """A copy of a torch model on a GPU; `tensors` gives its outputs by name, of what it returns.

    With `graphs` one inference at a shape is captured once and replayed, so that the host's launches
    are out of the way, as they are in a deployed engine.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Tensors,
        *,
        device: str = "cuda",
        precision: str = "fp16",
        graphs: bool = True,
        change: Change | None = None,
    ) -> None:
        """Copy the model to the device, in evaluation mode; `change` is applied to the copy there.

        Raises:
            CompressError: torch sees no such device, or does not compute in that precision.
        """
        if precision not in DTYPES:
            raise CompressError(
                f"torch models run in {', '.join(DTYPES)} here, not in {precision!r}; int8 and fp8 are "
                "products of single layers"
            )
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise CompressError(
                f"torch {torch.__version__} sees no CUDA device, so nothing can be timed on a GPU here"
            )
        self.device, self.precision, self.tensors = device, precision, tensors
        self.on_gpu = device.startswith("cuda")
        self.graphs = graphs and self.on_gpu
        placed = copy.deepcopy(model).to(device=device, dtype=DTYPES[precision]).eval()
        self.model: nn.Module | None = placed if change is None else change(placed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model = None
        if self.on_gpu:
            torch.cuda.empty_cache()

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, as float32."""
        model = self._open()
        with torch.inference_mode():
            found = self.tensors(model(**self._feed(inputs)))
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}

    def timed(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        """One inference on inputs in device memory; the call waits for its end.

        Raises:
            CompressError: graphs are on, and the model does something that a graph cannot hold.
        """
        return self._waiting(self._launcher(inputs))

    def timed_step(self, prompt: Mapping[str, Array]) -> Callable[[], object]:
        """One more token for every sequence of a prompt that the cache holds, ended by waiting for it.

        Raises:
            CompressError: the model takes no cache; or graphs are on, and a graph cannot hold its step.
        """
        step = decoder.stepper(self._open(), self._feed(prompt))
        return self._waiting(capture_graph(step) if self.graphs else step)

    def timed_phase(self, prompt: Mapping[str, Array], phase: str) -> Callable[[], object]:
        """One phase of a decoder: "prefill" of the prompt, or "decode" of one token after it."""
        return self.timed_step(prompt) if phase == "decode" else self.timed(prompt)

    def device_ms(self, inputs: Mapping[str, Array], runs: int) -> NDArray[np.float64]:
        """Milliseconds of `runs` single inferences between events on the device."""
        launch = self._launcher(inputs)
        return events_ms(launch, runs, self.device)

    def peak_mb(self, inputs: Mapping[str, Array]) -> float | None:
        """Megabytes that torch held at most during one inference, weights included; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            self._open()(**self._feed(inputs))
        self._wait()
        return torch.cuda.max_memory_allocated() / 1e6

    def facts(self) -> dict[str, str | int]:
        """Runtime, version, device, precision, graphs, clock and temperature now, for the report."""
        found = gpu() if self.on_gpu else None
        return {
            "runtime": RUNTIME if self.on_gpu else "torch",
            "version": torch.__version__,
            "provider": self.device if found is None else found.name,
            "precision": self.precision,
            "cuda_graph": "on" if self.graphs else "off",
            **(conditions() if self.on_gpu else {}),
        }

    def _open(self) -> nn.Module:
        if self.model is None:
            raise CompressError("the runner is closed; use it inside its `with`")
        return self.model

    def _feed(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        """Tensors on the device; real numbers in the runner's precision."""
        feed = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        dtype = DTYPES[self.precision]
        return {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in feed.items()
        }

    def _launcher(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        """A call that starts one inference and does not wait for it."""
        model, feed = self._open(), self._feed(inputs)

        def forward() -> object:
            with torch.inference_mode():
                return model(**feed)

        return capture_graph(forward) if self.graphs else forward

    def _waiting(self, launch: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            launch()
            self._wait()

        return call

    def _wait(self) -> None:
        wait(self.device)


def capture_graph(forward: Callable[[], object]) -> Callable[[], object]:
    """A call that replays what `forward` does on the GPU; its tensors stay where they are.

    Raises:
        CompressError: the work cannot be captured, since it waits for the GPU or changes its shapes.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):  # kernels are picked and loaded now: a capture must not do that
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = forward()
    except RuntimeError as error:
        words = re.sub(r"\s+", " ", str(error)).strip()[:200]
        raise CompressError(
            f"this model cannot be captured as a CUDA graph: {words}\n"
            "  Time both models with graphs off; launches are then part of what is measured"
        ) from error

    def replay(kept: object = kept) -> None:  # the closure keeps the graph's memory alive
        graph.replay()

    return replay


def events_ms(launch: Callable[[], object], runs: int, device: str = "cuda") -> NDArray[np.float64]:
    """Milliseconds of every call between two events on the device; wall clock on a CPU."""
    for _ in range(WARM_UP):
        launch()
    wait(device)
    if not device.startswith("cuda"):
        stamps = [time.perf_counter()]
        for _ in range(runs):
            launch()
            stamps.append(time.perf_counter())
        return 1e3 * np.diff(stamps)
    pairs = []
    for _ in range(runs):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        launch()
        after.record()
        pairs.append((before, after))
    wait(device)
    return np.array([before.elapsed_time(after) for before, after in pairs])


def wait(device: str) -> None:
    """Come back when everything that was started on the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def conditions(meter: Nvml | None = None) -> dict[str, str | int]:
    """Driver, clock and temperature of the GPU now, as far as its driver reports them."""
    found = (Nvml() if meter is None else meter).facts()
    return {key: value for key, value in found.items() if key != "gpu" and value is not None}
