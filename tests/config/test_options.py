"""`key=value` options of the verbs that are not a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigErrors


@dataclass(frozen=True)
class Options:
    output: str = option(help="where to")
    input: tuple[str, ...] = option(help="where from")
    size: int | Literal["auto"] = option("auto", help="how much")
    rate: float | None = option(None, help="how fast")
    loud: bool = option(False, help="say more")


def _problems(*argv: str) -> list:
    with pytest.raises(ConfigErrors) as caught:
        parse_options(Options, argv)
    return caught.value.problems


def test_words_become_values():
    options = parse_options(Options, ["output=a=b", "input=x,y", "size=3", "rate=1e-3", "loud=on"])
    assert options == Options(output="a=b", input=("x", "y"), size=3, rate=1e-3, loud=True)


def test_what_is_left_out_takes_its_default():
    assert parse_options(Options, ["output=o", "input=i"]) == Options("o", ("i",))


def test_all_mistakes_at_once():
    problems = _problems("outptu=x", "verbose", "size=big", "loud=perhaps")
    assert [str(problem.got) for problem in problems] == ["outptu=x", "verbose", "big", "perhaps"]
    assert "did you mean 'output'?" in problems[0].fix
    assert all("output, input, size, rate, loud" in problem.allowed for problem in problems[:2])


def test_missing_ones_say_what_they_are_for():
    problems = _problems("size=3")
    assert [problem.what for problem in problems] == ["'output' is missing", "'input' is missing"]
    assert problems[0].fix == "add output=...: where to"


def test_help_lists_every_option_with_its_default():
    lines = describe_options(Options).splitlines()
    assert [line.split("=")[0].strip() for line in lines] == ["output", "input", "size", "rate", "loud"]
    assert [line.rpartition("[")[2] for line in lines[2:]] == ["auto]", "none]", "False]"]
    assert (
        len({line.index(word) for line, word in zip(lines, ("where", "where", "how", "how", "say"), strict=True)}) == 1
    )


def test_words_without_a_key_are_for_the_positions():
    parse = lambda *argv: parse_options(Options, argv, ("output", "input"))  # noqa: E731
    assert parse("a", "b") == Options("a", ("b",))
    assert parse("input=b", "a") == parse("a", "input=b") == Options("a", ("b",))
    assert parse("runs/lr=0.1/x", "b").output == "runs/lr=0.1/x", "a path may have an = in it"
    with pytest.raises(ConfigErrors, match="there is no option 'inputs'"):
        parse("a", "inputs=b")
    with pytest.raises(ConfigErrors, match="written key=value"):
        parse("a", "b", "c")
    with pytest.raises(ConfigErrors, match="written key=value"):
        parse("--verbose", "a", "b")
    with pytest.raises(ConfigErrors, match="'output' is given more than once"):
        parse("output=a", "input=b", "output=c")
