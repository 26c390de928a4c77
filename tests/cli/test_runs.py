"""`runs` and `watch`, on made-up runs and a lock that is really held."""

from __future__ import annotations

import json
import os
import time

import pytest
from filelock import FileLock

from orchestrator.api.run_overview import is_held, list_runs
from orchestrator.cli import main
from orchestrator.report.run_frame import seconds_to_go, spark, time_line
from tests.report.test_run_report import HOSTILE, evaluation, leg, row, write

OLD = time.time() - 40 * 86400


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Runs of two names: one that runs, one that died, a finished and a failed one that are old."""
    monkeypatch.chdir(tmp_path)
    for name, status, age in (
        ("tiny/now", "running", 0.0),
        ("tiny/died", "running", 4000.0),
        ("tiny/done", "finished", 40 * 86400.0),
        ("wide/broke", "failed", 41 * 86400.0),
    ):
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        legs = [leg(0, 0, 2, host="host-a"), leg(1, 2, None, host="host-b")]
        goodput = {"fraction": 0.8, "seconds": {"training": 80.0, "starting": 20.0}}
        facts = {"name": name, "status": status, "legs": legs, "goodput": goodput}
        write(run_dir, [row(1), row(2), evaluation(2, 3.5), row(3, leg=1)], facts)
        (run_dir / ".lock").touch()
        for path in run_dir.iterdir():
            os.utime(path, (time.time() - age,) * 2)
    return tmp_path / "runs"


def test_the_list_says_what_each_is_doing(folder, capsys):
    with FileLock(folder / "tiny" / "now" / ".lock"):
        os.utime(folder / "tiny" / "now" / "metrics.jsonl", (time.time() - 3600,) * 2)  # a long step
        assert main(["runs"]) == 0
        assert is_held(folder / "tiny" / "now") is True
        assert is_held(folder / "tiny" / "died") is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["run", "state", "step", "loss", "val"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["tiny/now", "running"],
        ["tiny/died", "dead"],
        ["tiny/done", "finished"],
        ["wide/broke", "failed"],
    ]
    assert lines[1].split()[2:8] == ["3", "of", "10", "2.6667", "3.5000", "80.0%"]
    assert lines[1].split()[8:] == ["1", "2", "x", "Some", "CPU", "host-b", "0", "s", "ago"]
    assert lines[3].endswith("40 d ago")


def test_a_run_of_another_host_is_alive_while_it_gives_signs_of_life(folder):
    run_dir = folder / "tiny" / "died"
    (run_dir / "time_book.alive").write_text("{}")
    assert {one.run: one.state for one in list_runs(folder)}["tiny/died"] == "running"


def test_json_and_filters(folder, capsys):
    assert main(["runs", "states=dead,failed", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in found] == ["tiny/died", "wide/broke"]
    assert main(["runs", "name=wide", "limit=1"]) == 0
    assert "tiny" not in capsys.readouterr().out
    assert main(["runs", "runs_dir=nowhere"]) == 0
    assert "there is no folder nowhere" in capsys.readouterr().out


def test_prune_lists_first_and_then_removes_what_it_has_listed(folder, capsys):
    assert main(["runs", "prune", "older_than=30d"]) == 0
    out = capsys.readouterr().out
    assert "would go   tiny/done  finished, 40 d ago" in out
    assert "nothing was removed: add yes=true" in out
    assert (folder / "wide" / "broke" / "run.json").exists()
    assert main(["runs", "prune", "older_than=30d", "yes=true"]) == 0
    assert "removed    wide/broke  failed" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["tiny"]
    assert sorted(path.name for path in (folder / "tiny").iterdir()) == ["died", "now"]


def test_prune_keeps_the_newest_of_each_name_and_what_runs(folder, capsys):
    with FileLock(folder / "tiny" / "done" / ".lock"):
        facts = folder / "tiny" / "done" / "run.json"
        facts.write_text(facts.read_text().replace("finished", "running"))
        assert main(["runs", "prune", "keep_last=0", "yes=true"]) == 0
    left = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/*/run.json"))
    assert left == ["tiny/done", "tiny/now"], "one is held, and the other one gives signs of life"
    assert "removed    tiny/died  dead" in capsys.readouterr().out


def test_a_run_that_is_held_is_not_removed_whatever_it_says(folder, capsys):
    with FileLock(folder / "wide" / "broke" / ".lock"):
        assert main(["runs", "prune", "older_than=30d", "yes=true"]) == 2
    captured = capsys.readouterr()
    assert "another process is training in this run directory" in captured.err
    assert "removed    tiny/done" in captured.out
    assert (folder / "wide" / "broke" / "run.json").exists()


def test_what_a_link_leads_to_is_not_removed(folder, capsys):
    (folder / "link").mkdir()
    (folder / "link" / "there").symlink_to(folder / "wide" / "broke")
    assert main(["runs", "prune", "name=link", "keep_last=0", "yes=true"]) == 1
    assert "the run directory is a link" in capsys.readouterr().err
    assert (folder / "wide" / "broke" / "run.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune"], "say which runs are to go"),
        (["prune", "older_than=soon"], "an age is a number and a unit"),
        (["prune", "keep_last=-1"], "a number of runs stays"),
        (["prune", "states=running"], "a run that runs is not removed"),
        (["prune", "states=dying"], "'states"),
        (["pruned"], "did you mean 'prune'?"),
        (["limit=-1"], "there are no fewer runs than none"),
    ],
)
def test_mistakes(folder, capsys, words, said):
    assert main(["runs", *words]) == 2
    assert said in capsys.readouterr().err


def test_watch_shows_a_run_once(folder, capsys):
    assert main(["watch", "tiny/now", "once=true"]) == 0
    out = capsys.readouterr().out
    assert "tiny/now  running  host-b" in out
    assert "step 3 of 10" in out
    assert "fsdp 2, fp32" in out
    assert "perplexity 33.12 at step 2" in out
    assert "restarts" in out
    assert "goodput 80.0%" in out
    assert "training" in out
    assert "80.0%, 1 min 20 s" in out


def test_watch_prints_a_line_for_each_change_until_the_run_ends(folder, capsys):
    assert main(["watch", "wide", "every=0.1"]) == 0
    assert capsys.readouterr().out == "wide/broke  failed  step 3 of 10  loss 2.6667  2,000 tokens/s\n"


def test_hostile_files_are_shown_and_do_no_harm(folder, capsys):
    run_dir = folder / "tiny" / "now"
    hostile = leg(0, 0, 2, host="\x1b]0;x\x07[red]", device_names=[HOSTILE], notice="[bold]\x1b[2J", layout=3)
    (run_dir / "run.json").write_text(json.dumps({"status": "\x1b[31mup", "legs": [hostile], "goodput": [1]}))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n{"step": "2"}\n[1]\n{cut')
    assert main(["runs", "name=tiny"]) == 0
    assert main(["watch", str(run_dir), "once=true"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    (run_dir / "run.json").write_text("[]")
    assert main(["runs"]) == 0


def test_a_curve_in_a_line():
    assert spark([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert spark([1.0] * 5, 3) == "▁▁▁"
    assert spark([], 3) == ""
    assert len(spark([float(number) for number in range(1000)], 40)) == 40


def test_the_time_to_go_is_that_of_the_last_steps():
    rows = [{"step_seconds": 100.0}, *({"step_seconds": 2.0} for _ in range(20))]
    assert seconds_to_go(rows, 20, 50) == 60.0
    assert seconds_to_go([], 20, 50) is None
    assert seconds_to_go(rows, 60, 50) == 0.0


def test_states_are_shown_by_their_share():
    assert [name for name, _ in time_line({"saving": 1.0, "training": 98.99, "loading": 0.01}, 20)] == [
        *("training", "saving"),
    ]
    assert time_line({}, 20) == []
