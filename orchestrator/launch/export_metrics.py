"""Export the metrics of a run while it goes on, as `logger.prometheus` says, and measure its energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.distributed import standing
from orchestrator.observe.energy import EnergyMeter
from orchestrator.observe.prometheus import LiveRun, Prometheus, require
from orchestrator.runs.messages import warn
from orchestrator.runs.record import Record
from orchestrator.runs.time_book import TimeBook

if TYPE_CHECKING:
    from orchestrator.training.job import Job


def export_metrics(job: Job, book: TimeBook) -> None:
    """Serve the run's metrics from the process that speaks, or write them into a file; where that fails, it is said.

    Args:
        job: the job of this process.
        book: of the run's time.

    Raises:
        MissingExtraError: the library is not installed.
    """
    config = job.resolved.config.logger.prometheus
    if not config.enabled or not job.parallel.speaks:
        return
    require(config)
    run_dir, leg = job.resolved.place.run_dir, job.leg
    about = {key: str(leg.get(key)) for key in ("target", "precision", "devices", "hosts")}
    exported = LiveRun(
        f"{run_dir.absolute().parent.name}/{run_dir.absolute().name}",
        about,
        leg["leg"],
        leg["start_step"],
        lambda: standing.here.step,
        job.loader.tokens_after,
        book.book,
    )
    exporter = Prometheus(exported, config, warn)
    if exporter.url is not None:
        job.say(f"prometheus {exporter.url}")
    channel = job.watchers.channels.open("metrics for Prometheus", exporter.write, close=exporter.close)
    job.watchers.metrics.write_to(channel)


def measure_energy(job: Job, record: Record) -> Callable[[], object]:
    """Measure from now on in the process that speaks. Returns what adds it to the leg's facts.

    Args:
        job: the job of this process.
        record: of the run.
    """
    if job.parallel.rank != 0:
        return int
    meter, resolved = EnergyMeter(), job.resolved

    def note() -> None:
        record.note(energy=meter.facts(resolved.chip, resolved.devices))
        meter.close()

    return note
