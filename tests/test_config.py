"""Settings: what is read from `--set`, what survives TOML, and what a wrong value is answered."""

from typing import Literal

import pytest
from pydantic import Field

from lamina.config import Settings, assignments, read_toml, write_toml
from lamina.errors import ConfigError


class Inner(Settings):
    rate: float = Field(0.5, ge=0, le=1, description="a share")
    sizes: list[int] = Field(default_factory=lambda: [3, 2], description="a list")


class Outer(Settings):
    name: str = Field(description="has no default")
    steps: int = Field(10, ge=1, description="bounded below")
    slope: float = Field(1.0, gt=0, description="open below")
    share: float = Field(0.25, le=1, description="bounded above")
    part: float = Field(0.25, lt=1, description="open above")
    rule: Literal["a", "b"] = Field("a", description="a choice")
    flag: bool = Field(False, description="a switch")
    inner: Inner = Field(default_factory=Inner, description="settings inside settings")
    perhaps: int | None = Field(None, description="may be missing")


# ── assignments ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=3", 3),
        ("x=3.0", 3.0),
        ("x=3e-3", 0.003),
        ("x=true", True),
        ('x="3"', "3"),
        ("x=[5, 5]", [5, 5]),
        ("x=odd", "odd"),
        ("x=timm:vit_base.a=b", "timm:vit_base.a=b"),
        (" x = odd ", "odd"),
        ("x=", ""),
    ],
)
def test_a_value_is_read_as_toml_or_else_as_text(text, value):
    found = assignments([text])
    assert found == {"x": value} and type(found["x"]) is type(value)


def test_dots_nest_and_the_last_word_counts():
    assert assignments(["a.b.c=1", "a.b.d=2", "a.e=3", "a.b.c=4", "f=5"]) == {
        "a": {"b": {"c": 4, "d": 2}, "e": 3},
        "f": 5,
    }


@pytest.mark.parametrize("text", ["lr", "=3", "a.=3", ".a=3", "a..b=3", ""])
def test_an_option_without_name_or_value_is_refused(text):
    with pytest.raises(ConfigError) as error:
        assignments([text])
    assert str(error.value) == f"--set takes name=value; got {text!r}"


def test_a_setting_inside_a_plain_value_is_refused():
    with pytest.raises(ConfigError) as error:
        assignments(["a=1", "a.b=2"])
    assert str(error.value) == "--set 'a.b=2': 'a' was already given a plain value"


# ── TOML ─────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_come_back_from_toml_as_they_were(tmp_path):
    settings = Outer(name='ü\n"x"', slope=1e-7, flag=True, inner=Inner(rate=1.0, sizes=[7]), perhaps=3)
    write_toml(tmp_path / "s.toml", settings.model_dump())
    assert Outer.from_toml(tmp_path / "s.toml") == settings
    assert Outer.from_toml(tmp_path / "s.toml").inner.sizes == [7]


def test_none_is_left_out_of_toml_at_every_depth_and_comes_back_as_the_default(tmp_path):
    write_toml(tmp_path / "s.toml", {"name": "x", "perhaps": None, "inner": {"rate": 0.0, "gone": None}})
    assert read_toml(tmp_path / "s.toml") == {"name": "x", "inner": {"rate": 0.0}}
    assert Outer.from_toml(tmp_path / "s.toml") == Outer(name="x", inner=Inner(rate=0.0))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_toml(tmp_path / "s.toml")
    assert str(error.value) == f"{tmp_path / 's.toml'} cannot be read: No such file or directory"


@pytest.mark.parametrize("contents", [b"a = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_said(tmp_path, contents):
    (tmp_path / "s.toml").write_bytes(contents)
    with pytest.raises(ConfigError) as error:
        read_toml(tmp_path / "s.toml")
    start, _, reason = str(error.value).partition(" is not valid TOML: ")
    assert start == str(tmp_path / "s.toml") and reason and "\n" not in reason


def test_changed_is_what_differs_from_the_defaults():
    assert Outer(name="x", steps=10, slope=2.0).changed() == {"name": "x", "slope": 2.0}


# ── sentences ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Outer.name has no default and was not given"),
        ({"name": 3}, "Outer.name must be text; got 3 (int)"),
        ({"steps": 0}, "Outer.steps must be at least 1; got 0"),
        ({"steps": 2.5}, "Outer.steps must be a whole number; got 2.5 (float)"),
        ({"steps": "2"}, "Outer.steps must be a whole number; got '2' (str)"),
        ({"steps": True}, "Outer.steps must be a whole number; got True (bool)"),
        ({"slope": 0.0}, "Outer.slope must be above 0.0; got 0.0"),
        ({"slope": float("nan")}, "Outer.slope must be a finite number; got nan"),
        ({"slope": float("inf")}, "Outer.slope must be a finite number; got inf"),
        ({"slope": "steep"}, "Outer.slope must be a number; got 'steep' (str)"),
        ({"share": 2}, "Outer.share must be at most 1.0; got 2"),
        ({"part": 1.0}, "Outer.part must be below 1.0; got 1.0"),
        ({"rule": "c"}, "Outer.rule must be 'a' or 'b'; got 'c'"),
        ({"flag": 1}, "Outer.flag must be true or false; got 1 (int)"),
        ({"inner": {"rate": 2.0}}, "Inner.rate must be between 0 and 1; got 2.0"),
        ({"inner": {"rat": 1.0}}, "Inner: no setting is called 'rat'; did you mean 'rate'? Known: rate, sizes"),
        (
            {"slop": 1.0},
            "Outer: no setting is called 'slop'; did you mean 'slope'? Known: flag, inner, name, part, perhaps, rule, "
            "share, slope, steps",
        ),
        (
            {"zzz": 1.0},
            "Outer: no setting is called 'zzz'. Known: flag, inner, name, part, perhaps, rule, share, slope, steps",
        ),
    ],
)
def test_a_wrong_value_is_answered_by_the_setting_the_rule_and_what_was_given(values, message):
    with pytest.raises(ConfigError) as error:
        Outer(**({"name": "x"} | values if values else {}))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "values", [{"inner": 3}, {"inner": {"sizes": ["a"]}}, {"inner": {"sizes": 3}}, {"perhaps": "x"}]
)
def test_any_other_wrong_value_is_answered_in_one_line_that_begins_with_the_setting(values):
    with pytest.raises(ConfigError) as error:
        Outer(name="x", **values)
    (name,) = values
    assert str(error.value).startswith((f"Outer.{name}", "Inner.sizes")) and "\n" not in str(error.value)
    assert "; got " in str(error.value)


def test_whole_numbers_do_for_numbers():
    assert Outer(name="x", slope=2).slope == 2.0


def test_settings_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        Outer(name="x").steps = 3
