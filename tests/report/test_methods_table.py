"""What every site was offered, and why it was given what it was given."""

import numpy as np
import pytest
from support.html_blocks import EVIL, blocks
from support.reports import report
from support.sites import ffn

from compress.cost.model_latency import Whole
from compress.ir import Offer, Option
from compress.pipeline import attribution
from compress.pipeline.pricing import Costs
from compress.report import methods_table, render
from compress.search.closed_loop import CandidateTable, Iteration
from compress.search.knapsack import OptionCosts

SITE = ffn(64)
ROWS = {
    "dense": {64: 4.0, 32: 2.0, 16: 1.0},
    "int8-dynamic": {64: 2.0, 32: 0.9},
    "rank:8": {64: 1.9},
    "block:64x32@0.5": {64: 3.0},
}
LOSSES = {"dense": (0.0, 0.2, 0.5), "int8-dynamic": (0.1, 0.3), "rank:8": (0.05,), "block:64x32@0.5": (0.01,)}
GAINS = {"int8-dynamic": 2.0, "rank:8": 2.1, "block:64x32@0.5": 4 / 3, "2:4": 1.02}


def found(given, untimed=(), others=None):
    costs = Costs(
        whole=Whole(inside_ms=(4.0,), whole_ms=(5.0,)),
        rows={"ffn": ROWS},
        gains={"ffn": GAINS, **(others or {})},
        untimed=untimed,
        source="measured",
    )
    options = costs.options(SITE)
    losses = [LOSSES[option.form] for option in options]
    order = [
        row.index(option) for option in options for row in [[o for o in options if o.form == option.form]]
    ]
    lost = np.array([row[k] for row, k in zip(losses, order, strict=True)])
    menu = OptionCosts(np.array([costs.latency_ms(SITE, option) for option in options]), lost)
    menus = CandidateTable(
        names=("ffn",), kinds=("ffn",), options=(options,), totals=(64,), prior=(menu,), scaled=(menu,),
        whole=costs.whole,
    )  # fmt: skip
    turn = Iteration(limit_ms=1, predicted_ms=1, choices={"ffn": given}, loss=0.0)
    return {offer.form: offer for offer in attribution.offers(costs, menus, turn, SITE)}


def test_every_form_is_told_at_the_time_of_what_was_chosen():
    told = found(Option(precision="int8-dynamic"))
    assert told["int8-dynamic"] == Offer(
        form="int8-dynamic", speedup=2.0, units=64, loss=0.1, chosen=True, why="chosen"
    )
    assert told["structure"] == Offer(
        form="structure", units=32, loss=0.2, why="loses more: 0.2 where the chosen loses 0.1"
    )
    assert told["rank:8"].why == ("loses less alone (0.05, the chosen 0.1), more with the rest of the plan")
    assert told["block:64x32@0.5"] == Offer(
        form="block:64x32@0.5", speedup=4 / 3, why="too slow: 1.33x at most, where 2.00x was needed"
    )
    assert told["dense"].why == "too slow: 1.00x at most, where 2.00x was needed"
    assert told["2:4"] == Offer(form="2:4", speedup=1.02, why="saves no time here: 1.02x")
    assert [offer.form for offer in told.values() if offer.chosen] == ["int8-dynamic"]


def test_a_narrower_choice_asks_more_of_the_others():
    told = found(Option(units=32, precision="int8-dynamic"))
    assert (told["int8-dynamic"].units, told["int8-dynamic"].loss) == (32, 0.3)
    assert told["rank:8"].why == "too slow: 2.11x at most, where 4.44x was needed"
    assert told["structure"].why == "too slow: 4.00x at most, where 4.44x was needed"
    kept = found(Option())
    assert (kept["dense"].chosen, kept["dense"].loss) == (True, 0.0)
    assert kept["structure"].why == "loses more: 0.2 where the chosen loses 0"
    assert kept["structure"].units == 32


def test_what_only_other_sites_take_or_nothing_could_time_is_told_apart():
    told = found(Option(), untimed=("fp8",), others={"heads": {"rank:4": 1.5}})
    assert told["rank:4"].why == "does not fit the shapes of this site"
    assert told["fp8"].why == "could not be timed here"
    assert told["fp8"].loss is None


def offered(**more):
    made = report(layers=1)
    sites = [
        site.model_copy(update={"offers": tuple(found(Option(precision="int8-dynamic")).values()), **more})
        for site in made.sites
    ]
    return made.model_copy(update={"sites": tuple(sites)})


def test_the_table_has_forms_across_and_marks_what_was_chosen():
    table = methods_table.table(offered())
    assert table.forms == ("dense", "structure", "2:4", "block:64x32@0.5", "int8-dynamic", "rank:8")
    assert [cell.text for cell in table.rows[0][2]] == [
        "too slow", "0.200", "no gain, 1.02x", "too slow", "✓ 0.100", "0.0500",
    ]  # fmt: skip
    assert [cell.chosen for cell in table.rows[0][2]].index(True) == 4


def test_a_form_that_one_site_lacks_is_a_dash_there():
    made = offered()
    first, second = made.sites
    less = second.model_copy(update={"offers": second.offers[:2]})
    table = methods_table.table(made.model_copy(update={"sites": (first, less)}))
    assert [cell.text for cell in table.rows[1][2]][2:] == ["-"] * 4


def test_units_alone_need_no_table():
    plain = tuple(o for o in found(Option()).values() if o.form in methods_table.PLAIN)
    assert methods_table.table(offered(offers=plain)) is None
    assert "What each site was offered" not in render.html(offered(offers=plain))
    assert methods_table.table(report()) is None


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_pages_show_it_and_escape_it(kind):
    made = offered()
    text = getattr(render, kind)(made)
    assert "✓ 0.100" in text
    assert "no gain, 1.02x" in text
    if kind == "html":
        (row,) = [b for b in blocks(text) if b.startswith(made.sites[0].name) and "✓" in b]
        assert "loses less alone (0.05, the chosen 0.1)" in text
    else:
        (row,) = [line for line in text.splitlines() if made.sites[0].name in line and "✓" in line]
        head, rule = text.splitlines()[text.splitlines().index(row) - 2 :][:2]
        assert head.count("|") == rule.count("|") == row.count("|") == 9
    evil = tuple(one.model_copy(update={"form": EVIL, "why": EVIL}) for one in made.sites[0].offers)
    bad = getattr(render, kind)(offered(offers=evil))
    assert "<script>alert" not in bad
