"""The short form of rewards: what it means, and a sentence for what it cannot mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdm_finetune.rewards.options import Named, parse, typed
from tdm_serve.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("scenes", [Named("scenes")]),
        ("scenes:1.0,aesthetic:0.2", [Named("scenes", 1.0), Named("aesthetic", 0.2)]),
        (" scenes : 2 , jpeg : -1e-3 ", [Named("scenes", 2.0), Named("jpeg", -0.001)]),
        ("jpeg:0", [Named("jpeg", 0.0)]),
        ("ocr()", [Named("ocr")]),
        (
            "http(url=http://127.0.0.1:9000,timeout_s=20):0.5,scenes",
            [Named("http", 0.5, {"url": "http://127.0.0.1:9000", "timeout_s": "20"}), Named("scenes")],
        ),
        ('feedback(path="a, (b):c.jsonl")', [Named("feedback", 1.0, {"path": "a, (b):c.jsonl"})]),
        (r'feedback(path="say \"hi\"\\")', [Named("feedback", 1.0, {"path": 'say "hi"\\'})]),
        ("http(url=http://h/?a=b)", [Named("http", 1.0, {"url": "http://h/?a=b"})]),
    ],
)
def test_short_form(text: str, meant: list[Named]) -> None:
    assert parse(text) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" ", "empty"),
        ("scenes,", "a name is missing"),
        (":1", "a name is missing"),
        ("scenes:", "weight ''"),
        ("scenes:much", "weight 'much'"),
        ("scenes:nan", "weight 'nan'"),
        ("scenes:inf", "weight 'inf'"),
        ("scenes:1:2", "2 weights"),
        ("ocr(reader=tesseract", "parenthesis is not matched"),
        ("ocr)reader(", "parenthesis is not matched"),
        ('feedback(path="a)', "quote is not matched"),
        ("ocr(reader)", "'reader' in the reward"),
        ("ocr(=x)", "no option of the form key=value"),
        ("ocr(reader=a,reader=b)", "'reader' is given twice"),
        ("ocr(reader=a)x:1", "goes on after its options"),
    ],
)
def test_what_is_not_in_the_short_form(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert said in str(caught.value)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(max_size=20), max_size=3))
def test_any_text_survives_in_quotes(options: dict[str, str]) -> None:
    quoted = {key: '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for key, value in options.items()}
    written = "(" + ",".join(f"{key}={value}" for key, value in quoted.items()) + ")"
    assert parse(f"reward{written}:2,other") == [Named("reward", 2.0, options), Named("other")]


@given(st.text(max_size=40))
def test_nothing_else_comes_out_than_parts_or_a_config_error(text: str) -> None:
    try:
        parts = parse(text)
    except ConfigError:
        return
    assert all(part.name for part in parts)


def make(
    path: Path,
    name: str = "x",
    count: int | None = None,
    share: float = 0.5,
    on: bool = False,
    kind: Literal["a", "b"] = "a",
) -> None:
    """Stands for a factory."""


def test_values_get_the_types_of_the_parameters() -> None:
    given = {"path": "12", "name": "7", "count": "3", "share": "2", "on": "true", "kind": "b"}
    expected: dict[str, Any] = {
        "path": Path("12"), "name": "7", "count": 3, "share": 2.0, "on": True, "kind": "b",
    }  # fmt: skip
    result = typed("reward", make, given)
    assert result == expected
    assert {key: type(value) for key, value in result.items()} == {key: type(v) for key, v in expected.items()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs the option 'path'"),
        ({"path": "p", "size": "1"}, "no option 'size'; it takes path (path); name (text, default 'x')"),
        ({"path": "p", "count": "many"}, "count is 'many'"),
        ({"path": "p", "on": "yes"}, "on is 'yes'"),
        ({"path": "p", "kind": "c"}, "kind is 'c', expected 'a' or 'b'"),
        ({"path": "p", "share": "half"}, "share is 'half', expected float"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed("reward", make, given)
    assert said in str(caught.value)


def test_a_factory_may_take_any_option() -> None:
    def anything(**options: str) -> None: ...

    assert typed("reward", anything, {"a": "text"}) == {"a": "text"}
