"""Metrics of a run for Prometheus: served by the process that speaks, or in a file for node_exporter.

Nothing is counted at a step: what is asked for is read when somebody asks. Names and units follow Prometheus' own
conventions (base units, `_total` for counters). Counters are of this process and begin at zero with it, as `rate()`
takes them; what is of the whole run is a gauge. Labels: the run, and the state of a second.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.schema import PrometheusConfig
from orchestrator.errors import MissingExtraError
from orchestrator.observe.sink import reason
from orchestrator.observe.time_spans import CLOSING, Book

PREFIX = "orchestrator_"
_GAUGES = {
    "loss": ("loss", "Training loss of the last written step, nats per token"),
    "val_loss": ("validation_loss", "Held-out loss of the last evaluation, nats per token"),
    "grad_norm": ("gradient_norm", "L2 norm of the gradients of the last written step"),
    "lr": ("learning_rate", "Learning rate of the last written step"),
    "tokens_per_second": ("tokens_per_second", "Tokens per second since the last written rows"),
    "mfu": ("mfu_ratio", "Model FLOPs utilisation: the model's arithmetic per peak of the devices"),
    "memory_bytes": ("device_memory_bytes", "Memory in use on the first process's device"),
}
"""Key of a row of metrics.jsonl: name of the metric, and what it is."""


@dataclass(frozen=True)
class LiveRun:
    """What of a run is exported, read anew whenever somebody asks.

    Attributes:
        run: name and directory of the run, which tell it from others on the host.
        about: facts of the run, which do not change.
        leg: which start of the run this is.
        start_step: steps completed before this process.
        step: gives the steps completed.
        tokens: gives the tokens trained on after so many steps.
        book: gives the run's time.
    """

    run: str
    about: Mapping[str, str]
    leg: int
    start_step: int
    step: Callable[[], int]
    tokens: Callable[[int], int]
    book: Callable[[], Book]


def require(config: PrometheusConfig) -> None:
    """Refuse a configuration whose library is not installed.

    Args:
        config: of the run.

    Raises:
        MissingExtraError: it is enabled, and the library is not there.
    """
    if config.enabled and importlib.util.find_spec("prometheus_client") is None:
        raise MissingExtraError("prometheus-client", "prometheus", "logger.prometheus.enabled=true")


class Prometheus:
    """Exports a run until `close`.

    Args:
        exported: what.
        config: where.
        warn: told that nothing is served, as where the port is taken: the run goes on.
    """

    def __init__(self, exported: LiveRun, config: PrometheusConfig, warn: Callable[[str], object]):
        from prometheus_client import CollectorRegistry

        self._exported, self._textfile = exported, config.textfile
        self._latest: dict[str, Any] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._server: Any = None
        if config.port is not None:
            self._serve(config.address, config.port, warn)

    @property
    def url(self) -> str | None:
        """Where it is served; None where it is not."""
        if self._server is None:
            return None
        host, port = self._server.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over the last figures, and write the file, if there is to be one.

        Args:
            rows: of metrics.jsonl.

        Raises:
            OSError: the file cannot be written.
        """
        for row in rows:
            self._latest.update({key: row[key] for key in _GAUGES if key in row})
        if self._textfile is not None:
            from prometheus_client import write_to_textfile

            write_to_textfile(str(Path(self._textfile).expanduser()), self._registry)

    def close(self) -> None:
        """End serving. A file stays, with what was written last."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def collect(self) -> Iterator[Any]:
        """Yield the metrics as they are now, for the library."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        exported, step, book = self._exported, self._exported.step(), self._exported.book()
        run = [exported.run]

        def one(kind: Any, name: str, text: str, value: float) -> Any:
            family = kind(PREFIX + name, text, labels=["run"])
            family.add_metric(run, value)
            return family

        def by_state(kind: Any, name: str, text: str, seconds: Mapping[str, float]) -> Any:
            family = kind(PREFIX + name, text, labels=["run", "state"])
            for state, value in seconds.items():
                family.add_metric([*run, state], value)
            return family

        info = InfoMetricFamily(PREFIX + "run", "The run", labels=["run"])
        info.add_metric(run, dict(exported.about))
        yield info
        begun = exported.start_step
        yield one(CounterMetricFamily, "steps", "Optimizer steps that this process has completed", step - begun)
        trained = exported.tokens(step) - exported.tokens(begun)
        yield one(CounterMetricFamily, "tokens", "Tokens that this process has trained on", trained)
        yield one(CounterMetricFamily, "restarts", "Starts of the run before this one", exported.leg)
        yield one(GaugeMetricFamily, "step", "Optimizer steps completed by the run", step)
        text = "Seconds of this process by what it did; training that was undone within it counts as training"
        yield by_state(CounterMetricFamily, "state_seconds", text, _of_this_process(book, exported.leg))
        text = "Seconds of the whole run by state, also between its starts"
        yield by_state(GaugeMetricFamily, "run_seconds", text, book.seconds)
        if book.fraction is not None:
            text = "Share of the run's seconds that went into steps that were kept"
            yield one(GaugeMetricFamily, "goodput_ratio", text, book.fraction)
        for key, (name, text) in _GAUGES.items():
            if key in self._latest and (key in ("loss", "grad_norm", "val_loss") or self._latest[key] is not None):
                value = self._latest[key]  # a number that is not finite is null in a row
                yield one(GaugeMetricFamily, name, text, float("nan") if value is None else value)

    def _serve(self, address: str, port: int, warn: Callable[[str], object]) -> None:
        from prometheus_client import start_http_server

        try:
            self._server, _ = start_http_server(port, address, self._registry)
        except (OSError, OverflowError) as error:
            warn(f"metrics for Prometheus are not served at {address}:{port}: {reason(error)}; the run goes on")


def _of_this_process(book: Book, leg: int) -> dict[str, float]:
    """Return seconds that only grow: what lies before the process is left out, and what was undone was training."""
    seconds = {state: value for state, value in book.legs.get(leg, {}).items() if state not in CLOSING}
    if "lost" in seconds:
        seconds["training"] = seconds.get("training", 0.0) + seconds.pop("lost")
    return seconds
