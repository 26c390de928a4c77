"""Which devices have fp8 products: said before anything is started."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from orchestrator.errors import HardwareError, MissingExtraError
from orchestrator.hardware.fp8_support import check_fp8


def _target(name: str, strategy: str = "dtensor", chip: str | None = None, **runtime: str) -> SimpleNamespace:
    probe = SimpleNamespace(chip=chip, runtime=runtime)
    return SimpleNamespace(name=name, strategy=strategy, runtime="torch", probe=lambda: probe)


RECIPES = ("tensorwise", "rowwise", "rowwise_gw_hp", "mxfp8")
HAS = [
    (_target("cpu"), RECIPES),
    (_target("cuda", compute_capability="8.0"), ()),
    (_target("cuda", compute_capability="8.9"), ("tensorwise",)),
    (_target("cuda", compute_capability="9.0"), ("tensorwise", "rowwise", "rowwise_gw_hp")),
    (_target("cuda", compute_capability="10.0"), RECIPES),
    (_target("cuda", compute_capability="12.0"), ("tensorwise", "rowwise", "rowwise_gw_hp")),
    (_target("cuda", chip="a100-80"), ()),
    (_target("cuda", chip="h100-sxm"), ("tensorwise", "rowwise", "rowwise_gw_hp")),
    (_target("rocm", architecture="gfx942"), ("tensorwise", "rowwise", "rowwise_gw_hp")),
    (_target("rocm", architecture="gfx90a"), ()),
    (_target("tpu", strategy="xla"), ()),
    (_target("trainium"), ()),
]


@pytest.mark.parametrize(("target", "has"), HAS)
def test_recipes_of_a_device(target, has, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for recipe in RECIPES:
        if recipe in has:
            check_fp8(target, recipe)
        else:
            with pytest.raises(
                HardwareError, match=r"hardware.precision=fp8 cannot be had here(.|\n)*=bf16|tensorwise"
            ):
                check_fp8(target, recipe)


def test_the_library_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="torchao"):
        check_fp8(_target("cpu"), "rowwise")
