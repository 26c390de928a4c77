"""Which checkpoints a run has, which can be trusted, which may go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint import run_checkpoints
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import MANIFEST
from orchestrator.checkpoint.run_checkpoints import committed, newest_valid, prune, removable, remove_uncommitted
from orchestrator.errors import DamagedError
from tests.lab.checkpoints import write_whole

TENSORS = {"model.a": torch.arange(6.0)}


def _names(paths) -> list[str]:
    return [path.name for path in paths]


def _fake(parent, *names: str) -> None:
    for name in names:
        (parent / name).mkdir(parents=True)
        (parent / name / MANIFEST).write_text("{}")


def _flip(path, name="config.yaml") -> None:
    file = path / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_newest_first_by_number_not_by_name(tmp_path):
    _fake(
        tmp_path,
        "step-00000002",
        "step-00000010",
        "step-00000010.2",
        "step-00000010.10",
        "step-123456789",
        "step-00000009",
    )
    assert _names(committed(tmp_path)) == [
        "step-123456789",
        "step-00000010.10",
        "step-00000010.2",
        "step-00000010",
        "step-00000009",
        "step-00000002",
    ]


def _diverged(path):
    (path / "handover.json").write_text('{"loss": null, "grad_norm": null}')


def test_retention_counts_only_finite_checkpoints(tmp_path):
    names = [f"step-{number:08d}" for number in range(1, 7)]
    _fake(tmp_path, *names)
    for name in names[3:]:
        _diverged(tmp_path / name)
    assert _names(removable(tmp_path, 2, None)) == names[:1], "the two newest finite ones stay"
    assert _names(removable(tmp_path, 9, None)) == []
    (tmp_path / names[5] / "handover.json").write_text("cut")
    assert _names(removable(tmp_path, 1, None)) == names[4::-1], "what cannot be read counts as before"


def test_a_checkpoint_of_a_run_that_had_diverged_is_passed_over(tmp_path):
    whole, poisoned = (write_whole(tmp_path, TENSORS, step=step) for step in (1, 2))
    _diverged(poisoned)
    told = []
    assert newest_valid(tmp_path, False, told.append) == whole
    assert "not finite" in told[0]


def test_only_committed_directories_count(tmp_path):
    _fake(tmp_path, "step-00000001", "step-1", "epoch-00000001", "step-00000002-copy", "step-00000003.x")
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000005").write_text("a file")
    assert _names(committed(tmp_path)) == ["step-00000001"]
    assert committed(tmp_path / "nowhere") == []


def test_the_newest_valid_one_is_found_and_the_others_reported(tmp_path):
    paths = [write_whole(tmp_path, TENSORS, step=step) for step in (1, 2, 3, 4)]
    _flip(paths[1])
    (paths[2] / MANIFEST).write_text("{")
    (paths[3] / "state.json").unlink()
    said: list[str] = []
    assert newest_valid(tmp_path, True, said.append) == paths[0]
    assert [text.split(":")[0] for text in said] == [f"skipping {path}" for path in reversed(paths[1:])]
    assert "state.json" in said[0]
    assert "manifest is damaged" in said[1]
    assert "config.yaml" in said[2]
    assert all(path.is_dir() for path in paths), "nothing is removed"


def test_without_verification_content_is_not_read(tmp_path):
    path = write_whole(tmp_path, TENSORS)
    _flip(path)
    assert newest_valid(tmp_path, False, pytest.fail) == path
    assert newest_valid(tmp_path, True, lambda text: None) is None


def test_tensors_are_left_to_whoever_reads_them(tmp_path):
    path = write_whole(tmp_path, TENSORS)
    _flip(path, "rank-00000.safetensors")
    assert newest_valid(tmp_path, True, pytest.fail) == path
    with pytest.raises(DamagedError):
        Checkpoint(path).verify()


def test_older_ones_are_found(tmp_path):
    paths = [write_whole(tmp_path, TENSORS, step=step) for step in (1, 2, 3, 3)]
    _flip(paths[1])
    assert newest_valid(tmp_path, True, pytest.fail, before=paths[3]) == paths[2]
    assert newest_valid(tmp_path, True, lambda text: None, before=paths[2]) == paths[0]
    assert newest_valid(tmp_path, True, pytest.fail, before=paths[0]) is None
    assert newest_valid(tmp_path, True, pytest.fail, before=tmp_path / "step-00000009") is None


def test_a_second_save_of_a_step_is_the_newer(tmp_path):
    first, second = write_whole(tmp_path, TENSORS), write_whole(tmp_path, TENSORS)
    assert newest_valid(tmp_path, True, pytest.fail) == second
    _flip(second)
    assert newest_valid(tmp_path, True, lambda text: None) == first


def test_nothing_there(tmp_path):
    assert newest_valid(tmp_path / "nowhere", True, pytest.fail) is None


@pytest.mark.parametrize(
    ("keep_last", "every", "left"),
    [
        (1, None, [50]),
        (2, None, [50, 40]),
        (9, None, [50, 40, 30, 20, 10]),
        (0, None, [50]),
        (-3, None, [50]),
        (1, 20, [50, 40, 20]),
        (2, 30, [50, 40, 30]),
        (1, 7, [50]),
    ],
)
def test_pruning_keeps_the_last_and_the_multiples(tmp_path, keep_last, every, left):
    _fake(tmp_path, *(f"step-{step:08d}" for step in (10, 20, 30, 40, 50)))
    removed = prune(tmp_path, keep_last, every)
    assert _names(committed(tmp_path)) == [f"step-{step:08d}" for step in left]
    assert len(removed) + len(left) == 5
    assert not any(path.exists() for path in removed)


@settings(deadline=None)
@given(st.sets(st.integers(0, 40), max_size=8), st.integers(0, 4), st.one_of(st.none(), st.integers(1, 7)))
def test_pruning_twice_is_pruning_once(tmp_path_factory, steps, keep_last, every):
    parent = tmp_path_factory.mktemp("checkpoints")
    _fake(parent, *(f"step-{step:08d}" for step in steps))
    prune(parent, keep_last, every)
    left = _names(committed(parent))
    assert prune(parent, keep_last, every) == []
    assert left[: max(1, keep_last)] == [f"step-{s:08d}" for s in sorted(steps, reverse=True)[: max(1, keep_last)]]
    assert not every or {f"step-{step:08d}" for step in steps if step % every == 0} <= set(left)


def test_pruning_takes_the_manifest_first(tmp_path, monkeypatch):
    """Cut off in the middle, it leaves nothing that looks like a checkpoint."""
    paths = [write_whole(tmp_path, TENSORS, step=step) for step in (1, 2)]

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_checkpoints, "remove_tree", die)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1, None)
    assert committed(tmp_path) == [paths[1]]
    monkeypatch.undo()
    assert remove_uncommitted(tmp_path) == [paths[0]]
    Checkpoint(paths[1]).verify()


def test_what_cannot_be_pruned_does_not_end_the_training(tmp_path, monkeypatch):
    _fake(tmp_path, "step-00000001", "step-00000002", "step-00000003")
    real = type(tmp_path).unlink

    def refuse(path, **options):
        if path.parent.name == "step-00000002":
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    assert _names(prune(tmp_path, 1, None)) == ["step-00000001"]
    assert _names(committed(tmp_path)) == ["step-00000003", "step-00000002"]


def test_what_saves_left_is_removed_and_nothing_else(tmp_path):
    kept = write_whole(tmp_path, TENSORS)
    damaged = write_whole(tmp_path, TENSORS, step=2)
    (damaged / MANIFEST).write_text("{")
    for name in ("step-00000003", "step-00000001.2", "notes", "step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_text("part")
    (tmp_path / "readme.txt").write_text("mine")
    assert sorted(_names(remove_uncommitted(tmp_path))) == ["step-00000001.2", "step-00000003"]
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, damaged.name, "notes", "step-3", "readme.txt"}
    assert remove_uncommitted(tmp_path / "nowhere") == []


def test_a_link_out_of_the_directory_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    parent = tmp_path / "checkpoints"
    parent.mkdir()
    (parent / "step-00000001").symlink_to(outside)
    remove_uncommitted(parent)
    assert (outside / "precious").read_text() == "data"


def test_what_would_be_removed_is_what_is_removed(tmp_path):
    _fake(tmp_path, *(f"step-{step:08d}" for step in range(1, 8)))
    for keep_last, every in ((0, None), (2, None), (1, 3), (9, 2)):
        listed = removable(tmp_path, keep_last, every)
        before = committed(tmp_path)
        assert prune(tmp_path, keep_last, every) == listed
        assert committed(tmp_path) == [path for path in before if path not in listed]
        _fake(tmp_path, *(path.name for path in listed))
