"""A made-up machine: files under a temporary root, and commands that answer what the test says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.hardware import host
from orchestrator.hardware.host import TorchBuild

CPU_TORCH = TorchBuild("2.13.0+cpu", None, None)
CUDA_TORCH = TorchBuild("2.13.0+cu130", "13.0", None)
ROCM_TORCH = TorchBuild("2.13.0+rocm7.1", None, "7.1.25424")


class Machine:
    """Builder of the made-up machine."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self._monkeypatch = root, monkeypatch
        self.answers: dict[str, str] = {}
        self.packages: dict[str, str] = {}
        monkeypatch.setattr(host, "ROOT", root)
        monkeypatch.setattr(host, "run", lambda *command: self.answers.get(command[0]))
        monkeypatch.setattr(host, "package_version", lambda name: self.packages.get(name))
        self.python(3, 12)
        self.torch(CPU_TORCH)
        for name in list(os.environ):
            if name.endswith("VISIBLE_DEVICES") or name.startswith(("TPU_", "TORCH_TPU_", "MEGASCALE_", "NEURON_")):
                monkeypatch.delenv(name)

    def python(self, major: int, minor: int) -> None:
        self._monkeypatch.setattr(host, "python_version", lambda: (major, minor))

    def torch(self, build: TorchBuild | None) -> None:
        self._monkeypatch.setattr(host, "torch_build", lambda: build)
        self.packages["torch"] = build.version if build else ""

    def file(self, path: str, text: str = "") -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def pci(self, vendor: int, device: int, class_code: int, function: int = 0) -> None:
        """Add a card, or with `function` another function of the last one."""
        cards = len(list(self.root.glob("sys/bus/pci/devices/*.0")))
        card = cards - 1 if function else cards
        for name, value in (("vendor", vendor), ("device", device), ("class", class_code)):
            self.file(f"/sys/bus/pci/devices/0000:00:{card:02x}.{function}/{name}", f"{value:#x}\n")

    def tpu(self, device: int, chips: int, *, functions: int = 1, files: str = "/dev/vfio/{}") -> None:
        """TPU chips with their device files, and without the packages."""
        for chip in range(chips):
            for function in range(functions):
                self.pci(0x1AE0, device, 0x120000, function)
                self.file(files.format(chip * functions + function))

    def trainium(self, device: int, chips: int) -> None:
        """Trainium chips with their driver, and without the packages."""
        for chip in range(chips):
            self.pci(0x1D0F, device, 0x118000)
            self.file(f"/dev/neuron{chip}")

    def nvidia(self, *names: str, driver: str = "580.65.06", capability: str = "9.0", mig: str = "[N/A]") -> None:
        self.file("/dev/nvidiactl")
        rows = [f"{i}, GPU-{i}f00, {name}, 81559, {driver}, {capability}, {mig}" for i, name in enumerate(names)]
        self.answers["nvidia-smi"] = "\n".join(rows) + "\n"

    def amd(self, *names: str) -> None:
        self.file("/dev/kfd")
        self.file("/sys/class/kfd/kfd/topology/nodes/0/properties", "cpu_cores_count 64\nsimd_count 0\n")
        for index, name in enumerate(names):
            text = f"simd_count 1216\ngfx_target_version 90402\ndrm_render_minor {128 + index}\n"
            self.file(f"/sys/class/kfd/kfd/topology/nodes/{index + 1}/properties", text)
            self.file(f"/sys/class/drm/renderD{128 + index}/device/product_name", name)
            self.file(f"/sys/class/drm/renderD{128 + index}/device/mem_info_vram_total", str(192 * 2**30))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a processor and nothing else."""
    return Machine(tmp_path, monkeypatch)
