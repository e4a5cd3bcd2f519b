"""Cost tables of this processor, by chains in onnxruntime."""

import onnxruntime as ort
from support.sites import ffn, heads

from compress.cost import latency_table
from compress.export.backends import ort_chains
from compress.export.microbench import site_timing
from compress.measure import timing


def test_the_table_of_this_machine_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(site_timing, "CYCLE_LIMITS", (2, 2))
    sites = [ffn(64), heads()]
    first = ort_chains.table(sites, align=8)
    assert first.fingerprint == timing.fingerprint()
    assert first.versions == {"onnxruntime": ort.__version__}
    assert (first.threads, first.precision, first.runtime) == (1, "fp32", "onnxruntime")
    assert set(first.rows) == {site.shape for site in sites}
    assert set(first.rows[sites[0].shape]) == set(latency_table.grid(sites[0], 8))
    assert all(ms > 0 for row in first.rows.values() for ms in row.values())
    monkeypatch.setattr(site_timing, "measure", None)
    assert ort_chains.table(sites, align=8) == first
