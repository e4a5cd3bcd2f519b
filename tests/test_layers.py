"""What the source tree promises: who may import whom, what is never called, that tests assert."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"compress": "compress", "export": "compress.export", "profiles": "compress.profiles"}

# A module imports only from rows above its own; nothing in one row imports another of that row.
ROWS = (
    "errors",
    "ir profiles",
    "artifact recipe",
    "wording tables svg launch",
    "core.budget core.fakequant core.obs core.rotation core.scores core.smooth core.units "
    "search report data trace modeling",
    "core.gptq core.ranges core.support",
    "core.block core.lowrank core.nm core.permute core.sltrain",
    "advice sltrain charts loop pretrained probe bench energy roofline surgery measurement export.device "
    "export.flatten export.sparse",
    "answer channels offers quantities",
    "page family quality named trial store cost console export.engine export.seams "
    "export.attention export.cache published export.products export.modules",
    "expand analyze stream images texts devices doctor session merge several export.lowering export.runners",
    "task sharding checkpoint export.onnx export.chains export.finished export.tensorrt export.decode",
    "calibrate shuffle export.quantized export.verify export.watch export.steady export.ort export.decoder",
    "forms formed saliency export.blocks export.forms export.cuda",
    "export.place",
    "blockwise database distill job quantize refit residual export.edge export.layouts",
    "files guided patterns smoothing export.half",
    "learning stitch anchor matching pat tune",
    "pricing staged",
    "power",
    "attribution choosing recovery",
    "proof",
    "aware reach thrift width",
    "pipeline survey export.deliver follow",
    "gradual",
    "cli",
    "__main__",
)
PACKAGES = {"", "core", "demo", "export", "profiles"}
NO_TORCH = (
    "advice answer errors ir offers quantities profiles artifact recipe wording tables svg search "
    "report data charts loop bench energy roofline page published family cost console devices doctor "
    "session measurement merge cli export.device launch"
)
MOST_LINES = 420
TRAVELS_ALONE = {"export.device"}  # one file is all that a device gets
NEVER = {"eval", "exec", "compile", "__import__", "print", "breakpoint"}


def sources():
    """Every module that ships, by its name below `compress`."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name.removeprefix("compress").removeprefix(".")] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imported(tree):
    """Every dotted name that a tree imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(tree):
    """The modules of ours among them."""
    for name in imported(tree):
        if name.split(".")[0] == "compress":
            short = name.removeprefix("compress").removeprefix(".")
            while short not in SOURCES:
                short = short.rpartition(".")[0]
            yield short


def row(name):
    return next(number for number, names in enumerate(ROWS) if name in names.split())


@pytest.mark.parametrize("name", sorted(set(SOURCES) - PACKAGES))
def test_a_module_imports_only_from_the_rows_above_it(name):
    assert any(name in names.split() for names in ROWS), f"{name} needs a place in ROWS"
    wrong = [other for other in own(TREES[name]) if other not in PACKAGES and row(other) >= row(name)]
    assert wrong == []


@pytest.mark.parametrize("name", sorted(PACKAGES & set(SOURCES)))
def test_packages_import_nothing_of_ours_but_the_errors(name):
    lazy = {"store"} if name == "" else set()  # inside of compress.load
    assert set(own(TREES[name])) <= {"errors", *lazy}


def test_runtimes_are_known_only_to_the_exporters():
    runtimes = {"onnx", "onnxruntime", "onnxscript", "tensorrt"}
    users = {
        name for name, tree in TREES.items() if runtimes & {full.split(".")[0] for full in imported(tree)}
    }
    assert {name for name in users if not name.startswith("export.")} == set()


@pytest.mark.parametrize("name", ["search", "report", "ir", "recipe", "cli"])
def test_decisions_and_reports_never_import_torch(name):
    heavy = {"torch", "transformers", "onnx", "onnxruntime"}
    assert {full.split(".")[0] for full in imported(TREES[name])} & heavy == set()


def test_what_does_not_need_torch_does_not_load_it():
    code = "import sys, compress\n"
    code += "".join(f"import compress.{name}\n" for name in NO_TORCH.split() if name in SOURCES)
    code += "sys.exit(', '.join({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)) or 0)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_is_pickled_evaluated_or_printed(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in NEVER, f"line {node.lineno}"
            elif isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) not in {"torch.load", "os.system"}, f"line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell"):
                    assert ast.unparse(keyword.value) == "False", f"line {node.lineno}"
    roots = {full.split(".")[0] for full in imported(TREES[name])}
    assert roots & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} == set()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_module_opens_with_a_sentence_and_ends_before_420_lines(name):
    doc = ast.get_docstring(TREES[name])
    assert doc
    assert doc.splitlines()[0].endswith((".", ":", "?")) or len(doc.splitlines()) > 1
    lines = SOURCES[name].read_text(encoding="utf-8").splitlines()
    assert name in TRAVELS_ALONE or len(lines) <= MOST_LINES


def test_nothing_is_left_to_do():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    files = [*SOURCES.values(), *(ROOT / "tools").glob("*.py"), *(ROOT / "profiles").glob("*.toml")]
    assert [str(path) for path in files if marks.search(path.read_text(encoding="utf-8"))] == []


def suite():
    """Every test function of this suite, with what its file defines beside it."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield path, tree, node


def claims(function, helpers, depth=3):
    """Whether a function asserts: itself, through pytest or a library, or by a helper that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"\bpytest\.(raises|warns|fail)$|(^|\.)assert_\w+$", called):
                return True
            helper = helpers.get(called.split(".")[-1])
            if helper is not None and depth and claims(helper, helpers, depth - 1):
                return True
    return False


def test_every_test_asserts():
    lazy = []
    for path, tree, function in suite():
        helpers = {
            node.name: node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_")
        }
        if not claims(function, helpers):
            lazy.append(f"{path.name}::{function.name}")
    assert lazy == []


def test_no_test_is_hidden_by_another_of_its_name():
    seen = set()
    for path, _, function in suite():
        assert (path, function.name) not in seen
        seen.add((path, function.name))
    assert len(seen) > 50


def test_test_files_stand_where_their_module_stands():
    free = {
        "cli",
        "layers",
        "packaging",
        "doctests",
        "readme",
        "check",
        "families",
        "demo",
        "benchmark",
        "gpu",
        "export.tensorrt_api",
    }
    for path in (ROOT / "tests").rglob("test_*.py"):
        place = path.relative_to(ROOT / "tests").with_suffix("").parts
        name = ".".join([*place[:-1], place[-1].removeprefix("test_")])
        assert name in SOURCES or name in free, f"{path} tests no module of that name"
