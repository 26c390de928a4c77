"""Side channels that fail: said once, kept, written when there is room, and never an exception."""

from __future__ import annotations

import errno
import json
import os

import pytest

from orchestrator.observe import sink
from orchestrator.observe.sink import Appended, Channel, JsonLines, SideChannels

FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """A sink that is full for a while."""

    def __init__(self):
        self.full, self.rows, self.attempts = False, [], 0

    def write(self, rows):
        self.attempts += 1
        if self.full:
            raise FULL
        self.rows += rows


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sink.time, "monotonic", lambda: now[0])
    return now


def test_what_a_full_disk_refused_is_written_in_order_when_there_is_room(clock):
    disk, said = Disk(), []
    channel = Channel("metrics.jsonl", disk.write, said.append)
    channel.put([1])
    disk.full = True
    for row in (2, 3, 4):
        channel.put([row])
    assert (disk.rows, channel.waiting) == ([1], 3)
    assert said == [
        "metrics.jsonl cannot be written: No space left on device; the run goes on, "
        "the last 10,000 rows are kept and it is tried again"
    ]
    disk.full = False
    channel.put([5])
    assert disk.rows == [1], "a moment later nothing is tried"
    clock[0] += 1.1
    channel.put([6])
    assert disk.rows == [1, 2, 3, 4, 5, 6]
    assert said[1:] == ["metrics.jsonl is written again, with 5 rows that waited"]
    channel.close()
    assert len(said) == 2


def test_a_sink_that_fails_slowly_takes_a_tenth_of_the_time_at_most(clock):
    disk = Disk()
    disk.full = True

    def slow(rows):
        clock[0] += 3
        disk.write(rows)

    channel = Channel("W&B", slow, lambda text: None)
    begin = clock[0]
    while clock[0] < begin + 600:
        channel.put([0])
        clock[0] += 1
    assert 3 * disk.attempts <= 70


def test_rows_beyond_the_limit_are_counted_and_said(clock):
    disk, said = Disk(), []
    disk.full = True
    channel = Channel("metrics.jsonl", disk.write, said.append, limit=3)
    channel.put(range(5))
    channel.close()
    assert said[1:] == ["metrics.jsonl: 5 rows are lost: No space left on device"]

    disk, said = Disk(), []
    disk.full = True
    channel = Channel("metrics.jsonl", disk.write, said.append, limit=3)
    channel.put(range(5))
    disk.full = False
    channel.close()
    assert disk.rows == [2, 3, 4]
    assert said[1:] == ["metrics.jsonl is written again, with 3 rows that waited; 2 rows are lost"]


def test_of_states_the_newest_is_written_and_none_is_called_lost(clock):
    disk, said = Disk(), []
    disk.full = True
    channel = Channel("run.json", disk.write, said.append, unit=None)
    channel.put(["running"])
    channel.put(["finished"])
    disk.full = False
    channel.close()
    assert disk.rows == ["finished"]
    assert said[1:] == ["run.json is written again"]


def test_a_warning_that_fails_itself_does_not_go_round_in_circles():
    outcome = []

    def refuse(rows):
        raise FULL

    def warn(text):
        outcome.append(text)
        channel.put(["the warning"])

    channel = Channel("standard error", refuse, warn)
    channel.put(["a line"])
    assert len(outcome) == 1
    assert channel.waiting == 2


def test_a_close_that_fails_is_said():
    said = []

    def fail():
        raise RuntimeError("no network")

    channels = SideChannels(said.append)
    channels.open("W&B", lambda rows: None, close=fail)
    channels.close()
    assert said == ["a side channel could not be closed: no network"]


def test_a_piece_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    room, write = [25], os.write

    def limited(file, data):
        taken = min(room[0], len(data))
        if not taken:
            raise FULL
        room[0] -= taken
        return write(file, data[:taken])

    monkeypatch.setattr(sink.os, "write", limited)
    path = tmp_path / "new" / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write([{"step": 1}])
    with pytest.raises(OSError, match="No space"):
        lines.write([{"step": 2, "loss": 1.0}])
    assert path.read_text() == '{"step": 1}\n'
    room[0] = 1000
    lines.write([{"step": 2, "loss": 1.0}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_that_a_crash_cut_is_not_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    JsonLines(path).write([{"step": 2}])
    assert path.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']


def test_a_folder_in_the_place_of_the_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="directory"):
        Appended(tmp_path).append(b"x")
