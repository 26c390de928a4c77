"""Fleets: how they are written, which chips exist, what they cost; and slices of TPUs."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.chips.load import load_catalogue
from orchestrator.errors import ConfigError, ConfigErrors
from orchestrator.planner.fleet import FleetEntry, find_chip, inter_bandwidth, parse_fleet, resolve_fleets, split_fleets
from orchestrator.planner.slices import fit_slices, legal_shapes
from tests.planner.fakes import fleet_of

TPUS = [chip for chip in load_catalogue() if chip.vendor == "google"]


@pytest.mark.parametrize(
    ("text", "chip", "chips"),
    [
        ("h100x1024", "h100-sxm", 1024),
        ("H100x1_024", "h100-sxm", 1024),
        ("h100-sxmx8", "h100-sxm", 8),
        ("mi300xx64", "mi300x", 64),
        ("mi300x64", "mi300x", 64),
        ("tpu_v5px2048", "tpu-v5p", 2048),
        ("v5px2048", "tpu-v5p", 2048),
        ("trn2x400k", "trn2", 400_000),
        ("tpu_v7xx9216", "tpu-v7x", 9216),
        ("ironwoodx64", "tpu-v7x", 64),
        ("2xtpu_v5p:8x16x16", "tpu-v5p", 4096),
        ("tpu_v6e:16x16", "tpu-v6e", 256),
        ("gb200x72", "gb200", 72),
    ],
)
def test_the_short_way(text, chip, chips):
    fleet = fleet_of(text)
    assert (fleet.cluster.chip.key, fleet.cluster.chips, fleet.notes) == (chip, chips, ())


@pytest.mark.parametrize(
    "text", ["", "h100", "x8", "h100x", "h100x0", "h100@5", "h100@5parsec", "h100@$5Q", "tpu_v5p:axb"]
)
def test_what_is_not_a_fleet(text):
    with pytest.raises(ConfigError, match="not a fleet"):
        parse_fleet(text)


def test_lists():
    assert split_fleets("[h100x8, trn2x16]") == ["h100x8", "trn2x16"]
    assert split_fleets("h100x8") == ["h100x8"]


def test_all_mistakes_at_once_with_hints():
    with pytest.raises(ConfigErrors) as caught:
        resolve_fleets(["h1000x8", "nonsense", "trn2@1GW", "tpu_v5p:3x3x3", "h100:4x4x4"], load_catalogue())
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "did you mean 'h100'?" in text
    assert "watts_per_chip" in text, "the power of Trainium2 is not published"
    assert "no such slice" in text
    assert "only TPUs come in slices" in text


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (FleetEntry(chip="h100"), "no size"),
        (FleetEntry(chip="h100", chips=8, budget_usd=1), "several sizes"),
        (FleetEntry(chip="h100", chips=-8), "'chips' of h100-sxm is out of range"),
        (FleetEntry(chip="h100", chips=8, pue=0.9), "PUE"),
        (FleetEntry(chip="h100", chips=8, price_usd_per_chip_hour=math.inf), "price_usd_per_chip_hour"),
    ],
)
def test_entries_that_make_no_sense(entry, what):
    with pytest.raises(ConfigErrors, match=what):
        resolve_fleets([entry], load_catalogue())


def test_hosts_and_slices_are_whole():
    h100 = fleet_of("h100x1001")
    assert h100.cluster.chips == 1000
    assert h100.paid_chips == 1001, "one pays for what one asked for"
    assert "whole hosts of 8" in h100.notes[0]
    assert fleet_of("h100x3").cluster.chips == 3, "less than a host is a part of one"
    v6e = fleet_of("tpu_v6ex600")
    assert (v6e.slices.count, v6e.slices.shape, v6e.cluster.domain_chips) == (2, (16, 16), 256)
    million = fleet_of("tpu_v5px1M")
    assert (million.slices.count, million.slices.shape) == (162, (16, 16, 24))
    assert million.cluster.chips == 995_328


def test_a_gigawatt():
    fleet = fleet_of("tpu_v7x@1GW")
    most = 1e9 / (1085 * 1.09)
    assert fleet.cluster.chips <= most < fleet.cluster.chips + 9216
    assert fleet.cluster.chips % 9216 == 0
    assert "~845,559 chips" in fleet.notes[0], "derived from an estimate, and says so"
    assert fleet_of("trn2@10MW", watts_per_chip=1000, pue=1.25).cluster.chips == 8000


def test_chips_and_power_together_bind_where_they_bind():
    assert fleet_of("tpu_v7xx1M@1GW").cluster.chips == fleet_of("tpu_v7x@1GW").cluster.chips
    assert fleet_of("tpu_v7xx9216@1GW").cluster.chips == 9216


def test_fleets_of_one_kind_can_be_told_apart():
    assert [fleet.label for fleet in resolve_fleets(["h100x8", "h100x8", "h100x16"], load_catalogue())] == [
        "h100-sxm x 8 (1)",
        "h100-sxm x 8 (2)",
        "h100-sxm x 16",
    ]


def test_a_chip_alone_is_a_lower_bound_of_its_server():
    assert str(fleet_of("h200x8").power) == "≥700 W"
    assert str(fleet_of("h100x8").power) == "1,275 W"
    assert "≤" in fleet_of("h200@1MW").notes[0], "so a megawatt carries at most so many"


def test_unknown_figures_stay_unknown():
    assert fleet_of("gb200x72").price.value is None
    assert fleet_of("trn3x144").power.value is None
    given = fleet_of("trn3x144", watts_per_chip=1500, price_usd_per_chip_hour=3)
    assert (given.power.value, given.price.value, given.price.estimated) == (1500, 3, False)


def test_the_cheapest_list_price_and_whose():
    price = fleet_of("h100x8").price
    assert price.value == 3.99
    assert "Lambda" in price.sources[0]


def test_the_network_is_published_or_given():
    catalogue = load_catalogue()
    assert inter_bandwidth(fleet_of("tpu_v7xx128"), catalogue).value == 12.5e9
    assert inter_bandwidth(fleet_of("h100x64", inter_gb_per_s=100), catalogue).value == 100e9
    assert inter_bandwidth(fleet_of("cpux1"), catalogue).value is None


def test_chips_of_ones_own(tmp_path):
    path = tmp_path / "chips.yaml"
    entry = {
        "vendor": "acme",
        "name": "Acme 1",
        "bf16_dense_tflops": {"value": 500, "source": "acme.example data sheet"},
    }
    path.write_text(yaml.safe_dump({"chips": {"acme1": entry}}))
    assert resolve_fleets(["acme1x7"], load_catalogue(path))[0].cluster.chip.name == "Acme 1"
    with pytest.raises(ConfigError, match="chips_file"):
        find_chip("zzz", load_catalogue(path))


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.key)
def test_legal_slices(chip):
    shapes = legal_shapes(chip.key, chip.topology.domain_chips)
    for size, shape in shapes.items():
        assert math.prod(shape) == size <= chip.topology.domain_chips
        if len(shape) == 3 and size >= 64:
            assert list(shape) == sorted(shape)
            assert not any(side % 4 for side in shape)
    assert max(shapes) == {"tpu-v5p": 6144}.get(chip.key, chip.topology.domain_chips)


@given(st.sampled_from(TPUS), st.integers(1, 2**20))
def test_slices_use_nearly_all_that_slices_can(chip, chips):
    fitted = fit_slices(chip, chips)
    shapes = legal_shapes(chip.key, chip.topology.domain_chips)
    if fitted is None:
        assert chips < min(shapes)
        return
    assert fitted.chips <= chips
    assert shapes[fitted.chips_each] == fitted.shape
    assert fitted.chips >= max(size for size in shapes if size <= chips) * 0.99
