"""`checkpoint` as a user types it: what it prints, and with which code it exits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.diff import TensorDifferences
from orchestrator.cli import checkpoint_text, main
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import ModelConfig, RunConfig
from orchestrator.models.shapes import parameter_shapes
from orchestrator.runs import run_directory
from tests.lab.checkpoints import forge, write_whole
from tests.lab.models import model_config, random_model, save_model, tokenizer_files
from tests.lab.tensors import read_all

TENSORS = {"model.embed.weight": torch.arange(12.0).reshape(4, 3), "optimizer.step.embed.weight": torch.tensor(2.0)}
STATE = {
    "step": 1,
    "data": {"next_sequence": 96, "fingerprint": "abc"},
    "target": "cpu",
    "layout": {"fsdp": 2},
    "software": {"torch": "2.13"},
}
LEGS = [{"target": "cuda", "end_step": 8}, {"target": "tpu", "software": {}}]
HISTORY = {"history.json": json.dumps({"legs": LEGS, "rows": []}).encode()}


def call(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["checkpoint", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def flip(checkpoint: Path, name: str = "rank-00000.safetensors") -> None:
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture
def run(tmp_path):
    """A run directory with three checkpoints."""
    run_dir = tmp_path / "runs" / "tiny" / "1"
    run_dir.mkdir(parents=True)
    run_directory.write_config(run_dir, RunConfig(runs_dir=str(tmp_path / "runs")))
    for step in (10, 20, 30):
        state = {**STATE, "step": step}
        write_whole(run_dir / "checkpoints", TENSORS, step=step, state=state, config={"name": "tiny"}, extra=HISTORY)
    return run_dir


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step-{number:08d}"


# Help and options


def test_help(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in ("inspect", "verify", "diff", "export", "import", "prune"))
    for name in ("inspect", "verify", "diff", "export", "import", "prune"):
        code, out, _ = call(capsys, name, "--help")
        assert code == 0
        assert "Example: python -m orchestrator checkpoint" in out
    assert call(capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspekt"], "did you mean 'inspect'?"),
        (["inspect"], "'path' is missing"),
        (["inspect", "a", "b"], "an option is written key=value"),
        (["inspect", "a", "tensor=true"], "did you mean 'tensors'?"),
        (["diff", "a"], "'b' is missing"),
        (["export", "a"], "'output' is missing"),
        (["export", "a", "output=b", "format=onnx"], "hf, peft, dcp"),
        (["export", "a", "output=b", "max_shard_gb=0"], "'max_shard_gb' is out of range"),
        (["prune", "a", "keep_last=0"], "'keep_last' is out of range"),
        (["inspect", "nowhere"], "no checkpoint found in nowhere"),
        (["verify", "nowhere"], "no checkpoint found in nowhere"),
        (["prune", "nowhere", "keep_last=1"], "there are no checkpoints here"),
        (["import", "nowhere", "output=b"], "nothing to import here"),
        (["inspect", "latest", "runs_dir=nowhere"], "no valid checkpoint was found"),
    ],
)
def test_mistakes_of_the_user(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert expected in err
    assert list(tmp_path.iterdir()) == []


# inspect


def test_inspect(capsys, run):
    code, out, _ = call(capsys, "inspect", run)
    assert code == 0
    rows = dict(line.split(None, 1) for line in out.splitlines() if line)
    assert rows["step"].strip() == "30"
    assert rows["parameters"].strip() == "12"
    assert rows["layout"].strip() == "fsdp 2"
    assert rows["format"].strip() == "version 2, not signed"
    assert "next_sequence 96" in rows["data"]
    assert "leg 0       end_step 8, target cuda\n" in out
    assert rows["model.embed"].split() == ["1", "12", "48", "bytes", "F32"]
    assert "optimizer.step.embed.weight" not in out
    _, out, _ = call(capsys, "inspect", f"path={step(run, 10)}", "tensors=true")
    assert next(line for line in out.splitlines() if line.startswith("optimizer.step.embed")).split() == [
        "optimizer.step.embed.weight",
        "F32",
        "scalar",
        "1",
        "rank-00000.safetensors",
    ]


def test_inspect_as_json(capsys, run):
    code, out, _ = call(capsys, "inspect", run / "checkpoints", "--json", "tensors=true")
    facts = json.loads(out)
    assert code == 0
    assert (facts["step"], facts["parameters"], facts["tensors"], facts["signed"]) == (30, 12, 2, False)
    files = [path.stat().st_size for path in step(run, 30).iterdir()]
    assert facts["bytes_on_disk"] == sum(files)
    assert facts["data"] == STATE["data"]
    assert facts["provenance"]["software"] == {"torch": "2.13"}
    assert facts["tensor_list"][0]["shards"] == [{"file": "rank-00000.safetensors", "start": [0, 0], "stop": [4, 3]}]


def test_latest_is_found_in_the_runs(capsys, run, tmp_path):
    _, out, _ = call(capsys, "inspect", "latest", f"runs_dir={tmp_path / 'runs'}")
    assert str(step(run, 30)) in out


def test_inspect_passes_over_a_damaged_newest(capsys, run):
    (step(run, 30) / "state.json").unlink()
    code, out, err = call(capsys, "inspect", run)
    assert (code, str(step(run, 20)) in out, "step-00000030" in err) == (0, True, True)


def test_names_of_strangers_do_not_steer_the_terminal(capsys, tmp_path):
    path = write_whole(tmp_path, TENSORS, state={"step": 1, "target": "\x1b[31mred"}, config={"model": 3})
    code, out, _ = call(capsys, "inspect", path, "tensors=true")
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out
    shown = list(checkpoint_text.difference_rows(TensorDifferences(("model.\x1b[2J",), (), (), (), 0, 0)))
    assert shown[0] == "only in a  model.\\x1b[2J"


# verify


def test_verify(capsys, tmp_path):
    model = {"vocab_size": 32, "dim": 8, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_dim": 16}
    config = to_dict(RunConfig())
    config["model"].update(model)
    weights = {f"model.{name}": torch.ones(shape) for name, shape in parameter_shapes(ModelConfig(**model))}
    path = write_whole(tmp_path, weights, config=config)
    code, out, err = call(capsys, "verify", path)
    assert (code, err) == (0, "")
    assert "whole; 4 files, " in out
    assert f"all hashes match; {len(weights)} tensors where the manifest says" in out
    # Hashes that fit, and a model that is not in it.
    config["model"]["layers"] = 2
    other = write_whole(tmp_path, weights, 2, config=config)
    code, out, _ = call(capsys, "verify", other)
    assert code == 1
    assert out.startswith("wrong: the checkpoint does not hold the model")
    assert "all hashes match, but they do not mean" in out
    # One flipped bit, and damage everywhere.
    flip(path)
    code, out, _ = call(capsys, "verify", path)
    assert (code, out.count("damaged: rank-00000.safetensors bytes")) == (1, 1)
    assert "model.head.weight[0:32, 0:8]" in out
    many = write_whole(tmp_path, {f"model.{n}": torch.ones(1) for n in range(100)}, 3)
    (many / "rank-00000.safetensors").write_bytes(bytes((many / "rank-00000.safetensors").stat().st_size))
    code, out, _ = call(capsys, "verify", many)
    assert code == 1
    assert out.count("damaged: ") == 20
    assert "... and 81 more ranges" in out


def test_verify_of_a_file_that_is_cut(capsys, run):
    (step(run, 30) / "state.json").write_text("{")
    code, out, _ = call(capsys, "verify", run)
    assert code == 1
    assert "'state.json' of the checkpoint is damaged" in out


# diff


def test_diff(capsys, run, tmp_path):
    code, out, _ = call(capsys, "diff", step(run, 10), run)
    assert code == 0
    assert "bitwise equal: all 2 tensors" in out
    changed = {**TENSORS, "model.embed.weight": TENSORS["model.embed.weight"] + 1, "model.new": torch.ones(1)}
    other = write_whole(tmp_path / "other", changed)
    code, out, _ = call(capsys, "diff", run, other)
    assert code == 1
    assert "only in b  model.new" in out
    assert "12 of 12" in out
    assert "1 of 2 tensors that both have are bitwise equal" in out
    code, out, _ = call(capsys, "diff", run, other, "json=true")
    found = json.loads(out)
    assert (code, found["equal"], found["only_second"]) == (1, False, ["model.new"])
    assert found["changed"][0]["max_abs"] == 1.0
    assert call(capsys, "diff", run, other, "prefix=optimizer.")[0] == 0


def test_json_has_no_nan(capsys, run, tmp_path):
    other = write_whole(tmp_path / "other", TENSORS)
    forge(other, "model.embed.weight", lambda part: part.fill_(float("nan")))
    _, out, _ = call(capsys, "diff", run, other, "json=true")
    assert json.loads(out, parse_constant=pytest.fail)["changed"][0]["max_abs"] == "nan"


# export and import


def test_export_and_import(capsys, tmp_path):
    saved = save_model(tmp_path / "run", random_model(model_config("qwen3")), extra=tokenizer_files(tmp_path / "t"))
    code, out, _ = call(capsys, "export", saved, f"output={tmp_path / 'hf'}", "max_shard_gb=0.00002")
    assert code == 0
    assert "Qwen3ForCausalLM" in out
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    code, out, _ = call(capsys, "import", tmp_path / "hf", f"output={tmp_path / 'back'}")
    assert code == 0
    assert f"train train.init_from={tmp_path / 'back'}" in out
    assert call(capsys, "diff", saved, tmp_path / "back")[0] == 0
    code, _, err = call(capsys, "import", tmp_path / "hf", f"output={tmp_path / 'back'}")
    assert (code, "nothing is written over" in err) == (2, True)
    code, _, err = call(capsys, "import", tmp_path / "hf", f"output={tmp_path / 'x'}", "format=dcp")
    assert (code, "not of format dcp" in err) == (2, True)


def test_export_refuses_a_damaged_checkpoint(capsys, tmp_path):
    saved = save_model(tmp_path / "run", random_model(model_config("llama")))
    flip(saved)
    code, _, err = call(capsys, "export", saved, f"output={tmp_path / 'hf'}")
    assert (code, "the checkpoint is damaged" in err) == (2, True)
    assert not (tmp_path / "hf").exists()


def test_pickle_only_on_the_users_word(capsys, tmp_path):
    saved = save_model(tmp_path / "run", random_model(model_config("llama")))
    code, _, err = call(capsys, "export", saved, f"output={tmp_path / 'dcp'}", "format=dcp")
    assert (code, "allow_pickle=true" in err, (tmp_path / "dcp").exists()) == (2, True, False)
    code, _, err = call(capsys, "export", saved, f"output={tmp_path / 'dcp'}", "format=dcp", "allow_pickle=true")
    assert (code, "WARNING" in err and "pickle" in err) == (0, True)
    call(capsys, "export", saved, f"output={tmp_path / 'hf'}")
    words = ["import", tmp_path / "dcp", f"output={tmp_path / 'back'}", f"config={tmp_path / 'hf'}"]
    code, _, err = call(capsys, *words)
    assert (code, "allow_pickle=true" in err, (tmp_path / "back").exists()) == (2, True, False)
    code, out, err = call(capsys, *words, "allow_pickle=true")
    assert (code, "WARNING" in err, "no tokenizer came along" in out) == (0, True, True)
    assert read_all(tmp_path / "back").keys() == read_all(saved).keys()
    assert call(capsys, "diff", saved, tmp_path / "back")[0] == 0
    code, _, err = call(capsys, *words, "model=tiny", "allow_pickle=true")
    assert (code, "leave out one of them" in err) == (2, True)


# prune


def test_prune(capsys, run):
    code, out, _ = call(capsys, "prune", run, "keep_last=1", "keep_every_steps=10", "dry_run=true")
    assert (code, "0 would be removed, 3 kept" in out) == (0, True)
    code, out, _ = call(capsys, "prune", run, "keep_last=1", "keep_every_steps=20", "dry_run=true")
    assert f"would remove  {step(run, 10)}" in out
    assert step(run, 10).exists()
    code, out, _ = call(capsys, "prune", run / "checkpoints", "keep_last=1", "keep_every_steps=20")
    assert code == 0
    assert f"removed  {step(run, 10)}" in out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]
    Checkpoint(step(run, 20)).verify()


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_prune_keeps_off_a_run_that_is_running(capsys, run, below):
    with run_directory.lock(run):
        code, _, err = call(capsys, "prune", run / below, "keep_last=1")
    assert (code, "another process is training" in err) == (2, True)
    assert step(run, 10).exists()
    assert call(capsys, "prune", run / below, "keep_last=1")[0] == 0


def test_prune_of_a_directory_elsewhere_finds_its_run(capsys, tmp_path):
    run_dir = tmp_path / "runs" / "tiny" / "1"
    run_dir.mkdir(parents=True)
    config = yaml.safe_load(yaml.safe_dump(to_dict(RunConfig(runs_dir=str(tmp_path / "runs")))))
    config["checkpoint"]["dir"] = str(tmp_path / "elsewhere")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    place = tmp_path / "elsewhere" / "tiny" / "1"
    for number in (1, 2):
        write_whole(place, TENSORS, step=number, config=config)
    with run_directory.lock(run_dir):
        assert call(capsys, "prune", place, "keep_last=1")[0] == 2
        assert call(capsys, "prune", run_dir, "keep_last=1")[0] == 2
    assert call(capsys, "prune", run_dir, "keep_last=1")[0] == 0
    assert [path.name for path in place.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("how", ["cut", "one bit"])
def test_prune_never_leaves_damaged_ones_alone(capsys, run, how):
    if how == "cut":
        os.truncate(step(run, 30) / "rank-00000.safetensors", 10)
    else:
        flip(step(run, 30))
    code, _, err = call(capsys, "prune", run, "keep_last=1")
    assert (code, "are damaged" in err) == (2, True)
    assert step(run, 10).exists()
    assert call(capsys, "prune", run, "keep_last=2")[0] == 0
    assert not step(run, 10).exists()


def test_prune_of_the_latest_run(capsys, run, tmp_path):
    runs_dir = f"runs_dir={run.parent.parent}"
    code, out, _ = call(capsys, "prune", "latest", "keep_last=2", runs_dir)
    assert (code, "1 removed, 2 kept" in out) == (0, True)
    code, _, err = call(capsys, "prune", "latest", "keep_last=2", f"runs_dir={tmp_path / 'none'}")
    assert (code, "there are no runs" in err) == (2, True)
