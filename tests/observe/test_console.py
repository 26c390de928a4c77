"""What is printed where nobody reads, where there is no room, no stream, or no letter for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orchestrator.errors import UserError, printable

WORK = """
import sys, pathlib
from orchestrator.observe import sink
from orchestrator.observe.console import guarded
sink._PAUSE_SECONDS = (0.0, 0.0)
result = pathlib.Path(sys.argv[1])
with guarded() as output:
    for number in range(5):
        print("line", number, "\\u2588 \\x1b[31m", flush=True)
        print("to stderr \\u2588", file=sys.stderr)
    with open(sys.argv[1] + ".data", "w") as file:
        file.write("data")
    printed = output.close()
result.write_text(f"done {printed}")
"""


def work(tmp_path, shell: str, **env: str) -> tuple[subprocess.CompletedProcess[str], str]:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    result = tmp_path / "result"
    command = f"{sys.executable} {script} {result} {shell}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (tmp_path / "result.data").read_text() == "data", "and not what was printed"
    return done, result.read_text()


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("> /dev/full", "standard output cannot be written: No space left on device; the run goes on"),
        ("> /dev/full 2> /dev/full", ""),
        (">&- 2>&-", ""),
        (">&- 2>&- <&-", ""),
        ("2> /dev/full", ""),
    ],
)
def test_the_work_goes_on(tmp_path, shell, said):
    done, outcome = work(tmp_path, shell)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert done.stderr.count("cannot be written") <= 1
    assert outcome == ("done False" if shell.startswith("> /dev/full") else "done True")


def test_a_reader_that_has_gone_is_no_fault(tmp_path):
    done, outcome = work(tmp_path, "| true")
    assert outcome == "done True"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_letter_that_the_encoding_lacks_is_written_as_its_number(tmp_path, env):
    done, outcome = work(tmp_path, "", **env, PYTHONUTF8="0")
    assert outcome == "done True"
    assert done.stdout.splitlines()[0] == r"line 0 \u2588 \x1b[31m", "and control characters, too"


def test_messages_hold_no_control_characters():
    assert printable("a\tb\nc\x1b[2J\r\x9b") == "a\tb\nc\\x1b[2J\\r\\x9b"
    assert "\x1b" not in str(UserError("what", got="\x1b[31m", fix="\x07"))
