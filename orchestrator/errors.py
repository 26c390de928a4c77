"""Errors that a user can act on.

Every one says what is wrong, what was got, what is allowed and what to do. The command line prints
them without a traceback and exits with `exit_code`; anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.installing import how_to_install

# What a process tells the engine that started it: docs/running.md.
DONE = 0
FAILED = 1  # an internal error, a lost process, a full disk, a store that does not answer: may be tried again
MISTAKE = 2  # of the user: the same command fails again
DIVERGED = 3  # the numbers are not finite: the same command diverges again
INTERRUPTED = 130  # stopped by SIGINT after a save: the run can be resumed
TERMINATED = 143  # the same for SIGTERM
STOPPED = (INTERRUPTED, TERMINATED)
_MAX_SHOWN = 30  # problems of a configuration that are printed
_PARTS = ("what", "got", "allowed", "fix")


def printable(text: object) -> str:
    """Escape control characters, and characters that no encoding holds; line breaks and tabs stay.

    Names, prompts and configurations come from untrusted files, and a terminal obeys control characters.

    Args:
        text: anything; `str` of it is used.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in str(text)
    )


def shown(value: object, length: int = 200) -> str:
    """Return untrusted text for a message: truncated, ASCII alone, with control characters escaped.

    Args:
        value: anything; `str` of it is used.
        length: characters that are kept.
    """
    return ascii(str(value))[1:-1][:length]


class UserError(Exception):
    """A problem that the user can solve.

    Args:
        what: the problem, in one sentence.
        got: the value that caused it, as the user wrote it.
        allowed: what would have been accepted.
        fix: what to do next.
    """

    exit_code = MISTAKE

    def __init__(self, what: str, *, got: object = None, allowed: str | None = None, fix: str | None = None):
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        lines = [what]
        if got is not None:
            lines.append(f"  got:     {got}")
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if fix:
            lines.append(f"  do:      {fix}")
        super().__init__(printable("\n".join(lines)))


def describe_defect(error: BaseException) -> str:
    """Describe an error that is none of the user's: in one paragraph; with `ORCHESTRATOR_TRACEBACK=1` the stack.

    A system that refuses (a full disk, no memory) is named as that; whatever else escapes is a defect of the product.

    Args:
        error: what was raised.
    """
    if os.environ.get("ORCHESTRATOR_TRACEBACK") == "1":
        return "".join(traceback.format_exception(error)).rstrip()
    said = (str(error).strip() or "no message")[:1000]
    if isinstance(error, MemoryError):
        return "error: this machine has not enough memory for that"
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename else ""
        return printable(f"error: the system refuses: {error.strerror}{named}")
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "orchestrator" in frame.filename.split(os.sep)[-3:]] or list(frames)
    place = f" at {os.sep.join(ours[-1].filename.split(os.sep)[-3:])}:{ours[-1].lineno}" if ours else ""
    return printable(
        f"error: this is a defect of orchestrator: {type(error).__name__}: {said}{place}\n"
        "  do:      run it again with ORCHESTRATOR_TRACEBACK=1, and report what that prints"
    )


class ConfigError(UserError):
    """One wrong entry of the configuration or of a command line."""


class LaunchError(UserError):
    """A launch engine or its client is not there, does not answer, or refuses a job."""


class ConfigErrors(UserError):
    """All the wrong entries of a configuration, so that they can be corrected at once.

    Args:
        problems: the wrong entries, at least one.
    """

    def __init__(self, problems: Sequence[UserError]):
        self.problems = list(problems)
        count = len(self.problems)
        shown = self.problems[:_MAX_SHOWN]
        head = "1 problem in the configuration:" if count == 1 else f"{count} problems in the configuration:"
        body = "\n".join(str(problem) for problem in shown)
        body += f"\nand {count - len(shown)} more" if count > len(shown) else ""
        super().__init__(f"{head}\n{body}")


class PartError(UserError):
    """A part of the user's own has failed; its traceback is in the message. One rank alone may raise it."""


class CallbackError(PartError):
    """A callback of the user's own has failed in the training: the next attempt may meet what it needs again."""

    exit_code = FAILED


class LayoutError(UserError):
    """The degrees of a layout do not fit the devices or the model."""


class HardwareError(UserError):
    """The wanted hardware or its runtime is not available."""


class DataError(UserError):
    """The data is missing, unreadable or does not fit the run."""


class DamagedDataError(DataError):
    """A token store is damaged. One rank alone may raise it."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit the run."""


class SaveError(CheckpointError):
    """A checkpoint could not be written. The run may be retried: it is no mistake of the user's."""

    exit_code = FAILED


class DamagedError(CheckpointError):
    """Files of a checkpoint are damaged; an older checkpoint may be whole."""


class NonFiniteError(CheckpointError):
    """Weights, optimizer state or logits are not finite: NaN or infinite."""


class RunDirectoryError(UserError):
    """A run directory cannot be written, such as on a full disk. The run may be tried again when it can.

    Args:
        what: could not be done.
        directory: the run directory.
    """

    exit_code = FAILED

    def __init__(self, what: str, directory: object):
        super().__init__(what, got=directory, fix="make room or get permission there, or set runs_dir to another place")


class HandoverError(CheckpointError):
    """A checkpoint computes other results where it was loaded than where it was saved."""


class RunFailedError(UserError):
    """The run failed by no mistake of the user: the same command may succeed when it is tried again."""

    exit_code = FAILED


class MovedOnError(RunFailedError):
    """Another process has gone on with the run, while this one was being started.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: object):
        super().__init__(
            "the run was gone on with by another process while this one was started", got=run_dir, fix="start it again"
        )


class LostPeerError(RunFailedError):
    """Another process of the job has gone or does not answer."""


class MissingExtraError(UserError):
    """An optional dependency is not installed.

    Args:
        package: that is missing.
        extra: that brings it.
        purpose: what it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            fix=how_to_install(extra),
        )


def error_to_dict(error: UserError) -> dict[str, Any]:
    """Return an error as JSON data, for another process to raise.

    Args:
        error: what was raised.
    """
    parts = {name: None if (part := getattr(error, name)) is None else str(part) for name in _PARTS}
    problems = [error_to_dict(problem) for problem in error.problems] if isinstance(error, ConfigErrors) else []
    return {"type": type(error).__name__, **parts, "problems": problems}


def error_from_dict(data: Mapping[str, Any]) -> UserError:
    """Return the error that `error_to_dict` described; of a type that this version does not have, a `UserError`.

    Args:
        data: as `error_to_dict` gives it.
    """
    if data["type"] == ConfigErrors.__name__:
        return ConfigErrors([error_from_dict(problem) for problem in data["problems"]])
    kind = globals().get(data["type"])
    if not (isinstance(kind, type) and issubclass(kind, UserError)):
        kind = UserError
    error = kind.__new__(kind)
    # Past the constructors of those that are made from something else.
    UserError.__init__(error, data["what"], got=data["got"], allowed=data["allowed"], fix=data["fix"])
    return error
