"""What is installed is what lies in the tree, and nothing but `compress` reaches site-packages."""

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import compress

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]
DATA = PROJECT["tool"]["setuptools"]["package-data"]
FOLDERS = ("compress", "export", "profiles")
IGNORED = ("__pycache__", "*.pyc", ".*")


def folder_of(package):
    """Where a package lies: the longest mapping that leads to it."""
    mapped = max((name for name in MAPPED if f"{package}.".startswith(f"{name}.")), key=len)
    rest = package.removeprefix(mapped).lstrip(".").split(".")
    return ROOT.joinpath(MAPPED[mapped], *[part for part in rest if part])


def tree_files():
    """Every file below the three folders, by the path it should have when installed."""
    found = set()
    for folder in FOLDERS:
        place = "compress" if folder == "compress" else f"compress/{folder}"
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT / folder).parts
            skipped = any(fnmatch.fnmatch(part, mark) for part in parts for mark in IGNORED)
            if path.is_file() and not skipped:
                found.add("/".join([place, *parts]))
    return found


def test_every_folder_with_modules_is_a_listed_package():
    found = {folder_of(package) for package in PACKAGES}
    lies = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert lies == found
    assert all((folder / "__init__.py").is_file() for folder in found)


def test_every_data_file_is_matched_by_a_pattern():
    shipped = set()
    for package in PACKAGES:
        place = package.replace(".", "/")
        for path in folder_of(package).iterdir():
            patterns = [*DATA.get(package, []), "*.py"]
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                shipped.add(f"{place}/{path.name}")
    assert tree_files() - shipped == set()


def test_the_folders_are_importable_only_below_compress():
    code = (
        "import importlib.util as u, compress.export, compress.profiles;"
        "assert not any(u.find_spec(n) for n in ('export', 'profiles', 'tests', 'tools', 'oracles'))"
    )
    # From elsewhere and without the current directory, so that only what is installed counts.
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("folder", ["export", "profiles"])
def test_a_folder_refuses_to_be_imported_under_its_bare_name(folder):
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=f"compress.{folder}"):
        spec.loader.exec_module(module)


def test_the_command_is_compress_and_its_version_is_the_module_s():
    assert PROJECT["project"]["scripts"] == {"compress": "compress.cli.main:main"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", compress.__version__)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "compress.__version__"}


def test_the_license_is_stated_and_its_texts_are_shipped():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    listed = PROJECT["project"]["license-files"]
    assert listed == ["LICENSE", "compress/demo/LICENSE.md"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text
    notices = (ROOT / "compress" / "demo" / "LICENSE.md").read_text(encoding="utf-8")
    embedded = {path.name for path in (ROOT / "compress" / "demo").iterdir() if path.is_file()}
    for name in embedded - {"LICENSE.md", "__init__.py"}:
        assert f"`{name}`" in notices, f"the license of {name} is not stated"
    for words in ("CLINC150", "CC BY 3.0", "all-MiniLM-L6-v2", "Apache License 2.0", "Changes made"):
        assert words in notices


def test_every_import_from_outside_is_declared():
    """A package that is only there because another one needs it may be gone tomorrow."""
    import ast

    spelled = {"pillow": "PIL"}
    declared = {
        spelled.get(name, name).lower()
        for name in (re.match(r"[\w-]+", words)[0] for words in PROJECT["project"]["dependencies"])
    }
    implied = {
        "markupsafe": "jinja2",
        "pydantic_core": "pydantic",
        "annotated_types": "pydantic",
        "huggingface_hub": "transformers",
        "onnx_ir": "onnxscript",
        "ml_dtypes": "onnxscript",
    }
    used = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    used |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    used.add(node.module.split(".")[0])
    outside = {implied.get(name, name).lower() for name in used - set(sys.stdlib_module_names)}
    assert outside - {"compress", "tensorrt"} <= declared


def copied_tree(tmp_path):
    """The repository as a user unpacks it, so that no stale build folder leaks into the wheel."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "build", "dist", "*.egg-info", "out")
    for name in (*FOLDERS, "tests", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "MANIFEST.in",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, tree)
    return tree


def ran(*words, **options):
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=False, timeout=280, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", place, copied_tree(place))
    (found,) = place.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == tree_files()


@pytest.mark.slow
def test_the_wheel_carries_its_licenses(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode("utf-8").splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert {line for line in lines if line.startswith("License-File: ")} == {
        "License-File: LICENSE",
        "License-File: compress/demo/LICENSE.md",
    }
    for name in ("LICENSE", "compress/demo/LICENSE.md"):
        assert any(found.endswith(f".dist-info/licenses/{name}") for found in names)


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_of_ours_is(wheel, tmp_path):
    place = tmp_path / "fresh"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    ran(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(ran(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The packages of this environment, but not its editable install: .pth files in it are not read.
    outside = ran(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (site / "outside.pth").write_text(outside + "\n")
    elsewhere = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": ""}}
    where = ran(python, "-c", "import compress; print(compress.__file__)", **elsewhere)
    assert Path(where.strip()).is_relative_to(place)
    assert ran(place / "bin" / "compress", "--version", **elsewhere).startswith("compress ")
    assert "a100" in ran(python, "-m", "compress", "targets", "--quiet", **elsewhere)
    code = "import compress.pipeline, compress.export, compress.demo, compress.core"
    ran(python, "-c", code, **elsewhere)
