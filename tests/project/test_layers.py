"""What the source tree promises: who may import whom, what is never called, that tests assert."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {"compress": "compress", "export": "compress.export", "profiles": "compress.profiles"}

# A room imports from itself and from the floors above its own in this list, the ground floor first. Rooms of
# one floor do not know each other. A module at the top of `compress` is a room of its own.
FLOORS = (
    "errors formats",
    "ir profiles task_specs",
    "sites.kinds validation",
    "artifacts recipe",
    "core measure",
    "cost report sites demo",
    "tasks export.onnx",
    "distributed export.microbench",
    "export.backends",
    "calibration export",
    "methods export.edge",
    "search training export.delivery",
    "pipeline",
    "api",
    "cli",
    "__main__",
)
MOST_ROOMS, MOST_MODULES = 30, 20
NO_TORCH = (
    "errors formats ir profiles task_specs artifacts recipe report.progress report.next_steps report.summary "
    "report.methods_table report.formatting report.svg report.schema report.charts report.render "
    "report.family report.metrics_table tasks.readers tasks.datasets search.knapsack search.closed_loop "
    "measure.timing measure.intervals measure.verify_on_device cost.energy cost.roofline "
    "cost.published_latencies "
    "cost.latency_table cli.main cli.console cli.options cost.device_facts cli.doctor cli.command "
    "validation api.request recipe_reference "
    "export.edge.bundle_schema export.edge.merge distributed.process_env"
)
MOST_LINES = 400
TRAVELS = {"measure.verify_on_device"}  # a device gets this script and measure.intervals, nothing else
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


def room(name):
    """The room that a module lies in: its folder, or itself at the top."""
    if SOURCES[name].name == "__init__.py" or "." not in name:
        return name
    return name.rpartition(".")[0]


def floor(name):
    found = [number for number, names in enumerate(FLOORS) if room(name) in names.split()]
    assert len(found) == 1, f"the room of {name or 'compress'} needs one place in FLOORS"
    return found[0]


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {""}))
def test_a_room_imports_only_from_the_floors_below_it(name):
    others = {other for other in own(TREES[name]) if other and room(other) != room(name)}
    assert [other for other in sorted(others) if floor(other) >= floor(name)] == []


def test_modules_of_a_room_do_not_import_each_other_in_a_circle():
    below = {name: {other for other in own(tree) if other != name} for name, tree in TREES.items() if name}
    while below:
        ground = {name for name, others in below.items() if not others & below.keys()}
        assert ground, f"these import each other: {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in ground}


def test_every_floor_names_rooms_that_are_there():
    rooms = {room(name) for name in SOURCES if name}
    assert {name for names in FLOORS for name in names.split()} == rooms


def test_rooms_are_few_and_none_is_crowded():
    folders = {path.parent for path in SOURCES.values()}
    assert len(folders) <= MOST_ROOMS
    crowded = {folder.name for folder in folders if len(list(folder.glob("*.py"))) > MOST_MODULES}
    assert crowded == set()


def test_the_package_itself_imports_nothing_before_it_is_asked_to():
    lazily = {"api.results", "api.verbs", "report.progress", "recipe", "tasks.task", "errors"}
    assert set(own(TREES[""])) <= lazily
    code = "import sys, compress; sys.exit(', '.join({'torch', 'numpy', 'pydantic'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_calls_the_public_api_and_nothing_below_it():
    used = {room(other) for name in SOURCES if room(name) == "cli" for other in own(TREES[name])}
    facts = {"cost", "distributed", "ir", "measure", "profiles"}  # of this machine: doctor, targets
    allowed = {"api", "errors", "formats", "recipe", "recipe_reference", "report"}
    assert used - {"cli", ""} <= facts | allowed


def test_runtimes_are_known_only_to_the_exporters():
    runtimes = {"onnx", "onnxruntime", "onnxscript", "tensorrt"}
    users = {
        name for name, tree in TREES.items() if runtimes & {full.split(".")[0] for full in imported(tree)}
    }
    assert {name for name in users if not name.startswith("export.")} == set()


@pytest.mark.parametrize("name", ["search.knapsack", "report.schema", "ir", "recipe", "cli.main"])
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
def test_a_module_opens_with_a_sentence_and_has_at_most_400_lines(name):
    doc = ast.get_docstring(TREES[name])
    assert doc
    assert doc.splitlines()[0].endswith((".", ":", "?")) or len(doc.splitlines()) > 1
    lines = SOURCES[name].read_text(encoding="utf-8").splitlines()
    assert name in TRAVELS or len(lines) <= MOST_LINES


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
        "sites.families",
        "sites.kinds.toy_kind",
        "tasks.toy_task",
        "export.backends.toy_backend",
        "methods.toy_move",
        "export.backends.tensorrt_api",
        *(
            f"project.{name}"
            for name in ("layers", "packaging", "seams", "doctests", "readme", "guides", "examples")
        ),
        *(f"tools.{name}" for name in ("check", "benchmark", "draw_rooms", "write_tables", "gpu")),
    }
    packages = {"profiles.profiles": "profiles"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        place = path.relative_to(ROOT / "tests").with_suffix("").parts
        name = ".".join([*place[:-1], place[-1].removeprefix("test_")])
        assert packages.get(name, name) in SOURCES or name in free, f"{path} tests no module of that name"
