"""A request to stop: whom it reaches, how often it counts, and that nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from orchestrator import stopping
from orchestrator.stopping import Stopped

NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # the handler runs at the next operation


@NUMBERS
def test_a_signal_stops_what_has_nothing_to_bring_to_an_end(number, capfd):
    with stopping.listening(), pytest.raises(Stopped) as caught:
        _send(number)
    assert caught.value.exit_code == 128 + number
    assert f"stopping   {number.name}: in start-up" in capfd.readouterr().err


@NUMBERS
def test_where_it_is_deferred_it_is_only_noted_and_delivered_often_counts_once(number, capfd):
    with stopping.listening(), stopping.deferred():
        for _ in range(5):
            _send(number)
        assert stopping.requested() == number
        assert not stopping.insisted()
        with pytest.raises(Stopped):
            stopping.check()
    assert capfd.readouterr().err.count("stopping") == 1


def test_the_first_signal_gives_the_exit_code():
    with stopping.listening(announce=False), stopping.deferred():
        _send(signal.SIGTERM)
        _send(signal.SIGINT)
        assert stopping.requested() == signal.SIGTERM


def test_slurms_usr1_is_a_sigterm(capfd):
    with stopping.listening(), stopping.deferred():
        assert stopping.seconds_left() is None
        stopping.allow(30.0)
        _send(signal.SIGUSR1)
        _send(signal.SIGTERM)
        assert stopping.requested() == signal.SIGTERM
        assert 29 < stopping.seconds_left() <= 30
        with pytest.raises(Stopped) as caught:
            stopping.check()
    assert caught.value.exit_code == 143
    assert capfd.readouterr().err.count("stopping   SIGUSR1: at the next step, and saving") == 1


def test_the_clean_up_after_a_signal_is_not_torn_by_another():
    cleaned = False
    with stopping.listening(announce=False):
        try:
            _send(signal.SIGTERM)
        except Stopped:
            _send(signal.SIGINT)
            cleaned = True
    assert cleaned


def test_within_what_is_deferred_a_part_can_be_left_at_once():
    with stopping.listening(announce=False), stopping.deferred():
        with pytest.raises(Stopped), stopping.at_once():
            _send(signal.SIGTERM)
        _send(signal.SIGTERM)


def test_the_handlers_are_put_back_and_requests_forgotten():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.listening(announce=False), stopping.deferred():
        _send(signal.SIGTERM)
    with stopping.listening(announce=False):
        assert stopping.requested() == 0
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a library may
        with stopping.listening(), pytest.raises(Stopped):
            _send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_outside_of_the_main_thread_signals_keep_their_meaning():
    seen = []

    def listen():
        with stopping.listening():
            seen.append([signal.getsignal(number) for number in stopping.SIGNALS])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in stopping.SIGNALS]]


def test_a_forked_child_does_not_stop_its_parent():
    with stopping.listening(announce=False), stopping.deferred():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert stopping.requested() == 0


BUSY = """
import ctypes
from orchestrator import stopping
stopping.GRACE_SECONDS = 0.5
with stopping.listening(), stopping.deferred():
    print("ready", flush=True)
    # The main thread is in a C function that no signal interrupts, and no handler of Python runs.
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_ctrl_c_ends_at_once_when_its_time_has_come_and_not_before():
    words = [sys.executable, "-c", BUSY]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):  # a terminal's, and those that it was forwarded as
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.poll() is None
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None, "an engine that says it again does not insist"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.splitlines() == [
        "stopping   SIGINT: at the next step, and saving; press Ctrl-C again after 0.5 s to end without saving",
        "ended at once",
    ]
