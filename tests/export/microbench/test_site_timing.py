import itertools
import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from support import oracles
from support.sites import BATCH, HIDDEN, ROWS, TOKENS, WIDTH, ffn, heads

from compress.errors import CompressError
from compress.export.backends import ort_chains
from compress.export.microbench import onnx_chain, site_timing
from compress.export.microbench.site_timing import ChainRuntime
from compress.measure import timing
from compress.sites.kinds import decode_step


def run(site, units, copies=1, x=None, mask=None):
    """The chain's output, and its float weights of more than one number in order of use."""
    file = onnx_chain.chain(site, units, copies)
    model = onnx.load_from_string(file)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {"x": x}
    if site.kind == "heads" and units:
        feeds["mask"] = mask
    weights = [numpy_helper.to_array(w) for w in model.graph.initializer]
    weights = [w.astype(float) for w in weights if w.dtype == np.float32 and w.size > 1]
    return session.run(None, feeds)[0], weights


def inputs(seed=0):
    random = np.random.default_rng(seed)
    mask = np.zeros((BATCH, 1, TOKENS, TOKENS), dtype=np.float32)
    mask[1, :, :, -2:] = -1e9
    return random.standard_normal((ROWS, HIDDEN)).astype(np.float32), mask


ACTIVATIONS = {
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: max(v, 0.0),
    "relu_squared": lambda v: max(v, 0.0) ** 2,
    "silu": lambda v: v / (1 + math.exp(-v)),
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "tanh": math.tanh,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "mish": lambda v: v * math.tanh(math.log1p(math.exp(v))),
    "hardswish": lambda v: v * min(max(v + 3, 0), 6) / 6,
    "elu": lambda v: v if v > 0 else math.expm1(v),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
    "identity": lambda v: v,
    "": lambda v: v,
    "other": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_feed_forward_chain_computes_the_activation_it_names(activation):
    x, _ = inputs()
    found, (scale, shift, up, up_bias, down, down_bias) = run(ffn(activation=activation), 7, x=x)
    assert up.shape == (7, HIDDEN)
    assert down.shape == (HIDDEN, 7)
    inside = np.vectorize(ACTIVATIONS[activation])(x @ up.T + up_bias)
    expected = oracles.normalized(inside @ down.T + down_bias + x, scale, shift)
    assert np.abs(found - expected).max() < 1e-4


def test_a_gate_multiplies_whether_its_matrix_is_fused_or_apart():
    x, _ = inputs(1)
    found, (scale, shift, up, gate, down) = run(ffn(gated="two", activation="silu", bias=False), 5, x=x)
    inside = np.vectorize(ACTIVATIONS["silu"])(x @ up.T) * (x @ gate.T)
    assert np.abs(found - oracles.normalized(inside @ down.T + x, scale, shift)).max() < 1e-4
    found, (scale, shift, both, down) = run(ffn(gated="one", activation="silu", bias=False), 5, x=x)
    assert both.shape == (10, HIDDEN)
    inside = np.vectorize(ACTIVATIONS["silu"])(x @ both[:5].T) * (x @ both[5:].T)
    assert np.abs(found - oracles.normalized(inside @ down.T + x, scale, shift)).max() < 1e-4


@pytest.mark.parametrize(("queries", "units"), [(1, 2), (1, 3), (3, 2)])
def test_an_attention_chain_computes_masked_attention(queries, units):
    x, mask = inputs(2)
    found, weights = run(heads(queries=queries), units, x=x, mask=mask)
    scale, shift, query, a, key, b, value, c, out, d = weights
    context = oracles.masked_attention(
        x @ query.T + a, x @ key.T + b, x @ value.T + c, mask, units, queries, WIDTH
    )
    assert np.abs(found - oracles.normalized(context @ out.T + d + x, scale, shift)).max() < 1e-4


@pytest.mark.parametrize(("queries", "units"), [(1, 3), (3, 2)])
def test_a_step_attends_to_the_cache_and_gives_it_back_longer(queries, units):
    site = decode_step(heads(queries=queries, bias=False))
    random = np.random.default_rng(5)
    x = random.standard_normal((BATCH, HIDDEN)).astype(np.float32)
    mask = np.zeros((BATCH, 1, 1, TOKENS + 1), dtype=np.float32)
    mask[1, :, :, :2] = -1e9
    file = onnx_chain.chain(site, units, 1)
    onnx.checker.check_model(onnx.load_from_string(file), full_check=True)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x", "mask", "past0", "past1"]
    keys, values = (
        random.standard_normal((BATCH, units, TOKENS, WIDTH)).astype(np.float32) for _ in range(2)
    )
    found, *present = session.run(None, {"x": x, "mask": mask, "past0": keys, "past1": values})
    weights = [numpy_helper.to_array(w) for w in onnx.load_from_string(file).graph.initializer]
    scale, shift, query, key, value, out = (w for w in weights if w.dtype == np.float32 and w.size > 1)
    context = np.zeros((BATCH, units * queries * WIDTH))
    for item, unit in itertools.product(range(BATCH), range(units)):
        own = slice(unit * WIDTH, (unit + 1) * WIDTH)
        k = np.vstack([keys[item, unit], (x @ key.T)[item, own]])
        v = np.vstack([values[item, unit], (x @ value.T)[item, own]])
        for held, whole in zip(present, (k, v), strict=True):
            assert np.allclose(held[item, unit], whole, atol=1e-5)
        for place in range(unit * queries, (unit + 1) * queries):
            q = (x @ query.T)[item, place * WIDTH : (place + 1) * WIDTH]
            scores = k @ q / np.sqrt(WIDTH) + mask[item, 0, 0]
            shares = np.exp(scores - scores.max())
            context[item, place * WIDTH : (place + 1) * WIDTH] = shares @ v / shares.sum()
    assert np.abs(found - oracles.normalized(context @ out.T + x, scale, shift)).max() < 1e-4


@pytest.mark.parametrize("fused", [(3 * WIDTH,), (WIDTH, 2 * WIDTH)])
def test_fused_projections_are_split_into_the_same_attention(fused):
    x, mask = inputs(3)
    found, weights = run(heads(fused=fused, bias=False), 2, x=x, mask=mask)
    scale, shift, *readers, out = weights
    size = 2 * WIDTH
    if len(readers) == 1:
        query, key, value = (readers[0][k * size : (k + 1) * size] for k in range(3))
    else:  # the widest product comes first and holds query and key
        query, key, value = readers[0][:size], readers[0][size:], readers[1]
    context = oracles.masked_attention(x @ query.T, x @ key.T, x @ value.T, mask, 2, 1, WIDTH)
    assert np.abs(found - oracles.normalized(context @ out.T + x, scale, shift)).max() < 1e-4


def test_copies_have_weights_of_their_own_and_follow_each_other():
    x, _ = inputs(4)
    found, weights = run(ffn(activation="relu"), 6, copies=3, x=x)
    scale, shift, *rest = weights
    assert len(rest) == 3 * 4
    assert not np.allclose(rest[0], rest[4])
    stream = x
    for up, up_bias, down, down_bias in zip(*(rest[k::4] for k in range(4)), strict=True):
        inside = np.maximum(stream @ up.T + up_bias, 0)
        stream = oracles.normalized(inside @ down.T + down_bias + stream, scale, shift)
    assert np.abs(found - stream).max() < 1e-4


@pytest.mark.parametrize("site", [ffn(), heads()])
def test_without_units_only_the_sum_and_the_norm_are_left(site):
    model = onnx.load_from_string(onnx_chain.chain(site, 0, 2))
    assert [node.op_type for node in model.graph.node] == ["Add", "LayerNormalization"] * 2
    assert [value.name for value in model.graph.input] == ["x"]


def test_what_cannot_be_timed_alone_is_refused_by_name():
    with pytest.raises(CompressError, match=r"heads: .* \[4, 6, 4\] features a unit, not \[4, 4, 4\]"):
        onnx_chain.chain(heads(fused=(4, 6, 4)), 2, 1)
    with pytest.raises(CompressError, match="heads: only 2 of query, key and value"):
        onnx_chain.chain(heads(fused=(4, 4)), 2, 1)
    site = ffn()
    with pytest.raises(CompressError, match="ffn: 0 readers and 1 writers"):
        onnx_chain.chain(site.model_copy(update={"matmuls": site.matmuls[1:]}), 2, 1)
    with pytest.raises(CompressError, match="ffn: 1 readers and 2 writers"):
        onnx_chain.chain(site.model_copy(update={"matmuls": (*site.matmuls, site.matmuls[1])}), 2, 1)
    odd = site.matmuls[1].model_copy(update={"out": HIDDEN + 1})
    with pytest.raises(CompressError, match="ffn: products of different hidden widths"):
        onnx_chain.chain(site.model_copy(update={"matmuls": (site.matmuls[0], odd)}), 2, 1)
    few = heads().model_copy(update={"tokens": 3})
    with pytest.raises(CompressError, match="heads: 10 rows are not batch 2 x 3 tokens"):
        ort_chains.open_session(onnx_chain.chain(few, 2, 1), few, 1)


def test_a_session_runs_at_the_shape_of_the_site():
    site = heads(causal=True)
    call = ort_chains.open_session(onnx_chain.chain(site, 2, 1), site, 1)
    (found,) = call()
    assert found.shape == (ROWS, HIDDEN)
    assert np.isfinite(found).all()
    step = decode_step(site)
    answers = ort_chains.open_session(onnx_chain.chain(step, 2, 3), step, 1)()
    assert [answer.shape for answer in answers] == [(BATCH, HIDDEN)] + [(BATCH, 2, TOKENS + 1, WIDTH)] * 6
    assert np.isfinite(answers[0]).all()
    assert answers[1][:, :, :-1].std() > 0.5


# Timing, with graphs whose cost is known


class Machine:
    """Chains that take a known time on a clock of their own; the machine slows down as it goes."""

    def __init__(self, cost_ms, around_ms=0.5, slowness=lambda calls: 1.0):
        self.now, self.calls = 0.0, 0
        self.cost_ms, self.around_ms, self.slowness = cost_ms, around_ms, slowness
        self.built = []

    def clock(self):
        return self.now

    def chain(self, site, units, copies):
        self.built.append((site.shape, units, copies))
        return copies * (self.around_ms + (self.cost_ms(units) if units else 0.0))

    def rig(self):
        return ChainRuntime(self.make, self.clock, group_mb=site_timing.GROUP_MB)

    def make(self, site, units, copies, form):
        ms = self.chain(site, units, copies)

        def call():
            self.calls += 1
            self.now += ms / 1e3 * self.slowness(self.calls)

        return call


@pytest.fixture
def machine(monkeypatch):
    def install(**keywords):
        made = Machine(**keywords)
        monkeypatch.setattr(site_timing, "CYCLE_LIMITS", (12, 12))
        return made

    return install


def test_a_row_is_the_cost_of_the_site_alone_per_copy(machine):
    made = machine(cost_ms=lambda units: 0.1 + 0.02 * units)
    rows = site_timing.measure([ffn()], {ffn().shape: [8, 4, 0]}, rig=made.rig())
    assert rows == {ffn().shape: pytest.approx({12: 0.34, 8: 0.26, 4: 0.18})}
    assert {copies for _, _, copies in made.built} == {site_timing.COPIES}


def test_a_machine_that_slows_down_keeps_the_ratios_of_a_row(machine):
    made = machine(cost_ms=lambda units: 0.02 * units, slowness=lambda calls: 1 + calls / 100)
    row = site_timing.measure([ffn()], {ffn().shape: [9, 6, 3]}, rig=made.rig())[ffn().shape]
    for units in (9, 6, 3):
        assert row[units] / row[12] == pytest.approx(units / 12, rel=0.02)


def test_a_disturbed_run_is_outvoted(machine):
    made = machine(cost_ms=lambda units: 0.02 * units, slowness=lambda calls: 9.0 if calls % 7 == 0 else 1.0)
    row = site_timing.measure([ffn()], {ffn().shape: [6]}, rig=made.rig())[ffn().shape]
    assert row == pytest.approx({12: 0.24, 6: 0.12})


def test_a_site_that_seems_free_still_costs_a_little(machine):
    made = machine(cost_ms=lambda units: 0.2 if units == 12 else -0.1)
    row = site_timing.measure([ffn()], {ffn().shape: [6]}, rig=made.rig())[ffn().shape]
    assert 0 < row[6] < 1e-3


def test_sites_of_one_shape_are_timed_once_and_unasked_shapes_not_at_all(machine):
    made = machine(cost_ms=lambda units: 0.02 * units)
    twin = ffn().model_copy(update={"name": "twin"})
    rows = site_timing.measure([ffn(), twin, heads()], {ffn().shape: [6]}, rig=made.rig())
    assert list(rows) == [ffn().shape]
    assert [units for _, units, _ in made.built] == [12, 0, 6]


def test_groups_bound_the_memory_and_change_nothing(machine, monkeypatch):
    made = machine(cost_ms=lambda units: 0.02 * units)
    whole = site_timing.measure([ffn()], {ffn().shape: [9, 6, 3]}, rig=made.rig())
    monkeypatch.setattr(site_timing, "GROUP_MB", 0.0)
    made.built.clear()
    parts = site_timing.measure([ffn()], {ffn().shape: [9, 6, 3]}, rig=made.rig())
    assert parts[ffn().shape] == pytest.approx(whole[ffn().shape])
    assert [units for _, units, _ in made.built] == [12, 0, 9, 12, 0, 6, 12, 0, 3]


def test_large_sites_get_fewer_copies_and_the_largest_are_left_to_the_estimate(machine, monkeypatch):
    made = machine(cost_ms=lambda units: 0.02 * units)
    size = site_timing.weights_mb(ffn(), 12)
    assert size == pytest.approx(2 * 12 * HIDDEN * 4e-6)
    monkeypatch.setattr(site_timing, "COPIES_MB", 2.5 * size)
    site_timing.measure([ffn()], {ffn().shape: [6]}, rig=made.rig())
    assert {copies for _, _, copies in made.built} == {2}
    monkeypatch.setattr(site_timing, "COPIES_MB", 0.5 * size)
    made.built.clear()
    site_timing.measure([ffn()], {ffn().shape: [6]}, rig=made.rig())
    assert {copies for _, _, copies in made.built} == {1}
    monkeypatch.setattr(site_timing, "MAX_SITE_MB", 0.9 * size)
    assert site_timing.measure([ffn()], {ffn().shape: [6]}, rig=made.rig()) == {}


def test_the_time_limit_ends_the_cycles_after_the_least_number(monkeypatch):
    monkeypatch.setattr(site_timing, "CYCLE_LIMITS", (3, 50))
    clock = Machine(cost_ms=lambda units: 1.0)
    call = clock.make(ffn(), 1, 1, "dense")
    assert site_timing.time_cycles([call, call], 0.0, clock.clock, lambda done, work: None).shape == (3, 2)
    assert site_timing.time_cycles([call, call], 1e9, clock.clock, lambda done, work: None).shape == (50, 2)


def test_cycles_alternate_their_order_after_a_visit_to_each(monkeypatch):
    monkeypatch.setattr(site_timing, "CYCLE_LIMITS", (2, 2))
    seen = []
    calls = [lambda k=k: seen.append(k) for k in range(3)]
    site_timing.time_cycles(calls, 1.0, lambda: float(len(seen)), lambda done, work: None)
    assert seen[::3] == [0, 1, 2, 0, 1, 2, 2, 1, 0]


def test_progress_ends_at_its_total(machine):
    made = machine(cost_ms=lambda units: 0.02 * units)
    seen = []
    sites = [ffn(), heads()]
    site_timing.measure(
        sites, {s.shape: [2] for s in sites}, 1, lambda a, b: seen.append((a, b)), rig=made.rig()
    )
    assert seen[-1] == (2000, 2000)
    assert seen == sorted(seen)
    assert 900 < seen[len(seen) // 2 - 1][0] <= 1000


def test_more_threads_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(timing, "physical_cores", lambda: 1)
    with pytest.raises(CompressError, match="2 threads"):
        site_timing.measure([ffn()], {ffn().shape: [6]}, 2, rig=None)


def test_one_thread_is_timed_by_its_own_clock():
    assert site_timing.clock_for(1).__name__ == "thread_time"
    assert site_timing.clock_for(2).__name__ == "perf_counter"


def test_a_sample_keeps_both_ends_and_spreads_evenly():
    assert site_timing.sample_levels([5, 1, 3, 0, 3], 4) == [5, 3, 1]
    found = site_timing.sample_levels(range(101), 11)
    assert (found[0], found[-1], len(found)) == (100, 1, 11)
    assert all(9 <= a - b <= 11 for a, b in itertools.pairwise(found))
    assert len(site_timing.sample_levels(range(1000))) == site_timing.MOST_LEVELS
