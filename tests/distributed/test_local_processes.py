"""Processes of this machine: signals that are passed on, deaths that are named, and nobody who is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.distributed import local_processes
from orchestrator.distributed.heartbeat import Beat, BeatFile
from orchestrator.distributed.local_processes import Ended, run_local

# A process that leaves its number, its beat and the signals that it gets in a folder, and behaves as it is told.
WORKER = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["ORCHESTRATOR_RANK"]
do = sys.argv[2].split(",")[int(rank)]
def note(number, frame):
    with open(folder / f"signals-{rank}", "a") as file:
        file.write(f"{number}\\n")
    if do.startswith("save"):
        time.sleep(0.3)
        sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
(folder / f"pid-{rank}.partial").write_text(f"{os.getpid()} {os.environ['ORCHESTRATOR_STORE']}")
os.rename(folder / f"pid-{rank}.partial", folder / f"pid-{rank}")
if do.startswith("exit"):
    time.sleep(0.3)
    sys.exit(int(do[4:]))
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    time.sleep(0.02)
"""


def _words(folder: Path, *what: str) -> list[str]:
    return [sys.executable, "-c", WORKER, str(folder), ",".join(what)]


def _started(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(list(folder.glob("pid-?"))) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return [int((folder / f"pid-{rank}").read_text().split()[0]) for rank in range(count)]


def _meanwhile(action) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def _run(folder: Path, *what: str, then=lambda pids: None) -> Ended:
    thread = _meanwhile(lambda: then(_started(folder, len(what))))
    ended = run_local(_words(folder, *what), [{}] * len(what))
    thread.join()
    assert not any(psutil.pid_exists(pid) for pid in _started(folder, len(what)))
    return ended


@pytest.mark.parametrize(
    ("what", "code"), [(("exit0", "exit0"), 0), (("exit2", "wait"), 2), (("wait", "exit3"), 3), (("exit1", "save"), 1)]
)
def test_the_first_process_that_fails_gives_the_exit_code(tmp_path, monkeypatch, what, code):
    monkeypatch.setattr(local_processes, "_GRACE_SECONDS", 0.5)
    assert _run(tmp_path, *what).code == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_request_that_is_delivered_twice_is_passed_on_once(tmp_path, capfd, number):
    def ask(pids):
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    assert _run(tmp_path, "save", "save", then=ask) == Ended(128 + number)
    assert [(tmp_path / f"signals-{rank}").read_text().split()[0] for rank in (0, 1)] == ["15"] * 2
    assert capfd.readouterr().err.count("stopping   ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_process_that_has_no_handlers_yet_obeys_as_well(number, capfd):
    thread = _meanwhile(lambda: time.sleep(0.3) or os.kill(os.getpid(), number))
    assert run_local(["sleep", "60"], [{}, {}]) == Ended(128 + number)
    thread.join()
    assert "Traceback" not in capfd.readouterr().err


def test_a_process_that_stops_alone_takes_the_others_along(tmp_path):
    assert _run(tmp_path, "save", "save", then=lambda pids: os.kill(pids[1], signal.SIGTERM)) == Ended(143)


def test_a_process_that_is_killed_is_named_and_the_others_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(local_processes, "_GRACE_SECONDS", 0.5)

    def kill(pids):
        store = Path((tmp_path / "pid-1").read_text().split()[1].removeprefix("file:"))
        BeatFile(store, 1).write(Beat(7, "here", pids[1], 3).to_text())
        os.kill(pids[1], signal.SIGKILL)

    ended = _run(tmp_path, "wait", "wait", then=kill)
    assert (ended.code, ended.step) == (1, 7)
    (problem,) = ended.problems
    assert problem.startswith("process 1 of 2 (pid ")
    assert "was ended by SIGKILL, last seen after step 7" in problem
    assert "from outside" in problem


@pytest.mark.parametrize(
    ("number", "memory", "said"), [(9, True, "likely cause is memory"), (9, False, "from outside"), (11, True, "")]
)
def test_memory_is_named_where_the_kernel_has_killed_for_it(number, memory, said):
    cause = local_processes._likely_cause(number, memory)
    assert said in cause
    assert bool(cause) is bool(said)


def test_the_kernel_says_how_often_it_has_killed_for_memory(monkeypatch, tmp_path):
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 4\nnuma_hit 2\n")
    monkeypatch.setattr(local_processes, "_VMSTAT", tmp_path / "vmstat")
    assert local_processes._out_of_memory_kills() == 4
    monkeypatch.setattr(local_processes, "_VMSTAT", tmp_path / "none")
    assert local_processes._out_of_memory_kills() == 0


def test_a_stopped_process_is_named_and_does_not_remain(tmp_path):
    """It acts on no signal but SIGKILL: there is nothing to wait for."""
    begin = time.monotonic()

    def stop(pids):
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(pids[0], signal.SIGKILL)

    ended = _run(tmp_path, "wait", "wait", then=stop)
    assert "process 1 of 2" in ended.problems[1]
    assert "is stopped (SIGSTOP)" in ended.problems[1]
    assert time.monotonic() - begin < local_processes._GRACE_SECONDS


LAUNCHER = """
import sys
from orchestrator import stopping
from orchestrator.distributed.local_processes import run_local
stopping.GRACE_SECONDS = 0.5
print(run_local(sys.argv[1:], [{}, {}]).code, flush=True)
"""


def test_nothing_remains_of_a_launcher_that_is_killed(tmp_path):
    """One of its processes saves; one is stopped, which acts on no SIGTERM before it is continued."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, *_words(tmp_path, "save", "save")])
    pids = _started(tmp_path, 2)
    guards = [child for child in psutil.Process(launcher.pid).children() if child.pid not in pids]
    deadline = time.monotonic() + 20
    while not guards and time.monotonic() < deadline:
        time.sleep(0.01)
        guards = [child for child in psutil.Process(launcher.pid).children() if child.pid not in pids]
    time.sleep(0.3)  # the guard is there when it has opened its handles
    os.kill(pids[1], signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    family = [*pids, guards[0].pid]
    while any(map(_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in family if _alive(pid)]
    assert [(tmp_path / f"signals-{rank}").read_text() for rank in (0, 1)] == ["15\n", "15\n"]


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_second_ctrl_c_ends_processes_that_do_not_stop(tmp_path):
    words = [sys.executable, "-c", LAUNCHER, *_words(tmp_path, "wait", "wait")]
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    pids = _started(tmp_path, 2)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.8)
    launcher.send_signal(signal.SIGINT)
    assert launcher.communicate(timeout=20)[0] == "130\n"
    assert not any(map(_alive, pids))
    assert (tmp_path / "signals-0").read_text() == "15\n"
