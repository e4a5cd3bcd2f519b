"""Programs that run a compressed model: one for every task, printed in the card and on the page."""

from compress.report.schema import Report

SESSION = 'session = onnxruntime.InferenceSession("model.onnx")'
FEED = "feed = {one.name: inputs[one.name] for one in session.get_inputs()}"
TEXT_CLASSIFICATION = f"""\
import onnxruntime
from transformers import AutoConfig, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
labels = AutoConfig.from_pretrained(".").id2label
{SESSION}

inputs = tokenizer(["Where is my order?"], padding=True, return_tensors="np")
{FEED}
(logits,) = session.run(["logits"], feed)
print(labels[int(logits[0].argmax())])"""
IMAGE_CLASSIFICATION = f"""\
import onnxruntime
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

processor = AutoImageProcessor.from_pretrained(".")
labels = AutoConfig.from_pretrained(".").id2label
{SESSION}

inputs = processor([Image.open("picture.png").convert("RGB")], return_tensors="np")
{FEED}
(logits,) = session.run(["logits"], feed)
print(labels[int(logits[0].argmax())])"""
EMBEDDINGS = f"""\
import numpy
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
{SESSION}

inputs = tokenizer(["Where is my order?", "Track a parcel"], padding=True, return_tensors="np")
{FEED}
(hidden,) = session.run(["last_hidden_state"], feed)
mask = inputs["attention_mask"][:, :, None]
embeddings = (hidden * mask).sum(1) / mask.sum(1)  # mean pooling over the tokens
embeddings /= numpy.linalg.norm(embeddings, axis=1, keepdims=True)
print(embeddings @ embeddings.T)"""
SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer  # with the extra [onnx]

model = SentenceTransformer(".", backend="onnx", model_kwargs={"file_name": "model.onnx"})
print(model.encode(["Where is my order?"]).shape)"""
DECODER = """\
from compress import load
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = load(".")

inputs = tokenizer("The", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
OWN = f"""\
import numpy
import onnxruntime

{SESSION}
types = {{"tensor(float)": numpy.float32, "tensor(int64)": numpy.int64, "tensor(bool)": numpy.bool_}}
feed = {{
    one.name: numpy.ones([size if isinstance(size, int) else 1 for size in one.shape], types[one.type])
    for one in session.get_inputs()
}}
for output, values in zip(session.get_outputs(), session.run(None, feed)):
    print(output.name, values.shape)"""
LOAD = """\
from compress import load

model = load(".")"""
LOAD_OWN = """\
from compress import load
from my_package import make_model  # a function that returns the module at its original shapes

model = load(".", factory=make_model)"""
PRETRAINED = {
    "text-classification": TEXT_CLASSIFICATION,
    "image-classification": IMAGE_CLASSIFICATION,
    "feature-extraction": EMBEDDINGS,
    "text-generation": DECODER,
}


def is_own_module(report: Report) -> bool:
    """Whether the model is a module of the user's own, which needs a factory to be loaded."""
    return report.task not in PRETRAINED


def run_snippet(report: Report) -> str:
    """A whole program that runs the output directory it is started in, and prints a result."""
    return OWN if report.task is None else PRETRAINED.get(report.task, OWN)


def load_snippet(report: Report) -> str:
    """How the compressed weights are loaded as a PyTorch module."""
    return LOAD_OWN if is_own_module(report) else LOAD


def library_snippet(report: Report) -> str | None:
    """The same for the library that the model is usually used with, None where there is none."""
    return SENTENCE_TRANSFORMERS if report.task == "feature-extraction" else None
