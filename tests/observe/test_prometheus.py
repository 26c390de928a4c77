"""Metrics for Prometheus, asked for by HTTP and read by Prometheus' own parsers."""

from __future__ import annotations

import math
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from orchestrator.config.schema import PrometheusConfig, RunConfig
from orchestrator.config.validate import validate
from orchestrator.observe.prometheus import LiveRun, Prometheus
from orchestrator.observe.time_spans import TimeEntry, make_book

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
ROW = {
    "step": 7,
    "loss": 2.5,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "tokens_per_second": 900.0,
    "mfu": None,
    "memory_bytes": None,
}
BOOK = make_book(
    [
        *(TimeEntry(0.0, "starting"), TimeEntry(2.0, "training", 0, 0), TimeEntry(12.0, "waiting", 8, stepped=12.0)),
        *(TimeEntry(20.0, "starting"), TimeEntry(23.0, "training", 4, 1), TimeEntry(29.0, "stopped", 10)),
    ]
)
EXPORTED = LiveRun("tiny/now", {"target": "cpu"}, 1, 4, lambda: 10, lambda step: step * 128, lambda: BOOK)


@pytest.fixture
def served() -> Iterator[Prometheus]:
    exporter = Prometheus(EXPORTED, PrometheusConfig(True, 0), pytest.fail)
    yield exporter
    exporter.close()


def scrape(url: str | None) -> str:
    assert url
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": OPENMETRICS}), timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        return answer.read().decode()


def samples(text: str) -> dict[tuple[str, str], float]:
    """Value by name and state, from OpenMetrics; each is of this run."""
    found = [sample for family in parse_openmetrics(text) for sample in family.samples]
    assert {sample.labels["run"] for sample in found} == {"tiny/now"}
    return {(sample.name, sample.labels.get("state", "")): sample.value for sample in found}


def test_what_is_served_is_openmetrics(served: Prometheus):
    served.write([ROW, {"step": 7, "val_loss": 2.25}])
    found = samples(scrape(served.url))
    expected = {
        ("orchestrator_steps_total", ""): 6,
        ("orchestrator_tokens_total", ""): 6 * 128,
        ("orchestrator_restarts_total", ""): 1,
        ("orchestrator_step", ""): 10,
        ("orchestrator_state_seconds_total", "training"): 6,
        ("orchestrator_state_seconds_total", "starting"): 3,
        ("orchestrator_run_seconds", "training"): 5 + 6,
        ("orchestrator_run_seconds", "lost"): 5,
        ("orchestrator_run_seconds", "waiting"): 8,
        ("orchestrator_run_seconds", "starting"): 5,
        ("orchestrator_goodput_ratio", ""): 11 / 29,
        ("orchestrator_loss", ""): 2.5,
        ("orchestrator_validation_loss", ""): 2.25,
        ("orchestrator_gradient_norm", ""): 0.5,
        ("orchestrator_learning_rate", ""): 1e-3,
        ("orchestrator_tokens_per_second", ""): 900,
        ("orchestrator_run_info", ""): 1,
    }
    assert found == {key: pytest.approx(value) for key, value in expected.items()}
    served.write([{**ROW, "loss": None, "nonfinite": {"loss": "nan"}, "memory_bytes": 2**30}])
    found = samples(scrape(served.url))
    assert math.isnan(found["orchestrator_loss", ""])
    assert found["orchestrator_device_memory_bytes", ""] == 2**30


def test_a_port_that_is_taken_is_a_warning():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port, told = other.getsockname()[1], list[str]()
        exporter = Prometheus(EXPORTED, PrometheusConfig(True, port), told.append)
        assert exporter.url is None
        exporter.write([ROW])
        exporter.close()
    assert len(told) == 1
    assert f"127.0.0.1:{port}" in told[0]
    assert "in use" in told[0]


def test_a_file_for_node_exporter(tmp_path: Path):
    path = tmp_path / "run.prom"
    exporter = Prometheus(EXPORTED, PrometheusConfig(True, None, textfile=str(path)), pytest.fail)
    exporter.write([ROW])
    exporter.close()
    found = {sample.name: sample.value for family in parse_text(path.read_text()) for sample in family.samples}
    assert found["orchestrator_loss"] == 2.5
    assert found["orchestrator_steps_total"] == 6
    assert [each.name for each in tmp_path.iterdir()] == ["run.prom"]
    gone = Prometheus(EXPORTED, PrometheusConfig(True, None, textfile=str(tmp_path / "no" / "run.prom")), pytest.fail)
    with pytest.raises(OSError, match="No such file"):
        gone.write([ROW])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PrometheusConfig(textfile="/etc/passwd"), "ends in .prom"),
        (PrometheusConfig(True, None), "neither served nor written"),
        (PrometheusConfig(port=70000), "logger.prometheus.port"),
        (PrometheusConfig(port=-1), "logger.prometheus.port"),
    ],
)
def test_what_cannot_be_is_refused(config: PrometheusConfig, said: str):
    logger = replace(RunConfig().logger, prometheus=config)
    problems = validate(replace(RunConfig(), logger=logger))
    assert len(problems) == 1
    assert said in str(problems[0])
