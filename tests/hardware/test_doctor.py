"""The verb `doctor` and its single checks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple

import pytest

from orchestrator.cli import doctor
from orchestrator.errors import ConfigErrors
from orchestrator.hardware import checks, host
from tests.hardware.conftest import Machine


def states(found: list[checks.Check]) -> dict[str, str]:
    return {check.name: check.state for check in found}


def test_whole_run_as_json(capsys: pytest.CaptureFixture[str], tmp_path):
    assert doctor.main(["--json", f"runs_dir={tmp_path}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert "cpu" in found["works_on"]
    assert {row["target"] for row in found["hardware"]} == {"cpu", "cuda", "rocm", "tpu", "trainium"}


def test_text_ends_with_a_verdict(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    machine.nvidia("NVIDIA H100 80GB HBM3")
    machine.packages |= {name: f"{series or '1'}.0" for name, series in checks._NEEDED.items()}
    trial = checks.Check("cpu arithmetic", "ok", "works")
    monkeypatch.setattr(checks, "try_devices", lambda types, deep: [trial])
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "is built without CUDA" in text
    assert "Verdict: training works here on cpu." in text
    assert text.rstrip().endswith("(two processes)")


def test_a_failed_trial_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    trial = checks.Check("cpu arithmetic", "error", "Illegal instruction")
    monkeypatch.setattr(checks, "try_devices", lambda types, deep: [trial])
    assert doctor.main([]) == 1
    assert "training does not work here" in capsys.readouterr().out


def test_help_needs_no_torch():
    code = (
        "import sys; from orchestrator.cli import doctor; doctor.main(['--help']); "
        "assert not {'torch', 'hydra', 'lightning'} & set(sys.modules)"
    )
    assert "deep=" in subprocess.check_output([sys.executable, "-c", code], text=True)


def test_wrong_option():
    with pytest.raises(ConfigErrors, match="did you mean 'deep'"):
        doctor.main(["depe=true"])


def test_packages(machine: Machine):
    machine.packages.update({"torch": "2.9.0", "lightning": "2.6.3", "hydra-core": "1.3.8"})
    found = checks.check_packages()
    assert states(found)["torch"] == "warning"
    assert states(found)["lightning"] == "error"
    assert states(found)["hydra-core"] == "ok"
    assert states(found)["grain"] == "error"
    assert "compromised" in next(check.text for check in found if check.name == "lightning")


@pytest.mark.parametrize(("version", "state"), [((3, 10), "error"), ((3, 12), "ok"), ((3, 14), "error")])
def test_python(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], state: str):
    info = namedtuple("info", "major minor micro")(*version, 1)
    monkeypatch.setattr(checks.sys, "version_info", tuple(info))
    assert states(checks.check_system())["python"] == state


def test_storage(tmp_path, monkeypatch: pytest.MonkeyPatch):
    found = checks.check_storage(str(tmp_path / "not" / "there"))
    assert states(found)["file locks"] == "ok"
    assert "open files" in states(found)
    assert list(tmp_path.iterdir()) == []
    usage = namedtuple("usage", "total used free")(2**20, 0, 2**20)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    assert states(checks.check_storage(str(tmp_path)))["runs"] == "warning"


def test_trial_reports_the_last_line_of_a_failure():
    found = checks.try_devices(["nonsense"])
    assert found[0].state == "error"
    assert "nonsense" in found[0].text


def test_shared_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    (machine.root / "dev/shm").mkdir(parents=True)
    assert "shared memory" in states(checks.check_storage(str(machine.root)))
    assert host.path("/dev/shm").is_dir()
