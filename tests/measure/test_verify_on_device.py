"""The script that travels: its statistics are compress.bench's, and whatever is wrong it says so."""

import ast
import ctypes
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from support.outputs import write_output

from compress.cost import energy
from compress.export.delivery import deliver
from compress.export.edge.bundle_schema import Measurement
from compress.measure import intervals, timing, verify_on_device

SOURCE = Path(verify_on_device.__file__).read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write_output(tmp_path / "out")
    deliver.deliver(tmp_path / "out", "edge", tmp_path / "edge")
    return tmp_path / "edge"


def verify(folder, *words):
    command = [sys.executable, "-I", str(folder / "verify.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr
    return done


# What it promises about itself


def test_it_is_python_3_9_and_imports_nothing_but_numpy():
    tree = ast.parse(SOURCE, feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
    assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))


def test_its_protocol_is_that_of_the_benchmark():
    names = ["MIN_BLOCKS", "WARM_UP_SPREAD", "WINDOW_RUNS", "WINDOWS", "FLAGS"]
    assert [getattr(verify_on_device, name) for name in names] == [getattr(timing, name) for name in names]


def test_statistics_are_those_of_the_module_that_travels_with_it():
    beside = verify_on_device.load_intervals()
    assert beside.__file__ == intervals.__file__
    random = np.random.default_rng(0)
    blocks = [[ms * random.lognormal(0, 0.1, 7) for _ in range(30)] for ms in (3.0, 2.0)]
    found, known = beside.paired_ratio(*blocks, 7), intervals.paired_ratio(*blocks, 7)
    assert (found.value, found.interval.ends) == (known.value, known.interval.ends)
    assert not {"bootstrap", "quantile"} & set(SOURCE.replace(".", " ").split())


def test_samples_are_thinned_as_the_report_thins_them():
    from compress.measure.timing import thin
    from compress.report.schema import MOST_SAMPLES

    samples = np.random.default_rng(0).uniform(1, 2, 5000).tolist()
    assert verify_on_device.thin(samples) == list(thin(samples, MOST_SAMPLES))
    assert verify_on_device.thin(samples[:10]) == list(thin(samples[:10], MOST_SAMPLES))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, ms):
        def run():
            self.now += ms / 1e3 * (1 + 0.3 * math.sin(37 * self.now) + 0.1 * self.now)

        return run


@pytest.mark.parametrize("blocks", [30, 33])
def test_a_whole_comparison_takes_the_same_samples_in_the_same_order(blocks):
    clock = Clock()
    expected = timing.compare(
        {"dense": clock.work(4), "compressed": clock.work(1.5)}, blocks=blocks, block_ms=17, clock=clock
    )
    clock = Clock()
    found = verify_on_device.compare(
        {"dense": clock.work(4), "compressed": clock.work(1.5)}, blocks=blocks, block_ms=17, clock=clock
    )
    for side in verify_on_device.SIDES:
        for mine, theirs in zip(found["samples_ms"][side], expected.samples_ms[side], strict=True):
            assert np.array_equal(mine, theirs)
    assert (found["drift"], found["settled"]) == (expected.drift, expected.settled)


@pytest.mark.parametrize(
    "text", ["model name : X\nflags : avx2 sse fma", "CPU implementer : 0x41\nFeatures : asimd", ""]
)
def test_the_processor_is_named_as_the_benchmark_names_it(text):
    name, flags = timing.processor(text)
    assert verify_on_device.processor(text) == (name, list(flags))


def test_facts_of_this_machine_are_those_that_a_report_holds():
    mine, theirs = verify_on_device.device_facts(), timing.environment()
    for key in ("cpu", "flags", "logical_cores", "os", "machine", "python"):
        assert mine[key] == theirs[key]
    assert mine["memory_gb"] == pytest.approx(theirs["memory_gb"], abs=0.2)


def system(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_facts_of_a_board_are_read_from_its_system_files(tmp_path):
    root = system(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\x00",
            "proc/cpuinfo": "CPU implementer : 0x41\nCPU part : 0xd42\n",
            "proc/meminfo": "MemTotal:        7812500 kB\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400\n",
            "sys/class/thermal/thermal_zone0/temp": "45500\n",
            "sys/class/thermal/thermal_zone1/temp": "51000\n",
            "sys/class/thermal/thermal_zone2/temp": "not ready",
            "var/lib/nvpmodel/status": "pmode:0002\n",
        },
    )
    facts = verify_on_device.device_facts(root)
    assert facts["model"] == "NVIDIA Jetson Orin Nano"
    assert (facts["cpu"], facts["memory_gb"], facts["governor"]) == ("arm 0x41 0xd42", 8.0, "performance")
    assert (facts["cpu_mhz"], facts["temperature_c"], facts["power_mode"]) == (1510.4, 51.0, "pmode:0002")
    bare = verify_on_device.device_facts(tmp_path / "nothing")
    assert (bare["model"], bare["memory_gb"], bare["temperature_c"], bare["governor"]) == (None,) * 4


def test_threads_of_one_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_on_device.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    place = "sys/devices/system/cpu/cpu{}/topology/{}"
    files = {place.format(n, "core_id"): str(n // 2) for n in range(4)}
    root = system(tmp_path, files | {place.format(n, "physical_package_id"): "0" for n in range(4)})
    assert verify_on_device.physical_cores(root) == 2
    assert verify_on_device.physical_cores(tmp_path / "nothing") == 4
    monkeypatch.setattr(verify_on_device, "physical_cores", lambda: 2)
    verify_on_device.check_threads(2)
    for threads in (0, 3):
        with pytest.raises(
            verify_on_device.BundleError, match=f"{threads} threads.*2 physical cores.*1 to 2"
        ):
            verify_on_device.check_threads(threads)


# Energy


def powercap(tmp_path, value):
    place = "sys/class/powercap/intel-rapl:{}/{}"
    files = {}
    for number, name in ((0, "package-0"), (1, "core"), (2, "dram")):
        files[place.format(number, "name")] = name
        files[place.format(number, "energy_uj")] = str(value)
        files[place.format(number, "max_energy_range_uj")] = "10000000"
    return system(tmp_path, files)


def test_the_processor_s_counter_is_read_as_the_benchmark_reads_it(tmp_path):
    root = powercap(tmp_path, 9_000_000)
    mine, theirs = verify_on_device.Rapl(root), energy.Rapl(root / "sys/class/powercap")
    for value in (9_500_000, 200_000, 700_000):  # it wraps once
        powercap(tmp_path, value)
        assert mine.joules() == pytest.approx(theirs.joules())
    assert mine.joules() == pytest.approx(2 * 1.7, abs=1e-5)
    assert verify_on_device.meter_for("cpu", root).name == "RAPL"
    assert verify_on_device.meter_for("cpu", tmp_path / "nothing") is None


def test_energy_above_idle_is_the_benchmark_s():
    class Meter:
        name, found = "RAPL", True

        def __init__(self, clock, busy):
            self.clock, self.busy = clock, busy

        def joules(self):
            return 2.0 * self.clock.now + 8.0 * self.busy[0]

    def measured(way):
        clock, busy = Clock(), [0.0]

        def run():
            clock.now += 0.01
            busy[0] += 0.01

        def sleep(seconds):
            clock.now += seconds

        meter = Meter(clock, busy)
        if way == "device":
            return verify_on_device.energy_of(run, meter, 3.0, clock, sleep)
        return energy.measure_energy(run, seconds=3.0, meter=meter, clock=clock, sleep=sleep)

    mine, theirs = measured("device"), measured("bench")
    assert mine["energy_mj"] == pytest.approx(theirs.energy_mj) == pytest.approx(80.0)
    assert (mine["power_w"], mine["idle_w"]) == pytest.approx((10.0, 2.0))
    assert verify_on_device.energy_of(lambda: None, types.SimpleNamespace(joules=lambda: 0.0), 0.01) is None


def rails(tmp_path, **channels):
    files = {"sys/class/hwmon/hwmon1/name": "ina3221", "sys/class/hwmon/hwmon0/name": "nvme"}
    for number, (label, millivolt, milliampere) in enumerate(channels.values(), 1):
        files[f"sys/class/hwmon/hwmon1/in{number}_label"] = label
        files[f"sys/class/hwmon/hwmon1/in{number}_input"] = str(millivolt)
        files[f"sys/class/hwmon/hwmon1/curr{number}_input"] = str(milliampere)
    return system(tmp_path, files)


def test_a_board_s_supply_stands_for_all_rails_and_else_they_add_up(tmp_path):
    whole = verify_on_device.Rails(rails(tmp_path / "a", x=("VDD_IN", 5000, 1500), y=("VDD_CPU", 5000, 700)))
    assert (whole.watts(), whole.name) == (pytest.approx(7.5), "INA3221 VDD_IN")
    parts = verify_on_device.Rails(
        rails(tmp_path / "b", x=("VDD_GPU", 5000, 1000), y=("VDD_CPU", 4000, 500), z=("NC", 1, 1))
    )
    assert (parts.watts(), parts.name) == (pytest.approx(7.0), "INA3221 VDD_CPU + VDD_GPU")
    assert not verify_on_device.Rails(tmp_path / "nothing").found
    assert verify_on_device.meter_for("cpu", tmp_path / "a").name == "INA3221 VDD_IN"


def test_a_board_s_power_is_summed_over_time(tmp_path):
    meter = verify_on_device.Rails(rails(tmp_path, x=("VDD_IN", 5000, 2000)), every_s=0.001)
    began = verify_on_device.time.perf_counter()
    before = meter.joules()
    verify_on_device.time.sleep(0.3)
    found, took = meter.joules() - before, verify_on_device.time.perf_counter() - began
    assert 0 < found <= 10.0 * took * 1.01
    assert found >= 10.0 * took * 0.3


def nvml(millijoules=0, name=b"NVIDIA A100", code=0):
    """The few functions of the driver's library; the energy counter may be missing (code 3)."""
    written = {}

    def energy_counter(_, place):
        place._obj.value = millijoules
        return code

    def open_by_index(index, place):
        written["index"] = index.value
        place._obj.value = 1
        return 0

    def named(_, buffer, size):
        buffer.value = name
        return 0

    return types.SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByIndex_v2=open_by_index,
        nvmlDeviceGetTotalEnergyConsumption=energy_counter,
        nvmlDeviceGetName=named,
        nvmlSystemGetDriverVersion=lambda buffer, size: setattr(buffer, "value", b"580.1"),
        nvmlDeviceGetClockInfo=lambda h, kind, place: setattr(place._obj, "value", 1410),
        nvmlDeviceGetTemperature=lambda h, kind, place: setattr(place._obj, "value", 40),
        written=written,
    )


def test_a_gpu_s_counter_and_facts_come_from_the_driver(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    library = nvml(5_000_000)
    meter = verify_on_device.Nvml(library)
    assert (meter.found, meter.joules(), library.written["index"]) == (True, 5000.0, 2)
    assert meter.facts() == {
        "gpu": "NVIDIA A100",
        "driver": "580.1",
        "gpu_mhz": 1410,
        "gpu_temperature_c": 40,
    }
    old = verify_on_device.Nvml(nvml(code=3))
    assert (old.found, old.facts()["gpu"]) == (False, "NVIDIA A100")
    monkeypatch.setattr(verify_on_device, "opened", lambda _: None)
    assert (verify_on_device.Nvml().found, verify_on_device.Nvml().facts()) == (False, {})


# Answers


class Model:
    def __init__(self, change=lambda answer: answer):
        self.change = change

    def infer(self, inputs):
        return {"logits": self.change(inputs["x"].copy())}


def examples(mask=None):
    inputs = {"x": np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)}
    if mask is not None:
        inputs["attention_mask"] = np.array(mask)
    return [verify_on_device.Example(inputs, {"dense": {"logits": inputs["x"]}})]


def raised(place, by):
    def change(answer):
        answer[place] += by
        return answer

    return change


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda answer: answer, True),
        (raised((0, 0, 0), 0.02), True),  # 1e-3 of the largest answer, 23
        (raised((0, 0, 0), 0.03), False),
        (raised((0, 0, 0), np.nan), False),
        (raised((0, 0, 0), np.inf), False),
        (lambda answer: answer[:1], False),
    ],
)
def test_answers_pass_only_within_the_tolerance(change, passed):
    found = verify_on_device.agreement(Model(change), "dense", examples(), 1e-3)
    assert found["passed"] is passed
    assert found["tolerance"] == pytest.approx(0.023)
    json.dumps(found, allow_nan=False)


def test_positions_that_are_padding_do_not_count():
    wrong = Model(raised((1, 2), 9.0))
    assert verify_on_device.agreement(wrong, "dense", examples([[1, 1, 1], [1, 1, 0]]), 1e-3)["passed"]
    assert not verify_on_device.agreement(wrong, "dense", examples([[1, 1, 1], [1, 1, 1]]), 1e-3)["passed"]


def test_the_digest_of_a_document_is_that_of_its_contents():
    assert verify_on_device.canonical_digest({"a": 1, "b": [2]}) == verify_on_device.canonical_digest(
        {"b": [2], "a": 1}
    )
    assert verify_on_device.canonical_digest({"a": 1}) != verify_on_device.canonical_digest({"a": 2})


# The whole script, as a process of its own


def test_a_whole_bundle_is_measured(folder):
    done = verify(folder)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "checksums: 5 files are whole",
        "numbers: compressed differs",
        "measured: dense",
        "60 blocks",
    ):
        assert words in done.stdout
    found = Measurement.model_validate_json((folder / "measured.json").read_text())
    assert found.golden.dense.passed
    assert found.golden.dense.examples == 3
    assert found.ratio.value > 1
    assert len(found.timings.dense.block_medians_ms) == 60
    assert found.runtime.provider == "CPUExecutionProvider"


def test_json_stands_alone_on_standard_output(folder, tmp_path):
    done = verify(folder, "--json", "--seconds", "0.5", "--out", str(tmp_path / "m.json"))
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads((tmp_path / "m.json").read_text())
    assert not (folder / "measured.json").exists()
    assert json.loads(done.stdout)["protocol"]["block_ms"] == pytest.approx(500 / 120)


@pytest.mark.parametrize("name", ["model.onnx", "dense.onnx", "examples.npz", "intervals.py", "bundle.json"])
def test_a_flipped_byte_is_found(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    path.write_bytes(bytes(content))
    done = verify(folder)
    assert done.returncode == 2
    assert f"{name} is damaged" in done.stderr or "bundle.json" in done.stderr
    assert "copy the bundle to this device again" in done.stderr
    assert not (folder / "measured.json").exists()


def sealed(folder, **changes):
    path = folder / "bundle.json"
    rest = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"} | changes
    path.write_text(json.dumps({**rest, "digest": verify_on_device.canonical_digest(rest)}))


def test_other_numbers_are_told_and_nothing_is_timed(folder):
    with np.load(folder / "examples.npz") as stored:
        arrays = dict(stored)
    arrays["1.compressed.logits"] = arrays["1.compressed.logits"] + 0.5
    np.savez(folder / "examples.npz", **arrays)
    files = json.loads((folder / "bundle.json").read_text())["files"]
    sealed(folder, files=files | {"examples.npz": verify_on_device.sha256(folder / "examples.npz")})
    done = verify(folder)
    assert done.returncode == 4
    assert "computes other numbers" in done.stderr
    found = Measurement.model_validate_json((folder / "measured.json").read_text())
    assert (found.golden.dense.passed, found.golden.compressed.passed) == (True, False)
    assert (found.timings, found.ratio) == (None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "ort"], "holds no .ort files"),
        (["--provider", "NoSuchProvider"], "has no NoSuchProvider; it has .*CPUExecutionProvider"),
        (["--threads", "4096"], "4096 threads cannot be timed: this process may use"),
        (["--runtime", "tensorrt"], "tensorrt cannot be imported.*part of JetPack"),
        (["--seconds", "-1"], "--seconds -1 is not a length of time"),
        (["--out", "/nowhere/m.json", "--seconds", "0.1"], "/nowhere/m.json: No such file.*--out"),
    ],
)
def test_a_request_that_cannot_be_carried_out_gets_one_message(folder, words, message):
    done = verify(folder, *words)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr


def test_missing_files_and_other_versions_are_told(folder):
    sealed(folder, schema_version=99)
    done = verify(folder, "--json")
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (2, 2)
    assert "schema 99, this verify.py reads 1" in done.stderr
    sealed(folder, schema_version=1, files={"../secret": "0" * 64})
    assert "../secret is not in the bundle" in verify(folder).stderr
    (folder / "bundle.json").unlink()
    assert "bundle.json cannot be read" in verify(folder).stderr


def test_a_gpu_target_on_a_processor_is_warned_of(folder):
    target = json.loads((folder / "bundle.json").read_text())["target"]
    sealed(folder, target=target | {"name": "a100", "kind": "gpu", "runtime": "tensorrt"})
    done = verify(folder, "--seconds", "0.2")
    assert done.returncode == 0
    assert "the target a100 is a GPU, but this is a measurement of the CPU" in done.stdout


# TensorRT, by a double of the part of its interface that is used


class Trt(types.ModuleType):
    """Records what it is asked; an engine copies input `x` to output `y`."""

    def __init__(self, major, parses=True, plan=b"plan"):
        super().__init__("tensorrt")
        self.__version__ = f"{major}.0.1"
        self.said, self.parses, self.plan = [], parses, plan
        flags = {"TF32": "tf32"} | ({"FP16": "fp16"} if major < 11 else {})
        self.BuilderFlag = types.SimpleNamespace(**flags)
        self.TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
        self.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda s, level: None})
        self.nptype = lambda kind: kind

    def Builder(self, logger):  # noqa: N802
        profile = types.SimpleNamespace(set_shape=lambda *words: self.said.append(words))
        config = types.SimpleNamespace(
            set_flag=lambda flag: self.said.append(("set", flag)),
            clear_flag=lambda flag: self.said.append(("clear", flag)),
            add_optimization_profile=lambda given: self.said.append(("profile", given is profile)),
        )
        tensor = types.SimpleNamespace(name="x")
        return types.SimpleNamespace(
            create_network=lambda flags: types.SimpleNamespace(num_inputs=1, get_input=lambda _: tensor),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=lambda network, given: self.plan,
        )

    def OnnxParser(self, network, logger):  # noqa: N802
        return types.SimpleNamespace(
            parse_from_file=lambda path: self.parses, num_errors=1, get_error=lambda _: "no such operator"
        )

    def Runtime(self, logger):  # noqa: N802
        addresses, shapes = {}, {}

        def execute(stream):
            size = int(np.prod(shapes["x"])) * 4
            ctypes.memmove(addresses["y"], addresses["x"], size)
            return True

        context = types.SimpleNamespace(
            set_input_shape=shapes.__setitem__,
            set_tensor_address=addresses.__setitem__,
            get_tensor_shape=lambda name: shapes["x"],
            execute_async_v3=execute,
        )
        engine = types.SimpleNamespace(
            num_io_tensors=2,
            get_tensor_name=lambda index: "xy"[index],
            get_tensor_mode=lambda name: {"x": "in", "y": "out"}[name],
            get_tensor_dtype=lambda name: np.float32,
            create_execution_context=lambda: context,
        )
        return types.SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)


class HostCuda:
    """The CUDA runtime with the host's memory for the device's."""

    def __init__(self):
        self.kept, self.freed = {}, []

    def cudaStreamCreate(self, place):  # noqa: N802
        place._obj.value = 7
        return 0

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        return 0

    def cudaMalloc(self, place, size):  # noqa: N802
        buffer = ctypes.create_string_buffer(size.value)
        place._obj.value = ctypes.addressof(buffer)
        self.kept[place._obj.value] = buffer
        return 0

    def cudaFree(self, address):  # noqa: N802
        self.freed.append(address.value)
        return 0

    def cudaMemcpy(self, to, source, size, way):  # noqa: N802
        ctypes.memmove(to, source, size.value)
        return 0


def arrays(*shapes):
    random = np.random.default_rng(0)
    return [
        verify_on_device.Example({"x": random.uniform(size=shape).astype(np.float32)}, {}) for shape in shapes
    ]


@pytest.fixture
def cuda(monkeypatch):
    library = HostCuda()
    monkeypatch.setattr(verify_on_device, "opened", lambda name: library)
    return library


@pytest.mark.parametrize(
    ("major", "precision", "built", "flag"),
    [
        (10, "fp16", "fp16", [("set", "fp16")]),
        (11, "fp16", "fp32", [("clear", "tf32")]),
        (10, "fp32", "fp32", [("clear", "tf32")]),
        (10, "tf32", "tf32", []),
    ],
)
def test_an_engine_is_built_for_all_shapes_and_answers(monkeypatch, cuda, major, precision, built, flag):
    trt = Trt(major)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    given = arrays((1, 8), (3, 4), (3, 8))
    model = verify_on_device.TensorrtModel(Path("m.onnx"), given, precision)
    assert (model.precision, model.version) == (built, f"{major}.0.1")
    assert trt.said == [*flag, ("x", (1, 4), (1, 8), (3, 8)), ("profile", True)]
    for example in given:
        assert np.array_equal(model.infer(example.inputs)["y"], example.inputs["x"])
    assert len(cuda.freed) == 4  # two buffers, each of which grew twice
    assert model.timed(given[0].inputs)() is None


def test_what_tensorrt_refuses_is_told(monkeypatch, cuda):
    monkeypatch.setitem(sys.modules, "tensorrt", Trt(10, parses=False))
    with pytest.raises(verify_on_device.BundleError, match=r"10\.0\.1 cannot read m.onnx: no such operator"):
        verify_on_device.TensorrtModel(Path("m.onnx"), arrays((1, 2)), "fp32")
    monkeypatch.setitem(sys.modules, "tensorrt", Trt(10, plan=None))
    with pytest.raises(verify_on_device.BundleError, match="built no engine"):
        verify_on_device.TensorrtModel(Path("m.onnx"), arrays((1, 2)), "fp32")
    cuda.cudaMalloc = lambda place, size: 2
    with pytest.raises(verify_on_device.BundleError, match="cudaMalloc failed with CUDA error 2"):
        verify_on_device.Cuda().place("x", np.ones(3))
    monkeypatch.setattr(verify_on_device, "opened", lambda name: None)
    with pytest.raises(verify_on_device.BundleError, match=r"libcudart\.so was not found"):
        verify_on_device.Cuda()
