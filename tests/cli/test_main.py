"""The front door: what it says, what it returns, and that asking for help loads nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import __version__, cli
from orchestrator.cli import VERBS, checkpoint, main
from orchestrator.errors import ConfigError, HardwareError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "hydra", "omegaconf", "lightning", "numpy", "grain", "tokenizers", "transformers")

LOOK = f"""
import json, sys
from orchestrator.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out and what in out for verb, what in VERBS.items())


def test_nothing_said_is_a_mistake(capsys):
    assert main([]) == 2
    assert "usage: python -m orchestrator VERB" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean 'train'?"), ("Doctor", "did you mean 'doctor'?"), ("xyzzy", "--help")]
)
def test_an_unknown_verb(word, hint, capsys):
    assert main([word, "optim.lr=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: there is no such verb\n  got:     " + word)
    assert hint in captured.err
    assert all(verb in captured.err for verb in VERBS)


def test_every_verb_is_a_module_and_every_module_a_verb():
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__"}
    of_verbs = {"checkpoint_text", "text_words", *(module for module, _ in checkpoint._MODULES.values())}
    assert modules == {verb.replace("-", "_") for verb in VERBS} | of_verbs


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_nothing_heavy(verb):
    done = subprocess.run(
        [sys.executable, "-c", LOOK, verb, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    *text, last = done.stdout.splitlines()
    assert json.loads(last) == [0, []], done.stderr
    assert text[0].startswith(f"usage: python -m orchestrator {verb}")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["train", "optim.lrr=1"],
        ["train", "model=tinyy"],
        ["train", "--config-dir", "/nowhere/at/all"],
        ["data", "prepare", "nonsense"],
        ["data", "prepair"],
        ["generate", "colour=red"],
        ["doctor", "colour=red"],
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(words, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "  do: " in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("wrong", got=1, fix="mend it"), 2, "error: wrong\n  got:     1\n  do:      mend it\n"),
        (HardwareError("none"), 2, "error: none\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_verb_raises_becomes_an_exit_code(monkeypatch, capsys, error, code, said):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["train"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("ours"), "defect of orchestrator: RuntimeError: ours at "),
        (OSError(28, "No space left on device", "/full"), "the system refuses: No space left on device: /full"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_defect_is_one_paragraph_and_its_stack_is_to_be_had(monkeypatch, capsys, error, said):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["train"]) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("ORCHESTRATOR_TRACEBACK", "1")
    assert main(["train"]) == 1
    assert "Traceback" in (shown := capsys.readouterr().err)
    assert "in fail" in shown


@pytest.mark.parametrize("verb", ["train", "plan", "checkpoint"])
def test_a_folder_that_has_gone(tmp_path, monkeypatch, capsys, verb):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main([verb]) == 2
    assert "is gone" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error():
    done = subprocess.run(
        [f"{sys.executable} -m orchestrator train --help | true; exit ${{PIPESTATUS[0]}}"],
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("orchestrator train optim.l", "orchestrator optim.l"),
        ("orchestrator train data=train model=", "orchestrator data=train model="),
        ("python -m orchestrator train ", "python -m orchestrator "),
        ("orchestrator doctor ", "orchestrator doctor "),
        ("orchestrator trai", "orchestrator trai"),
    ],
)
def test_hydra_completes_the_words_after_train(monkeypatch, line, becomes):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["--version"]) == 0
    assert os.environ["COMP_LINE"] == becomes


def test_without_a_line_to_complete_nothing_is_set(monkeypatch):
    monkeypatch.delenv("COMP_LINE", raising=False)
    main(["--version"])
    assert "COMP_LINE" not in os.environ


def test_hydras_completion_knows_groups_and_options():
    environment = {**os.environ, "COMP_LINE": "orchestrator train model=tiny_", "COMP_POINT": "29"}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "train", "-sc", "query=bash"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env=environment,
    )
    presets = sorted(path.stem for path in (ROOT / "conf/model").glob("tiny_*.yaml"))
    assert done.stdout.split() == [f"model={name}" for name in presets], done
