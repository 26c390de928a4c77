"""A certificate of virtual TPU devices: one process drives them all, beside a process for the host's CPU."""

from __future__ import annotations

import os
import subprocess
import sys

from orchestrator.certify.certificate import read
from tests.lab.slow import slow


@slow
def test_virtual_devices_pass(tmp_path):
    words = ["hardware=tpu", "hardware.simulate=4", "layout.fsdp=2", "layout.tensor=2", f"output={tmp_path / 'made'}"]
    command = [sys.executable, "-m", "orchestrator", "certify", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env={**os.environ})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    certificate = read(tmp_path / "made").certificate
    assert (certificate.device["simulated"], certificate.layouts) == (True, ("fsdp=2 x tensor=2",))
    # No device is asked alone where one process drives all of them.
    names = {case.name for case in certificate.cases}
    assert "each_device" not in names
    assert {"matrix_products", "collectives", "resume", "handover_in", "handover_out", "nonfinite"} <= names
