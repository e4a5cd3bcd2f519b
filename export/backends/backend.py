"""The seam for runtimes: what a compilation needs to know of whatever runs a compressed model.

A backend is one class in one module of this folder and one line in `select.BACKENDS`. `Capabilities` is
the part that holds without the device: which options the runtime executes. `Backend` adds what only a
machine that has the device can do: build, run, time and meter a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from numpy.typing import NDArray
from torch import Tensor, nn

from compress.cost.energy import Meter
from compress.cost.latency_table import Table
from compress.export.microbench.onnx_chain import SiteLayouts, default_layouts
from compress.export.microbench.site_timing import ChainRuntime
from compress.ir import Option
from compress.profiles import Profile

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Change = Callable[[nn.Module], nn.Module]
Tensors = Callable[[object], Mapping[str, Tensor]]
Fact = str | int | float | bool | None

OVER_CACHE = 2.0  # weights of a chain on a GPU, in sizes of its cache
GPU_GROUP_MB = 8192.0  # weights of all chains that are loaded on a GPU at once
VERSIONS = ("version", "provider", "gpu", "cuda", "driver", "cuda_graph")  # facts that a cost table keeps


class Runner(Protocol):
    """Whatever maps inputs to outputs, so that two of them can be compared."""

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name."""


class OpenRunner(Runner, Protocol):
    """A loaded model, used inside `with`, that also gives calls to time."""

    def timed(self, inputs: Arrays) -> Callable[[], object]:
        """One inference, ready to be timed."""

    def timed_phase(self, prompt: Arrays, phase: str) -> Callable[[], object]:
        """One phase of a decoder: "prefill" of the prompt, or "decode" of one token after it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Capabilities(ABC):
    """What the runtime of a target executes.

    Attributes:
        profile: the target.
        block_patterns: block-sparse patterns to try where none were timed.
        pairs_blocks_with_rank: whether a block-sparse weight may have a low-rank part beside it.
    """

    profile: Profile
    block_patterns: ClassVar[tuple[str, ...]] = ("block:64x32@0.5", "block:64x32@0.25")
    pairs_blocks_with_rank: ClassVar[bool] = False

    @abstractmethod
    def executes(self, option: Option, *, transposed: bool = False) -> bool:
        """Whether the runtime has a kernel for an option that may pay on the target.

        `transposed` weights are stored `[in, out]`.
        """

    @abstractmethod
    def multiples(self, option: Option) -> tuple[int, int]:
        """What the outputs and inputs of a weight must be multiples of to run in an option."""

    @abstractmethod
    def explain_refusal(self, move: str) -> str:
        """Why no site can take a move on the target, as the end of a sentence."""


@dataclass(frozen=True)
class Backend(Capabilities):
    """A runtime on this machine, whose device is the target.

    Attributes:
        threads: of the processor, where the runtime computes on it.
    """

    threads: int

    @classmethod
    @abstractmethod
    def available(cls, profile: Profile, threads: int) -> Self | None:
        """The backend where the target is this machine and the runtime is installed, else None."""

    @property
    @abstractmethod
    def runtime(self) -> str:
        """Name of the runtime in reports and cost tables."""

    @property
    def precision(self) -> str:
        """Number format of the dense baseline."""
        return self.profile.baseline_precision

    @abstractmethod
    def build(
        self,
        model: nn.Module,
        *,
        write: Callable[[], object] | None = None,
        deploy: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """Make whatever `open` loads, and return the model to open.

        Args:
            model: the finished torch model.
            write: exports it as ONNX; a backend that runs files calls it. None where the file is there.
            deploy: the model with layers in their deployed number formats; a backend that runs torch
                modules calls it. None for a model whose layers are all plain.
        """

    @abstractmethod
    def open(
        self, model: nn.Module, file: Path, tensors: Tensors, change: Change | None = None
    ) -> OpenRunner:
        """Load a model for inference.

        Args:
            model: as `build` returned it.
            file: the ONNX file that `build` wrote, where the backend runs files.
            tensors: the outputs by name, of what the torch model returns.
            change: applied to a torch model once it is on the device.
        """

    def adapted(self, model: nn.Module, tensors: Tensors, inputs: Arrays, *, steps: bool = False) -> Self:
        """This backend with settings that the dense model can run in, so that all models run alike.

        With `steps` one more token after the inputs is what will be timed.
        """
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
        """Notes on how far the timed model is from float32; none where the shipped file itself is timed.

        Args:
            expected: the model on the processor; low precision is emulated.
            opened: loads the model that was timed.
            tensors: the outputs by name, of what the torch model returns.
            batches: inputs.
            rounding: tolerance of products in low precision, relative to the largest output.

        Raises:
            CompressError: they disagree by more than the precision explains.
        """
        return []

    def environment(self) -> dict[str, Fact]:
        """Facts of the device for the report, beside those of the processor."""
        return {}

    @abstractmethod
    def rig(self, written: SiteLayouts = default_layouts) -> ChainRuntime:
        """How chains of single sites are run; `written` chooses the layouts of block-sparse products."""

    @abstractmethod
    def empty_table(self) -> Table:
        """A cost table of this machine, runtime and precision without rows."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of everything that decides speed here; tables of another one are not used."""

    @abstractmethod
    def meter(self) -> Meter:
        """The energy counter of the device."""

    @abstractmethod
    def facts(self) -> dict[str, Fact]:
        """Runtime, version, provider and settings, and the state of the device now.

        "version" and "provider" are always there; "threads" where the runtime computes on the processor.
        """

    @property
    def times_block_layouts(self) -> bool:
        """Whether the layout of a block-sparse product is chosen by timing (`block_layouts`)."""
        return False
