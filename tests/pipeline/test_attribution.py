from types import SimpleNamespace

from support.sites import ffn, heads

from compress.cost import latency_table
from compress.ir import Option
from compress.pipeline import attribution
from compress.pipeline.plan_search import WEIGHT_PRECISION

SITES = (ffn(64), heads())


def test_a_size_budget_counts_the_bytes_outside_every_site(tmp_path):
    inside = sum(latency_table.weight_bytes(site, Option(), WEIGHT_PRECISION) for site in SITES)
    dense = tmp_path / "dense.onnx"
    dense.write_bytes(bytes(4 * inside))
    line = attribution._outside_bytes(SimpleNamespace(dense_file=dense, sites=SITES))
    assert line.startswith(f"{3 * inside / 1e6:.3g} of {4 * inside / 1e6:.3g} MB (75%) of the dense file")
