"""docs/where.md: each answer is a file that exists, and whose name stands in no other answer."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_answer_is_a_file():
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \|$", (ROOT / "docs" / "where.md").read_text(), re.M)
    assert len(rows) >= 30
    assert len({question for question, _ in rows}) == len(rows)
    missing = [file for _, file in rows if not (ROOT / "orchestrator" / file).is_file()]
    assert missing == []


def test_paths_that_the_pages_name_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    wrong = []
    for page in pages:
        for path in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|yaml|json))`", page.read_text()):
            if not any((place / path).exists() for place in (ROOT, ROOT / "orchestrator")):
                wrong.append(f"{page.name}: {path}")
    assert wrong == []
