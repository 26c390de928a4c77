"""The table of faults: what a user's run meets sooner or later, each done to a real run, and what must come of it.

A row is a function of a folder of its own that raises `AssertionError` where the outcome is wrong, or `NotRun` where
this machine does not let it be tried. Add a row here and `scripts/fault_table` runs it.

How a sink is made to fail: a file that grows is put on `/dev/full` by a link, which the system refuses as a full disk
does; in the place of a file that is replaced, or of a folder, there is one of the other kind. The disk as a whole is a
tmpfs, where the machine permits to mount one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed
from tests.lab.cli import command
from tests.lab.processes import ranks_below
from tests.lab.runs import small_overrides
from tests.lab.tensors import read_all

ROWS: dict[str, Callable[[Path], None]] = {}
LIMIT_SECONDS = 300.0
STEPS = 8
_WORDS = (
    "model.dim=32",
    "model.layers=1",
    "train.seq_len=32",
    "train.global_batch_tokens=128",
    "train.eval_tokens=128",
    "train.eval_every=4",
    "train.sample.tokens=1",
    f"train.max_steps={STEPS}",
    "checkpoint.every_steps=4",
    "logger.tensorboard=true",
    "logger.progress=true",
)
# Long enough for a signal to come in its middle, and never run to its end.
_LONG = ("train.max_steps=100000", "train.eval_every=null", "checkpoint.every_steps=20", "logger.every_steps=5")


class NotRun(Exception):
    """This machine does not permit the fault."""


def row(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add a function to the table."""

    def add(function: Callable[[Path], None]) -> Callable[[Path], None]:
        ROWS[name] = function
        return function

    return add


class Run:
    """A run of the product, as a user starts it, with its output in files."""

    def __init__(self, folder: Path, *words: str, stdout: Any = None, env: dict[str, str] | None = None):
        self.folder, self._out, self._err = folder, folder / "stdout", folder / "stderr"
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                command("train", *small_overrides(folder, *_WORDS, *words)),
                stdout=out if stdout is None else stdout,
                stderr=err,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )

    @property
    def said(self) -> str:
        return self._out.read_text(errors="replace") + self._err.read_text(errors="replace")

    @property
    def directories(self) -> list[Path]:
        return sorted(path.parent for path in (self.folder / "runs").glob("*/*/config.yaml"))

    @property
    def directory(self) -> Path:
        (only,) = self.directories
        return only

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
        return facts

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.process.poll() is None, f"ended early with {self.process.returncode}: {self.said[-2000:]}"
            assert time.monotonic() < deadline, f"nothing happened: {self.said[-2000:]}"
            time.sleep(0.02)

    def steps(self) -> list[int]:
        with contextlib.suppress(OSError, ValueError):
            rows = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
            return [entry["step"] for entry in rows if "loss" in entry]
        return []

    def end(self, *codes: int) -> None:
        """Wait for the end; no traceback is ever right."""
        try:
            code = self.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"no end within {LIMIT_SECONDS:g} s: {self.said[-2000:]}") from None
        assert code in codes, f"exit {code}, not {codes}: {self.said[-2000:]}"
        assert "Traceback" not in self.said, self.said[-3000:]

    def saved(self, step: int | None = None) -> None:
        """The newest checkpoint is whole, and that of `step`."""
        newest = committed(self.directory / "checkpoints")
        assert newest, "nothing was saved"
        Checkpoint(newest[0]).verify()
        assert step is None or Checkpoint(newest[0]).step == step, newest[0]

    def stop(self) -> None:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for member in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    member.kill()
        self.process.wait()


@contextlib.contextmanager
def _started(folder: Path, *words: str, **options: Any) -> Iterator[Run]:
    run = Run(folder, *words, **options)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.stop()


def _sink(name: str, obstruct: Callable[[Path], object], said: str, status: str | None = "finished") -> None:
    """A row: one sink cannot be written from the start of the run to its end."""

    def check(folder: Path) -> None:
        with _started(folder) as run:
            run.until(lambda: run.directories)
            obstruct(run.directory)  # long before the first step: the processes have to load torch
            run.end(0)
            run.saved(STEPS)
            assert status is None or run.facts["status"] == status, run.facts["status"]
            assert said in run.said, f"not said: {run.said[-2000:]}"

    ROWS[f"{name} cannot be written"] = check


_sink("metrics.jsonl", lambda run: (run / "metrics.jsonl").symlink_to("/dev/full"), "metrics.jsonl cannot be written")
_sink("samples.jsonl", lambda run: (run / "samples.jsonl").symlink_to("/dev/full"), "samples.jsonl cannot be written")
_sink("tensorboard", lambda run: (run / "tensorboard").write_text("a file"), "tensorboard cannot be written")
_sink("report", lambda run: (run / "report.html.partial").mkdir(), "the report could not be written")
_sink("run.json", lambda run: (run / "run.json.partial").mkdir(), "the status 'finished' cannot be written", None)


@contextlib.contextmanager
def _small_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        raise NotRun("no right to mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def _fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return filler


@row("the disk of the run is full for a while")
def full_for_a_while(folder: Path) -> None:
    with _small_disk(folder / "disk", "4m") as disk:
        words = (f"runs_dir={disk}/runs", f"checkpoint.dir={folder / 'saved'}", "train.max_steps=400")
        with _started(folder, *words, "train.eval_every=null", "logger.every_steps=1") as run:
            (folder / "runs").symlink_to(disk / "runs")
            run.until(lambda: len(run.steps()) > 3)
            filler = _fill(disk)
            run.until(lambda: "metrics.jsonl cannot be written" in run.said)
            filler.unlink()
            run.end(0)
            assert run.steps() == list(range(1, 401)), "rows are lost"
            assert run.facts["status"] == "finished"
            assert "metrics.jsonl is written again" in run.said


@row("the disk of the run is full to the end")
def full_to_the_end(folder: Path) -> None:
    with _small_disk(folder / "disk", "4m") as disk:
        words = (f"runs_dir={disk}/runs", "train.max_steps=400", "train.eval_every=null", "checkpoint.every_steps=null")
        with _started(folder, *words, "logger.every_steps=1", "launch.max_restarts=0") as run:
            (folder / "runs").symlink_to(disk / "runs")
            run.until(lambda: len(run.steps()) > 3)
            _fill(disk)
            run.end(1)
            assert run.facts["status"] == "failed", run.facts["status"]
            assert "could not be written: No space left on device" in run.said


@row("no room at the start")
def full_at_the_start(folder: Path) -> None:
    with _small_disk(folder / "disk", "4m") as disk:
        _fill(disk)
        with _started(folder, f"runs_dir={disk}/runs") as run:
            run.end(1, 2)
            assert "No space left on device" in run.said, run.said


@row("standard output is full")
def stdout_full(folder: Path) -> None:
    with open("/dev/full", "wb") as full, _started(folder, stdout=full) as run:
        run.end(0)
        run.saved(STEPS)
        assert run.facts["status"] == "finished"
        assert "standard output cannot be written: No space left on device" in run.said


@row("the reader of standard output goes")
def reader_gone(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with _started(folder, stdout=writer) as run:
        os.close(writer)
        run.end(0)
        run.saved(STEPS)
        assert run.facts["status"] == "finished"


@row("standard output knows ASCII alone")
def ascii_only(folder: Path) -> None:
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with _started(folder, "train.sample.tokens=8", env=env) as run:  # of random bytes, few are ASCII
        run.end(0)
        assert run.facts["status"] == "finished"


@row("a process of two is killed")
def killed_rank(folder: Path) -> None:
    with _started(folder, *_LONG, "hardware.devices=2", "launch.max_restarts=0") as run:
        run.until(lambda: run.directories and committed(run.directory / "checkpoints"))
        ranks_below(run.process.pid)[1].kill()
        run.end(1)
        run.saved()
        assert run.facts["status"] == "failed"
        assert "process 1" in run.said, run.said[-2000:]


@row("the numbers become infinite")
def diverged(folder: Path) -> None:
    """After three steps that are saved, a learning rate of 1e38: what was saved is there, and finite."""
    healthy = ("optim.schedule.kind=constant", "optim.schedule.warmup_steps=0", "checkpoint.every_steps=1")
    with _started(folder, *healthy, "checkpoint.keep_last=2", "train.max_steps=3") as run:
        run.end(0)
    with _started(folder, *healthy, "resume=latest", "train.max_steps=40", "optim.lr=1e38") as run:
        run.end(3)
        assert run.facts["status"] == "diverged"
        run.saved()
        for path in committed(run.directory / "checkpoints"):
            assert all(tensor.isfinite().all() for tensor in read_all(path).values()), path


@row("SIGTERM twice within 50 ms")
def two_signals(folder: Path) -> None:
    with _started(folder, *_LONG) as run:
        run.until(lambda: len(run.steps()) > 3)
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        run.process.send_signal(signal.SIGTERM)
        run.end(143)
        run.saved(run.facts["legs"][-1]["end_step"])
        assert run.facts["status"] == "interrupted"


@row("a multirun is stopped")
def multirun(folder: Path) -> None:
    with _started(folder, *_LONG, "optim.lr=1e-3,2e-3,3e-3", "-m") as run:
        run.until(lambda: run.directories and run.steps())
        run.process.send_signal(signal.SIGINT)
        run.end(130)
        run.saved()
        assert len(run.directories) == 1, "the next job was started"


@row("the object store stops answering")
def store_outage(folder: Path) -> None:
    from tests.lab.store import serve

    with contextlib.ExitStack() as served:
        store = served.enter_context(serve("s3"))
        with _started(folder, f"checkpoint.dir={store.place}/runs", *_LONG, env=store.environment) as run:
            run.until(lambda: store.matching("COMMIT .*manifest.json"))
            served.close()
            run.process.send_signal(signal.SIGTERM)
            run.end(143)
            assert run.facts["status"] == "interrupted"
            assert "could not be written" in run.said, run.said[-2000:]
            # The last save goes to the run's own disk, and that is said.
            run.saved(run.facts["legs"][-1]["end_step"])
            assert "which did not take it" in run.said, run.said[-2000:]


def main(words: list[str], folder: Path, report: Callable[[str, str, float], object]) -> int:
    """Run the rows whose names have one of `words` in them, or all. Returns how many are wrong."""
    wrong = 0
    for number, (name, check) in enumerate(ROWS.items()):
        if words and not any(word in name for word in words):
            continue
        place, begin = folder / str(number), time.monotonic()
        place.mkdir()
        try:
            check(place)
            outcome = "right"
        except NotRun as reason:
            outcome = f"not run: {reason}"
        except AssertionError as error:
            outcome, wrong = f"WRONG: {error}", wrong + 1
        except Exception as error:
            outcome, wrong = f"WRONG: {error!r}", wrong + 1
        report(name, outcome, time.monotonic() - begin)
    return wrong
