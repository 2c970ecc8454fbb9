"""Absurd JSON and trees are refused in one line that names them, whatever their size."""

import json
from typing import Any

import pytest

from engine.files.trees import DamagedError, absurd, lacking, parse_json

LINES = {
    "[" * 100_000: "is nested too deeply",
    '{"a":' * 100_000 + "1" + "}" * 100_000: "is nested too deeply",
    "[" * 101 + "]" * 101: "is nested more than 100 deep",
    '{"a": ' + "9" * 5000 + "}": "holds a number that is too long",
    '{"a": "\\ud800"}': "holds text that is not Unicode",
    "": "is not JSON",
    "{": "is not JSON",
    b"\xff\xfe": "is not UTF-8 text",
}


@pytest.mark.parametrize("text", LINES, ids=lambda text: str(text[:12]))
def test_invalid_json_is_one_line(text: str | bytes) -> None:
    with pytest.raises(DamagedError, match=f"^a file {LINES[text]}.*; fetch it again$") as caught:
        parse_json(text, "a file", remedy="fetch it again")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("tree", [5, None, [], {"a": [1, {"b": "ü"}], "c": 2**70, "d": "\ud83d\ude00"}])
def test_other_json_is_read(tree: Any) -> None:
    tree = json.loads(json.dumps(tree))
    assert parse_json(json.dumps(tree), "a file") == tree
    assert parse_json(json.dumps(tree, ensure_ascii=False).encode(), "a file") == tree
    assert parse_json("[" * 100 + "]" * 100, "a file") is not None


def test_a_tree_that_refers_to_itself_ends() -> None:
    """As YAML's aliases make them: one in a circle, and one of 10^12 values in 13 lists."""
    circle: dict[str, Any] = {}
    circle["a"] = circle
    assert absurd(circle) == "is nested more than 100 deep"
    laughs: list[Any] = [1] * 10
    for _ in range(12):
        laughs = [laughs] * 10
    assert absurd(laughs, most_values=1000) == "holds more than 1000 values"
    assert absurd({"a": [1, 2], "b": 3}, most_values=4) is None
    assert absurd({"a": [1, 2], "b": 3}, most_values=3) == "holds more than 3 values"


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"a": {"b": [{"c": 1}, {"c": 2}]}}, None),
        ({"a": {"b": []}}, None),
        ({"a": {"b": [{"c": 1}, {"c": "x"}]}}, "in a.b, c is 'x'"),
        ({"a": {"b": [{"c": 1}, {}]}}, "in a.b, it has no c"),
        ({"a": {"b": [1]}}, "in a.b, it holds no keys"),
        ({"a": {"b": {"c": 1}}}, "a.b is {'c': 1}"),
        ({"a": {}}, "it has no a.b"),
    ],
)
def test_items_of_a_list_have_a_shape_too(tree: Any, said: str | None) -> None:
    assert lacking(tree, {"a.b[].c": int}) == said
