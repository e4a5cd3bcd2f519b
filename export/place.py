"""Where a compilation is timed: on this processor by the exported file, or on its GPU by the torch model."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from compress import bench
from compress.artifact import digest
from compress.cost import Table
from compress.energy import Meter, Rapl
from compress.errors import CompressError
from compress.export import blocks, cuda, modules, products, runners, verify
from compress.export.cuda import Change, CudaRunner
from compress.export.device import TOLERANCES, Nvml
from compress.export.runners import Array, OrtRunner
from compress.ir import Site
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
        runtime: "onnxruntime", or "torch-cuda" for the GPU.
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
        """What the dense model and the compressed one are timed in."""
        return self.profile.baseline_precision

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
            return OrtRunner(file, threads=self.threads)
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
    ) -> "Place":
        """This place, without graphs if the model cannot be captured: all that is compared runs alike."""
        if self.by_file or not self.graphs:
            return self
        try:
            with self.runner(model, Path(), logits, name) as runner:
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
        rounded: bool,
    ) -> list[str]:
        """How far what is timed on a GPU is from float32, as a note; of a file, others say that.

        Args:
            expected: the model on this processor; products in low precision are emulated.
            runner: the same at this place.
            logits: picks the output that carries the quality.
            batches: inputs.
            rounded: whether products in low precision are among them.

        Raises:
            CompressError: they disagree by more than the precision explains.
        """
        if self.by_file:
            return []
        allowed = max(TOLERANCES[self.precision], TOLERANCES["int8"] if rounded else 0.0)
        name = next(iter(runner.infer(batches[0])))
        with runners.TorchRunner(expected, logits, name) as reference:
            found = verify.parity(reference, runner, batches, relative=allowed)
        return [
            f"What was timed is the torch model in {self.precision} ({self.runtime}), not the ONNX file: "
            f"its answers are at most {found.max_abs_difference:.2g} away from float32, "
            f"{found.agreement:.1%} agree."
        ]

    def environment(self) -> dict[str, Fact]:
        """The GPU that timed, with its driver, clock and temperature now; nothing of a processor."""
        if self.by_file:
            return {}
        facts = {key: value for key, value in self.facts().items() if value is not None}
        return {"gpu": facts.pop("provider"), **{key: v for key, v in facts.items() if key != "version"}}

    def rig(self) -> blocks.Rig:
        """How chains of single sites are run here."""
        if self.by_file:
            return blocks.on_processor(self.threads)
        return blocks.Rig(
            self._chain,
            time.perf_counter,
            least_mb=2 * OVER_CACHE * self.profile.cache_mb,  # float32 megabytes, of a model in half of it
            group_mb=GPU_GROUP_MB,
        )

    def empty_table(self) -> Table:
        """A table of this machine, runtime and precision without any rows."""
        if self.by_file:
            return blocks.empty_table(self.threads)
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
        if self.by_file:
            return bench.fingerprint()
        driver = cuda.conditions().get("driver", "") if self.device.startswith("cuda") else ""
        return digest(cuda.gpu(), torch.__version__, driver, self.graphs)[:16]

    def meter(self) -> Meter:
        """The energy counter of what runs: the GPU's own, or the processor's."""
        return Rapl() if self.by_file else Nvml()

    def facts(self) -> dict[str, Fact]:
        """Runtime, version, provider and, on a GPU, driver, clock and temperature at this moment."""
        if self.by_file:
            return {**runners.facts(), "provider": runners.CPU, "threads": self.threads}
        found = cuda.gpu() if self.device.startswith("cuda") else None
        return {
            "runtime": self.runtime,
            "version": torch.__version__,
            "provider": self.device if found is None else found.name,
            "cuda": None if found is None else found.cuda,
            "cuda_graph": "on" if self.graphs else "off",
            **(cuda.conditions() if found is not None else {}),
        }

    def _chain(self, site: Site, units: int, copies: int, form: str) -> bench.Runner:
        """A chain of one site on the GPU with its products in a form, as a call that waits for it.

        Raises:
            CompressError: torch or the GPU has no such product, or none of that size.
        """
        dtype = cuda.DTYPES[self.precision]
        x, mask = (
            None if part is None else part.to(self.device, dtype) for part in modules.inputs(site, units)
        )
        chain = modules.Chain(site, units, copies).to(self.device, dtype).eval()

        def forward() -> object:
            with torch.inference_mode():
                return chain(x, mask)

        try:
            if form != "dense" and units and (left := products.convert(chain, form)):
                raise CompressError(f"{site.name}: {form} does not fit {left[0]} at {units} units")
            forward()
        except (RuntimeError, NotImplementedError) as error:
            words = str(error).splitlines()[0][:200]
            raise CompressError(f"{site.name}: torch cannot run {form} here: {words}") from error
        launch = cuda.captured(forward) if self.graphs and self.device.startswith("cuda") else forward

        def call() -> None:
            launch()
            cuda.wait(self.device)

        return call


VERSIONS = ("version", "provider", "cuda", "driver", "cuda_graph")


def place_of(profile: Profile, threads: int) -> Place | None:
    """Where a target can be timed on this machine, None when it is another device."""
    if profile.measured_here:
        return Place(profile, "onnxruntime", "cpu", threads)
    if cuda.at_hand(profile):
        return Place(profile, cuda.RUNTIME, "cuda", threads)
    return None
