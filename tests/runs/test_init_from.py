"""A run starts from the weights of a checkpoint: an imported model, or another run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.compose import compose
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.tokenize import load_tokenizer
from orchestrator.errors import CheckpointError, ConfigErrors, UserError
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.importing import import_weights
from orchestrator.launch.start import launch
from orchestrator.runs import init_from
from tests.lab import cli
from tests.lab.models import model_config, random_model, save_model, small_tokenizer, tokenizer_files
from tests.lab.runs import SMALL, checkpoint, losses, read_rows, train, write_corpus
from tests.lab.tensors import read_all

# Updates so small that they vanish in the weights.
STILL = ("optim.lr=1e-30", "optim.weight_decay=0.0", "train.max_steps=2", "checkpoint.every_steps=null")


def imported(tmp_path: Path, kind: str = "qwen3", dtype: str = "stored") -> Path:
    """What `checkpoint import` makes of a Hugging Face directory, with a tokenizer."""
    model = random_model(model_config(kind))
    saved = save_model(tmp_path / "first", model, extra=tokenizer_files(tmp_path / "tokenizer"))
    export_hf(Checkpoint(saved), str(tmp_path / "hf"), dtype, 10**9, lambda done: None)  # type: ignore[arg-type]
    import_weights(tmp_path / "hf", str(tmp_path / "imported"), "hf")
    return tmp_path / "imported"


def words(tmp_path: Path, *more: str) -> list[str]:
    """The small run without the keys that say what the model and the tokenizer are."""
    plain = [word for word in SMALL if not word.startswith(("model.", "data.tokenizer", "train.seq_len"))]
    corpus = write_corpus(tmp_path / "corpus")
    places = [f"runs_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}", "train.seq_len=32"]
    return [*plain, *places, f"data.sources=[{{path:'{corpus}',weight:1}}]", *more]


def settled(*overrides: str) -> RunConfig:
    said: list[str] = []
    return init_from.settle(compose(list(overrides)), True, said.append)


# Which model


def test_the_model_and_the_tokenizer_are_the_checkpoints(tmp_path):
    found = imported(tmp_path)
    config = settled(*words(tmp_path, f"train.init_from={found}"))
    assert config.model == model_config("qwen3", name="hf")
    assert (config.data.tokenizer.kind, config.data.tokenizer.path) == ("file", str(found))
    assert config.train.init_from == str(found)
    assert config.train.max_steps == 20, "all else is the command line's"


def test_keys_of_the_command_line_are_set_on_top(tmp_path):
    found = imported(tmp_path)
    more = ["model.dropout=0.1", "model.max_seq_len=48", "data.tokenizer.kind=bytes"]
    config = settled(*words(tmp_path, f"train.init_from={found}", *more))
    assert (config.model.dropout, config.model.max_seq_len, config.model.dim) == (0.1, 48, 32)
    assert config.data.tokenizer.kind == "bytes"
    assert settled(*words(tmp_path, f"train.init_from={found}", "model=llama_20m")).model.dim == 384


def test_a_run_is_a_source_too(tmp_path):
    run_dir = tmp_path / "runs" / "tiny" / "1"
    save_model(run_dir / "checkpoints", random_model(model_config("llama")), step=10)
    newest = save_model(run_dir / "checkpoints", random_model(model_config("llama")), step=20)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(RunConfig(runs_dir=str(tmp_path / "runs")))))
    for source in (str(run_dir), "latest"):
        assert settled(*words(tmp_path, f"train.init_from={source}")).train.init_from == str(newest)


def test_what_does_not_fit_is_said_before_anything_starts(tmp_path):
    found = imported(tmp_path)
    with pytest.raises(ConfigErrors, match=r"train\.seq_len=128"):
        launch(compose(words(tmp_path, f"train.init_from={found}", "train.seq_len=128")))
    with pytest.raises(CheckpointError, match="no checkpoint was found here"):
        launch(compose(words(tmp_path, f"train.init_from={tmp_path / 'nowhere'}")))
    with pytest.raises(CheckpointError, match="another tokenizer") as caught:
        launch(compose(words(tmp_path, f"train.init_from={found}", "data.tokenizer.kind=bytes")))
    assert "data prepare tokenizer=" in str(caught.value)
    with pytest.raises(CheckpointError, match="weights alone") as caught:
        launch(compose(words(tmp_path, f"resume={found}")))
    assert f"train.init_from={found}" in str(caught.value)
    with pytest.raises(UserError, match="a resumed run has its weights"):
        launch(compose(words(tmp_path, f"resume={found}", f"train.init_from={found}")))
    _flip(found / "config.yaml")
    with pytest.raises(CheckpointError, match="damaged"):
        launch(compose(words(tmp_path, f"train.init_from={found}")))
    assert not (tmp_path / "runs").exists()


def test_damaged_weights_are_not_trained_from(tmp_path, capfd):
    found = imported(tmp_path)
    _flip(found / "rank-00000.safetensors")
    assert launch(compose(words(tmp_path, f"train.init_from={found}"))).code == UserError.exit_code
    assert "the checkpoint is damaged: rank-00000.safetensors" in capfd.readouterr().err


def _flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_tokenizers_that_end_documents_differently_agree():
    ours, other = small_tokenizer(), small_tokenizer()
    other.eos_token = "!"
    assert ours.agrees_with(other)
    other._content = {**other._content, "normalizer": {"type": "NFC"}}
    assert not ours.agrees_with(other)


# Which weights


@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", "stored"), ("gpt2", "bf16")])
def test_a_run_starts_with_exactly_these_weights(tmp_path, kind, dtype):
    """On two ranks, sharded; bf16 is made fp32, which trains."""
    found = imported(tmp_path, kind, dtype)
    config = settled(*words(tmp_path, f"train.init_from={found}", "layout.fsdp=2", "hardware.devices=2", *STILL))
    train(config, 2, tmp_path / "run")
    weights = {name: t for name, t in read_all(checkpoint(tmp_path / "run", 2)).items() if name.startswith("model.")}
    source = read_all(found)
    assert set(weights) == set(source)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source[name].float()), name


def test_weights_of_another_model_are_refused(tmp_path):
    found = imported(tmp_path)
    config = settled(*words(tmp_path, f"train.init_from={found}", "model.layers=3", *STILL))
    with pytest.raises(AssertionError, match="the checkpoint is of another model"):
        train(config, 1, tmp_path / "run")


def test_import_train_and_export_through_the_command_line(tmp_path):
    imported(tmp_path, "llama")
    done = cli.run("checkpoint", "import", str(tmp_path / "hf"), f"output={tmp_path / 'mine'}")
    assert done.returncode == 0, done.stderr
    overrides = [f"train.init_from={tmp_path / 'mine'}", "train.max_steps=6", "hardware.devices=2", "layout.tensor=2"]
    done = cli.run("train", *words(tmp_path, *overrides))
    assert done.returncode == 0, done.stderr
    run_dir = cli.only_run(tmp_path / "runs")
    found = losses(read_rows(run_dir))
    assert found[-1] < found[0]
    config = from_dict(RunConfig, yaml.safe_load((run_dir / "config.yaml").read_text()))
    assert config.model == model_config("llama", name="hf", head_dim=8)
    done = cli.run("train", f"resume={run_dir}", "train.max_steps=8", "resume_allow=[schedule]")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "run.json").read_text())["legs"][1]["start_step"] == 6
    done = cli.run("checkpoint", "export", str(run_dir), f"output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(tmp_path / "out").fingerprint == small_tokenizer().fingerprint
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    norm = theirs.state_dict()["model.norm.weight"]
    assert torch.equal(norm, read_all(checkpoint(run_dir, 8))["model.norm.weight"])
    assert not torch.equal(norm, read_all(tmp_path / "mine")["model.norm.weight"]), "it has learned"
