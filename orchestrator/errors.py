"""Errors that a user can act on.

Every one says what is wrong, what was got, what is allowed and what to do. The command line prints
them without a traceback and exits with `exit_code`; anything else that escapes is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

# What a process tells the engine that started it: docs/running.md.
DONE = 0
FAILED = 1  # an internal error, a lost process, a full disk, a store that does not answer: may be tried again
MISTAKE = 2  # of the user: the same command fails again
DIVERGED = 3  # the numbers are not finite: the same command diverges again
INTERRUPTED = 130  # SIGINT was obeyed and the run saved: it can go on
TERMINATED = 143  # the same for SIGTERM
STOPPED = (INTERRUPTED, TERMINATED)


class UserError(Exception):
    """A problem that the user can mend.

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
        super().__init__("\n".join(lines))


class ConfigError(UserError):
    """One wrong entry of the configuration or of a command line."""


class ConfigErrors(UserError):
    """All the wrong entries of a configuration, so that they can be mended in one go."""

    def __init__(self, problems: Sequence[UserError]):
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem in the configuration:" if count == 1 else f"{count} problems in the configuration:"
        body = "\n".join(str(problem) for problem in self.problems)
        super().__init__(f"{head}\n{body}")


class LayoutError(UserError):
    """The degrees of a layout do not fit the devices or the model."""


class HardwareError(UserError):
    """The wanted hardware or its runtime is not here."""


class DataError(UserError):
    """The data is missing, unreadable or does not fit the run."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit the run."""


class DamagedError(CheckpointError):
    """Files of a checkpoint are not what was written; an older checkpoint may be whole."""


class HandoverError(CheckpointError):
    """A checkpoint computes something else where it was loaded than where it was saved."""


class RunFailedError(UserError):
    """The run failed by no mistake of the user: the same command may succeed when it is tried again."""

    exit_code = FAILED


class LostPeerError(RunFailedError):
    """Another process of the job has gone or does not answer."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            fix=f"pip install 'orchestrator[{extra}]'",
        )
