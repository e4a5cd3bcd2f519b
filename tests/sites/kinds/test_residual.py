"""The hidden width is a kind of site that the search of units leaves alone."""

import pytest
from support.stream_models import built

from compress.errors import CompressError
from compress.methods.hidden_width import find_stream, site_of
from compress.recipe import Options
from compress.sites.kinds import kind_of, searched
from compress.sites.kinds.residual import RESIDUAL


def test_the_site_of_a_stream_is_of_this_kind_and_not_timed_alone():
    site = site_of(find_stream(*built("vit")))
    assert kind_of(site) is RESIDUAL
    with pytest.raises(CompressError, match="residual: the hidden width is timed with the whole model"):
        RESIDUAL.parts(site)


def test_a_recipe_cannot_list_it_among_the_kinds_to_search():
    assert "residual" not in searched()
    assert Options().kinds == searched()
    with pytest.raises(ValueError, match="must be one of 'heads', 'ffn'"):
        Options(kinds=("residual",))
