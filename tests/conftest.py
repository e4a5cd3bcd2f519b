import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run in one process per core; further threads in each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test reads or writes the tables in the home of whoever runs it."""
    os.environ["COMPRESS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
