"""What every kind of site in the table keeps, whatever else it does."""

import re

import pytest
import torch
from support.channel_families import FAMILIES, family
from support.sites import ffn, heads
from support.stream_models import built, logits, projected, wide

from compress.errors import CompressError
from compress.methods.hidden_width import find_stream, narrow, site_of
from compress.sites import discovery, prune
from compress.sites.kinds import KINDS, decode_step, kind_of, match, searched
from compress.sites.kinds.layout import Layout


def cut_by_units(name, kind):
    """Answers of a model at full shape without some units, of the shrunk one, and of the dense one."""
    model, example, sites = family(name)
    site = sites[kind]
    kept = torch.arange(site.units)[1::2]
    removals = {site.name: prune.Removal(kept)}
    every = list(sites.values())
    found = [prune.mask(model, every, removals), prune.shrink(model, every, removals), model]
    assert sum(value.numel() for value in found[1].parameters()) < sum(
        value.numel() for value in model.parameters()
    )
    with torch.no_grad():
        return [one(**example).logits for one in found]


def cut_by_directions(name, kind):
    """The same of a hidden width: at full shape, what writes to it is projected on what stays."""
    model, example = built({"separate": "vit", "fused": "gpt2", "grouped": "llama"}[name])
    stream = find_stream(model, example)
    assert site_of(stream).kind == kind
    second, width = wide(stream), stream.width - 4
    found = projected(model, stream, second, width), narrow(model, stream, second, width), model
    return [logits(one, example) for one in found]


CUTS = {"heads": cut_by_units, "ffn": cut_by_units, "residual": cut_by_directions}


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_model_computes_what_the_masked_one_does(kind, family_name):
    masked, smaller, dense = CUTS[kind](family_name, kind)
    assert torch.allclose(masked, smaller, atol=1e-4)
    assert not torch.allclose(masked, dense, atol=1e-2)  # what was cut matters


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_listed_under_its_name_and_has_colors_of_its_own(name):
    kind = KINDS[name]
    assert kind.name == name
    assert kind.label
    for color in (kind.color, kind.dark_color):
        assert re.fullmatch("#[0-9a-f]{6}", color)
    others = [other for other in KINDS.values() if other is not kind]
    assert kind.color not in {other.color for other in others}
    assert kind.dark_color not in {other.dark_color for other in others}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("units", [1, 7, 100, 3072])
def test_levels_fall_from_all_units_to_few(name, units):
    site = ffn(units=units).model_copy(update={"kind": name})
    levels = kind_of(site).levels(site, 8)
    assert levels[0] == units
    assert levels == sorted(set(levels), reverse=True)
    assert levels[-1] >= 1
    assert units == 7 or levels[-1] <= max(8, units // 50)


@pytest.mark.parametrize("name", searched())
def test_in_decoding_a_site_has_one_row_for_every_sequence(name):
    site = (heads if name == "heads" else ffn)().model_copy(update={"kind": name})
    step = decode_step(site)
    assert (step.tokens, {m.rows for m in step.matmuls}) == (1, {site.batch})
    assert step.kind == name


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(4, 8, (), attention=True, head_dim=8), "heads"),
        (Layout(4, 1, (), attention=True, head_dim=1), "heads"),
        (Layout(64, 1, (), activation="relu"), "ffn"),
        (Layout(64, 1, (), activation="identity", gated=True), "ffn"),
        (Layout(64, 1, (), activation="other"), "ffn"),
        (Layout(64, 1, (), activation="identity"), None),  # a matrix in two factors
        (Layout(16, 4, (), activation="other"), None),
    ],
)
def test_a_layout_belongs_to_one_kind_at_most(layout, name):
    assert [key for key, kind in KINDS.items() if kind.matches(layout)] == ([name] if name else [])
    assert getattr(match(layout), "name", None) == name


def test_a_site_of_no_known_kind_is_refused_with_the_kinds_there_are():
    with pytest.raises(CompressError, match="no kind of site 'channel'; known: heads, ffn, residual"):
        kind_of(ffn().model_copy(update={"kind": "channel"}))


def test_sites_are_found_of_kinds_in_the_table_only():
    for name in FAMILIES:
        model, example, _ = family(name)
        kinds = {site.kind for site in discovery.find_sites(model, example).sites}
        assert kinds == {"heads", "ffn"} <= set(searched())
