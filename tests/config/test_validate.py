"""What the types cannot say. Every rule has an example that breaks it."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config import optimizers
from orchestrator.config import validate as rules
from orchestrator.config.compose import compose
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import OptimConfig, RunConfig
from orchestrator.config.validate import check_ranges, validate

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))


def _with(**changes: Any) -> RunConfig:
    """The defaults with dotted keys (`__` for the dot) changed."""
    data = to_dict(RunConfig())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    return from_dict(RunConfig, data)


def _said(config: RunConfig) -> list[str]:
    return [problem.what for problem in validate(config)]


def _change(key: str, value: Any) -> RunConfig:
    return _with(**{key.replace(".", "__"): value})


def test_the_defaults_pass():
    assert validate(RunConfig()) == []
    assert validate(compose().config) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_model_passes(preset):
    data = yaml.safe_load((Path(__file__).parents[2] / "conf" / "model" / f"{preset}.yaml").read_text())
    data.pop("defaults", None)
    assert validate(_with(model={**to_dict(RunConfig())["model"], **data})) == []


@pytest.mark.parametrize("key", [key for key, (least, _) in rules._COUNTS.items() if least >= 0])
def test_counts_have_a_least_and_a_largest(key):
    """A configuration can come from a stranger: no number of it may overflow a counter or take all memory."""
    least, largest = rules._COUNTS[key]
    for value, allowed in (
        (least - 1, f"{least} or more"),
        (-(1 << 70), f"{least} or more"),
        (largest + 1, f"{least} to {largest}"),
        (9999999999999999999999, f"{least} to {largest}"),
    ):
        said = [problem for problem in check_ranges(_change(key, value)) if f"'{key}'" in problem.what]
        assert [(problem.got, problem.allowed) for problem in said] == [(value, allowed)]
        assert f"set {key}=" in said[0].fix
    for value in (least, largest):
        assert not check_ranges(_change(key, value))


@pytest.mark.parametrize("key", [*rules._ABOVE_ZERO, *rules._NOT_NEGATIVE])
@pytest.mark.parametrize("value", [-1e-9, -1.0, math.nan, math.inf, -math.inf, 1e39, 1e308])
def test_numbers_are_finite_and_fit_fp32(key, value):
    assert _said(_change(key, value)) == [f"'{key}' is out of range"]


@pytest.mark.parametrize("key", rules._ABOVE_ZERO)
def test_some_are_above_zero(key):
    assert _said(_change(key, 0.0)) == [f"'{key}' is out of range"]


@pytest.mark.parametrize("key", rules._NOT_NEGATIVE)
def test_some_may_be_zero(key):
    assert not check_ranges(_change(key, 0.0))


@pytest.mark.parametrize("bad", ["\0", "\x1b[31m", "\n", "\x7f", "\x9b", "\u2028", "\u202e", "\ud800"])
@pytest.mark.parametrize("key", ["name", "runs_dir", "checkpoint.dir", "data.sources", "data.text_field", "model.name"])
def test_text_has_nothing_that_a_terminal_or_a_file_system_obeys(key, bad):
    value = [{"path": f"a{bad}b", "weight": 1.0}] if key == "data.sources" else f"a{bad}b"
    (problem,) = check_ranges(_change(key, value))
    assert f"U+{ord(bad[0]):04X}" in problem.got
    assert str(problem).isascii()


def test_text_of_people_is_fine():
    for name in ("größe", "实验-7", "a b", "run_1.2", "café"):
        assert not validate(_with(name=name, runs_dir=f"/x/{name}\u3000y"))
    assert not validate(_with(train__sample__prompt="def f():\n\treturn 'é'\r\n"))
    assert _said(_with(train__sample__prompt="\ud800"))
    assert _said(_with(name="é" * 101))


def test_a_scaling_does_not_divide_by_nothing():
    for scaling, theta in (
        ({"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}, 1e4),
        ({"kind": "yarn", "beta_fast": 1.0, "beta_slow": 1.0}, 1e4),
        ({"kind": "yarn"}, 1.0),
    ):
        assert len(validate(_with(model__rope_scaling=scaling, model__rope_theta=theta))) == 1


def test_a_place_that_goes_with_the_process_keeps_no_checkpoints():
    (problem,) = validate(_with(checkpoint__dir="memory://x"))
    assert "would be gone" in problem.what


@pytest.mark.parametrize("key", ["model.dropout", "data.validation_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_fractions_are_below_one(key, value):
    assert not validate(_change(key, 0.0))
    assert _said(_change(key, value)) == [f"'{key}' is out of range"]


@pytest.mark.parametrize("key", ["min_lr_ratio", "decay_fraction", "warmup_fraction"])
def test_ratios_are_zero_to_one(key):
    for value in (0.0, 1.0):
        assert not validate(_change(f"optim.schedule.{key}", value))
    for value in (-0.01, 1.01, math.nan):
        assert _said(_change(f"optim.schedule.{key}", value)) == [f"'optim.schedule.{key}' is out of range"]


def test_betas_are_named_one_by_one():
    assert _said(_with(optim__betas=[1.0, -0.5])) == [f"'optim.betas[{i}]' is out of range" for i in (0, 1)]


def test_sources_are_some_and_weigh_something():
    assert _said(_with(data__sources=[])) == ["'data.sources' is out of range"]
    sources = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 0.0}]
    assert _said(_with(data__sources=sources)) == ["'data.sources[1].weight' is out of range"]


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", "/"])
def test_a_run_is_named_like_one_folder(name):
    assert _said(_with(name=name)) == ["'name' is out of range"]


def test_widths_that_do_not_divide_show_the_numbers():
    (problem,) = validate(_with(model__dim=130))
    assert (problem.what, problem.got) == ("model.dim does not divide by model.heads", "130 / 4")
    assert validate(_with(model__dim=130, model__head_dim=32)) == []
    (problem,) = validate(_with(model__kv_heads=3))
    assert (problem.what, problem.got) == ("model.heads does not divide by model.kv_heads", "4 / 3")


def test_rope_wants_an_even_head():
    (problem,) = validate(_with(model__head_dim=33))
    assert problem.got == "head_dim 33"
    assert validate(_with(model__head_dim=33, model__positions="learned")) == []


def test_a_sequence_fits_the_model():
    assert _said(_with(train__seq_len=1)) == ["'train.seq_len' is out of range"]
    assert validate(_with(train__seq_len=2048)) == []
    (problem,) = validate(_with(train__seq_len=4096))
    assert (problem.got, problem.allowed) == ("train.seq_len=4096", "at most model.max_seq_len=2048")


@pytest.mark.parametrize(("tokens", "near"), [(4097, 4096), (255, 256), (100, 256), (0, 256), (-512, 256), (640, 512)])
def test_a_batch_is_whole_sequences(tokens, near):
    (problem,) = validate(_with(train__global_batch_tokens=tokens))
    assert f"{tokens} / train.seq_len=256" in problem.got
    assert problem.fix == f"set train.global_batch_tokens={near}"
    assert validate(_with(train__global_batch_tokens=near)) == []


def test_all_at_once():
    config = _with(optim__lr=-1.0, model__kv_heads=3, train__global_batch_tokens=100, name="")
    assert len(validate(config)) == 4


def test_every_numeric_key_has_a_rule():
    """A new number of the schema is either given a rule or named here."""
    without = {f"optim.schedule.{key}" for key in ("min_lr_ratio", "decay_fraction", "warmup_fraction")}
    without |= {"model.init_cutoff"}
    without |= {f"train.lora.{key}" for key in ("rank", "alpha", "dropout")}  # check_lora_ranges
    ruled = {
        *rules._COUNTS,
        *rules._NOT_NEGATIVE,
        *rules._ABOVE_ZERO,
        "model.dropout",
        "data.validation_fraction",
        "train.ema.decay",
    }

    def numbers(value: Any, prefix: str = ""):
        for field in dataclasses.fields(value):
            item, key = getattr(value, field.name), prefix + field.name
            if dataclasses.is_dataclass(item):
                yield from numbers(item, f"{key}.")
            elif any(word in str(field.type) for word in ("int", "float")) and not any(
                word in str(field.type) for word in ("tuple", "Literal")
            ):
                yield key

    without |= {key for key in numbers(RunConfig()) if key.startswith("islands.")}  # check_islands
    found = set(numbers(RunConfig()))
    assert {key for key in found if not key.startswith("optim.") or "schedule" in key} == ruled | without
    for kind in typing.get_args(OptimConfig):
        of_schedule = {f"optim.{key}" for key in numbers(kind(), "") if "schedule" in key}
        assert of_schedule <= ruled | without
        own = {key.removeprefix("adamw.").removeprefix("base.") for key in numbers(kind(), "") if "schedule" not in key}
        assert own <= set(optimizers._RANGES)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (
            {"name": "muon", "ns_steps": 100, "momentum": 1.0, "adamw": {"lr": 0.0}},
            ["momentum", "ns_steps", "adamw.lr"],
        ),
        ({"name": "muon", "adamw": {"betas": [0.9, 1.0]}}, ["adamw.betas[1]"]),
        ({"name": "adafactor", "beta2_decay": 0.8, "clip_threshold": 0.5}, ["beta2_decay", "clip_threshold"]),
        ({"name": "adafactor", "eps_update": 0.0, "eps_parameter": -1.0}, ["eps_update", "eps_parameter"]),
        ({"name": "sgd", "lr": math.nan, "weight_decay": -1}, ["lr", "weight_decay"]),
        ({"_target_": "a.B", "lr": math.inf}, ["lr"]),
    ],
)
def test_ranges_of_each_optimizer(data, keys):
    config = from_dict(RunConfig, {"optim": data})
    assert _said(config) == [f"'optim.{key}' is out of range" for key in keys]


def test_what_an_optimizer_cannot_be():
    def said(**data: Any) -> list[str]:
        return _said(from_dict(RunConfig, {"optim": data}))

    assert said(name="sgd", nesterov=True, momentum=0.0) == ["Nesterov's step looks ahead along a momentum"]
    assert not said(name="sgd", nesterov=True)
    for target in ("", "???"):
        assert said(_target_=target) == ["'optim._target_' names no optimizer"]
    assert said(_target_="a.B", arguments={"lr": 1}) == ["'optim.arguments.lr' is not an argument to give"]


def test_a_statement_needs_a_key():
    assert _said(_with(checkpoint__statement=True)) == ["a statement that nobody has signed proves nothing"]
    for key in ("signing_key", "model_signing_key"):
        assert _said(_with(checkpoint__statement=True, **{f"checkpoint__{key}": "key.pem"})) == []
