"""The code blocks of README and docs/, and a fresh clone to run them in.

A line directly in front of a block says what is not run with the tests, and why:

    <!-- run by scripts/docs --run -->        what takes longer
    <!-- not run: needs a Slurm cluster -->   what cannot be run here
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LATER = "run by scripts/docs --run"
NOT_RUN = "not run: "
# So much is put behind each training command, and no more: what a page says of the command is what is run.
SMALL = (
    "train.max_steps=2 train.seq_len=64 train.global_batch_tokens=512 train.eval_tokens=512 train.sample.tokens=2 "
    "checkpoint.handover.sequences=1 logger.progress=false hardware.threads=1"
)
_FENCE = re.compile(r"^\s*```(\w*)\s*$")
_COMMENT = re.compile(r"^\s*<!-- (.*) -->\s*$")


@dataclass
class Block:
    """A code block.

    Attributes:
        page: the file it is in.
        line: number of the line with its first fence.
        language: the word behind the fence, or nothing.
        note: the comment in front of it, or nothing.
        lines: its content.
    """

    page: Path
    line: int
    language: str
    note: str
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def text(self) -> str:
        """The content, with lines that end in a backslash joined to the next one."""
        return "\n".join(self.lines).replace("\\\n", " ")


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    found: list[Block] = []
    before, inside = "", False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence := _FENCE.match(line):
            if not inside:
                comment = _COMMENT.match(before)
                found.append(Block(page, number, fence[1], comment[1] if comment else ""))
            inside = not inside
        elif inside:
            found[-1].lines.append(line)
        before = line
    assert not inside, f"{page}: a code block without an end"
    return found


def smaller(line: str) -> str:
    """A line of a block as it is run: a command that trains, on two tiny steps."""
    line, apart, behind = re.sub(r"\s+#.*$", "", line).partition(" &")
    trains = re.match(r"\s*(?:\w+=\S+ )?(scripts/train|python -m orchestrator train|torchrun .* train)\b", line)
    if trains and shlex.split(line)[-1] not in ("--help", "job"):
        # A run that goes on needs a step to do.
        line = f"{line} {SMALL.replace('max_steps=2', 'max_steps=3') if ' resume=' in line else SMALL}"
    return f"{line}{apart}{behind}"


def clone(folder: Path) -> Path:
    """Make a fresh clone of this repository in which the environment counts as made: the packages are this one's."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
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


def paste(script: str, folder: Path, timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh shell in `folder`, as if its lines were pasted one after the other."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        ["bash", "--norc", "-s"],
        input=script,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
