"""Costs of a device that is not here: a shipped table of it wins over the roofline, shape by shape."""

from types import SimpleNamespace

from sites import ffn, heads

from compress import pricing, profiles, roofline

H100 = profiles.load("h100")


def shipped(monkeypatch, origin, rows):
    table = {
        "fingerprint": "f",
        "runtime": origin,
        "threads": 1,
        "precision": "fp16",
        "rows": {shape: {str(units): ms for units, ms in row.items()} for shape, row in rows.items()},
    }
    document = {"title": "t", "source": "s", "table": table}
    monkeypatch.setattr(profiles, "measured", lambda name, own: document if own == origin else None)


def test_a_shipped_table_prices_the_shapes_that_it_knows(monkeypatch):
    known, unknown = ffn(), heads()
    shipped(monkeypatch, "torch-cuda", {known.shape: {12: 5.0, 6: 3.0}})
    monkeypatch.setattr(pricing, "_outside_ms", lambda job: 1.0)
    job = SimpleNamespace(profile=H100, sites=(known, unknown), narrowed=None)
    costs = pricing._estimated(job, {"ffn": {"dense": [12, 6]}, "heads": {"dense": [3, 1]}})
    assert costs.rows["ffn"]["dense"] == {12: 5.0, 6: 3.0}
    assert costs.rows["heads"]["dense"][3] == roofline.roofline(unknown, 3, H100)
    assert costs.source == "estimated"  # the model as a whole was not timed


def test_the_runtime_of_the_profile_comes_before_torch(monkeypatch):
    monkeypatch.setattr(profiles, "measured", lambda name, origin: None)
    assert pricing.shipped(H100) is None
    shipped(monkeypatch, "tensorrt", {})
    assert pricing.shipped(H100).runtime == "tensorrt"
    shipped(monkeypatch, "torch-cuda", {})
    assert pricing.shipped(H100).runtime == "torch-cuda"


def test_a_narrow_model_is_estimated_like_the_dense_one_and_counts_from_it(monkeypatch):
    wide = SimpleNamespace(profile=H100, sites=(ffn(), heads()), narrowed=None)
    fewer = {"ffn": {"dense": [12, 6]}, "heads": {"dense": [3, 1]}}
    shipped(monkeypatch, "torch-cuda", {ffn().shape: {12: 5.0, 6: 3.0}})
    monkeypatch.setattr(pricing, "_outside_ms", lambda job: 2.0 if job is wide else 1.0)
    narrow = SimpleNamespace(profile=H100, sites=wide.sites, narrowed=object(), baseline=wide)
    costs = pricing._estimated(narrow, fewer)
    inside = sum(roofline.roofline(site, site.units, H100, threads=1) for site in wide.sites)
    assert costs.dense_ms == inside + 2.0
    assert costs.whole.latency_ms(inside) == inside + 1.0
    assert costs.rows["ffn"]["dense"][12] == roofline.roofline(ffn(), 12, H100, threads=1)
    monkeypatch.setattr(pricing, "_outside_ms", lambda job: 1.0 if job is wide else 1.5)
    slower = pricing._estimated(narrow, fewer)
    assert (slower.dense_ms, slower.whole.latency_ms(inside)) == (inside + 1.0, inside + 1.0)
