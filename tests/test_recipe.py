from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import recipe
from compress.errors import CompressError
from compress.ir import BUDGETS, Budget

ASK = {"target": "cpu", "budget": Budget(speedup=2)}


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def refusal(path, overrides=None):
    with pytest.raises(CompressError) as found:
        recipe.read(path, overrides or {})
    return str(found.value)


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("speedup", "2x", 2.0),
        ("speedup", " 1.5 X ", 1.5),
        ("speedup", "1.01", 1.01),
        ("latency_ms", "5", 5.0),
        ("latency_ms", ".5 ms", 0.5),
        ("energy_mj", "20mJ", 20.0),
        ("power_w", "15w", 15.0),
        ("size_mb", "30 MB", 30.0),
    ],
)
def test_a_budget_is_a_number_with_its_unit_or_without(name, words, value):
    assert recipe.parse_budget(name, words) == Budget(**{name: value})


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("speedup", "fast", "--speedup 'fast' is not a budget; write for example --speedup 2x"),
        ("speedup", "2ms", "is not a budget"),
        ("speedup", "-2x", "is not a budget"),
        ("speedup", "2.x", "is not a budget"),
        ("speedup", "", "is not a budget"),
        ("speedup", "1x", "--speedup 1x asks for no gain; a speedup is above 1"),
        ("speedup", "0.5", "asks for no gain"),
        ("latency_ms", "5s", "--latency-ms '5s' is not a budget; write for example --latency-ms 5"),
        ("latency_ms", "0", "--latency-ms 0 must be above zero"),
        ("size_mb", "30 GB", "--size-mb '30 GB' is not a budget; write for example --size-mb 30"),
    ],
)
def test_other_words_are_no_budget_and_the_message_shows_one(name, words, message):
    with pytest.raises(CompressError) as found:
        recipe.parse_budget(name, words)
    assert message in str(found.value)


def test_every_budget_has_a_unit():
    assert set(recipe.UNITS) == set(BUDGETS)


def test_words_alone_make_a_recipe_with_defaults():
    found = recipe.read(None, ASK)
    assert found == recipe.Recipe(target="cpu", budget=Budget(speedup=2))
    assert (found.out, found.model, found.max_drop) == ("out", None, None)
    assert (found.shapes.batch, found.shapes.tokens, found.bench.threads) == (1, 32, 1)


def test_words_win_over_the_file_and_only_where_they_say_something(tmp_path):
    path = written(
        tmp_path,
        'target = "a100"\nout = "there"\n[budget]\nspeedup = 2\n[shapes]\nbatch = 4\ntokens = 9\n',
    )
    found = recipe.read(path, {"target": "cpu", "out": None, "shapes": {"tokens": 7}})
    assert (found.target, found.out) == ("cpu", "there")
    assert found.shapes == recipe.Shapes(batch=4, tokens=7)
    assert recipe.read(path, {"budget": Budget(size_mb=3)}).budget == Budget(size_mb=3)
    assert recipe.read(path, {"search": {"seed": 5}}).search.seed == 5


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("target", "no target was given; add for example --target cpu"),
        ("budget", "no budget was given; add for example --speedup 2x"),
    ],
)
def test_a_target_and_a_budget_must_be_given(missing, message):
    assert refusal(None, {key: value for key, value in ASK.items() if key != missing}) == message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('targt = "cpu"\n', 1, "unknown key 'targt'; did you mean 'target'? Known:"),
        (
            "\n[shapes]\nbatch = 1\ntoken = 4\n",
            4,
            "unknown key 'token' in [shapes]; did you mean 'tokens'?",
        ),
        ("\n[serch]\nseed = 1\n", 2, "unknown key 'serch'; did you mean 'search'?"),
        ("\n# a comment\n[bench] # more\nthreads = 0\n", 4, "'threads' in [bench]"),
        ("shapes = {batch = 0}\n", 1, "'batch' in [shapes]"),
        ("shapes.batch = 0\n", 1, "'batch' in [shapes]"),
        ("[calibration]\nbatch = 4\n\n[shapes]\nbatch = 0\n", 5, "'batch' in [shapes]"),
        ("max_drop = -1\n", 1, "'max_drop' Input should be greater than or equal to 0 (found -1)"),
        ('\n[search]\nseed = "x"\n', 3, "found 'x'"),
        ("zzz = 1\n", 1, "unknown key 'zzz'. Known: "),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_nearest_key(tmp_path, text, line, message):
    path = written(tmp_path, text)
    found = refusal(path, ASK)
    assert f"{path} line {line}: " in found
    assert message in found


def test_a_budget_that_is_not_one_is_explained(tmp_path):
    path = written(tmp_path, 'target = "cpu"\n[budget]\nspeedup = 2\nsize_mb = 3\n')
    found = refusal(path)
    assert f"{path} line 2: 'budget' a budget is exactly one of" in found
    assert "Value error" not in found


def test_the_keys_known_in_a_table_are_those_of_the_table(tmp_path):
    found = refusal(written(tmp_path, "[bench]\nzzz = 1\n"), ASK)
    assert found.endswith("Known: block_ms, blocks, rounds, threads")


def test_a_mistake_in_words_has_no_line():
    assert refusal(None, {**ASK, "task": "poetry"}).startswith("request: 'task' ")


@pytest.mark.parametrize("content", [b"target = ", b"\xff\xfe\x00", b"target = 'a'\ntarget = 'b'\n"])
def test_what_is_not_toml_is_refused(tmp_path, content):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    assert f"{path} is not TOML" in refusal(path, ASK)


def test_a_recipe_that_cannot_be_read_says_why(tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "absent.toml", ASK)
    assert "cannot be read (Is a directory)" in refusal(tmp_path, ASK)


def test_a_missing_key_without_a_default_is_named():
    from pydantic import ValidationError

    from compress.ir import Slice

    with pytest.raises(ValidationError) as found:
        Slice.model_validate({"tensor": "w", "dim": 0})
    assert recipe.explain(found.value, Slice, "sites.json") == (
        "sites.json: 'width' is missing; it has no default"
    )


TEXT = st.text("ab \"'\\#=[]{}.\né漢😀", max_size=12)


@given(
    out=TEXT,
    model=st.none() | TEXT,
    max_drop=st.none() | st.floats(0, 1),
    units=st.none() | st.lists(st.floats(0, 1), max_size=3),
    uniform=st.booleans(),
    budget=st.sampled_from(BUDGETS),
    amount=st.floats(1e-3, 1e6),
)
@settings(max_examples=30, deadline=None)
def test_a_recipe_survives_toml(tmp_path_factory, out, model, max_drop, units, uniform, budget, amount):
    asked = recipe.Recipe(
        target="cpu",
        budget=Budget(**{budget: amount}, rate_hz=7.0 if budget == "power_w" else None),
        out=out,
        model=model,
        max_drop=max_drop,
        options=recipe.Options(units=units, uniform=uniform, kinds=("ffn",)),
        search=recipe.Search(seed=3),
    )
    path = tmp_path_factory.mktemp("toml") / "r.toml"
    path.write_text(recipe.to_toml(asked), encoding="utf-8")
    assert recipe.read(path, {}) == asked


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "a\tb", "é·漢"])
def test_any_text_survives_toml(tmp_path, text):
    asked = recipe.Recipe(target="cpu", budget=Budget(speedup=2), data=text)
    path = Path(tmp_path, "r.toml")
    path.write_text(recipe.to_toml(asked), encoding="utf-8")
    assert recipe.read(path, {}) == asked


def test_a_word_that_is_no_choice_is_answered_with_the_nearest():
    asked = {**ASK, "options": {"moves": ["structure", "blocks"]}}
    assert refusal(None, asked) == (
        "request: 'moves' in [options] cannot be 'blocks'; did you mean 'block'? Known: structure, width, "
        "int8, int8-static, int4, fp8, block, lowrank, 2:4"
    )
    assert refusal(None, {**ASK, "task": "zzz"}).startswith("request: 'task' cannot be 'zzz'. Known: text-")
