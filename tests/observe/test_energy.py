"""Energy by counters: those of a made-up power tree, those that fail, and what a leg says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.observe import energy
from orchestrator.observe.energy import EnergyMeter, Rapl


def zone(root: Path, number: str, name: str, microjoules: int) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    return folder


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    return tmp_path


def test_packages_and_memory_are_read_and_come_round(tree: Path):
    first, second = zone(tree, "0", "package-0", 999_000_000), zone(tree, "1", "package-1", 5)
    zone(tree, "0:0", "core", 77)
    memory = zone(tree, "0:1", "dram", 1_000_000)
    meter = EnergyMeter()
    (first / "energy_uj").write_text("4000000")
    (second / "energy_uj").write_text("2000005")
    (memory / "energy_uj").write_text("1500000")
    facts = meter.facts("h100-sxm", 2)
    meter.close()
    assert facts["joules"] == {"cpu": pytest.approx(5 + 2), "dram": pytest.approx(0.5)}
    assert facts["counted"] == {"cpu": 2, "dram": 1}
    assert "gpu: " in facts["not_measured"]
    assert facts["predicted_joules"] >= 0


def test_a_counter_that_comes_round_twice():
    readings = iter([900, 100, 800, 50])

    class Zone:
        name = "intel-rapl:0"

        def __truediv__(self, name: str) -> Zone:
            self.asked = name
            return self

        def read_text(self) -> str:
            return "1000" if self.asked == "max_energy_range_uj" else str(next(readings))

    rapl = Rapl([Zone()])  # type: ignore[list-item]
    assert [round(rapl.joules()["intel-rapl:0"] * 1e6) for _ in range(4)] == [900, 1100, 1800, 2050]


def test_where_nothing_can_be_read_it_is_said(tree: Path):
    facts = EnergyMeter().facts(None, 1)
    assert "joules" not in facts
    assert "predicted_joules" not in facts
    assert "cpu: the kernel shows no counter (RAPL)" in facts["not_measured"]


def test_a_driver_that_fails_ends_no_run():
    answers = iter([{"0": 1.0}])

    def forbidden() -> dict[str, float]:
        raise PermissionError(13, "Permission denied")

    meter = EnergyMeter({"gpu": lambda: next(answers), "cpu": forbidden})
    facts = meter.facts(None, 1)
    meter.close()
    assert "joules" not in facts
    assert "cpu: Permission denied" in facts["not_measured"]
    assert "gpu: " in facts["not_measured"]
