"""The verb: what it prints and writes, the loss of texts, and what it says of tasks that it cannot or will not run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from tests.lab import harness as lab
from tests.lab.ranks import run_ranks
from tests.lab.slow import slow

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint and tasks."""
    lab.preload()
    folder = tmp_path_factory.mktemp("verb")
    lab.make_checkpoint(folder, "qwen")
    lab.write_tasks(folder / "tasks")
    return folder


def _run(world, words: list[str]) -> tuple[str, str]:
    """What the verb prints, and what it says is wrong."""
    from orchestrator.cli.evaluate import main

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            assert main(words) == 0
    except UserError as error:
        return printed.getvalue(), str(error)
    return printed.getvalue(), ""


def evaluate(place: Path, *words: str) -> str:
    ((printed, problem),) = run_ranks(1, _run, [f"checkpoint={place / 'imported'}", "hardware=cpu", *words])
    assert not problem
    return printed


def refused(place: Path, *words: str) -> str:
    ((_, problem),) = run_ranks(1, _run, [f"checkpoint={place / 'imported'}", "hardware=cpu", *words])
    assert problem
    return problem


def test_a_folder_of_tasks_gives_a_table_and_files_in_lm_evals_schema(place, tmp_path):
    words = [f"output={tmp_path}/out", "samples=true", "bootstrap=0", "limit=3"]
    printed = evaluate(place, f"tasks=[{place / 'tasks'}]", *words)
    rows = [line.split() for line in printed.splitlines()]
    assert [row[0] for row in rows if row[0].startswith("lab_")] == ["lab_answers", "lab_choices", "lab_texts"]
    (file,) = (tmp_path / "out").glob("results_*.json")
    results = json.loads(file.read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"} <= set(results)
    assert results["n-samples"]["lab_choices"] == {"original": 7, "effective": 3}
    assert results["config"]["model_args"]["checkpoint"] == str(place / "imported")
    (samples,) = (tmp_path / "out").glob("samples_lab_choices_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3


def test_bits_per_byte_of_a_text_are_those_of_lm_evals_rolling_task(place, tmp_path):
    """On files and, of the same text, on a token store."""
    texts = [json.loads(line)["text"] for line in (place / "tasks" / "texts.jsonl").read_text().splitlines()]
    wanted = json.loads(evaluate(place, f"tasks={place}/tasks/lab_texts.yaml", "bootstrap=0", "json=true"))["results"]
    found = json.loads(evaluate(place, f"data={place}/tasks/texts.jsonl", "json=true"))
    assert found["bits_per_byte"] == pytest.approx(wanted["lab_texts"]["bits_per_byte,none"], rel=1e-6)
    assert (found["documents"], found["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
    _prepare(place, tmp_path / "store")
    stored = json.loads(evaluate(place, f"data={tmp_path / 'store'}", "json=true"))
    assert {key: stored[key] for key in ("tokens", "documents", "bytes")} == {
        key: found[key] for key in ("tokens", "documents", "bytes")
    }
    assert stored["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_a_directory_of_hugging_face_is_evaluated_as_it_is(place, tmp_path):
    words = [f"data={place}/tasks/texts.jsonl", "json=true"]
    wanted = json.loads(evaluate(place, *words))
    given = [f"checkpoint=hf:{place / 'hub'}", f"runs_dir={tmp_path}", "hardware=cpu"]
    ((printed, problem),) = run_ranks(1, _run, [*given, *words])
    assert not problem
    assert json.loads(printed)["loss"] == wanted["loss"]


def _prepare(place: Path, store: Path) -> None:
    from orchestrator.cli.data import main

    words = [f"input={place}/tasks/texts.jsonl", f"output={store}", f"tokenizer={place / 'imported'}"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["prepare", *words, "validation_fraction=0"]) == 0


def _changed(place: Path, folder: Path, old: str, new: str) -> Path:
    shutil.copytree(place / "tasks", folder)
    file = folder / "lab_choices.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    return file


def test_what_cannot_be_evaluated_is_one_error_that_says_what_to_do(place, tmp_path):
    def problem(name: str, old: str, new: str, *words: str) -> str:
        return refused(place, f"tasks={_changed(place, tmp_path / name, old, new)}", *words)

    elsewhere = problem("elsewhere", "dataset_path: json", "dataset_path: somebody/questions", "bootstrap=0")
    assert "not on this machine" in elsewhere
    assert "download=true" in elsewhere
    assert "a file that" in problem("gone", "choices.jsonl", "gone.jsonl")
    assert "of conversations only the answers count" in refused(
        place, f"data={place}/tasks/texts.jsonl", "data.messages=chat"
    )
    assert "'nothing' is undefined" in problem("template", "{{question}}", "{{nothing}}")
    assert "say what is to be evaluated" in refused(place)
    assert "means nothing here" in refused(place, f"tasks={place}/tasks", "train.seq_len=8")
    assert "takes fewer tokens" in refused(place, f"tasks={place}/tasks", "max_length=4096")


@slow
def test_a_wrong_name_gets_the_right_one(place):
    """It takes seconds, as all that lm-eval ships is looked through."""
    assert "did you mean arc_easy" in refused(place, "tasks=arc_easyy")


def test_a_file_of_a_task_runs_no_code(place, tmp_path):
    """Neither Python that it names nor by a template."""
    mark = tmp_path / "ran"
    named = _changed(place, tmp_path / "named", "doc_to_choice: choices", "doc_to_choice: !function code.choices")
    (named.parent / "code.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n\ndef choices(doc):\n    return doc['choices']\n"
    )
    assert "task_code=true" in refused(place, f"tasks={named}")
    assert not mark.exists()
    evaluate(place, f"tasks={named}", "task_code=true", "bootstrap=0")
    assert mark.exists()
    reaching = "{{cycler.__init__.__globals__.os.getpid()}}"
    template = _changed(place, tmp_path / "template", "{{question}}", reaching)
    assert "unsafe" in refused(place, f"tasks={template}", "bootstrap=0")
