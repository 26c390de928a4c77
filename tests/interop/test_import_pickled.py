"""State dicts under other names and prefixes find their places, or it is said which do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.cli import checkpoint as cli
from orchestrator.errors import CheckpointError, UserError
from orchestrator.interop.exporting import export_dcp
from orchestrator.interop.hf_config import family_of
from orchestrator.interop.hf_config_write import to_hf_config
from orchestrator.interop.hf_weights import to_hf
from orchestrator.interop.importing import detect_format, import_weights
from tests.lab.models import model_config, random_model, save_model
from tests.lab.tensors import read_all

OPTIMIZER = {"optimizer.state.exp_avg": torch.ones(3), "step": torch.ones(1)}


@pytest.fixture
def llama():
    return random_model(model_config("llama"))


def own(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def foreign(model: Any) -> dict[str, torch.Tensor]:
    return to_hf(own(model), family_of(model.config), model.config)


def bring(path: Path, state: dict[str, torch.Tensor], model: Any, config: str | None = None) -> dict[str, torch.Tensor]:
    """Import a .ckpt with this state dict beside a config.json."""
    torch.save({"state_dict": state}, path / "w.ckpt")
    family = family_of(model.config)
    (path / "config.json").write_text(json.dumps(to_hf_config(model.config, family, None, "float32")))
    assert detect_format(path / "w.ckpt") == "ckpt"
    found = import_weights(path / "w.ckpt", str(path / "out"), "ckpt", config=config)
    assert found.parameters == sum(tensor.numel() for tensor in own(model).values())
    bring.left_out = found.left_out  # type: ignore[attr-defined]
    return {name.removeprefix("model."): tensor for name, tensor in read_all(path / "out").items()}


def same(got: dict[str, torch.Tensor], model: Any) -> None:
    expected = own(model)
    assert set(got) == set(expected)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("prefix", ["", "model.", "net.decoder."])
@pytest.mark.parametrize("names", [own, foreign])
def test_names_and_prefixes(tmp_path, llama, names, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in names(llama).items()}
    same(bring(tmp_path, {**state, **OPTIMIZER}, llama), llama)
    assert bring.left_out == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "llama_tied"])
@pytest.mark.parametrize("names", [own, foreign])
def test_other_families(tmp_path, kind, names):
    model = random_model(model_config(kind))
    state = {f"model.{name}": tensor for name, tensor in names(model).items()}
    # A tied head is listed too by state_dict().
    state["model.lm_head.weight" if names is foreign else "model.head.weight"] = model.embed.weight.detach()
    same(bring(tmp_path, state, model), model)


def test_gpt2_as_on_the_hub(tmp_path):
    model = random_model(model_config("gpt2"))
    state = {name.removeprefix("transformer."): tensor for name, tensor in foreign(model).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    same(bring(tmp_path, state, model), model)


def test_what_wrappers_put_into_names(tmp_path, llama):
    wrapped = {
        f"module._orig_mod.model.{name.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}": tensor
        for name, tensor in foreign(llama).items()
    }
    same(bring(tmp_path, wrapped, llama), llama)


def test_bf16_stays_bf16(tmp_path, llama):
    llama = llama.to(torch.bfloat16)
    got = bring(tmp_path, foreign(llama), llama)
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    same(got, llama)


@pytest.mark.parametrize("names", ["own", "hf"])
def test_a_dcp_directory_of_ours(tmp_path, llama, names):
    saved = save_model(tmp_path / "run", llama)
    export_dcp(Checkpoint(saved), str(tmp_path / "dcp"), "stored", names, lambda done: None)
    with pytest.raises(CheckpointError, match="nothing says which model") as caught:
        import_weights(tmp_path / "dcp", str(tmp_path / "out"), "dcp")
    assert "model=PRESET" in str(caught.value)
    config = tmp_path / "dcp" / "config.json"
    config.write_text(json.dumps(to_hf_config(llama.config, "llama", None, "float32")))
    assert detect_format(tmp_path / "dcp") == "dcp"
    import_weights(tmp_path / "dcp", str(tmp_path / "out"), "dcp")
    same({name.removeprefix("model."): tensor for name, tensor in read_all(tmp_path / "out").items()}, llama)


def test_a_preset_describes_the_weights(tmp_path):
    """Its vocabulary is taken from the embedding."""
    from orchestrator.config.compose import compose

    described = compose(["model=tiny_qwen3"]).config.model
    model = random_model(type(described)(**{**vars(described), "vocab_size": 77}))
    torch.save(own(model), tmp_path / "w.pt")
    found = import_weights(tmp_path / "w.pt", str(tmp_path / "out"), "ckpt", model="tiny_qwen3")
    assert (found.model.vocab_size, found.model.name) == (77, "tiny_qwen3")
    with pytest.raises(UserError, match="there is no model 'tinny'"):
        import_weights(tmp_path / "w.pt", str(tmp_path / "other"), "ckpt", model="tinny")
    with pytest.raises(CheckpointError, match="missing: layers"):
        import_weights(tmp_path / "w.pt", str(tmp_path / "other"), "ckpt", model="llama_20m")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layers.1.mlp.up.weight"), "missing: layers.1.mlp.up.weight"),
        (lambda s: s.update({"layers.0.attn.q.bias": torch.ones(32)}), "left over: layers.0.attn.q.bias"),
        (lambda s: s.update({"layers.2.mlp.up.weight": torch.ones(2)}), "left over: layers.2.mlp.up.weight"),
        (lambda s: s.update({"norm.weight": torch.ones(3)}), r"norm.weight: \(3,\), wanted \(32,\)"),
        (lambda s: s.pop("embed.weight"), "no embedding by a name that is known"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, llama, change, words):
    state = own(llama)
    change(state)
    with pytest.raises(CheckpointError, match=words):
        bring(tmp_path, state, llama)
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_model_does_not_have_is_not_dropped(tmp_path, llama):
    state = {f"model.{name}": tensor for name, tensor in foreign(llama).items()}
    state["model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    with pytest.raises(CheckpointError, match=r"left over: model\.layers\.0\.self_attn\.q_proj\.bias"):
        bring(tmp_path, state, llama)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_what_training_loops_wrap_around_the_weights(tmp_path, llama, wrapper):
    """nanoGPT has a loss beside them, which is a tensor too; DeepSpeed calls them `module`."""
    beside = {"best_val_loss": torch.tensor(3.2), "iter_num": 7, "optimizer": {"state": {0: torch.ones(3)}}}
    torch.save({wrapper: foreign(llama), **beside}, tmp_path / "w.pt")
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(llama.config, "llama", None, "float32")))
    found = import_weights(tmp_path / "w.pt", str(tmp_path / "out"), "ckpt")
    same({name.removeprefix("model."): tensor for name, tensor in read_all(tmp_path / "out").items()}, llama)
    note = next(note for note in found.report.notes if f"below '{wrapper}'" in note)
    assert "best_val_loss" in note
    assert "iter_num" in note


def test_a_directory_from_before_safetensors(tmp_path, llama, capsys):
    """One file or several with an index: read by the same reader, when the user allows it."""
    state = foreign(llama)
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    config = json.dumps(to_hf_config(llama.config, "llama", None, "float32"))
    for kind in ("one", "several"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(config)
        if kind == "one":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            for file, held in parts.items():
                torch.save({name: state[name].clone() for name in held}, folder / file)
            index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        words = ["import", str(folder), f"output={folder / 'out'}", "progress=false"]
        with pytest.raises(CheckpointError, match="allow_pickle=true"):
            cli.main(words)
        assert cli.main([*words, "allow_pickle=true"]) == 0
        assert "the weights are pickle" in capsys.readouterr().out
        same({name.removeprefix("model."): tensor for name, tensor in read_all(folder / "out").items()}, llama)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../one/pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match="does not name files of its directory"):
        import_weights(folder, str(tmp_path / "no"), "ckpt")


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (("transformer.wte.weight", "transformer.h.0.attn.attn.weight", "transformer.h.0.norm_1.weight"), "LitGPT"),
        (("transformer.wte.weight", "transformer.h.0.attn.qkv.weight"), "LitGPT"),
        (("tok_embeddings.weight", "layers.0.attention.wq.weight"), "Meta's and Mistral's own code, or torchtitan"),
        (("language_model.embedding.word_embeddings.weight",), "Megatron"),
        (("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",), "an adapter of peft"),
        (("model.layers.0.self_attn.q_proj.weight.absmax",), "bitsandbytes"),
    ],
)
def test_weights_of_other_software_are_named_for_what_they_are(tmp_path, llama, names, word):
    with pytest.raises(CheckpointError, match=word):
        bring(tmp_path, {name: torch.ones(4, 4) for name in names}, llama)


def test_nanogpts_matrices_are_not_taken_for_gpt2s(tmp_path):
    model = random_model(model_config("gpt2"))
    state = {
        name: tensor.T.contiguous() if ".c_" in name and tensor.ndim == 2 else tensor
        for name, tensor in foreign(model).items()
    }
    with pytest.raises(CheckpointError, match="nanoGPT"):
        bring(tmp_path, state, model)


def test_two_tensors_of_one_name_are_refused(tmp_path, llama):
    state = own(llama)
    with pytest.raises(CheckpointError, match="wrappers"):
        bring(tmp_path, {**state, "module.norm.weight": torch.ones(32)}, llama)


def test_an_embedding_that_is_a_number(tmp_path):
    torch.save({**own(random_model(model_config("llama"))), "embed.weight": torch.tensor(1.0)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="vocab_size"):
        import_weights(tmp_path / "w.pt", str(tmp_path / "out"), "ckpt", model="tiny")
