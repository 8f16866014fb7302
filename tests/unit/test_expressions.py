"""The tables' expression language: what it computes, what it does not let through, what its errors say."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ConfigError, ShardwrightError, TableError
from shardwright.planner.expressions import parse

FIELDS = {"a": 7, "b": 2, "flag": True, "name": "silu", "nothing": None, "layer": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a * b + 1 - -a", 22),
        ("a // b", 3),
        ("a % b", 1),
        ("(a + 1) * b", 16),
        ("a > b and not flag", False),
        ("a <= 7 or undefined_but_never_asked", True),
        ("1 < b <= 2", True),
        ("name == 'silu'", True),
        ("name in ('gelu', 'silu')", True),
        ("name not in ['gelu']", True),
        ("a if flag else b", 7),
        ("nothing == none", True),
        ("true", True),
        ("false or none", None),
        ("layer % 2 == 1", True),
        ("1e-6", 1e-6),
        ("'a.b()'", "a.b()"),
        (12, 12),
        (True, True),
        (False, False),
        (" a ", 7),
        ("a +\n b" if False else "(a +\n b)", 9),
    ],
)
def test_what_it_computes(text, value):
    expression = parse(text)
    fields = FIELDS | ({"undefined_but_never_asked": 0} if "undefined" in str(text) else {})
    assert expression(fields) == value and type(expression(fields)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "f(a)", "print('x')", "__import__('os')", "a.real", "a.__class__", "''.join('a')", "x[0]", "a[b]", "[x for x in (1, 2)]",
        "{x for x in (1,)}", "{1: 2}", "{1, 2}", "(x for x in (1,))", "lambda: 1", "a := 1", "(a := 1)", "f'{a}'", "*a", "a ** b",
        "a << 60", "a @ b", "a / b", "~a", "+a", "a | b", "a & b", "a ^ b", "a is b", "a is not none", "await a", "yield a", "....x",
        "a; b", "a = 1", "import os", "", "a +", "(", "\0", "a b", "1 2", "def f(): pass", "'unfinished", "(*a, 1)",
        "'a' * b", "b * (1, 2)", "[1] + [2]", "'%s' % a", "-'a'", "('a' if b else 'c') * a", "(a or 'c') * 3", "true + 'a'",
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_its_text(text):
    with pytest.raises(TableError) as refused:
        parse(text, "my.toml [[tensor]] 3 when")
    assert refused.value.file == "my.toml [[tensor]] 3 when" and refused.value.actual == repr(text)


def test_length_and_depth_are_limited():
    with pytest.raises(TableError, match="longer than 500"):
        parse("a + " * 200 + "a")
    with pytest.raises(TableError):
        parse("(" * 240 + "a" + ")" * 240)


def test_names_are_the_fields_it_needs():
    assert parse("hidden_size // heads if layer > 2 else true").names == {"hidden_size", "heads", "layer", "true"}


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match=r"'a \+ missing' needs the field 'missing'.*Known: a, b, flag"):
        parse("a + missing")(FIELDS)


@pytest.mark.parametrize(
    "text",
    ["nothing * 2", "a // (b - 2)", "a % (b - 2)", "name + 1", "a < name", "a in b", "-name", "name * a", "a * (b if flag else name)"],
)
def test_what_cannot_be_computed_says_the_values(text):
    with pytest.raises(ConfigError, match="cannot be computed") as refused:
        parse(text)(FIELDS)
    assert repr(text)[1:-1] in str(refused.value)


def test_fields_cannot_hide_builtins():
    """Evaluation sees the given fields and nothing else."""
    with pytest.raises(ConfigError):
        parse("open")({})
    assert parse("open")({"open": 3}) == 3


@settings(max_examples=300, derandomize=True)
@given(st.text(alphabet="ab01 +-*/%()[]{}.,:=<>'\"_\\n\n", max_size=30))
def test_any_text_gives_a_value_or_our_error(text):
    with contextlib.suppress(ShardwrightError):
        parse(text)({"a": 3, "b": 2})


@pytest.mark.parametrize("text", ["9**9**9", "'a' * 999999999999", "'a' * 99 * 99999999 * 9", "(1,) * 99999999999"])
def test_no_text_takes_the_machine_down(text):
    with pytest.raises((TableError, ConfigError)):
        parse(text)({})
