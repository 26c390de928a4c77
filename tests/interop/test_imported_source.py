"""`train.init_from` of a Hugging Face directory and of adapters: imported once, and what the run then is."""

from __future__ import annotations

import pytest

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.compose import compose
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.imported_source import import_once
from orchestrator.interop.peft_adapters import export_peft
from orchestrator.launch.plan import find_plan
from tests.interop.test_peft import LORA, adapted
from tests.lab.models import model_config, random_model, save_model, tokenizer_files
from tests.lab.tensors import read_all
from tests.runs.test_init_from import words


def plan(tmp_path, *overrides):
    return find_plan(compose(words(tmp_path, *overrides)), main=True, alone=True)


@pytest.fixture
def directory(tmp_path):
    source = save_model(
        tmp_path / "saved", random_model(model_config("llama")), extra=tokenizer_files(tmp_path / "tokenizer")
    )
    export_hf(Checkpoint(source), str(tmp_path / "hf"), "stored", 1 << 30, lambda done: None)
    return tmp_path / "hf"


def test_a_directory_is_imported_once_and_the_run_starts_from_it(tmp_path, directory, capsys):
    found = plan(tmp_path, f"train.init_from=hf:{directory}").checkpoint
    assert "imported into" in capsys.readouterr().err
    assert found.directory.is_relative_to(tmp_path / "runs" / ".imported")
    source = read_all(next((tmp_path / "saved").iterdir()))
    stored = read_all(found.directory)
    assert stored.keys() == source.keys()
    assert all((stored[name] == source[name]).all() for name in source)
    written = (found.directory / "manifest.json").stat().st_mtime_ns
    again = plan(tmp_path, f"train.init_from={directory}", "train.lora.rank=2")  # without hf: it is one all the same
    assert again.checkpoint.directory == found.directory
    assert (found.directory / "manifest.json").stat().st_mtime_ns == written
    assert again.config.train.init_from == str(found.directory)
    assert (again.config.model.dim, again.config.train.lora.rank) == (32, 2)
    # A damaged import is made anew.
    (found.directory / "manifest.json").write_text("{}")
    assert read_all(import_once(f"hf:{directory}", str(tmp_path / "runs"))).keys() == source.keys()


def test_what_cannot_be_imported_is_said(tmp_path, directory):
    with pytest.raises(CheckpointError, match="no Hugging Face directory here"):
        plan(tmp_path, f"train.init_from=hf:{tmp_path / 'nowhere'}")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        plan(tmp_path, f"train.init_from=hf:{directory}")
    assert not list((tmp_path / "runs").rglob("manifest.json"))
    _, _, saved = adapted(tmp_path / "adapted", "llama", LORA)
    export_peft(saved, str(tmp_path / "peft"), "stored")
    with pytest.raises(CheckpointError, match="base=CHECKPOINT"):
        import_once(f"hf:{tmp_path / 'peft'}", str(tmp_path / "runs"))


def test_adapters_are_trained_on_or_merged(tmp_path, capsys):
    base, _, saved = adapted(tmp_path, "llama", LORA)
    source = f"train.init_from={saved.directory}"
    own = ["data.tokenizer.kind=bytes"]
    found = plan(tmp_path, source, "train.lora.rank=4", "train.lora.dropout=0.1", *own)
    assert (found.config.train.lora.alpha, found.config.train.lora.dropout) == (LORA.alpha, 0.1)
    with pytest.raises(ConfigError, match=r"train\.lora\.rank=8"):
        plan(tmp_path, source, "train.lora.rank=8", *own)
    capsys.readouterr()
    assert plan(tmp_path, source, *own).config.train.lora.rank is None
    assert "merged into the weights" in capsys.readouterr().err
    base.directory.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="not where the checkpoint says"):
        plan(tmp_path, source, "train.lora.rank=4", *own)


def test_adapters_need_weights(tmp_path):
    with pytest.raises(ConfigError, match="none to start from"):
        plan(tmp_path, "train.lora.rank=4")
