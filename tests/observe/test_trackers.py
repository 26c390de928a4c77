"""What TensorBoard and W&B get: grouped curves, without a gap or a cut, whatever happens to the disk or the network."""

from __future__ import annotations

import errno
import os
import sys
import types

import pytest

from orchestrator.config.schema import WandbConfig
from orchestrator.errors import MissingExtraError
from orchestrator.observe import sink, trackers
from orchestrator.observe.sink import Channel
from orchestrator.observe.trackers import TensorBoard, Wandb


def row(step: int, **more: float) -> dict:
    return {"step": step, "loss": 5.0 - step / 10, "tokens": 512.0 * step, "mfu": None, "time": 1e9 + step, **more}


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def steps(folder, tag="train/loss"):
    return [event.step for event in read(folder).Scalars(tag)]


def test_tags_are_grouped_and_the_configuration_is_there(tmp_path):
    board = TensorBoard(tmp_path, 0, {"name": "mine", "optim": {"lr": 0.1}})
    board.write([row(1), row(2, val_loss=4.0, val_perplexity=50.0)])
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/tokens", "val/loss", "val/perplexity"}
    assert found.Scalars("train/loss")[1].value == pytest.approx(4.8)
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    name: mine\n    optim:\n      lr: 0.1" in text


def test_a_resumed_run_hides_what_went_beyond(tmp_path, monkeypatch):
    TensorBoard(tmp_path, 0, {}).write([row(step) for step in range(1, 9)])
    monkeypatch.setattr(trackers.os, "getpid", lambda: 99_999_999)
    TensorBoard(tmp_path, 5, {}, [row(1)]).write([row(6), row(7)])
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_was_moved_brings_its_earlier_curve(tmp_path):
    TensorBoard(tmp_path / "new", 5, {}, [row(step) for step in range(1, 6)]).write([row(6)])
    assert steps(tmp_path / "new") == [1, 2, 3, 4, 5, 6]


def test_no_event_is_lost_or_cut_on_a_full_disk(tmp_path, monkeypatch):
    write, room = os.write, [None]

    def limited(file, data):
        if room[0] is not None:
            taken = min(room[0], len(data))
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= taken
            data = data[:taken]
        return write(file, data)

    monkeypatch.setattr(sink.os, "write", limited)
    monkeypatch.setattr(sink, "_PAUSE_SECONDS", (0.0, 0.0))
    channel = Channel("tensorboard", TensorBoard(tmp_path, 0, {}).write, lambda text: None)
    for step in range(1, 10):
        room[0] = 70 if 3 <= step < 7 else None
        channel.put([row(step)])
    assert steps(tmp_path) == list(range(1, 10))


@pytest.fixture
def wandb(monkeypatch):
    """W&B, as far as it is used, without a network at first."""
    module, logged = types.ModuleType("wandb"), []

    class Run:
        resumed = False

        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**options):
        if not module.network:
            raise ConnectionError("Network is unreachable")
        return Run()

    module.init, module.network, module.logged = init, False, logged
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(sink, "_PAUSE_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(sink, "_SHARE_OF_TIME", 0.0)
    return module


def test_wandb_without_a_network_gets_the_rows_later(wandb, tmp_path):
    said = []
    tracker = Wandb(tmp_path, WandbConfig(enabled=True), {}, "uuid", earlier=[row(1)])
    channel = Channel("W&B", tracker.write, said.append)
    channel.put([row(2)])
    channel.put([row(3)])
    assert wandb.logged == []
    assert said == [
        "W&B cannot be written: Network is unreachable; the run goes on, "
        "the last 10,000 rows are kept and it is tried again"
    ]
    wandb.network = True
    channel.put([row(4)])
    tracker.close()
    assert [entry if entry == "finished" else entry[0] for entry in wandb.logged] == [1, 2, 3, 4, "finished"]
    assert set(wandb.logged[0][1]) == {"train/loss", "train/tokens"}


def test_a_missing_library_is_said_at_once(tmp_path):
    with pytest.raises(MissingExtraError, match="wandb"):
        Wandb(tmp_path, WandbConfig(enabled=True), {}, "uuid")
