"""Jobs of launch engines, made of words as the verb makes them, and clients that record how they are called."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config.compose import compose
from orchestrator.engines.engine_job import EngineJob, engine_job
from orchestrator.engines.submission import Submission

_ENGINES = Path(__file__).parents[2] / ".venv-engines"
ENGINES_PYTHON = _ENGINES / "bin" / "python"
ENGINES_INSTALLED = (_ENGINES / ".installed-engines").exists()  # by scripts/setup engines


@functools.cache
def job_of(*words: str, run_id: str = "tiny-job") -> EngineJob:
    """The job of these words of `train`."""
    line = ["model=tiny", *words]
    return engine_job(compose(line).config, run_id, line)


def changed(job: EngineJob, changes: Mapping[str, Any]) -> EngineJob:
    """The job with other values of its configuration, by dotted key: without composing it anew."""

    def put(node: Any, keys: Sequence[str], value: Any) -> Any:
        first, *rest = keys
        return replace(node, **{first: put(getattr(node, first), rest, value) if rest else value})

    config = job.config
    for key, value in changes.items():
        config = put(config, key.split("."), value)
    return engine_job(config, job.run_id, [])


def submission(engine: str, id: str, folder: Path, **options: Any) -> Submission:
    """The record of a job that was submitted."""
    return Submission(engine, id, "tiny-job", 0.0, ("-m", "orchestrator"), ("client",), options, folder)


_CLIENT = """#!/bin/sh
printf '%s\\n' "$*" >>'{calls}'
number=$(wc -l <'{calls}')
for answer in '{folder}'/answer-"$number" '{folder}'/answer; do
  [ -e "$answer" ] && {{ cat "$answer"; exit "$(cat "$answer.code" 2>/dev/null || echo 0)"; }}
done
exit 0
"""


class FakeClient:
    """A program on the PATH that records its arguments and answers what it was given, call by call.

    It shows how a client is called and how its answers are read; whether the real one takes that is not shown.
    """

    def __init__(self, name: str, folder: Path, monkeypatch: Any):
        self._folder = folder / f"fake-{name}"
        self._folder.mkdir()
        program = self._folder / name
        program.write_text(_CLIENT.format(calls=self._folder / "calls", folder=self._folder))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{self._folder}{os.pathsep}{os.environ['PATH']}")

    def answer(self, *answers: Any, code: int = 0) -> None:
        """What each of the next calls prints; the last one for all that follow."""
        done = len(self.calls)
        for number, answer in enumerate(answers, 1):
            text = answer if isinstance(answer, str) else json.dumps(answer)
            (self._folder / f"answer-{done + number}").write_text(text)
        (self._folder / "answer").write_text(text)
        (self._folder / "answer.code").write_text(str(code))

    @property
    def calls(self) -> list[str]:
        """The arguments of each call."""
        path = self._folder / "calls"
        return path.read_text().splitlines() if path.exists() else []
