"""A runtime in one module: torch's eager mode on this processor, which claims the target `rpi5`."""

import os
import time
from dataclasses import dataclass

import torch

from compress.cost.energy import Rapl
from compress.cost.latency_table import Table
from compress.export.backends import parity
from compress.export.backends.backend import Backend
from compress.export.backends.onnxruntime import TorchRunner
from compress.export.microbench import torch_chain
from compress.export.microbench.onnx_chain import default_layouts
from compress.export.microbench.site_timing import ChainRuntime
from compress.measure import timing

TARGET = "rpi5"


class EagerRunner(TorchRunner):
    """The module as it is; a decoder is run on its whole prompt."""

    def timed_phase(self, prompt, phase):
        return self.timed(prompt)


@dataclass(frozen=True)
class EagerCpu(Backend):
    """Torch modules, dense products only."""

    @classmethod
    def available(cls, profile, threads):
        return cls(profile, threads) if profile.name == TARGET else None

    @property
    def runtime(self):
        return "torch-eager"

    def executes(self, option, *, transposed=False):
        return option.form == "dense"

    def multiples(self, option):
        return 1, 1

    def explain_refusal(self, move):
        return "eager torch multiplies dense float32 only"

    def build(self, model, *, write=None, deploy=None):
        return model

    def open(self, model, file, tensors, change=None):
        return EagerRunner(model, tensors)

    def agreement(self, expected, opened, tensors, batches, *, rounding):
        return [parity.note("torch module, not the ONNX file", expected, opened, tensors, batches, 1e-4)]

    def rig(self, written=default_layouts):
        return ChainRuntime(chain_call, time.thread_time, group_mb=256.0)

    def empty_table(self):
        versions = {"torch": torch.__version__}
        return Table(
            fingerprint=self.fingerprint, runtime=self.runtime, versions=versions, threads=self.threads
        )

    @property
    def fingerprint(self):
        return f"eager-{timing.fingerprint()}"

    def meter(self):
        return Rapl()

    def facts(self):
        return {
            "runtime": self.runtime,
            "version": torch.__version__,
            "provider": f"{os.cpu_count()} processors",
            "threads": self.threads,
        }


def chain_call(site, units, copies, form):
    """A call that runs copies of a site once; only dense ones are ever asked for."""
    x, mask = torch_chain.inputs(site, units)
    chain = torch_chain.Chain(site, units, copies).eval()

    def call():
        with torch.inference_mode():
            chain(x, mask)

    return call
