"""Training from Python: several processes, silence, exceptions, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.api.runs import Run
from orchestrator.api.training import _conclude
from orchestrator.errors import (
    DIVERGED,
    DONE,
    FAILED,
    INTERRUPTED,
    MISTAKE,
    TERMINATED,
    CheckpointError,
    DataError,
    RunFailedError,
)
from orchestrator.launch.start import Outcome
from tests.lab.runs import TINY, small_overrides

ROOT = Path(__file__).parents[2]

# As in a notebook: no file, the package found by this process's own path alone, another folder.
SCRIPT = """
import logging, os, signal, sys, threading, time
sys.path.insert(0, {root!r})
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
import orchestrator
from orchestrator.errors import DamagedError

lines = []

class Kept(logging.Handler):
    def emit(self, record):
        lines.append((record.levelname, record.getMessage()))

words = {words!r}

# Two processes. Nobody has asked for their lines.
run = orchestrator.train([*words, "hardware.devices=2"])
assert isinstance(run, orchestrator.Run) and run.status == "finished", run
assert run.directory.is_absolute() and run.report.is_file()
assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
assert run.metrics[-1]["loss"] > 0 and run.metrics[-1]["val_loss"] > 0
assert [checkpoint.step for checkpoint in run.checkpoints] == [2, 4]
assert run.config.layout.fsdp == "auto" and run.config.hardware.devices == 2
assert orchestrator.load_run(run.directory) == run

# An error that a process of the run meets, and its lines, which are asked for.
logger = logging.getLogger("orchestrator")
logger.addHandler(Kept())
logger.setLevel("INFO")
logger.propagate = False
checkpoint = run.checkpoints[-1]
for tensors in checkpoint.directory.rglob("*.safetensors"):
    content = bytearray(tensors.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin::64] = bytes(byte ^ 1 for byte in content[begin::64])
    tensors.write_bytes(content)
try:
    orchestrator.train([*words, f"train.init_from={{checkpoint.directory}}"])
except DamagedError as error:
    assert checkpoint.directory.name in str(error), error
else:
    raise AssertionError("a damaged checkpoint was trained on")
levels = [level for level, _ in lines]
assert levels.count("ERROR") == 1 and "INFO" in levels, lines

# Ctrl-C, once a step is done.
def interrupt():
    while True:
        time.sleep(0.1)
        found = [line for _, line in lines if line.startswith("step ")]
        if found:
            return os.kill(os.getpid(), signal.SIGINT)

lines.clear()
threading.Thread(target=interrupt, daemon=True).start()
stopped = orchestrator.train([*words, "train.max_steps=100000", "logger.progress=true"])
assert stopped.status == "interrupted", stopped.status
assert stopped.checkpoints[-1].step == stopped.metrics[-1]["step"] > 0

assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
assert "torch" not in sys.modules
"""


def test_a_program_trains_in_silence_gets_errors_as_exceptions_and_keeps_its_handlers(tmp_path):
    words = small_overrides(
        tmp_path, *TINY, "train.max_steps=4", "checkpoint.every_steps=2", "checkpoint.handover.enabled=false"
    )
    (tmp_path / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-"],
        input=SCRIPT.format(root=str(ROOT), words=words),
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_importing_the_package_takes_neither_torch_nor_hydra(tmp_path):
    code = (
        "import sys, orchestrator\n"
        "heavy = {'torch', 'lightning', 'hydra', 'numpy', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(orchestrator.__all__) <= set(dir(orchestrator))\n"
        "assert callable(orchestrator.train) and callable(orchestrator.compose)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_name_is_there():
    import orchestrator

    # torch_xla, which one of the strategies needs, is in environments of its own.
    assert all(getattr(orchestrator, name) for name in orchestrator.__all__ if name != "XlaStrategy")


def test_the_package_can_be_called_by_the_name_of_a_package_in_it():
    import orchestrator
    import orchestrator.launch.start

    with pytest.raises(DataError, match="nowhere"):
        orchestrator.train(["data.sources=[{path:/nowhere/at/all,weight:1}]"])
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = orchestrator.trian


@pytest.mark.parametrize("code", [DONE, DIVERGED, INTERRUPTED, TERMINATED])
def test_a_run_that_has_a_directory_is_returned_however_it_ended(code, tmp_path):
    (tmp_path / "config.yaml").write_text("name: run\n")
    assert _conclude(Outcome(code, tmp_path)) == Run(tmp_path)


@pytest.mark.parametrize(
    ("outcome", "error", "said"),
    [
        (Outcome(INTERRUPTED, Path("/gone")), KeyboardInterrupt, None),
        (Outcome(TERMINATED, Path("/gone")), RunFailedError, "before its first step"),
        (Outcome(MISTAKE, Path("/gone"), error=DataError("no such data")), DataError, "no such data"),
        (Outcome(FAILED, Path("/gone"), problems=("process 1 of 2 was ended",)), RunFailedError, "process 1 of 2"),
        (Outcome(FAILED, Path("/gone"), last_lines=("Boom: at once",)), RunFailedError, "Boom: at once"),
        (Outcome(DONE, None, "finished   it has all its steps"), CheckpointError, "all its steps"),
    ],
)
def test_what_kept_a_run_from_being_one_is_raised(outcome, error, said):
    with pytest.raises(error, match=said):
        _conclude(outcome)


def test_signals_keep_their_handlers_where_a_run_is_refused():
    import orchestrator

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(DataError):
        orchestrator.train(["data.sources=[{path:/nowhere/at/all,weight:1}]"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
