"""What a user is told in start-up, and when not."""

from __future__ import annotations

import pytest

from orchestrator.config.compose import compose
from orchestrator.runs.messages import doing


@pytest.mark.parametrize("words", [["logger.progress=false"], ["logger=quiet"]])
def test_start_up_shows_what_it_does_unless_progress_is_off(words, capsys):
    for config in (compose().config, [], ["model=tiny"]):
        doing("loading torch", config)
        assert capsys.readouterr().err == "start      loading torch\n"
    for config in (compose(words).config, words):
        doing("loading torch", config)
        assert capsys.readouterr().err == ""
