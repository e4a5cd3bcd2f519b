from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from support import families

from compress.errors import CompressError
from compress.ir import Budget
from compress.pipeline.job import decodes, prepare
from compress.recipe import Recipe, Shapes


class Silent:
    """Progress that nobody sees."""

    @contextmanager
    def stage(self, name):
        yield lambda done, work: None

    def say(self, line):
        pass


def test_what_decodes_generates_text_with_a_cache():
    gpt2, bert, own = (families.build(name)[0] for name in ("gpt2", "bert", "fused"))
    for model, name, expected in (
        (gpt2, "text-generation", True),
        (gpt2, "text-classification", False),
        (own, "text-generation", False),
        (bert, "feature-extraction", False),
    ):
        assert decodes(SimpleNamespace(name=name, model=model)) is expected


def test_a_model_without_a_cache_has_no_time_per_token(tmp_path):
    asked = Recipe(target="cpu", budget=Budget(speedup=2.0), out=str(tmp_path), shapes=Shapes(phase="decode"))
    with pytest.raises(CompressError, match=r"--phase decode .* text-classification .*leave out --phase"):
        prepare(asked, Silent())
