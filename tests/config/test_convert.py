"""Plain data to the schema and back: nothing lost, nothing coerced away, every problem said at once."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.convert import convert_text, describe_type, from_dict, from_dict_partly, to_dict
from orchestrator.config.schema import AdamWConfig, MuonConfig, RunConfig, TrainConfig
from orchestrator.errors import ConfigErrors


def _values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field of the schema admits."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _instances(typing.cast(type, hint))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(_values(args[0]), max_size=3).map(tuple)
        return st.tuples(*map(_values, args))
    if origin is dict:
        return st.dictionaries(st.text(min_size=1, max_size=5), _values(args[1]), max_size=2)
    if hint is Any:  # an argument of a user's part
        return st.recursive(st.integers() | st.text(max_size=5) | st.none(), lambda one: st.lists(one, max_size=2))
    if args:
        return st.one_of(*map(_values, args))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(10**6), 10**6),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text("abz09 .:-\u00e9'\"", max_size=8),
        type(None): st.none(),
        Any: st.one_of(st.integers(), st.text("ab", max_size=3), st.lists(st.booleans(), max_size=2)),
    }
    return plain[hint]


def _instances(cls: type) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: _values(hint) for name, hint in typing.get_type_hints(cls).items()})


def _problems(data: dict, cls: type = RunConfig) -> dict[str, Any]:
    with pytest.raises(ConfigErrors) as caught:
        from_dict(cls, data)
    return {problem.what.split("'")[1]: problem for problem in caught.value.problems}


@settings(max_examples=25, deadline=None)
@given(_instances(RunConfig))
def test_any_configuration_survives_yaml(config):
    assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_the_optimizer_that_is_named_has_its_own_keys():
    muon = from_dict(RunConfig, {"optim": {"name": "muon", "adamw": {"lr": 1}}}).optim
    assert (type(muon), muon.adamw.lr) == (MuonConfig, 1.0)
    own = from_dict(RunConfig, {"optim": {"_target_": "a.B", "name": "mine", "arguments": {"x": [1, "y", None]}}}).optim
    assert (own._target_, own.arguments) == ("a.B", {"x": [1, "y", None]})
    assert list(_problems({"optim": {"name": "sgd", "betas": [0.9, 0.9]}})) == ["optim.betas"]
    problem = _problems({"optim": {"name": "muno", "lr": 1}})["optim.name"]
    assert problem.fix == "did you mean 'muon'?"
    assert "any with optim._target_" in problem.allowed


def test_to_dict_is_plain_data_all_the_way_down():
    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None)), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    check(to_dict(RunConfig()))


def test_missing_keys_take_their_defaults():
    assert from_dict(RunConfig, {}) == RunConfig()
    assert from_dict(RunConfig, {"optim": {"schedule": {"kind": "wsd"}}}).optim.schedule.warmup_steps == 20


def test_all_problems_at_once_with_their_paths():
    found = _problems(
        {
            "seed": "many",
            "sed": 1,
            "model": {"dim": 1.5, "rope_scaling": {"factr": 2}},
            "optim": {"betas": [0.9, "x"], "schedule": {"kind": "cosin"}},
            "data": {"sources": [{"path": "a"}, {"weight": "heavy"}]},
            "train": 7,
        }
    )
    assert set(found) == {
        "seed",
        "sed",
        "model.dim",
        "model.rope_scaling.factr",
        "optim.betas[1]",
        "optim.schedule.kind",
        "data.sources[1].weight",
        "train",
    }
    for problem in found.values():
        assert problem.got is not None
        assert problem.allowed
        assert problem.fix


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ({"trian": {}}, "did you mean 'train'?"),
        ({"train": {"max_step": 3}}, "did you mean 'train.max_steps'?"),
        ({"optim": {"schedule": {"kind": "cosin"}}}, "did you mean 'cosine'?"),
        ({"hardware": {"devices": "atuo"}}, "did you mean 'auto'?"),
        ({"qwertz": 1}, "remove it"),
        ({"hardware": {"environment": {"OMP_NUM_THREADS": 4}}}, "'\"4\"'"),
    ],
)
def test_what_to_do_about_it(data, hint):
    (problem,) = _problems(data).values()
    assert hint in problem.fix


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", True),
        ("max_steps", 1.0),
        ("max_steps", "10"),
        ("max_steps", None),
        ("deterministic", 1),
        ("deterministic", "true"),
        ("remat", False),
        ("eval_every", "null"),
        ("micro_batch_size", "automatic"),
        ("sample", None),
        ("sample", [1]),
    ],
)
def test_nothing_is_coerced(key, value):
    assert list(_problems({key: value}, TrainConfig)) == [key]


def test_numbers_as_yaml_reads_them():
    # YAML 1.1 reads 1e-3 as text, because it has no dot.
    assert yaml.safe_load("1e-3") == "1e-3"
    assert from_dict(AdamWConfig, {"lr": "1e-3", "eps": 1}).lr == 1e-3
    assert isinstance(from_dict(AdamWConfig, {"eps": 1}).eps, float)
    assert list(_problems({"lr": 10**400}, AdamWConfig)) == ["lr"]


def test_null_is_shown_as_null():
    assert _problems({"seed": None})["seed"].got == "null"
    assert _problems({"optim": {"schedule": None}})["optim.schedule"].got == "null"


def test_partly_keeps_what_is_right():
    config, problems = from_dict_partly(RunConfig, {"seed": 7, "train": {"max_steps": "x", "seq_len": 64}, "foo": 1})
    assert (config.seed, config.train.seq_len, config.train.max_steps) == (7, 64, TrainConfig().max_steps)
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("eval_every", "null", None),
        ("eval_every", "1_000", 1000),
        ("deterministic", "Yes", True),
        ("deterministic", "off", False),
        ("micro_batch_size", "auto", "auto"),
        ("micro_batch_size", "4", 4),
        ("remat", "full", "full"),
    ],
)
def test_words_of_a_command_line(key, text, value):
    assert convert_text(TrainConfig, key, text) == value


@pytest.mark.parametrize(("key", "text"), [("max_steps", "1.5"), ("max_steps", ""), ("deterministic", "perhaps")])
def test_wrong_words_of_a_command_line(key, text):
    with pytest.raises(ConfigErrors, match=f"'{key}' has the wrong type or value"):
        convert_text(TrainConfig, key, text)


def test_types_are_described_in_words():
    hints = typing.get_type_hints(TrainConfig)
    assert describe_type(hints["micro_batch_size"]) == "a whole number or auto"
    assert describe_type(hints["eval_every"]) == "a whole number or null"
    assert describe_type(typing.get_type_hints(AdamWConfig)["betas"]) == "a list of 2: a number, a number"
