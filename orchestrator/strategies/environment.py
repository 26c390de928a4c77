"""The cluster environment that Lightning sees: one process, as the strategy does what happens between processes."""

from __future__ import annotations

from lightning.fabric.plugins.environments import LightningEnvironment


class JobEnvironment(LightningEnvironment):
    """One process, whatever engine has started it and however many there are."""

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning starts no process."""
        return True

    def world_size(self) -> int:
        """Return 1."""
        return 1

    def set_world_size(self, size: int) -> None:
        """Ignore `size`."""

    def global_rank(self) -> int:
        """Return 0."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """Ignore `rank`."""

    def local_rank(self) -> int:
        """Return 0."""
        return 0

    def node_rank(self) -> int:
        """Return 0."""
        return 0

    def teardown(self) -> None:
        """Do nothing."""
