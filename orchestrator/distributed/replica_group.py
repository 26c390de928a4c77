"""Which replica group a process belongs to, where copies of the model are worlds of their own.

With `launch.fault_tolerance=torchft` the copies of the model (the layout's `replicate` axis) are not ranks of one
world but groups, each with a store and process groups of its own. They meet by torchft's lighthouse, step by step, and
one that is lost takes no other with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.distributed.world import OWN_PREFIX
from orchestrator.errors import HardwareError, RunFailedError

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"  # torchft's own variable: the address of a lighthouse that somebody keeps
_NUMBER, _REJOINS, _ADDRESS_FILE = OWN_PREFIX + "GROUP", OWN_PREFIX + "GROUP_REJOINS", OWN_PREFIX + "LIGHTHOUSE_FILE"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ReplicaGroup:
    """A group among those of the run.

    Attributes:
        number: of the group, from 0.
        rejoins: it was lost, and comes back into a run that others have gone on with.
        lighthouse: the address where the groups meet; empty: the file says it.
        address_file: where the launcher's lighthouse writes its address.
    """

    number: int = 0
    rejoins: bool = False
    lighthouse: str = ""
    address_file: str = ""

    def environment(self) -> dict[str, str]:
        """Return the variables by which a process finds its group."""
        found = {_NUMBER: str(self.number), _REJOINS: str(int(self.rejoins)), _ADDRESS_FILE: self.address_file}
        return {**found, LIGHTHOUSE: self.lighthouse} if self.lighthouse else found

    def address(self, timeout_seconds: float) -> str:
        """Return the lighthouse's address, as soon as it is known.

        Args:
            timeout_seconds: how long the lighthouse may take to start.

        Raises:
            RunFailedError: it has not started in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.lighthouse:
            if self.address_file and (found := _read(Path(self.address_file))):
                return found
            if time.monotonic() > deadline:
                raise RunFailedError(
                    "the lighthouse, where the replica groups meet, did not start",
                    got=f"no address after {timeout_seconds:g} s (hardware.timeout_seconds)",
                    fix=f"look for its error, or set {LIGHTHOUSE} to the address of one that runs",
                )
            time.sleep(_POLL_SECONDS)
        return self.lighthouse

    def say_joined(self) -> None:
        """Tell the launcher that this group has come into the run, so that it counts among those that go on."""
        if self.address_file:
            self.joined_file.touch()

    @property
    def joined_file(self) -> Path:
        """What is there as soon as this group has come into the run."""
        return Path(self.address_file).with_name(f"joined-{self.number}")


def replica_group(environ: Mapping[str, str]) -> ReplicaGroup:
    """Return the group that the environment names.

    Args:
        environ: environment variables of this process.

    Raises:
        HardwareError: nothing has put this process into a group.
    """
    if _NUMBER not in environ:
        raise HardwareError(
            "launch.fault_tolerance=torchft needs processes that know their replica group",
            got=f"{_NUMBER} is not set",
            fix="let the product's own launcher start them: python -m orchestrator train",
        )
    rejoins = environ.get(_REJOINS, "0") == "1"
    return ReplicaGroup(int(environ[_NUMBER]), rejoins, environ.get(LIGHTHOUSE, ""), environ.get(_ADDRESS_FILE, ""))


def in_group(environ: Mapping[str, str]) -> bool:
    """Whether this process is of a replica group.

    Args:
        environ: environment variables of this process.
    """
    return _NUMBER in environ


def rejoins(environ: Mapping[str, str]) -> bool:
    """Whether this process is of a replica group that comes back.

    Args:
        environ: environment variables of this process.
    """
    return environ.get(_REJOINS) == "1"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
