"""Entry point of the processes that the launcher starts: `python -m orchestrator.launch.worker KIND ...`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from orchestrator import stopping
from orchestrator.observe.console import guarded
from orchestrator.output import printing


def main(argv: list[str]) -> int:
    """Be one process of a run (`train`), of a certification, or of work on a checkpoint's model (`model FOLDER`).

    `group FILE` supervises a replica group of a run, and `lighthouse FILE` is where these groups meet; `hub FOLDER` is
    the hub of a run with islands.

    Args:
        argv: the kind of the process, and its words.

    Returns:
        Its exit code.
    """
    # Before anything is imported that takes time. The launcher acknowledges a signal, for all.
    with printing(), stopping.listening(announce=False):
        try:
            kind, *words = argv
            if kind == "train":
                from orchestrator.launch.run import train_worker

                return train_worker()
            if kind in ("group", "lighthouse"):
                return _keep_groups(kind, words)
            if kind == "hub":
                from orchestrator.launch.hub_process import hub_worker

                return hub_worker(words)
            if kind.startswith("certify"):
                from orchestrator.launch.certifier import certify_worker

                return certify_worker(kind, words)
            from orchestrator.launch.model_job import model_worker

            return model_worker(words)
        except stopping.Stopped as stop:
            return stop.exit_code
        except Exception:
            # A library was interrupted, or has made an error of its own of it.
            if number := stopping.requested():
                return stopping.exit_code(number)
            raise


def _keep_groups(kind: str, words: list[str]) -> int:
    if kind == "group":
        from orchestrator.launch.group_launcher import group_worker

        return group_worker(words)
    from orchestrator.launch.lighthouse import lighthouse_worker

    return lighthouse_worker(words)


def run_process(argv: list[str]) -> NoReturn:
    """Be one process from its first line to its exit code.

    Args:
        argv: as for `main`.
    """
    import faulthandler
    import traceback

    from orchestrator.distributed import stacks
    from orchestrator.distributed.world import detect

    with guarded() as output:
        faulthandler.enable()  # where a native library aborts, the stacks say in which call
        world = detect(os.environ)
        _show_as(f"rank-{world.rank if world else 0}")
        if world and world.store.startswith("file:"):
            stacks.register(Path(world.store.removeprefix("file:")), world.rank)
        try:
            code = main(argv)
        except Exception:
            traceback.print_exc()
            code = 1
        output.close()
    stopping.end_process(code)


def _show_as(name: str) -> None:
    """Give this process a name that `ps` and `top` show: a forked one has the command line of its template."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def be_template(number: int) -> None:
    """Import what a training process imports, and fork such processes (`distributed.process_template`).

    Args:
        number: of the socket to the launcher.
    """
    import orchestrator.launch.aftermath
    import orchestrator.launch.missing_ranks
    import orchestrator.launch.run
    import orchestrator.report.run_report
    import orchestrator.runs.provenance
    import orchestrator.strategies.dtensor
    import orchestrator.training.handover_check
    import orchestrator.training.job  # noqa: F401
    from orchestrator.data.stream import import_grain
    from orchestrator.distributed.process_template import serve

    import_grain()
    serve(number, lambda: run_process(["train"]))


if __name__ == "__main__":
    if sys.argv[1] == "template":
        be_template(int(sys.argv[2]))
    else:
        run_process(sys.argv[1:])
