"""Where a compilation is timed: the exported file on this processor, or file or torch model on its GPU.

A GPU is timed in onnxruntime's CUDA provider where that is installed and starts, else in torch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from compress.artifacts import digest
from compress.cost.energy import Meter, Rapl
from compress.cost.latency_table import Table
from compress.errors import CompressError
from compress.export import parity
from compress.export.backends import onnxruntime, torch_cuda, torch_kernels
from compress.export.backends.onnxruntime import Array, OrtRunner
from compress.export.backends.torch_cuda import Change, CudaRunner
from compress.export.microbench import site_timing, torch_chain
from compress.export.microbench.onnx_chain import SiteLayouts, default_layouts
from compress.ir import Site
from compress.measure import timing
from compress.measure.verify_on_device import TOLERANCES, Nvml
from compress.profiles import Profile

OVER_CACHE = 2.0  # weights of a chain, in sizes of the GPU's cache
GPU_GROUP_MB = 8192.0
Fact = str | int | float | bool | None


class Timed(Protocol):
    """A runner that is opened by `with`, and gives calls to time."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""

    def timed(self, inputs: Mapping[str, Array]) -> Callable[[], object]:
        """One inference, ready to be measured."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Place:
    """One way of timing models here.

    Attributes:
        profile: the target, which this machine is.
        runtime: "onnxruntime" for files, "torch-cuda" for torch models on the GPU.
        device: what torch calls it.
        threads: of onnxruntime.
        graphs: whether a GPU replays captured graphs.
    """

    profile: Profile
    runtime: str
    device: str
    threads: int
    graphs: bool = True

    @property
    def precision(self) -> str:
        """What the dense model and the compressed one are timed in.

        Files hold float32, which the CUDA provider multiplies as TF32 where the GPU can.
        """
        if self.by_file and self.on_gpu:
            return "tf32" if "tf32" in self.profile.precisions else "fp32"
        return self.profile.baseline_precision

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is timed, or torch on this processor in its place."""
        return self.profile.kind == "gpu"

    @property
    def provider(self) -> str:
        """What onnxruntime calls the device."""
        return onnxruntime.CUDA if self.on_gpu else onnxruntime.CPU

    @property
    def by_file(self) -> bool:
        """Whether it is the exported file that is timed; otherwise it is the torch model itself."""
        return self.runtime == "onnxruntime"

    def runner(
        self,
        model: nn.Module,
        file: Path,
        logits: Callable[[object], Tensor],
        name: str,
        change: Change | None = None,
    ) -> Timed:
        """What is timed: the file, or the model on the GPU in the target's precision, changed there."""
        if self.by_file:
            return OrtRunner(file, threads=self.threads, provider=self.provider)
        return CudaRunner(
            model,
            logits,
            name,
            device=self.device,
            precision=self.precision,
            graphs=self.graphs,
            change=change,
        )

    def suited(
        self,
        model: nn.Module,
        logits: Callable[[object], Tensor],
        name: str,
        inputs: Mapping[str, Array],
        *,
        steps: bool = False,
    ) -> "Place":
        """This place, without graphs if the model cannot be captured: all that is compared runs alike.

        With `steps` it is one more token after the inputs that is timed.
        """
        if self.by_file or not self.graphs:
            return self
        try:
            with self.runner(model, Path(), logits, name) as runner:
                if steps and isinstance(runner, CudaRunner):
                    runner.timed_step(inputs)
                else:
                    runner.timed(inputs)
        except CompressError:
            return replace(self, graphs=False)
        return self

    def agreement(
        self,
        expected: nn.Module,
        runner: Timed,
        logits: Callable[[object], Tensor],
        batches: Sequence[dict[str, Array]],
        *,
        rounding: float,
    ) -> list[str]:
        """How far what is timed on a GPU is from float32, as a note; of a processor, others say that.

        Args:
            expected: the model on this processor; products in low precision are emulated.
            runner: the same at this place.
            logits: picks the output that carries the quality.
            batches: inputs.
            rounding: how far products in low precision may move answers, of the largest one; 0 without any.

        Raises:
            CompressError: they disagree by more than the precision explains.
        """
        if not self.on_gpu:
            return []
        allowed = max(TOLERANCES[self.precision], rounding)
        name = next(iter(runner.infer(batches[0])))
        with onnxruntime.TorchRunner(expected, logits, name) as reference:
            found = parity.parity(reference, runner, batches, relative=allowed)
        what = f"torch model in {self.precision} ({self.runtime}), not the ONNX file"
        if self.by_file:
            what = f"ONNX file in onnxruntime's {self.provider} ({self.precision})"
        return [
            f"What was timed is the {what}: its answers are at most {found.max_abs_difference:.2g} away "
            f"from float32, {found.agreement:.1%} agree."
        ]

    def environment(self) -> dict[str, Fact]:
        """The GPU that timed, with its driver, clock and temperature now; nothing of a processor."""
        if not self.on_gpu:
            return {}
        facts = {key: value for key, value in self.facts().items() if value is not None}
        if not self.by_file:
            facts["gpu"] = facts.pop("provider")
        return {key: value for key, value in facts.items() if key != "version"}

    def rig(self, written: SiteLayouts = default_layouts) -> site_timing.ChainRuntime:
        """How chains of single sites are run here; `written` says how files hold products in blocks."""
        if not self.on_gpu:
            return site_timing.cpu_runtime(self.threads, written=written)
        make = site_timing.onnxruntime_chains(self.threads, self.provider) if self.by_file else self._chain
        return site_timing.ChainRuntime(
            make,
            time.perf_counter,
            least_mb=2 * OVER_CACHE * self.profile.cache_mb,  # float32 megabytes, of a model in half of it
            group_mb=GPU_GROUP_MB,
        )

    def empty_table(self) -> Table:
        """A table of this machine, runtime and precision without any rows."""
        if not self.on_gpu:
            return site_timing.empty_table(self.threads)
        return Table(
            fingerprint=self.fingerprint,
            runtime=self.runtime,
            versions={key: str(value) for key, value in self.facts().items() if key in VERSIONS},
            threads=self.threads,
            precision=self.precision,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @property
    def fingerprint(self) -> str:
        """A short hash of what decides speed here."""
        if not self.on_gpu:
            return timing.fingerprint()
        driver = torch_cuda.conditions().get("driver", "") if self.device.startswith("cuda") else ""
        return digest(torch_cuda.gpu(), self.facts()["version"], driver, self.graphs)[:16]

    def meter(self) -> Meter:
        """The energy counter of what runs: the GPU's own, or the processor's."""
        return Nvml() if self.on_gpu else Rapl()

    def facts(self) -> dict[str, Fact]:
        """Runtime, version, provider and, on a GPU, driver, clock and temperature at this moment."""
        found = torch_cuda.gpu() if self.device.startswith("cuda") else None
        if self.by_file:
            of_gpu = (
                {} if found is None else {"gpu": found.name, "cuda": found.cuda, **torch_cuda.conditions()}
            )
            return {**onnxruntime.facts(), "provider": self.provider, "threads": self.threads, **of_gpu}
        return {
            "runtime": self.runtime,
            "version": torch.__version__,
            "provider": self.device if found is None else found.name,
            "cuda": None if found is None else found.cuda,
            "cuda_graph": "on" if self.graphs else "off",
            **(torch_cuda.conditions() if found is not None else {}),
        }

    def _chain(self, site: Site, units: int, copies: int, form: str) -> timing.Runner:
        """A chain of one site on the GPU with its products in a form, as a call that waits for it.

        Raises:
            CompressError: torch or the GPU has no such product, or none of that size.
        """
        dtype = torch_cuda.DTYPES[self.precision]
        x, mask = (
            None if part is None else part.to(self.device, dtype) for part in torch_chain.inputs(site, units)
        )
        chain = torch_chain.Chain(site, units, copies).to(self.device, dtype).eval()

        def forward() -> object:
            with torch.inference_mode():
                return chain(x, mask)

        try:
            if form != "dense" and units and (left := torch_kernels.convert(chain, form)):
                raise CompressError(f"{site.name}: {form} does not fit {left[0]} at {units} units")
            forward()
        except (RuntimeError, NotImplementedError) as error:
            words = str(error).splitlines()[0][:200]
            raise CompressError(f"{site.name}: torch cannot run {form} here: {words}") from error
        launch = torch_cuda.captured(forward) if self.graphs and self.device.startswith("cuda") else forward

        def call() -> None:
            launch()
            torch_cuda.wait(self.device)

        return call


VERSIONS = ("version", "provider", "gpu", "cuda", "driver", "cuda_graph")


def place_of(profile: Profile, threads: int) -> Place | None:
    """Where a target can be timed on this machine, None when it is another device."""
    if profile.measured_here:
        return Place(profile, "onnxruntime", "cpu", threads)
    if not torch_cuda.at_hand(profile):
        return None
    if onnxruntime.starts(onnxruntime.CUDA):
        return Place(profile, "onnxruntime", "cuda", threads, graphs=False)
    return Place(profile, torch_cuda.RUNTIME, "cuda", threads)
