"""The chip catalogue: honest figures, a strict parser, and sure matches only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from orchestrator.chips.chip import UNVERIFIED, Figure
from orchestrator.chips.load import load_catalogue
from orchestrator.errors import ConfigError, ConfigErrors

# Widest range in which a figure of one chip can lie, in SI units: a slip of a factor 1000 falls outside.
_RANGES = {
    "flops": (1e13, 1e16),
    "ops": (1e13, 1e16),
    "bytes": (1e10, 1e12),
    "hbm_bandwidth": (1e11, 2e13),
    "bandwidth": (1e9, 5e12),
    "power": (50, 5000),
    "prices": (0.1, 50),
}


@pytest.mark.parametrize("chip", list(load_catalogue()), ids=lambda chip: chip.key)
def test_every_figure_is_unknown_or_has_a_source(chip):
    catalogue = load_catalogue()
    for name, figure in chip.figures():
        if figure.value is None:
            assert not figure.known, name
            assert not figure.verified, name
        else:
            assert figure.source, f"{chip.key}.{name}"
            assert figure.source in catalogue.sources or any(mark in figure.source for mark in " ./"), name


@pytest.mark.parametrize("chip", list(load_catalogue()), ids=lambda chip: chip.key)
def test_units_are_sane(chip):
    for name, figure in chip.figures():
        if figure.value is not None:
            low, high = next(bounds for word, bounds in _RANGES.items() if word in name)
            assert low <= figure.value <= high, f"{chip.key}.{name} = {figure}"


def test_figures_in_si_units():
    h100 = load_catalogue().get("h100-sxm")
    assert h100.peak_flops("bf16").value == pytest.approx(989e12)
    assert h100.hbm_bytes.value == pytest.approx(80e9)
    assert load_catalogue().get("tpu-v5e").hbm_bytes.value == 16 * 2**30
    assert h100.topology.domain_chips == 8


def test_unknown_stays_unknown():
    v5e = load_catalogue().get("tpu-v5e")
    assert v5e.power.value is None
    assert str(v5e.power) == "unknown"
    assert v5e.peak_flops("fp32") == Figure(None, "FLOP/s")
    assert v5e.power.scaled(0.5, "half").value is None
    assert load_catalogue().cite(v5e.power) == "unknown"


def test_unverified_and_estimated_figures_say_so():
    cpu = load_catalogue().get("cpu-generic").peak_flops("bf16")
    assert cpu.source == UNVERIFIED
    assert not cpu.verified
    assert "unverified" in str(cpu)
    assert load_catalogue().get("tpu-v7x").power.estimated
    assert load_catalogue().get("h100-sxm").peak_flops("bf16").verified


def test_a_device_is_a_part_of_a_chip_with_several():
    mi250x = load_catalogue().get("mi250x")
    peak = mi250x.peak_flops("bf16").value
    assert peak is not None
    assert mi250x.device_peak_flops("bf16").value == pytest.approx(peak / 2)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("nvidia a100-sxm4-40gb ", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("AMD Instinct MI250X / MI250", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_only_sure_names_match(name, key):
    assert load_catalogue().match_device_name(name) == key


def test_unknown_key_has_a_hint_and_the_list():
    with pytest.raises(ConfigError) as caught:
        load_catalogue().get("H100-SMX")
    assert "did you mean 'h100-sxm'?" in str(caught.value)
    assert "tpu-v7x" in str(caught.value)


def test_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="fp32, bf16, fp8"):
        load_catalogue().get("h100-sxm").peak_flops("fp64")


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_own_chips_are_added_and_laid_over(tmp_path):
    own = write(
        tmp_path / "own.yaml",
        {
            "sources": {"lab": "measured in our lab"},
            "chips": {
                "mine": {"vendor": "acme", "name": "M1", "bf16_dense_tflops": {"value": 100, "source": "lab"}},
                "h200": {"power_w": {"value": 600, "source": "our rack's limit"}},
            },
        },
    )
    catalogue = load_catalogue(own)
    assert catalogue.get("mine").bf16_flops.value == pytest.approx(1e14)
    assert catalogue.get("mine").hbm_bytes.value is None
    assert catalogue.get("h200").power.value == 600
    assert catalogue.get("h200").bf16_flops == load_catalogue().get("h200").bf16_flops
    assert load_catalogue().get("h200").power.value == 700
    assert len(catalogue) == len(load_catalogue()) + 1


def test_all_wrong_entries_are_listed_with_their_paths(tmp_path):
    own = write(
        tmp_path / "own.yaml",
        {
            "chips": {
                "mine": {
                    "vendor": "acme",
                    "bf16_dense_tflop": {"value": 1, "source": "a b"},
                    "fp8_dense_tflops": 100,
                    "power_w": {"value": -1, "source": "a b"},
                    "hbm": {"value": 80, "unit": "gigs", "source": "a b"},
                    "hbm_tb_per_s": {"value": 1.0, "source": "stass"},
                    "intra_gb_per_s_oneway": {"value": 5},
                    "topology": {"domain_chips": 1.5, "source": "stas"},
                    "price_usd_per_chip_hour": [{"value": "cheap", "source": "a b"}],
                }
            }
        },
    )
    with pytest.raises(ConfigErrors) as caught:
        load_catalogue(own)
    text = str(caught.value)
    for path in (
        "chips.mine: there is no field 'bf16_dense_tflop'",
        "chips.mine.name is missing",
        "chips.mine.fp8_dense_tflops lacks its source",
        "chips.mine.power_w.value is not a positive number",
        "chips.mine.hbm.unit",
        "chips.mine.hbm_tb_per_s.source is not in the table of sources",
        "did you mean 'stas'?",
        "chips.mine.intra_gb_per_s_oneway.source is missing",
        "chips.mine.topology.domain_chips",
        "chips.mine.price_usd_per_chip_hour[0].value",
        "chips.mine.price_usd_per_chip_hour[0].provider",
    ):
        assert path in text, path
    assert "did you mean 'bf16_dense_tflops'?" in text


@pytest.mark.parametrize("text", ["- 1\n", "chips: [1]\n", "chips: {a: 3}\n", "chip: {}\n", "", "sources: 3\n"])
def test_a_file_of_another_shape_is_refused(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigErrors, match=r"own\.yaml"):
        load_catalogue(path)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_catalogue(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("chips: {a: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_catalogue(broken)


@pytest.mark.parametrize("value", [math.inf, math.nan, True, 0])
def test_no_stand_ins_for_unknown(tmp_path, value):
    entry = {"vendor": "a", "name": "b", "power_w": {"value": value, "source": "a b"}}
    with pytest.raises(ConfigErrors, match="null where it is unknown"):
        load_catalogue(write(tmp_path / "own.yaml", {"chips": {"mine": entry}}))
