"""The torch model as a backend: on the GPU of this machine, its low precision in torch's own kernels."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import nn

from compress import formats
from compress.artifacts import digest
from compress.cost.energy import Meter
from compress.cost.latency_table import Table
from compress.errors import CompressError
from compress.export.backends import parity, torch_cuda, torch_kernels
from compress.export.backends.backend import (
    GPU_GROUP_MB,
    OVER_CACHE,
    VERSIONS,
    Array,
    Arrays,
    Backend,
    Change,
    Fact,
    OpenRunner,
    Tensors,
)
from compress.export.backends.torch_cuda import CudaRunner
from compress.export.microbench import torch_chain
from compress.export.microbench.onnx_chain import SiteLayouts, default_layouts
from compress.export.microbench.site_timing import ChainRuntime
from compress.ir import Option, Site
from compress.measure import timing
from compress.measure.verify_on_device import TOLERANCES, Nvml
from compress.profiles import Profile


@dataclass(frozen=True)
class TorchCuda(Backend):
    """A torch model on the GPU.

    Attributes:
        device: as torch names it; tests run the same code on "cpu".
        graphs: whether captured CUDA graphs are replayed.
    """

    device: str = "cuda"
    graphs: bool = True
    # Tensor cores want squarer blocks than processors.
    block_patterns: ClassVar[tuple[str, ...]] = ("block:64x64@0.5", "block:64x64@0.25")

    @classmethod
    def available(cls, profile: Profile, threads: int) -> Self | None:
        """Here where the GPU is the profile's."""
        return cls(profile, threads) if torch_cuda.is_local_gpu(profile) else None

    @property
    def runtime(self) -> str:
        """Name of the runtime."""
        return torch_cuda.RUNTIME if self.device.startswith("cuda") else f"torch-{self.device}"

    def executes(self, option: Option, *, transposed: bool = False) -> bool:
        """What torch has a kernel for, in formats that the GPU multiplies; weights are `[out, in]`."""
        if transposed:
            return False
        if torch_kernels.kernel_of(option) is None:
            return False
        if option.number_format is not None:
            return option.number_format.kernel in self.profile.precisions
        return option.nm is None or option.pattern in self.profile.patterns

    def multiples(self, option: Option) -> tuple[int, int]:
        """As torch's kernels ask."""
        kernel = torch_kernels.required_kernel(option.form)
        return kernel.rows, kernel.columns

    def explain_refusal(self, move: str) -> str:
        """Why no site can take a move on this GPU."""
        brought = (Option(precision=found.name) for found in formats.MOVES[move].formats)
        if any(torch_kernels.kernel_of(option) is None for option in brought):
            return "torch has no product of it there"
        patterns = (pattern for pattern in self.profile.patterns if pattern != formats.DENSE)
        return f"its profile knows {', '.join([*patterns, *self.profile.precisions])}"

    def build(
        self,
        model: nn.Module,
        *,
        write: Callable[[], object] | None = None,
        deploy: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """The model with layers in their deployed formats; no file is written."""
        return model if deploy is None else deploy()

    def open(
        self, model: nn.Module, file: Path, tensors: Tensors, change: Change | None = None
    ) -> OpenRunner:
        """A copy of the model on the GPU in the target's precision."""
        return CudaRunner(
            model,
            tensors,
            device=self.device,
            precision=self.precision,
            graphs=self.graphs,
            change=change,
        )

    def adapted(self, model: nn.Module, tensors: Tensors, inputs: Arrays, *, steps: bool = False) -> Self:
        """This backend, without graphs if the dense model cannot be captured."""
        if not self.graphs:
            return self
        try:
            with self.open(model, Path(), tensors) as runner:
                runner.timed_phase(inputs, "decode") if steps else runner.timed(inputs)
        except CompressError:
            return replace(self, graphs=False)
        return self

    def agreement(
        self,
        expected: nn.Module,
        opened: Callable[[], OpenRunner],
        tensors: Tensors,
        batches: Sequence[dict[str, Array]],
        *,
        rounding: float,
    ) -> list[str]:
        """How far the model on the GPU is from float32 on the processor."""
        what = f"torch model in {self.precision} ({self.runtime}), not the ONNX file"
        allowed = max(TOLERANCES[self.precision], rounding)
        return [parity.note(what, expected, opened, tensors, batches, allowed)]

    def environment(self) -> dict[str, Fact]:
        """The GPU with its driver, clock and temperature now."""
        facts = {key: value for key, value in self.facts().items() if value is not None}
        facts["gpu"] = facts.pop("provider")
        return {key: value for key, value in facts.items() if key != "version"}

    def rig(self, written: SiteLayouts = default_layouts) -> ChainRuntime:
        """Torch chains on the GPU, larger than its cache."""
        return ChainRuntime(
            self._chain,
            time.perf_counter,
            least_mb=2 * OVER_CACHE * self.profile.cache_mb,  # float32 megabytes, of a model in half of it
            group_mb=GPU_GROUP_MB,
        )

    def empty_table(self) -> Table:
        """A table of this GPU, driver and torch."""
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
        """That of GPU, driver, torch and whether graphs are replayed."""
        driver = torch_cuda.conditions().get("driver", "") if self.device.startswith("cuda") else ""
        return digest(torch_cuda.gpu(), self.facts()["version"], driver, self.graphs)[:16]

    def meter(self) -> Meter:
        """The GPU's own counter."""
        return Nvml()

    def facts(self) -> dict[str, Fact]:
        """Runtime, version, provider and, on a GPU, driver, clock and temperature now."""
        found = torch_cuda.gpu() if self.device.startswith("cuda") else None
        return {
            "runtime": self.runtime,
            "version": torch.__version__,
            "provider": self.device if found is None else found.name,
            "cuda": None if found is None else found.cuda,
            "cuda_graph": "on" if self.graphs else "off",
            **(torch_cuda.conditions() if found is not None else {}),
        }

    def _chain(self, site: Site, units: int, copies: int, form: str) -> timing.Runner:
        """A call that runs a chain of one site on the GPU with its products in a form, and waits for it.

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
        launch = (
            torch_cuda.capture_graph(forward) if self.graphs and self.device.startswith("cuda") else forward
        )

        def call() -> None:
            launch()
            torch_cuda.wait(self.device)

        return call
