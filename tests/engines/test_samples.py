"""docs/launch-samples.md shows what the product makes: each sample is made again by the words above it."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from orchestrator.config.compose import compose
from orchestrator.engines.engine_job import engine_job
from orchestrator.engines.engine_table import engine_of
from orchestrator.engines.kubernetes_checks import manifest_problems
from orchestrator.engines.kubernetes_schemas import schema_problems
from tests.lab.run_server import ROOT

PAGE = ROOT / "docs" / "launch-samples.md"
_SAMPLE = re.compile(r"python -m orchestrator launch (engine=.*?)\n```\n\n```yaml\n(.*?)```", re.DOTALL)
_OTHER = re.compile(r"An administrator's.*?```yaml\n(.*?)```", re.DOTALL)
SAMPLES = [(shlex.split(words.replace("\\\n", " ")), text) for words, text in _SAMPLE.findall(PAGE.read_text())]


def made(words: list[str]) -> str:
    """The file that `launch` makes of these words."""
    line = [f"launch={word[7:]}" if word.startswith("engine=") else word for word in words if word != "dry_run=true"]
    (run_id,) = [word.partition("=")[2] for word in line if word.startswith("run_id=")]
    line = [word for word in line if not word.startswith("run_id=")]
    config = compose(line).config
    job, engine = engine_job(config, run_id, line), engine_of(config.launch.name)
    rendered = engine.render(job)
    assert engine.problems(job, rendered) == []
    (text,) = rendered.files.values()
    return text


@pytest.mark.parametrize(("words", "text"), SAMPLES, ids=[words[0] for words, _ in SAMPLES])
def test_a_sample_is_what_the_product_makes(words, text):
    assert made(words) == text


def test_there_are_samples_and_the_queue_passes_kueues_schemas():
    assert [words[0] for words, _ in SAMPLES] == ["engine=kubernetes", "engine=kubernetes", "engine=skypilot"]
    (text,) = _OTHER.findall(PAGE.read_text())
    objects = list(yaml.safe_load_all(text))
    assert [problem for one in objects for problem in schema_problems(one)] == []
    assert manifest_problems(objects) == []
