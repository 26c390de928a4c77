"""README's commands, pasted one after the other into a fresh shell on a fresh clone."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# So much is put behind each training command, and no more: what README says of the command is what is run.
SMALL = (
    "train.max_steps=2 train.seq_len=64 train.global_batch_tokens=512 train.eval_tokens=512 train.sample.tokens=2 "
    "checkpoint.handover.sequences=1 logger.progress=false hardware.threads=1"
)
TIMEOUT_SECONDS = 900


def blocks() -> list[tuple[str, list[str]]]:
    """README's code blocks in order: the language that each is marked with, and its lines."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in README.splitlines():
        if line.startswith("```"):
            if not inside:
                found.append((line.removeprefix("```"), []))
            inside = not inside
        elif inside:
            found[-1][1].append(line)
    return found


def commands() -> list[str]:
    """The lines of all blocks that are marked as bash, in order."""
    return [line for language, lines in blocks() if language == "bash" for line in lines if line.strip()]


def _smaller(command: str) -> str:
    line = re.sub(r"\s+#.*$", "", command)
    words = shlex.split(line)
    return f"{line} {SMALL}" if words[0] == "scripts/train" or "train" in words[:4] else line


@pytest.fixture
def clone(tmp_path):
    """A fresh clone whose environment counts as made: the packages are this one's."""
    folder = tmp_path / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod((ROOT / name).stat().st_mode)
    (folder / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith(".installed-"):
            (folder / ".venv" / part.name).symlink_to(part)
    content = (folder / "pyproject.toml").read_bytes() + (folder / "constraints.txt").read_bytes()
    (folder / ".venv" / ".installed-base").write_text(hashlib.sha256(content).hexdigest() + "\n")
    return folder


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_every_command_works_when_it_is_pasted(clone):
    script = "".join(
        f"{_smaller(line)} || {{ echo {shlex.quote(f'FAILED: {line}')}; exit 1; }}\n" for line in commands()
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        ["bash", "--norc", "-s"],
        input=script,
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_blocks_that_are_not_run_are_few_and_known():
    """Each for a reason: what is printed, and other environments (torch_xla, which tests/xla runs)."""
    first = [lines[0].split()[0] for language, lines in blocks() if language != "bash"]
    assert first == ["error:", "scripts/train", ".venv-xla/bin/python"]
    assert len(commands()) > 15
