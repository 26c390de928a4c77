"""Real runs and exchanges of checkpoints without a start of Python for each.

    python -m tests.lab.run_server

has everything imported, reads requests as lines of JSON and forks the ranks of each. So a test of one environment
(torch_xla's) has runs of another (the current torch's) at the cost of their steps; imports take ten seconds a process.
That a run starts as a user starts it is tested elsewhere (tests/launch, tests/xla/test_hosts.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lab import exchange, runs
from tests.lab.ranks import preload, run_ranks

ROOT = Path(__file__).resolve().parents[2]


class RunServer:
    """A process of `python` that runs what it is asked to, one request at a time.

    Args:
        python: of the environment that runs are wanted of.
        path: folders that hold parts of a user's own.
    """

    def __init__(self, python: str, *path: str):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *path])}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "-m", "tests.lab.run_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def train(self, overrides: list[str], run_dir: Path, resume_from: Path | None = None) -> Path:
        """Train in `run_dir`, which is returned."""
        self._ask("train", overrides, str(run_dir), resume_from and str(resume_from))
        return run_dir

    def exchange(self, overrides: list[str], sources: list[Path], target: Path) -> list[dict[str, Any]]:
        """What a run of `overrides` makes of each checkpoint of `sources`; see `tests.lab.exchange`."""
        found: list[dict[str, Any]] = self._ask("exchange", overrides, [str(path) for path in sources], str(target))
        return found

    def _ask(self, verb: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the server of runs has ended with {self._process.poll()}"
        answer = json.loads(line)
        assert "failed" not in answer, answer["failed"]
        return answer["result"]

    def end(self) -> None:
        """End the process, also in the middle of a request."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _train(overrides: list[str], run_dir: str, resume_from: str | None) -> None:
    config, size, environment = _prepared(overrides)
    from orchestrator.config.convert import to_dict

    Path(run_dir).mkdir(parents=True, exist_ok=True)
    resume = Path(resume_from) if resume_from else None
    codes = run_ranks(size, _placed, environment, runs._work, to_dict(config), Path(run_dir), resume)
    assert codes == [0] * size, f"the ranks ended with {codes}"


def _exchange(overrides: list[str], sources: list[str], target: str) -> list[dict[str, Any]]:
    _, size, environment = _prepared(overrides)
    return exchange.merged(run_ranks(size, _placed, environment, exchange._work, overrides, sources, Path(target)))


def _prepared(overrides: list[str]) -> tuple[Any, int, list[dict[str, str]]]:
    """The configuration, the number of its processes, and the environment of each."""
    from orchestrator.config.compose import compose
    from orchestrator.hardware.target_table import resolve

    config = compose(overrides).config
    target = resolve(config.hardware)
    devices = config.hardware.simulate or (1 if config.hardware.devices == "auto" else config.hardware.devices)
    size = target.processes(devices)
    return config, size, [target.environment(config.hardware, rank, size) for rank in range(size)]


def _placed(world: Any, environments: list[dict[str, str]], function: Any, *arguments: Any) -> Any:
    # Devices are looked for when they are first used, so what names them is in time here.
    os.environ.update(environments[world.rank])
    return function(world, *arguments)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runs print is no answer
    preload()
    if importlib.util.find_spec("torch_xla"):
        importlib.import_module("orchestrator.strategies.xla")
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            answer = {"result": {"train": _train, "exchange": _exchange}[verb](*arguments)}
        except AssertionError as error:
            answer = {"failed": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
