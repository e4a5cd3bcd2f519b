import json
from types import SimpleNamespace

import pytest

from compress.cli import doctor, main


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine on which everything is as it should be, to be broken one piece at a time."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "_imports", lambda module: None)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("compress.measure.timing.physical_cores", lambda: 4)
    return monkeypatch


def check(name):
    return next(found for found in (look() for look in doctor.CHECKS if look.__name__ == f"_{name}") if found)


def test_an_installed_environment_is_ready_and_says_so_in_text_and_json(capfd):
    assert main.perform(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["ready"] is True
    names = [check["name"] for check in found["checks"]]
    assert len(names) == len(set(names)) == len(doctor.CHECKS)
    assert {"python", "torch", "onnxruntime", "gpu", "energy", "cores", "memory", "disk"} <= set(names)
    assert found["environment"]["physical_cores"] >= 1
    text = doctor.text(found)
    assert text.endswith("ready: `compress --target cpu --speedup 2x` can run here")
    assert "MISSING" not in text


def test_whatever_is_not_there_comes_with_a_remedy():
    for look in doctor.CHECKS:
        found = look()
        assert found.found
        assert found.ok or found.remedy


def test_every_requirement_is_looked_at_and_extras_are_not():
    versions = doctor.requirements()
    assert {"torch", "onnx", "onnxruntime", "pydantic", "transformers"} <= set(versions)
    assert {"pytest", "mypy", "ruff"} & set(versions) == set()
    assert all(versions.values())


def test_a_missing_package_is_named_and_stops_everything(monkeypatch, capfd):
    monkeypatch.setattr(doctor, "requirements", lambda: {"torch": "2", "onnxscript": None})
    found = check("packages")
    assert (found.ok, found.required, found.found) == (False, True, "without onnxscript")
    assert main.perform(["doctor"]) == 2
    text = capfd.readouterr().out
    assert "MISSING packages        without onnxscript\n" in text
    assert f"{'':<24}pip install -c constraints.txt" in text
    assert text.rstrip().endswith("not ready: what is MISSING has to be mended first")


def test_a_package_that_is_not_installed_at_all_is_not_ready(monkeypatch):
    def absent(_):
        raise doctor.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    assert doctor.requirements() == {}
    assert check("packages").ok is False


def test_versions_that_are_absent_are_told_from_those_that_are_there(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["click>=8", "no-such-thing", "pytest; extra == 'dev'"]
    )
    versions = doctor.requirements()
    assert list(versions) == ["click", "no-such-thing"]
    assert versions["click"]
    assert versions["no-such-thing"] is None


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_library_that_cannot_be_loaded_is_reported_with_its_error(monkeypatch, name):
    def broken(_):
        raise OSError("libgomp.so.1: cannot open\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = check(name)
    assert (found.ok, found.required) == (False, True)
    assert found.found == "OSError: libgomp.so.1: cannot open"
    assert found.remedy.startswith("pip install")


def test_an_old_python_is_not_ready(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10))
    found = check("python")
    assert (found.ok, found.required, found.remedy) == (False, True, "install Python 3.11 or newer")


@pytest.mark.parametrize(("load", "ok"), [(0.5, True), (1.99, True), (2.0, False), (9.0, False)])
def test_a_busy_machine_is_called_busy(healthy, load, ok):
    healthy.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert check("cores").ok is ok


def test_little_memory_little_disk_and_a_closed_cache_are_noted(healthy, tmp_path):
    class Memory:
        available = 3.9e9
        total = 8e9

    class Usage:
        free = 1.9e9

    healthy.setattr(doctor.psutil, "virtual_memory", Memory)
    healthy.setattr(doctor.shutil, "disk_usage", lambda _: Usage)
    assert (check("memory").ok, check("memory").found) == (False, "3.9 GB free of 8.0 GB")
    assert check("disk").ok is False
    assert check("disk").found.startswith("1.9 GB free in ")
    Memory.available = 4.1e9
    Usage.free = 2.1e9
    assert (check("memory").ok, check("disk").ok) == (True, True)
    (tmp_path / "file").touch()
    healthy.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    assert check("cache").ok is False
    healthy.setenv("COMPRESS_CACHE", str(tmp_path / "new" / "deeper"))
    assert check("cache").ok is True
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_is_what_the_hub_library_takes_for_it(monkeypatch, value, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert check("hub").found.startswith("offline") is offline


@pytest.mark.parametrize("found", [True, False])
def test_energy_is_there_when_a_counter_can_be_read(monkeypatch, found):
    class Meter:
        name = "RAPL"

    Meter.found = found
    monkeypatch.setattr(doctor, "Rapl", Meter)
    monkeypatch.setattr(doctor, "Nvml", lambda: SimpleNamespace(found=False, name="NVML"))
    assert check("energy").ok is found
    monkeypatch.setattr(doctor, "Nvml", lambda: SimpleNamespace(found=True, name="NVML"))
    assert (check("energy").ok, check("energy").found[-4:]) == (True, "NVML")


def test_a_gpu_without_cuda_in_torch_is_told_from_no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_imports", lambda module: "absent")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi")
    assert check("gpu").found == "a driver is there, but this torch has no CUDA"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert check("gpu").found == "no GPU"
    assert check("tensorrt").ok is False


def test_a_demo_with_a_file_missing_says_which(monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "test.csv").touch()
    monkeypatch.setattr(doctor.resources, "files", lambda _: tmp_path)
    assert (check("demo").ok, check("demo").found) == (False, "without model.safetensors")
    (tmp_path / "model.safetensors").touch()
    assert check("demo").ok is True
