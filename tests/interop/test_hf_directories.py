"""Directories as people have them, through every hop: import, two steps, export, transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import Reader
from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.distributed.world import World
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.importing import import_weights
from orchestrator.models.decoder import Decoder
from orchestrator.runs import init_from
from orchestrator.runs.stored_model import model_of
from tests.lab import runs
from tests.lab.hf_directories import DIRECTORIES, build
from tests.lab.ranks import run_ranks
from tests.lab.tensors import read_all

transformers = pytest.importorskip("transformers")

STEPS = 2
# What is not there byte for byte after training: the weights, and the configuration that names their dtype.
CHANGED = ("model", "config.json")


def nothing(*done: int) -> None:
    pass


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval()(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def theirs(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def ours(checkpoint: Path) -> Decoder:
    opened = Checkpoint(checkpoint)
    model, reader = Decoder(model_of(opened)), Reader(opened)
    weights = {name: reader.tensor(f"model.{name}").float() for name, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _train_all(world: World, jobs: list[tuple[dict[str, Any], Path]]) -> None:
    for config, run_dir in jobs:
        run_dir.mkdir(parents=True)
        runs._work(world, config, run_dir, None)


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> Path:
    """All of them, imported, trained for two steps by one process, and exported again."""
    tmp = tmp_path_factory.mktemp("directories")
    plain = [word for word in runs.SMALL if not word.startswith(("model.", "data.tokenizer", "train."))]
    corpus = runs.write_corpus(tmp / "corpus")
    more = ["train.seq_len=32", "train.global_batch_tokens=64", f"train.max_steps={STEPS}", "train.eval_every=null"]
    more += ["train.eval_tokens=64", "train.sample.tokens=1", "checkpoint.every_steps=null", "optim.lr=1e-3"]
    places = [f"runs_dir={tmp}", f"data.cache_dir={tmp / 'cache'}", f"data.sources=[{{path:'{corpus}',weight:1}}]"]
    jobs = []
    for name in DIRECTORIES:
        source = build(name, tmp / "source")
        (tmp / "source" / f"{name}.path").write_text(str(source))
        import_weights(source, str(tmp / "imported" / name), "hf", logits="true")
        words = [*plain, *more, *places, f"train.init_from={tmp / 'imported' / name}"]
        config = init_from.settle(compose(words), True, print)
        jobs.append((to_dict(config), tmp / "runs" / name))
    run_ranks(1, _train_all, jobs)
    for name in DIRECTORIES:
        trained = Checkpoint(runs.checkpoint(tmp / "runs" / name, STEPS))
        export_hf(trained, str(tmp / "exported" / name), "stored", 10**9, nothing)
    return tmp


def source_of(tried: Path, name: str) -> Path:
    return Path((tried / "source" / f"{name}.path").read_text())


@pytest.mark.parametrize("name", DIRECTORIES)
def test_an_import_computes_what_transformers_does(tried, name):
    expected = logits(theirs(source_of(tried, name)))
    assert expected.std() > 0.3
    assert apart(logits(ours(tried / "imported" / name)), expected) < 1e-5
    report = json.loads((tried / "imported" / name / "import.json").read_text())
    assert report["logits"]["relative_difference"] < 1e-5


@pytest.mark.parametrize("name", DIRECTORIES)
def test_what_was_trained_is_what_transformers_gets(tried, name):
    trained, exported = runs.checkpoint(tried / "runs" / name, STEPS), tried / "exported" / name
    before, after = read_all(tried / "imported" / name), read_all(trained)
    assert not torch.equal(before["model.norm.weight"].float(), after["model.norm.weight"]), "it has learned"
    assert apart(logits(theirs(exported)), logits(ours(trained))) < 1e-5


@pytest.mark.parametrize("name", DIRECTORIES)
def test_config_json_comes_back_as_it_went_in(tried, name):
    """In its own generation, with every key; what it is stored in is another format now, and code is left out."""
    given = json.loads((source_of(tried, name) / "config.json").read_text())
    got = json.loads((tried / "exported" / name / "config.json").read_text())
    wanted = {key: value for key, value in given.items() if key not in ("auto_map", "dtype", "torch_dtype")}
    kept = {key: value for key, value in got.items() if key not in ("dtype", "torch_dtype")}
    assert kept == wanted
    written = "dtype" if "dtype" in given else "torch_dtype"
    assert {key: got[key] for key in ("dtype", "torch_dtype") if key in got} == {written: "float32"}


def beside(folder: Path) -> dict[str, bytes]:
    """Every file but those of the weights and config.json."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(CHANGED)}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_every_file_and_special_token_is_there_afterwards(tried, name):
    source, exported = source_of(tried, name), tried / "exported" / name
    given = beside(source)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= set(given)
    assert beside(exported) == given
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, exported))
    assert before.special_tokens_map == after.special_tokens_map
    assert before.special_tokens_map["eos_token"] == "<|endoftext|>"
    assert before.get_added_vocab() == after.get_added_vocab()
    for text in ("the cat<|endoftext|> sat", "", "def f():\n"):
        for special in (True, False):
            assert before.encode(text, add_special_tokens=special) == after.encode(text, add_special_tokens=special)
    settings = [transformers.GenerationConfig.from_pretrained(folder).to_dict() for folder in (source, exported)]
    assert settings[0] == settings[1]
    assert settings[0]["eos_token_id"] == [0, 5, 7]
