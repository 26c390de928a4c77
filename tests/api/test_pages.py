"""The Python of README and docs/python.md, run from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.lab import pages
from tests.lab.runs import TINY, small_overrides

TIMEOUT_SECONDS = 500
# Every run is made small; what a page says of it is run as it is written.
PRELUDE = """
import sys
sys.path.insert(0, {root!r})
import orchestrator.api.planning
import orchestrator.config.compose as composing
whole = composing.compose
composing.compose = lambda words, folder: whole([*words, *{words!r}], folder)
"""
AFTERWARDS = """
composing.compose = whole
assert run.status == other.status == "finished"
assert abs(measured.loss - run.metrics[-1]["val_loss"]) < 1e-4, (measured, run.metrics[-1])
assert model.config.vocab_size >= tokenizer.vocab_size > 0
loaded = orchestrator.load_model(run.checkpoints[-1])
assert str(orchestrator.generate("def ", loaded, tokens=32, temperature=0.7)) == str(text), text
on_files = orchestrator.evaluate(loaded, {data!r}, overrides=["train.seq_len=16"])
assert on_files.tokens > measured.tokens and 0 < on_files.loss < 10, on_files
try:
    orchestrator.generate("def ", loaded, top_p=7, tokens=0)
except ConfigErrors as errors:
    assert len(errors.problems) == 2
try:
    orchestrator.plan(fleet="h100x8", tokns="1T")
except ConfigErrors as errors:
    assert "did you mean 'tokens'?" in str(errors)
"""


def _run(arguments, folder, script=None):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        input=script,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def test_the_python_of_the_pages_runs_as_it_is_written(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    found = [
        block for page in (pages.ROOT / "README.md", pages.ROOT / "docs/python.md") for block in pages.blocks(page)
    ]
    run = [block for block in found if block.language == "python" and not block.note]
    assert len(run) >= 9
    small = small_overrides(tmp_path, *TINY, "train.max_steps=2", "checkpoint.handover.enabled=false")
    words = [word for word in small if not word.startswith("runs_dir=")]
    script = "\n".join(
        [
            PRELUDE.format(root=str(pages.ROOT), words=words),
            *(f"# {block}\n" + "\n".join(block.lines) for block in run),
            AFTERWARDS.format(data=str(tmp_path / "corpus" / "*.txt")),
        ]
    )
    done = _run(["-"], folder, script)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert {path.name for path in folder.iterdir()} == {"runs", "compare.html"}
