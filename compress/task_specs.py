"""What each built-in task is called and accepts: data without torch, which recipes and messages read.

A task is one module of `compress.tasks` with a class, and one `TaskSpec` in `TASKS`.
"""

from dataclasses import dataclass

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
)
TEXTS = ("text", "sentence", "content", "utterance", "query", "question", "review", "document")
IMAGES = ("image", "img", "picture")
LABELS = ("label", "labels", "intent", "class", "category", "target", "sentiment", "quality", "y")
SCORES = ("score", "similarity", "similarity_score", "label", "labels", "target")


@dataclass(frozen=True)
class ColumnRule:
    """How a task finds a column of a table.

    Attributes:
        option: the command line option that names the column.
        names: names that are recognized in any case of letters; the first that is there is taken.
        otherwise: what happens where there is no such column.
    """

    option: str
    names: tuple[str, ...]
    otherwise: str


@dataclass(frozen=True)
class TaskSpec:
    """One task as data.

    Attributes:
        name: as in recipes, reports and model cards.
        implementation: `package.module:Class` of the `Task` that is made from a `Request`.
        auto_class: the class in transformers that loads a checkpoint for the task.
        heads: endings of the architectures in config.json that were trained for it.
        main_input: the input that a model must take.
        outputs: names of the outputs in the exported file.
        metric: the score, unless the data has what another one needs.
        columns: how the columns of a table are found.
        shuffled: whether rows are put into random order before splits are cut; running text is not.
        blocks: whether text is cut into blocks of as many tokens as the recipe's shape has.
        caches: whether files hold a key-value cache where the model has one.
        fallback: whether checkpoints without a known head are taken for this task.
        usage: a program for the model card that runs the output directory and prints a result.
        library_usage: the same for the library that such a model is usually used with.
        tags: of the model card.
    """

    name: str
    implementation: str
    auto_class: str
    heads: tuple[str, ...]
    main_input: str
    outputs: tuple[str, ...]
    metric: str
    columns: tuple[ColumnRule, ...]
    shuffled: bool = True
    blocks: bool = False
    caches: bool = False
    fallback: bool = False
    usage: str = ""
    library_usage: str | None = None
    tags: tuple[str, ...] = ()


TEXT = ColumnRule("--text", TEXTS, "the column with the longest strings is taken")
LABEL = ColumnRule("--label", LABELS, "the column whose values are the model's labels is taken")
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

TASKS: dict[str, TaskSpec] = {
    "text-classification": TaskSpec(
        name="text-classification",
        implementation="compress.tasks.text_classification:TextClassification",
        auto_class="AutoModelForSequenceClassification",
        heads=("ForSequenceClassification",),
        main_input="input_ids",
        outputs=("logits",),
        metric="accuracy",
        columns=(TEXT, LABEL),
        usage=TEXT_CLASSIFICATION,
    ),
    "image-classification": TaskSpec(
        name="image-classification",
        implementation="compress.tasks.image_classification:ImageClassification",
        auto_class="AutoModelForImageClassification",
        heads=("ForImageClassification", "ForImageClassificationWithTeacher"),
        main_input="pixel_values",
        outputs=("logits",),
        metric="accuracy",
        columns=(ColumnRule("--text", IMAGES, "the column `image` is missing, which is an error"), LABEL),
        usage=IMAGE_CLASSIFICATION,
    ),
    "feature-extraction": TaskSpec(
        name="feature-extraction",
        implementation="compress.tasks.feature_extraction:FeatureExtraction",
        auto_class="AutoModel",
        heads=(),
        main_input="input_ids",
        outputs=("last_hidden_state",),
        metric="cosine",
        columns=(
            TEXT,
            ColumnRule("--label", SCORES, "the score is the mean cosine to the dense model's embeddings"),
        ),
        fallback=True,
        usage=EMBEDDINGS,
        library_usage=SENTENCE_TRANSFORMERS,
        tags=("sentence-transformers",),
    ),
    "text-generation": TaskSpec(
        name="text-generation",
        implementation="compress.tasks.text_generation:TextGeneration",
        auto_class="AutoModelForCausalLM",
        heads=("ForCausalLM", "LMHeadModel"),
        main_input="input_ids",
        outputs=("logits",),
        metric="perplexity",
        columns=(TEXT,),
        shuffled=False,
        blocks=True,
        caches=True,
        usage=DECODER,
    ),
}


def task_of_architectures(architectures: tuple[str, ...]) -> str:
    """The task that a checkpoint was trained for, from the class names in its config.json.

    >>> task_of_architectures(("BertForSequenceClassification",)), task_of_architectures(("BertModel",))
    ('text-classification', 'feature-extraction')
    """
    for architecture in architectures:
        for spec in TASKS.values():
            if architecture.endswith(spec.heads):
                return spec.name
    return next(spec.name for spec in TASKS.values() if spec.fallback)
