"""Checkpoints whose weights are not finite, of earlier versions or from elsewhere: all who would use them refuse."""

from __future__ import annotations

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import Reader
from orchestrator.cli import main
from orchestrator.errors import NonFiniteError
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.importing import import_weights
from tests.lab.checkpoints import forge
from tests.lab.models import model_config, random_model, save_model, tokenizer_files
from tests.lab.runs import checkpoint, small_config, train

NAN = float("nan")


def _first(part: torch.Tensor) -> None:
    part.view(-1)[0] = NAN


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small run whose newest checkpoint was poisoned afterwards."""
    tmp = tmp_path_factory.mktemp("poisoned")
    config = small_config(tmp, "train.max_steps=2", "checkpoint.every_steps=1")
    train(config, 1, tmp / "run")
    forge(checkpoint(tmp / "run", 2), "model.layers.1.mlp.down.weight", _first)
    return tmp, config


def test_a_resume_refuses_it_and_a_run_goes_on_from_the_one_before(saved, tmp_path):
    from dataclasses import replace

    tmp, config = saved
    poisoned = checkpoint(tmp / "run", 2)
    named = replace(config, resume=str(poisoned), train=replace(config.train, max_steps=3))
    with pytest.raises(AssertionError, match=r"not finite.*\n.*layers.1.mlp.down.weight in"):
        train(named, 1, tmp_path / "named", resume_from=poisoned)
    rows = train(replace(named, resume=str(tmp / "run")), 1, tmp_path / "run", resume_from=poisoned)
    assert [row["step"] for row in rows if "loss" in row] == [2, 3], "step 2 is trained again"


def test_new_runs_and_handover_refuse_its_weights(saved, tmp_path):
    from dataclasses import replace

    tmp, config = saved
    poisoned = str(checkpoint(tmp / "run", 2))
    with pytest.raises(AssertionError, match="tensors of the checkpoint are not finite"):
        train(replace(config, train=replace(config.train, init_from=poisoned)), 1, tmp_path / "new")


def test_generate_ends_in_one_error(saved, capsys):
    tmp, _ = saved
    code = main(["generate", "prompt=def", f"checkpoint={checkpoint(tmp / 'run', 2)}", "hardware=cpu"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("error:") == 1
    assert "logits that are not finite" in captured.err


def test_export_refuses_weights_that_are_not_finite_or_do_not_fit(tmp_path):
    def nothing(done):
        pass

    model = random_model(model_config("qwen3"))
    path = save_model(tmp_path / "mine", model, extra=tokenizer_files(tmp_path / "tokenizer"))
    name = "model.layers.0.mlp.up.weight"
    forge(path, name, lambda part: part.view(-1)[:1].fill_(1e30))
    with pytest.raises(NonFiniteError, match=r"does not fit float16(.|\n)*dtype=bf16"):
        export_hf(Checkpoint(path), str(tmp_path / "half"), "fp16", 10**9, nothing)
    export_hf(Checkpoint(path), str(tmp_path / "bf16"), "bf16", 10**9, nothing)
    forge(path, name, _first)
    with pytest.raises(NonFiniteError, match=f"its run diverged(.|\n)*{name}"):
        export_hf(Checkpoint(path), str(tmp_path / "out"), "stored", 10**9, nothing)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "half").exists()


def test_import_refuses_weights_that_are_not_finite(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model(model_config("qwen3"))
    path = save_model(tmp_path / "mine", model, extra=tokenizer_files(tmp_path / "tokenizer"))
    export_hf(Checkpoint(path), str(tmp_path / "hf"), "stored", 10**9, lambda done: None)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"not finite(.|\n)*model.norm.weight \(1 of"):
        import_weights(tmp_path / "hf", str(tmp_path / "out"), "hf")
    assert not (tmp_path / "out").exists()
    assert Reader(Checkpoint(path)).tensor("model.norm.weight").isfinite().all()
