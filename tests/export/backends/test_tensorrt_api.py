"""Every name and argument of TensorRT that export/tensorrt.py uses exists in the real bindings, 10 and 11.

The bindings are real, the libraries under them are empty: nothing is built or run. They are found in
build/tensorrt/10 and build/tensorrt/11, where .ci/run installs them.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "export" / "backends" / "tensorrt.py"
SYMBOLS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    "getNvOnnxParserVersion",
]
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# The variables of the source that hold an object of TensorRT.
HOLDS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "parser.get_error(index)": "ParserError",
    "config.get_timing_cache()": "ITimingCache",
    "self._open()": "IExecutionContext",
}
PATHS = {"name", "with_suffix", "read_bytes"}  # `engine` is also the name of a path
REPORT = """
import json, sys
import tensorrt_bindings as trt
found = {}
for name in json.loads(sys.argv[1]):
    value = trt
    for part in name.split("."):
        value = getattr(value, part, None)
    found[name] = None if value is None else value.__doc__ or ""
print(json.dumps({"version": trt.__version__, "found": found}))
"""


def used(tree):
    """Dotted names of the API in the source, with the number of arguments of every call (or None)."""
    calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        full, owner = ast.unparse(node), ast.unparse(node.value)
        if full.startswith("trt."):
            names[full.removeprefix("trt.")] = None
        elif owner in HOLDS and not (owner == "engine" and node.attr in PATHS):
            names[f"{HOLDS[owner]}.{node.attr}"] = calls.get(id(node))
    return names


USED = used(ast.parse(SOURCE.read_text(encoding="utf-8")))


def arity(doc):
    """The numbers of arguments that a pybind11 docstring's signatures allow, self left out."""
    allowed = set()
    for line in doc.splitlines():
        if "(self:" in line:
            inner = line[line.index("(self:") + 1 : line.rindex(" -> ")].rstrip(")")
            arguments = inner.split(", ")[1:]
            allowed |= set(range(sum(" = " not in one for one in arguments), len(arguments) + 1))
    return allowed


@pytest.fixture(scope="module", params=(10, 11))
def bindings(request, tmp_path_factory):
    """A function that asks one major's bindings for the docstrings of names."""
    major = request.param
    place = ROOT / "build" / "tensorrt" / str(major)
    if not (place / "tensorrt_bindings").is_dir():
        pytest.skip(f"no TensorRT {major} bindings in build/tensorrt/{major}; .ci/run installs them")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make the empty libraries with")
    libraries = tmp_path_factory.mktemp(f"libraries{major}")
    source = libraries / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for name in LIBRARIES:
        target = libraries / f"lib{name}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", target, source], check=True)

    def ask(names):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(place)}
        done = subprocess.run(
            [sys.executable, "-c", REPORT, json.dumps(names)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment,
        )
        if "version `" in done.stderr or "No module named" in done.stderr:
            pytest.skip(f"TensorRT {major} bindings are for another Python or system: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["version"].startswith(f"{major}.")
        return answer["found"]

    return ask


def test_the_source_is_read():
    assert {"Builder.build_serialized_network", "BuilderFlag.SPARSE_WEIGHTS", "ParserError.desc"} <= set(USED)
    assert USED["IExecutionContext.set_tensor_address"] == 2
    assert len(USED) > 40


def test_names_and_arguments_exist(bindings):
    found = bindings(list(USED))
    assert [name for name, doc in found.items() if doc is None] == []
    wrong = {
        name: (count, sorted(arity(found[name])))
        for name, count in USED.items()
        if count is not None and count not in arity(found[name])
    }
    assert wrong == {}


def test_what_does_not_exist_is_seen(bindings):
    found = bindings(["Builder.create_engine", "IExecutionContext.set_tensor_address"])
    assert found["Builder.create_engine"] is None
    assert 3 not in arity(found["IExecutionContext.set_tensor_address"])


def test_the_double_has_nothing_that_tensorrt_lacks(bindings):
    tree = ast.parse((ROOT / "tests" / "support" / "fake_tensorrt.py").read_text(encoding="utf-8"))
    names = [
        f"{owner.name}.{method.name}"
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    ]
    assert len(names) > 25
    assert [name for name, doc in bindings(names).items() if doc is None] == []
