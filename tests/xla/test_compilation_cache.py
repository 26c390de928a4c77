"""Compiled graphs are kept where the configuration says, by the processes of a run."""

from __future__ import annotations

import pytest

from orchestrator.data.store_cache import cache_root
from tests.lab import cli

RUN = ("hardware=tpu", "hardware.simulate=2", "model.layers=1", "train.max_steps=1", "train.global_batch_tokens=1024")
QUIET = ("train.eval_every=null", "train.eval_tokens=512", "train.sample.tokens=1", "checkpoint.at_end=false")


@pytest.mark.parametrize("asked", [True, False])
def test_graphs_are_kept_where_it_is_said(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(cache_root("auto")))  # of the data: not to be made again
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folder = tmp_path / "graphs"
    words = [f"hardware.compilation_cache={folder}"] if asked else []
    done = cli.run("train", *RUN, *QUIET, f"runs_dir={tmp_path / 'runs'}", *words)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "user" / "orchestrator" / "xla").exists()
    assert folder.exists() == asked
    if asked:
        assert len([path for path in folder.iterdir() if path.stat().st_size]) > 1
