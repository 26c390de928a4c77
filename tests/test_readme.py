"""README's commands, pasted one after the other into a fresh shell on a fresh clone."""

from __future__ import annotations

import shlex

import pytest

from tests.lab import pages
from tests.lab.slow import slow

TIMEOUT_SECONDS = 900
BLOCKS = pages.blocks(pages.ROOT / "README.md")
COMMANDS = [
    line for block in BLOCKS if block.language == "bash" and not block.note for line in block.text.splitlines() if line
]


@pytest.mark.timeout(TIMEOUT_SECONDS)
@slow
def test_every_command_works_when_it_is_pasted(tmp_path):
    script = "".join(
        f"{pages.smaller(line)} || {{ echo {shlex.quote(f'FAILED: {line}')}; exit 1; }}\n" for line in COMMANDS
    )
    done = pages.paste(script, pages.clone(tmp_path / "clone"), TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_blocks_that_are_not_run_are_few_and_known():
    """Each for a reason: what is printed, and other environments (torch_xla, which tests/xla runs)."""
    others = [block for block in BLOCKS if block.language != "python"]  # which tests/api/test_pages.py runs
    first = [block.lines[0].split()[0] for block in others if block.language != "bash" or block.note]
    assert first == ["error:", "scripts/train", ".venv-xla/bin/python"]
    assert len(COMMANDS) > 15
