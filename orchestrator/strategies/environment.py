"""What Lightning is told of the job's processes: nothing, as everything between them is the strategy's."""

from __future__ import annotations

from lightning.fabric.plugins.environments import LightningEnvironment


class JobEnvironment(LightningEnvironment):
    """One process, whatever engine has started it and however many there are."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return 1

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return 0

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        pass
