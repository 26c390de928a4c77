"""Run an engine's own client, such as sbatch or kubectl."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.errors import LaunchError, shown

_SECONDS = 120.0


def find_client(program: str, install: str) -> str:
    """Return the path of a client.

    Args:
        program: its name.
        install: how to get it.

    Raises:
        LaunchError: it is not on the PATH.
    """
    path = shutil.which(program)
    if path is None:
        raise LaunchError(
            f"the client '{program}' is not on this machine",
            fix=f"{install}; or look at what it would get: dry_run=true",
        )
    return path


def call_client(
    words: Sequence[str],
    install: str,
    folder: Path | None = None,
    seconds: float = _SECONDS,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a client to its end. Returns what it printed on standard output.

    Args:
        words: the client and its arguments; no shell reads them.
        install: how to get it.
        folder: that it runs in; None for this one.
        seconds: after which it is given up.
        environment: of the process; None for this one's.

    Raises:
        LaunchError: it is not here, does not answer in time, or refuses: with what it said.
    """
    program = find_client(words[0], install)
    command = shlex.join(words)
    try:
        done = subprocess.run(
            [program, *words[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        what = f"'{words[0]}' does not answer within {seconds:g} s"
        raise LaunchError(what, got=shown(command, 500), fix="try the command by hand") from None
    except OSError as error:
        raise LaunchError(f"'{words[0]}' cannot be run: {error.strerror or error}", got=program) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing")[-2000:]
        raise LaunchError(f"'{words[0]}' refuses (exit code {done.returncode}): {said}", got=shown(command, 500))
    return done.stdout


def client_lines(words: Sequence[str], install: str) -> Iterator[str]:
    """Yield the lines that a client prints, such as a log that it follows, until it ends.

    Args:
        words: the client and its arguments.
        install: how to get it.

    Raises:
        LaunchError: it is not here, or it ends with an error.
    """
    program = find_client(words[0], install)
    with subprocess.Popen(
        [program, *words[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            last = ""
            for line in process.stdout:
                last = line.rstrip("\n")
                yield last
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        raise LaunchError(
            f"'{words[0]}' has ended with {process.returncode}: {last}", got=shown(shlex.join(words), 500)
        )
