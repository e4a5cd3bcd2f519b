"""Programs that run a compressed model: one for every task, printed in the card and on the page."""

from compress.report.schema import Report
from compress.task_specs import TASKS

OWN = """\
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
types = {"tensor(float)": numpy.float32, "tensor(int64)": numpy.int64, "tensor(bool)": numpy.bool_}
feed = {
    one.name: numpy.ones([size if isinstance(size, int) else 1 for size in one.shape], types[one.type])
    for one in session.get_inputs()
}
for output, values in zip(session.get_outputs(), session.run(None, feed)):
    print(output.name, values.shape)"""
LOAD = """\
from compress import load

model = load(".")"""
LOAD_OWN = """\
from compress import load
from my_package import make_model  # a function that returns the module at its original shapes

model = load(".", factory=make_model)"""


def is_own_module(report: Report) -> bool:
    """Whether the model is a module of the user's own, which needs a factory to be loaded."""
    return report.task not in TASKS


def run_snippet(report: Report) -> str:
    """A whole program that runs the output directory it is started in, and prints a result."""
    spec = TASKS.get(report.task or "")
    return OWN if spec is None else spec.usage


def load_snippet(report: Report) -> str:
    """How the compressed weights are loaded as a PyTorch module."""
    return LOAD_OWN if is_own_module(report) else LOAD


def library_snippet(report: Report) -> str | None:
    """The same for the library that the model is usually used with, None where there is none."""
    spec = TASKS.get(report.task or "")
    return None if spec is None else spec.library_usage
