"""Run the code blocks of pages as a reader would: each page from its top, in a fresh clone, pasted into a fresh shell.

Blocks that are marked `not run` are left out. Training commands are run on two tiny steps; everything else is run as it
is written. What a page expects to be there (a model from the hub) is made small beforehand.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.lab import pages
from tests.lab.hf_directories import build

TIMEOUT_SECONDS = 1800


def main(names: list[str]) -> int:
    """Run the pages whose path holds one of `names`, or all. Returns 1 where one failed."""
    failed = 0
    for page in pages.PAGES:
        name = page.relative_to(pages.ROOT).as_posix()
        found = [block for block in pages.blocks(page) if block.language in ("bash", "console")]
        run = [block for block in found if not block.note.startswith(pages.NOT_RUN)]
        if not run or (names and not any(word in name for word in names)):
            continue
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="docs-") as folder:
            here = pages.clone(Path(folder) / "clone")
            if page.stem == "fine-tuning":
                build("qwen2_v4_tied", here / "models").rename(here / "models" / "Qwen3-0.6B")
            done = pages.paste("set -eu\nsource .venv/bin/activate\n" + script(run), here, TIMEOUT_SECONDS)
        verdict = "works" if done.returncode == 0 else f"FAILED with {done.returncode}"
        print(f"{name:<36}  {time.monotonic() - begin:4.0f} s  {len(run)} blocks  {verdict}", flush=True)
        if done.returncode:
            failed = 1
            print(done.stdout[-2000:] + done.stderr[-3000:], flush=True)
    return failed


def script(run: list[pages.Block]) -> str:
    """The blocks as one script that says where it is."""
    lines = []
    for block in run:
        lines.append(f"echo '### {block}'")
        for line in block.text.splitlines():
            if block.language == "bash":
                lines.append(pages.smaller(line))
            elif line.startswith("$ "):
                # What is printed is compared by tests/test_docs.py; 1 is a verdict of plan and verify.
                lines.append(f"{line.removeprefix('$ ')} || [ $? = 1 ]")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
