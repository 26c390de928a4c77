"""Where the product's own lines go."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from orchestrator import errors, output


def _run(code: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_lines_are_silent_until_a_program_asks_for_them_and_printed_for_the_command_line():
    assert _run("import logging; from orchestrator.output import tell; tell('lost', level=logging.WARNING)") == ("", "")
    asked = "import logging; logging.basicConfig(level='INFO'); from orchestrator.output import tell; tell('step 1')"
    assert _run(asked) == ("", "INFO:orchestrator:step 1\n")
    printed = (
        "import logging; logging.basicConfig(level='INFO')\n"
        "from orchestrator.output import is_printed, printing, tell\n"
        "with printing(), printing():\n"
        "    tell('loss 2.5', stream='stdout'); tell('late', level=logging.WARNING); tell('no', level=logging.ERROR)\n"
        "assert not is_printed(); tell('after')"
    )
    assert _run(printed) == ("loss 2.5\n", "warning: late\nerror: no\nINFO:orchestrator:after\n")


def test_a_line_of_another_process_keeps_its_level(caplog, monkeypatch):
    # As in a program that imports the package: the tests' own printing is off.
    monkeypatch.setattr(logging.getLogger("orchestrator"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("orchestrator"), "handlers", [])
    for line in ("step 1", "warning: the disk is full", "error: no such file"):
        output.relay(line, "stderr")
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert found == [("INFO", "step 1"), ("WARNING", "the disk is full"), ("ERROR", "no such file")]


@pytest.mark.parametrize(
    "error",
    [
        errors.DataError("no such data", got=7, allowed="text", fix="look"),
        errors.MissingExtraError("blake3", "blake3", "hashing"),
        errors.RunDirectoryError("it is full", "/runs"),
        errors.ConfigErrors([errors.ConfigError("one", got=1), errors.LayoutError("two")]),
    ],
)
def test_an_error_is_the_same_in_another_process(error):
    again = errors.error_from_dict(errors.error_to_dict(error))
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)
    assert [type(one) for one in getattr(again, "problems", [])] == [
        type(one) for one in getattr(error, "problems", [])
    ]


def test_an_error_of_a_name_that_is_no_error_is_a_plain_one():
    data = {**errors.error_to_dict(errors.DataError("no such data")), "type": "os"}
    assert type(errors.error_from_dict(data)) is errors.UserError
