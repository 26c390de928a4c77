"""The interface of a launch engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.submission import Submission
from orchestrator.errors import UserError

State = Literal["waiting", "running", "finished", "failed", "cancelled", "unknown"]


@dataclass(frozen=True)
class Rendered:
    """What an engine takes.

    Attributes:
        files: file name -> text, the one that is submitted first.
        submit: the words of the engine's own client that submit it, with the files' names relative to their folder.
    """

    files: Mapping[str, str]
    submit: tuple[str, ...]


@dataclass(frozen=True)
class EngineStatus:
    """What an engine says of a job.

    Attributes:
        state: in the words of all engines.
        said: in the engine's own words.
        hosts: that it runs on, where that is known.
    """

    state: State
    said: str
    hosts: tuple[str, ...] = ()


class Engine(ABC):
    """One engine that starts jobs: Slurm, Kubernetes, and so on. It is driven by its own client; none is imported.

    Attributes:
        name: of the option of the `launch` group.
        state: what has been run where, plainly.
        clients: programs that it is driven by.
        in_foreground: `submit` becomes the job, and does not return: the record is written before, with this process's
            id, and no other job is started by the same command.
        takes_sweeps: a job may have a `sweep`; else the jobs of a sweep are submitted one by one.
    """

    name: ClassVar[str]
    state: ClassVar[str]
    clients: ClassVar[tuple[str, ...]]
    in_foreground: ClassVar[bool] = False
    takes_sweeps: ClassVar[bool] = False

    @abstractmethod
    def render(self, job: EngineJob) -> Rendered:
        """Render what the engine takes, without asking it.

        Args:
            job: what is to run.

        Raises:
            ConfigErrors: what of the configuration the engine cannot do.
        """

    @abstractmethod
    def problems(self, job: EngineJob, rendered: Rendered) -> Sequence[UserError]:
        """Return all that is wrong with what was rendered, as strictly as can be said offline.

        Args:
            job: what is to run.
            rendered: as `render` gave it; a person may have changed the files.
        """

    @abstractmethod
    def submit(self, job: EngineJob, rendered: Rendered) -> str:
        """Submit it. The files lie in `job.folder`. Returns the engine's name of the job.

        Args:
            job: what is to run.
            rendered: what was rendered, written and checked.

        Raises:
            LaunchError: the client is not installed, or the engine refuses.
        """

    @abstractmethod
    def status(self, submitted: Submission) -> EngineStatus:
        """Ask for the state of a job.

        Args:
            submitted: its record; `id` is what `submit` returned.

        Raises:
            LaunchError: the engine does not answer.
        """

    @abstractmethod
    def lines(self, submitted: Submission, follow: bool) -> Iterator[str]:
        """Yield the lines that the job has printed.

        Args:
            submitted: its record.
            follow: go on with those that it prints, until it has ended.

        Raises:
            LaunchError: the engine does not answer.
        """

    @abstractmethod
    def cancel(self, submitted: Submission) -> None:
        """End the job: it is asked to save and stop first.

        Args:
            submitted: its record.

        Raises:
            LaunchError: the engine does not answer, or has no such job.
        """
