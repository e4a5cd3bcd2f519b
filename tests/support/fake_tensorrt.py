"""A double of the part of TensorRT's API that export/tensorrt.py uses; one engine doubles its input.

tests/export/test_tensorrt_api.py holds its names against the real bindings.
"""

import ctypes
import enum
import json

__version__ = "11.4.0.106"
LOG = ["(Sparsity) Found 2 layer(s) eligible to use sparse tactics: up, down"]
LAYERS = [{"Name": "up", "TacticName": "sm90_xmma_sparse_gemm"}, {"Name": "down", "TacticName": "sm90_gemm"}]


class ILogger:
    class Severity(enum.Enum):
        ERROR = 1
        INFO = 3

    def log(self, severity, msg):
        raise NotImplementedError


class DataType(enum.Enum):
    FLOAT = 0


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
BuilderFlag = enum.Enum("BuilderFlag", "SPARSE_WEIGHTS VERSION_COMPATIBLE")
HardwareCompatibilityLevel = enum.Enum(
    "HardwareCompatibilityLevel", "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY"
)
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
LayerInformationFormat = enum.Enum("LayerInformationFormat", "JSON")
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")


class ITimingCache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return b"timings"


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self):
        self.flags_set, self.profiles, self.limits, self.caches = set(), [], {}, []

    def set_flag(self, flag):
        self.flags_set.add(flag.name)

    def set_memory_pool_limit(self, pool, pool_size):
        self.limits[pool.name] = pool_size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.caches.append(cache.content)
        return cache.content != b"foreign"

    def get_timing_cache(self):
        return ITimingCache(b"")


class ITensor:
    name = "x"
    shape = (-1, -1, 4)


class INetworkDefinition:
    num_inputs = 1

    def get_input(self, index):
        return ITensor()


class Builder:
    flags, last, fault = None, None, None

    def __init__(self, logger):
        self.words = logger

    def create_network(self, flags):
        Builder.flags = flags
        return INetworkDefinition()

    def create_builder_config(self):
        Builder.last = IBuilderConfig()
        return Builder.last

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        for line in LOG:
            self.words.log(ILogger.Severity.INFO, line)
        if Builder.fault:
            self.words.log(ILogger.Severity.ERROR, Builder.fault)
            return None
        return b"engine"


class ParserError:
    def __init__(self, text):
        self.text = text

    def desc(self):
        return self.text


class OnnxParser:
    fault = None

    def __init__(self, network, logger):
        self.num_errors = 1 if OnnxParser.fault else 0

    def parse_from_file(self, model):
        return OnnxParser.fault is None

    def get_error(self, index):
        return ParserError(OnnxParser.fault)


class EngineInspector:
    def get_engine_information(self, format):
        return json.dumps({"Layers": LAYERS})


class ICudaEngine:
    num_io_tensors = 2

    def get_tensor_name(self, index):
        return ("x", "y")[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType.FLOAT

    def get_tensor_profile_shape(self, name, profile_index):
        return [(1, 2, 4), (1, 8, 4), (2, 8, 4)]

    def create_engine_inspector(self):
        return EngineInspector()

    def create_execution_context(self):
        return IExecutionContext()


class IExecutionContext:
    runs, works = 0, True

    def __init__(self):
        self.addresses = {}

    def set_input_shape(self, name, shape):
        self.shape = shape
        return shape[0] <= 2

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        IExecutionContext.runs += 1
        size = self.shape[0] * self.shape[1] * self.shape[2]
        source, target = ((ctypes.c_float * size).from_address(self.addresses[name]) for name in "xy")
        target[:] = [2 * value for value in source]
        return IExecutionContext.works


class Runtime:
    last = None

    def __init__(self, logger):
        self.engine_host_code_allowed = False
        Runtime.last = self

    def deserialize_cuda_engine(self, serialized_engine):
        return ICudaEngine() if serialized_engine == b"engine" else None
