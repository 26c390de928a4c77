"""The constants: whose they are, and that no held-out row has touched them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from orchestrator.chips.load import load_catalogue
from orchestrator.errors import ConfigError
from orchestrator.planner.evidence import calibration
from orchestrator.planner.evidence.published import held_out_families, shipped

DATA = Path(__file__).parent / "data"
CHIPS = load_catalogue()
FILE = yaml.safe_load(calibration.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("chip", list(CHIPS), ids=lambda chip: chip.key)
def test_every_chip_has_constants_that_make_sense(chip):
    found = calibration.calibration(chip)
    for share in ("gemm", "gemm_fp8", "attention", "achievable", "intra_link", "inter_link"):
        assert 0.1 < getattr(found, share) < 1.3, share
    for hidden in ("tensor_hidden", "context_hidden", "expert_hidden", "pipeline_hidden", "replicate_hidden"):
        assert 0 <= getattr(found, hidden) <= 1, hidden
    assert found.vendor in (chip.vendor, "generic")


def test_auto_is_the_vendors_default():
    assert calibration.calibration(CHIPS.get("h100-sxm")).stack == "typical-nvidia"
    assert calibration.calibration(CHIPS.get("tpu-v5p")).stack == "maxtext"
    assert calibration.calibration(CHIPS.get("cpu-generic")).stack == "orchestrator"


def test_the_products_own_stack_takes_the_constants_of_the_chips_vendor():
    ours = calibration.calibration(CHIPS.get("h100-sxm"), "orchestrator")
    assert ours.stack == "orchestrator-nvidia"
    assert ours.loss_chunk == 2048
    assert calibration.calibration(CHIPS.get("tpu-v5p"), "orchestrator").stack == "orchestrator-google"


def test_an_unknown_stack_is_refused_with_a_proposal():
    with pytest.raises(ConfigError, match="did you mean 'megatron'"):
        calibration.calibration(CHIPS.get("h100-sxm"), "megatrn")


def test_a_stack_changes_what_it_names_and_keeps_the_rest():
    data = {
        "vendors": {"v": {"constants": {"gemm": 0.5, "attention": 0.3}, "chips": {"c": {"sustained": 0.9}}}},
        "stacks": {"s": {"vendor": "v", "constants": {"gemm": 0.6}, "chips": {"c": {"attention": 0.2}}}},
    }
    found = calibration.parse(data, "s", "c")
    assert (found.gemm, found.attention, found.sustained) == (0.6, 0.2, 0.9)
    other = calibration.parse(data, "s", "another")
    assert (other.gemm, other.attention, other.sustained) == (0.6, 0.3, 1.0)
    wrong = copy.deepcopy(data)
    wrong["stacks"]["s"]["constants"]["gem"] = 1
    with pytest.raises(AssertionError, match="gem"):
        calibration.parse(wrong, "s", "c")


def test_no_constant_has_seen_a_held_out_family():
    runs, _ = shipped(DATA)
    held = held_out_families(runs)
    accounts = [
        entry["fitted_to"] for part in ("vendors", "stacks") for entry in FILE[part].values() if "fitted_to" in entry
    ]
    assert len(accounts) > 10
    for account in accounts:
        assert not held & set(account["families"])
        assert account["rows"] > 0
        assert account["date"]


def test_a_stack_without_fitted_rows_has_only_its_priors():
    priors = yaml.safe_load((Path(__file__).parents[2] / "scripts" / "planner_priors.yaml").read_text(encoding="utf-8"))
    for name, entry in FILE["stacks"].items():
        if "fitted_to" not in entry:
            assert entry == priors["stacks"][name], name


def test_the_constants_are_few():
    """Of each stack fewer than it has fitted rows, but for those of a row or two, which the priors hold."""
    for name, entry in FILE["stacks"].items():
        rows = entry.get("fitted_to", {}).get("rows", 0)
        count = len(entry.get("constants", {})) + sum(len(chip) for chip in entry.get("chips", {}).values())
        assert count <= max(rows, 24), name
