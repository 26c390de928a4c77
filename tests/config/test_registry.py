"""Parts that a user names: what is found and made, what is refused, and that nothing stored is ever imported."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from orchestrator.config import registry
from orchestrator.config.registry import OwnPart, refuse_stored, targets
from orchestrator.errors import ConfigError, ConfigErrors

MODULE = """
class Base: ...
class Widget(Base):
    def __init__(self, size, *, every=1):
        if size < 0:
            raise ValueError("size is below zero")
        self.size, self.every = size, every
class Other: ...
def factory(**arguments):
    return Widget(1)
def wrong(*given, **arguments):
    return Other()
CONSTANT = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine_parts` of the user's; all of it may be imported."""
    (tmp_path / "mine_parts.py").write_text(MODULE)
    (tmp_path / "mine_broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "mine_raises.py").write_text("x = 1\nraise RuntimeError('on import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_permitted", set())
    names = ("Widget", "Other", "factory", "wrong", "CONSTANT", "Wigdet")
    registry.permit([f"mine_parts.{name}" for name in names])
    registry.permit(["mine_broken.X", "mine_raises.X", "no_such_module.X", "mine_parts.sub.X"])
    yield tmp_path
    for name in ("mine_parts", "mine_broken", "mine_raises"):
        sys.modules.pop(name, None)


def _base():
    return sys.modules["mine_parts"].Base


def test_a_part_is_made_with_its_arguments_and_those_of_the_product(mine):
    part = OwnPart.of("callback", {"_target_": "mine_parts.Widget", "every": 5}, "callbacks[0]")
    part.check(7)
    made = part.make(7, expected=None)
    assert (made.size, made.every) == (7, 5)
    assert OwnPart("callback", "mine_parts.factory", "callbacks[1]", {"a": 1}).make(expected=_base()).size == 1


WRONG = {
    "no such module": ("no_such_module.X", {}, "there is no module 'no_such_module'"),
    "no such submodule": ("mine_parts.sub.X", {}, "mine_parts.sub"),
    "no such name": ("mine_parts.Wigdet", {}, "did you mean 'mine_parts.Widget'?"),
    "raises on import": ("mine_raises.X", {}, "mine_raises.py"),
    "imports what is missing": ("mine_broken.X", {}, "nothing_of_that_name"),
    "not callable": ("mine_parts.CONSTANT", {}, "cannot be called"),
    "a class of another kind": ("mine_parts.Other", {}, "mine_parts.Base"),
    "gives another kind": ("mine_parts.wrong", {}, "gives no callback"),
    "unknown argument": ("mine_parts.Widget", {"evry": 2}, "did you mean 'every'?"),
    "raises": ("mine_parts.Widget", {"every": 1}, "size is below zero"),
    "a part within a part": ("mine_parts.Widget", {"every": {"_target_": "os.getcwd"}}, "plain data"),
    "nested convention": ("mine_parts.Widget", {"_partial_": True}, "plain data"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_clear_error(mine, name):
    named, arguments, said = WRONG[name]
    import mine_parts  # type: ignore[import-not-found]

    with pytest.raises(ConfigError) as caught:
        OwnPart("callback", named, "callbacks[0]", arguments).make(-1, expected=mine_parts.Base)
    assert said in str(caught.value)
    assert f"callbacks[0]._target_={named}: " in str(caught.value)


def test_an_error_in_the_users_code_keeps_the_place_where_it_was_raised(mine):
    with pytest.raises(ConfigError, match=r"mine_parts\.py") as caught:
        OwnPart("callback", "mine_parts.Widget", "callbacks[0]").make(-1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "registry.py" not in str(caught.value)


def test_entries_that_name_nothing_are_refused(mine):
    for entry in ({}, {"_target_": None}, {"_target_": 3}, "mine_parts.Widget", ["x"]):
        with pytest.raises(ConfigError, match="_target_"):
            OwnPart.of("callback", entry, "callbacks[0]")


def test_an_installed_entry_point_is_found_by_name(mine, monkeypatch):
    entry = EntryPoint("widget", "mine_parts:Widget", "orchestrator.callbacks")
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [entry] if group == entry.group else [])
    monkeypatch.setattr(registry, "_permitted", set())  # it is installed: nobody has to name it again
    assert OwnPart("callback", "widget", "callbacks[0]").make(2).size == 2
    with pytest.raises(ConfigError, match="one of the installed: widget"):
        OwnPart("callback", "wigdet", "callbacks[0]").make(2)
    with pytest.raises(ConfigError, match="none is installed"):
        OwnPart("model", "widget", "model").make(2)


def test_what_nobody_named_here_is_not_imported(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "mine_marker.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass X: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_permitted", set())
    with pytest.raises(ConfigError, match="only if you name it yourself"):
        OwnPart("model", "mine_marker.X", "model").make()
    assert not marker.exists()
    assert "mine_marker" not in sys.modules
    registry.permit(["mine_marker.X"])
    OwnPart("model", "mine_marker.X", "model").make()
    assert marker.exists(), "the marker would have shown it"


STORED = [
    {"model": {"_target_": "evil.Model"}},
    {"callbacks": [{"_target_": "evil.Callback"}]},
    {"hardware": {"environment": {"_target_": "os.system"}}},
    {"anything": {"at": [{"any": [{"_target_": "evil:run"}]}]}},
    {"model": {"_target_": ["evil.Model"]}},
    {"model": {"_target_": {"_target_": "evil.Model"}}},
    {"name": "${oc.env:HOME}"},
    {"callbacks": [{"_target_": "known", "path": "${evil:x}"}]},
]


@pytest.mark.parametrize("stored", STORED)
def test_code_in_a_stored_configuration_is_refused(stored):
    with pytest.raises(ConfigErrors) as caught:
        refuse_stored(stored, {"name": "x", "model": {"_target_": None}}, "step-1/config.yaml")
    assert "step-1/config.yaml" in str(caught.value)
    assert "command line" in str(caught.value) or "give it again" in str(caught.value)


def test_the_message_says_what_to_write():
    stored = {"callbacks": [{"_target_": "mine.A", "every": 5}, {"_target_": "known"}], "model": {"_target_": "mine.M"}}
    with pytest.raises(ConfigErrors) as caught:
        refuse_stored(stored, {}, "x")
    assert "'callbacks=[{_target_: mine.A, every: 5}, {_target_: known}]'" in str(caught.value)
    assert " model._target_=mine.M," in str(caught.value)


def test_what_the_user_names_again_at_the_same_key_is_allowed():
    stored = {"model": {"_target_": "mine.Model", "dim": 3}, "train": {"sample": {"prompt": "${x}"}}}
    refuse_stored(stored, {"model": {"_target_": "mine.Model"}}, "x")
    for given in ({"model": {"_target_": "mine.Other"}}, {"callbacks": [{"_target_": "mine.Model"}]}, {}):
        with pytest.raises(ConfigErrors, match=r"model\._target_=mine\.Model"):
            refuse_stored(stored, given, "x")
    refuse_stored({"model": {"_target_": "installed"}}, {}, "x")


def test_targets_are_found_at_any_depth():
    data = {"a": [{"_target_": "x.Y"}, {"b": {"_target_": "z"}}], "_target_": None}
    assert dict(targets(data)) == {"a[0]._target_": "x.Y", "a[1].b._target_": "z"}
