"""ONNX files in onnxruntime as backends: on this processor, and on a GPU by the CUDA provider."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

from torch import nn

from compress import formats
from compress.artifacts import digest
from compress.cost.energy import Meter, Rapl
from compress.cost.latency_table import Table
from compress.export.backends import onnxruntime, ort_chains, parity, torch_cuda
from compress.export.backends.backend import (
    GPU_GROUP_MB,
    OVER_CACHE,
    VERSIONS,
    Array,
    Backend,
    Capabilities,
    Change,
    Fact,
    OpenRunner,
    Tensors,
)
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.microbench.onnx_chain import SiteLayouts, default_layouts
from compress.export.microbench.site_timing import ChainRuntime
from compress.ir import Option
from compress.measure import timing
from compress.measure.verify_on_device import TOLERANCES, Nvml
from compress.profiles import Profile


@dataclass(frozen=True)
class OnnxFile(Capabilities):
    """What the runtime of a target executes in an ONNX file, as its profile states it."""

    pairs_blocks_with_rank: ClassVar[bool] = True

    def executes(self, option: Option, *, transposed: bool = False) -> bool:
        """Only number formats and patterns that the profile lists; codes need weights `[out, in]`."""
        number_format = option.number_format
        if number_format is not None:
            # What integers gain on a device is not known before they are timed there.
            known = number_format.floating and number_format.kernel in self.profile.precisions
            if transposed or not known:
                return False
        return option.pattern in self.profile.patterns

    def multiples(self, option: Option) -> tuple[int, int]:
        """2:4 is stored eight inputs at a time; blocks must divide the weight."""
        if option.nm is not None:
            return 1, 2 * option.nm[1]
        return option.block if option.blocked else (1, 1)

    def explain_refusal(self, move: str) -> str:
        """Why no site can take a move on the target."""
        if any(not found.floating for found in formats.MOVES[move].formats):
            return "what integers gain there is not known before they are timed there"
        patterns = (pattern for pattern in self.profile.patterns if pattern != formats.DENSE)
        return f"its profile knows {', '.join([*patterns, *self.profile.precisions])}"


@dataclass(frozen=True)
class OnnxRuntime(OnnxFile, Backend):
    """An ONNX file in onnxruntime."""

    provider: ClassVar[str]

    @property
    def runtime(self) -> str:
        """Name of the runtime."""
        return "onnxruntime"

    def build(
        self,
        model: nn.Module,
        *,
        write: Callable[[], object] | None = None,
        deploy: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """Write the file; the model is only its source."""
        if write is not None:
            write()
        return model

    def open(
        self, model: nn.Module, file: Path, tensors: Tensors, change: Change | None = None
    ) -> OpenRunner:
        """The file in a session."""
        return OrtRunner(file, threads=self.threads, provider=self.provider)

    def facts(self) -> dict[str, Fact]:
        """Runtime, version, provider and threads."""
        return {**onnxruntime.facts(), "provider": self.provider, "threads": self.threads}


@dataclass(frozen=True)
class OnnxRuntimeCpu(OnnxRuntime):
    """An ONNX file in onnxruntime on this processor."""

    provider: ClassVar[str] = onnxruntime.CPU

    @classmethod
    def available(cls, profile: Profile, threads: int) -> Self | None:
        """Here where the profile is that of this processor."""
        return cls(profile, threads) if profile.measured_here else None

    def executes(self, option: Option, *, transposed: bool = False) -> bool:
        """Everything but fp8, of which a processor has no product; codes need weights `[out, in]`."""
        number_format = option.number_format
        return number_format is None or not (number_format.floating or transposed)

    def explain_refusal(self, move: str) -> str:
        """Why no site can take a move on this processor."""
        if any(found.floating for found in formats.MOVES[move].formats):
            return "a processor has no product of it"
        return "no matrix of this model fits it"

    def rig(self, written: SiteLayouts = default_layouts) -> ChainRuntime:
        """ONNX chains on this processor."""
        return ort_chains.cpu_runtime(self.threads, written=written)

    def empty_table(self) -> Table:
        """A table of this processor and onnxruntime."""
        return ort_chains.empty_table(self.threads)

    @property
    def fingerprint(self) -> str:
        """That of this processor and the runtime's version."""
        return timing.fingerprint()

    def meter(self) -> Meter:
        """The processor's own counter."""
        return Rapl()

    @property
    def times_block_layouts(self) -> bool:
        """Layouts are timed."""
        return True


@dataclass(frozen=True)
class OnnxRuntimeCuda(OnnxRuntime):
    """An ONNX file in onnxruntime's CUDA provider on the GPU of this machine."""

    provider: ClassVar[str] = onnxruntime.CUDA

    @classmethod
    def available(cls, profile: Profile, threads: int) -> Self | None:
        """Here where the GPU is the profile's and the provider starts."""
        if not torch_cuda.is_local_gpu(profile) or not onnxruntime.provider_starts(onnxruntime.CUDA):
            return None
        return cls(profile, threads)

    @property
    def precision(self) -> str:
        """TF32 where the GPU can: the provider multiplies the float32 of files so."""
        return "tf32" if "tf32" in self.profile.precisions else "fp32"

    def agreement(
        self,
        expected: nn.Module,
        opened: Callable[[], OpenRunner],
        tensors: Tensors,
        batches: Sequence[dict[str, Array]],
        *,
        rounding: float,
    ) -> list[str]:
        """How far the file on the GPU is from float32 on the processor."""
        what = f"ONNX file in onnxruntime's {self.provider} ({self.precision})"
        allowed = max(TOLERANCES[self.precision], rounding)
        return [parity.note(what, expected, opened, tensors, batches, allowed)]

    def environment(self) -> dict[str, Fact]:
        """The GPU with its driver, clock and temperature now."""
        return {key: value for key, value in self.facts().items() if value is not None and key != "version"}

    def rig(self, written: SiteLayouts = default_layouts) -> ChainRuntime:
        """ONNX chains on the GPU, larger than its cache."""
        return ChainRuntime(
            ort_chains.onnxruntime_chains(self.threads, self.provider),
            time.perf_counter,
            least_mb=2 * OVER_CACHE * self.profile.cache_mb,
            group_mb=GPU_GROUP_MB,
        )

    def empty_table(self) -> Table:
        """A table of this GPU, driver and onnxruntime."""
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
        """That of GPU, driver and runtime."""
        driver = torch_cuda.conditions().get("driver", "")
        return digest(torch_cuda.gpu(), self.facts()["version"], driver, False)[:16]

    def meter(self) -> Meter:
        """The GPU's own counter."""
        return Nvml()

    def facts(self) -> dict[str, Fact]:
        """Runtime, version, provider and threads, and the GPU with its driver, clock and temperature."""
        found = torch_cuda.gpu()
        of_gpu = {} if found is None else {"gpu": found.name, "cuda": found.cuda, **torch_cuda.conditions()}
        return {**super().facts(), **of_gpu}
