"""What a model came with is there after every hop, and text goes into it and out of it as it does in transformers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.cli import generate as verb
from orchestrator.config.compose import compose
from orchestrator.config.schema import TokenizerConfig
from orchestrator.data.chat_template import ChatTemplate
from orchestrator.data.model_files import as_transformers_names
from orchestrator.data.prepare import build_store
from orchestrator.data.tokenize import load_tokenizer
from orchestrator.errors import CheckpointError, ConfigErrors, DataError, UserError
from orchestrator.hardware.target_table import resolve
from orchestrator.inference.decoding import TextRequest
from orchestrator.inference.generator import Writer
from orchestrator.inference.sampling import Sampling
from orchestrator.inference.texts import WrittenText
from orchestrator.interop.exporting import export_hf
from orchestrator.interop.importing import import_weights
from orchestrator.launch.start import launch
from orchestrator.runs import init_from, resume
from orchestrator.runs.stored_model import files_of, tokenizer_of
from tests.lab import tokenizers as lab
from tests.lab.models import model_config, random_model, save_model
from tests.lab.runs import checkpoint, train
from tests.runs.test_init_from import settled, words

transformers = pytest.importorskip("transformers")
CLASSES = {"llama": "Mistral", "llama3": "Llama", "qwen": "Qwen3", "gemma": "Gemma2", "olmo": "Olmo2"}
OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
CHAT = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": " sat\n"}]
NOTHING = lambda *unused: None  # noqa: E731
CPU = resolve(compose(["hardware=cpu"]).config.hardware)


def hub_directory(folder: Path, kind: str) -> Path:
    """A model of a kind with everything that its directory has on the hub."""
    lab.make(folder, kind)
    vocab = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    head_dim = {} if kind == "olmo" else {"head_dim": 8}
    settings = folder / "generation_config.json"
    ends = json.loads(settings.read_text()).get("eos_token_id") if settings.exists() else None
    config = getattr(transformers, f"{CLASSES[kind]}Config")(
        vocab_size=vocab,
        eos_token_id=ends,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **head_dim,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
    model.save_pretrained(folder / "weights")
    for name in ("model.safetensors", "config.json"):
        (folder / "weights" / name).rename(folder / name)
    for path in (folder / "weights").iterdir():
        path.unlink()
    (folder / "weights").rmdir()
    return folder


def imported(tmp_path: Path, kind: str) -> Path:
    hub_directory(tmp_path / "hub", kind)
    import_weights(tmp_path / "hub", str(tmp_path / "imported"), "hf")
    return tmp_path / "imported"


def conversations(tmp_path: Path, kind: str) -> list[str]:
    """Of every second kind the run is fine-tuned on conversations, not on text."""
    if kind not in ("qwen", "gemma"):
        return []
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT * (1 + number % 2)}) + "\n" for number in range(40)))
    return ["data.messages=chat", f"data.sources=[{{path: {path}, weight: 1}}]", "data.validation_fraction=0"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the weights and config.json, by its path in the folder."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(("model", "config.json"))}


@pytest.mark.parametrize("kind", [*lab.KINDS, *lab.MORE_KINDS])
def test_everything_travels_from_import_over_training_and_resuming_to_export(tmp_path: Path, kind: str) -> None:
    found = imported(tmp_path, kind)
    given = contents(tmp_path / "hub")
    still = ("train.max_steps=2", "checkpoint.every_steps=null", *conversations(tmp_path, kind))
    train(settled(*words(tmp_path, f"train.init_from={found}", *still)), 1, tmp_path / "run")
    hops = [found, checkpoint(tmp_path / "run", 2)]
    if kind == "llama3":
        longer = ("train.max_steps=3", "checkpoint.every_steps=null")
        train(settled(*words(tmp_path, f"train.init_from={found}", *longer)), 1, tmp_path / "run", hops[-1])
        hops.append(checkpoint(tmp_path / "run", 3))
    for hop in hops:
        assert as_transformers_names(files_of(Checkpoint(hop))) == given
    exported = export_hf(Checkpoint(hops[-1]), str(tmp_path / "out"), "stored", 10**9, NOTHING)
    assert not exported.note
    assert contents(tmp_path / "out") == given
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hub", "out"))
    for text in lab.samples():
        for special in (True, False):
            assert before.encode(text, add_special_tokens=special) == after.encode(text, add_special_tokens=special)
    assert before.chat_template == after.chat_template
    templates = list(before.chat_template) if isinstance(before.chat_template, dict) else [None]
    assert len(templates) == {"llama3": 2, "gemma": 3}.get(kind, 1)
    for name in templates:
        assert after.apply_chat_template(CHAT, chat_template=name, tokenize=False)
        for prompt in (True, False):
            texts = [
                one.apply_chat_template(CHAT, chat_template=name, add_generation_prompt=prompt)["input_ids"]
                for one in (before, after)
            ]
            assert texts[0] == texts[1]
    for ours in (load_tokenizer(tmp_path / "out"), tokenizer_of(Checkpoint(hops[-1]))):
        assert ours is not None
        assert ChatTemplate(ours).encode(CHAT)[0].tolist() == before.apply_chat_template(CHAT)["input_ids"]
    assert before.special_tokens_map == after.special_tokens_map
    assert before.all_special_tokens == after.all_special_tokens
    made = [transformers.GenerationConfig.from_pretrained(tmp_path / name).to_dict() for name in ("hub", "out")]
    assert made[0] == made[1]
    said = [transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("hub", "out")]
    for key in OF_TOKENS:
        assert getattr(said[0], key) == getattr(said[1], key)
    assert before.model_max_length == after.model_max_length
    state = Checkpoint(hops[-1]).state()
    first = before.encode("")[:1] if kind != "qwen" else []
    assert state["documents"] == {
        "eos_id": before.eos_token_id, "bos_ids": first, "eos": True, "special_tokens_in_text": "text"
    }  # fmt: skip


# In and out of the model


@pytest.mark.parametrize("kind", lab.KINDS)
def test_greedy_text_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    writer = Writer(Checkpoint(imported(tmp_path, kind)), CPU.device(0))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    for prompt in ("the cat sat on the", "def f(x):\n", "日本"):
        inputs = theirs(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
        shown = inputs["input_ids"][0].tolist()
        writing = writer.write([writer.request(prompt, 20, Sampling(), 0)])
        pieces, text = "".join(piece for _, piece in writing), writing.texts[0]
        assert str(text) == pieces
        ended = ids[-1] in writer.stop_ids
        ids = ids[:-1] if ended else ids
        assert shown + text.ids == ids
        assert text.stopped == ("end" if ended else "tokens")
        # Bytes that make no character change what was shown before them.
        whole = theirs.decode(ids)
        assert theirs.decode(shown) + pieces == whole or "\ufffd" in whole


def test_a_list_of_ends_stops_the_text(tmp_path: Path) -> None:
    writer = Writer(Checkpoint(imported(tmp_path, "llama3")), CPU.device(0))
    ends = json.loads((tmp_path / "hub" / "generation_config.json").read_text())["eos_token_id"]
    assert writer.stop_ids == {writer.tokenizer.eos_id, *ends}
    assert len(writer.stop_ids) == 2


def test_what_was_chosen_otherwise_is_kept_used_and_exported(tmp_path: Path) -> None:
    """The model of a tokenizer that puts BOS is trained on without it, and with another token at the end."""
    found = imported(tmp_path, "llama3")
    more = ["data.tokenizer.bos=false", "data.tokenizer.eos_token='<|end_of_text|>'"]
    config = settled(*words(tmp_path, f"train.init_from={found}", "train.max_steps=2", *more))
    assert config.data.tokenizer.path == str(found), "the vocabulary is still the checkpoint's"
    train(config, 1, tmp_path / "run")
    saved = checkpoint(tmp_path / "run", 2)
    assert files_of(Checkpoint(saved)) == files_of(Checkpoint(found))
    writer = Writer(Checkpoint(saved), CPU.device(0))
    assert writer.tokenizer.prompt_ids("the") == writer.tokenizer.encode("the")
    exported = export_hf(Checkpoint(saved), str(tmp_path / "out"), "stored", 10**9, NOTHING)
    assert "no BOS" in exported.note
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("the") == writer.tokenizer.encode("the")
    assert theirs.eos_token == "<|end_of_text|>"
    again = settled(*words(tmp_path, f"train.init_from={saved}"))
    assert (again.data.tokenizer.bos, again.data.tokenizer.eos_token) == (False, "<|end_of_text|>")


def test_a_store_that_was_prepared_otherwise_than_the_model_wants(tmp_path: Path) -> None:
    found = imported(tmp_path, "llama")
    overrides = [word for word in words(tmp_path, f"train.init_from={found}") if "data.sources" not in word]
    corpus = str(tmp_path / "corpus")
    config = TokenizerConfig(path=str(found), bos=False)
    store = build_store([corpus], tmp_path / "store", config, progress=False)
    overrides.append(f"data.sources=[{{path:'{store.path}',weight:1}}]")
    with pytest.raises(DataError, match=r"prepared otherwise than asked for[\s\S]*data\.tokenizer\.bos=false"):
        launch(compose(overrides))
    settled_now = settled(*overrides, "data.tokenizer.bos=false")
    said: list[str] = []
    init_from.check_tokenizer(settled_now, Checkpoint(found), store.tokenizer, said.append)
    assert len(said) == 1
    assert "<s> (1) text </s> (2)" in said[0]


@pytest.mark.parametrize("state", [{}, {"imported": {}}])
def test_before_it_was_recorded_runs_put_no_bos_and_imports_are_as_their_tokenizer_says(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Checkpoint(imported(tmp_path, "llama"))
    monkeypatch.setattr(found, "state", lambda: state)
    tokenizer = tokenizer_of(found)
    assert tokenizer is not None
    assert tokenizer.documents.bos_ids == ((1,) if state else ())
    monkeypatch.setattr(found, "state", lambda: {"documents": [1]})
    with pytest.raises(CheckpointError, match="damaged"):
        tokenizer_of(found)


def test_a_run_of_before_the_options_goes_on_without_bos() -> None:
    saved = {"data": {"tokenizer": {"kind": "bpe", "path": "x"}}}
    resume._keep_documents(saved)
    assert saved == {"data": {"tokenizer": {"kind": "bpe", "path": None, "bos": False}}}
    for other in ({}, {"data": {"tokenizer": {"bos": "auto", "path": "x"}}}):
        before = json.dumps(other)
        resume._keep_documents(other)  # type: ignore[arg-type]
        assert json.dumps(other) == before


def test_a_path_means_a_file_and_another_kind_beside_it_is_an_error() -> None:
    assert compose(["data.tokenizer.path=x"]).config.data.tokenizer.made_from == "file"
    for words_, message in (
        (["data.tokenizer.path=x", "data.tokenizer.kind=bpe"], "names a tokenizer, and data.tokenizer.kind another"),
        (["data.tokenizer.bos=false", "data.tokenizer.eos=false"], "cannot be told apart"),
        (["data.tokenizer.bos=false", "data.tokenizer.bos_token=x"], "BOS token is named that is not to be put"),
        (["data.tokenizer.vocab_size=1000000000000"], "'data.tokenizer.vocab_size' is out of range"),
    ):
        with pytest.raises(ConfigErrors, match=message):
            compose(words_)


# The verb


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return imported(tmp_path, "llama")


def test_generate_writes_samples_and_json(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"checkpoint={trained}", "tokens=5", "hardware=cpu", "temperature=1.5"]
    assert verb.main([*common, "prompt=the cat", "samples=2", "json=true", "top_p=0.9", "min_p=0.01"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["prompt"] == "the cat"
    assert rows[0]["text"] != rows[1]["text"]
    assert verb.main([*common, "prompt=the cat", "seed=1", "top_p=0.9", "min_p=0.01"]) == 0
    assert capsys.readouterr().out == f"the cat{rows[1]['text']}\n"
    assert verb.main([*common, "prompt=the cat", "samples=2", "top_p=0.9", "min_p=0.01"]) == 0
    assert f"--- 2 of 2, seed 1\nthe cat{rows[1]['text']}\n" in capsys.readouterr().out


def test_generate_reads_a_prompt_from_a_file_or_standard_input(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [f"checkpoint={trained}", "tokens=4", "hardware=cpu", "temperature=0"]
    text = "the cat,\nsat = on 🙂"
    Path("prompt.txt").write_text(text)
    assert verb.main([*common, "prompt_file=prompt.txt"]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert verb.main([*common, "prompt_file=-"]) == 0
    assert first == capsys.readouterr().out
    assert first.startswith(text)
    Path("latin.txt").write_bytes(b"caf\xe9")
    for name, message in (
        ("nowhere.txt", "cannot be read"),
        (".", "cannot be read"),
        ("latin.txt", "not text in UTF-8"),
    ):
        with pytest.raises(DataError, match=message):
            verb.main([*common, f"prompt_file={name}"])


def test_generate_says_how_it_reads_special_tokens(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"checkpoint={trained}", "tokens=1", "hardware=cpu", "prompt=a </s> b"]
    assert verb.main(common) == 0
    assert "note: the prompt spells </s>, which is plain text" in capsys.readouterr().err
    assert verb.main([*common, "special_tokens_in_text=token"]) == 0
    assert "note" not in capsys.readouterr().err
    with pytest.raises(DataError, match="spells a special token"):
        verb.main([*common, "special_tokens_in_text=error"])


def test_values_of_generate_that_are_out_of_range_are_named_all_at_once() -> None:
    wrong = (
        "tokens=0",
        "samples=0",
        "temperature=-1.0",
        "top_k=0",
        "top_p=0.0",
        "min_p=2.0",
        "repetition_penalty=0.0",
        "seed=-1",
    )
    with pytest.raises(ConfigErrors) as caught:
        verb.main([*wrong, "prompt=x"])
    for word in wrong:
        assert f"'{word.partition('=')[0]}' is out of range" in str(caught.value)
        assert f"got:     {word}" in str(caught.value)
    for words_ in (["temperature=nan"], ["temperature=inf"], ["top_p=1.5"], ["repetition_penalty=nan"]):
        with pytest.raises(ConfigErrors, match="is out of range"):
            verb.main([*words_, "prompt=x"])
    for words_ in ([], ["prompt=x", "prompt_file=y"]):
        with pytest.raises(ConfigErrors, match="generate continues what one option gives"):
            verb.main(words_)


def test_nothing_is_printed_before_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No checkpoint, no tokenizer, damaged weights: the error is alone, and names what the user gave."""
    with pytest.raises(UserError, match="no checkpoint found in nowhere"):
        verb.main(["checkpoint=nowhere", "prompt=x", "hardware=cpu"])
    hub_directory(tmp_path / "hub", "llama")
    (tmp_path / "hub" / "tokenizer.json").unlink()
    found = import_weights(tmp_path / "hub", str(tmp_path / "bare"), "hf")
    assert "SentencePiece" in found.no_tokenizer
    assert "tokenizer.model" in files_of(Checkpoint(tmp_path / "bare")), "it travels all the same"
    with pytest.raises(CheckpointError, match=r"carries no tokenizer[\s\S]*bare[\s\S]*tokenizer=PATH"):
        verb.main([f"checkpoint={tmp_path / 'bare'}", "prompt=x", "hardware=cpu"])
    whole = imported(tmp_path, "qwen")
    weights = whole / "rank-00000.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        verb.main([f"checkpoint={whole}", "prompt=x", "hardware=cpu"])
    assert capsys.readouterr().out == ""


def _continuation(tmp_path: Path, text: str, stop: list[str]) -> tuple[list[str], str]:
    from orchestrator.data.tokenize import byte_tokenizer

    tokenizer = byte_tokenizer()
    found = WrittenText(tokenizer, TextRequest(tokenizer.encode("p"), 1000, stop=stop))
    pieces = [found.push(token) for token in tokenizer.encode(text)]
    pieces.append(found.finish())
    assert str(found) == "".join(pieces)
    return pieces, found.stopped


@pytest.mark.parametrize(
    ("text", "stop", "shown", "stopped"),
    [
        ("one two three", ["two"], "one ", "stop"),
        ("one two three", ["three", "two"], "one ", "stop"),
        ("one twice", ["two"], "one twice", "end"),
        ("aab", ["ab"], "a", "stop"),
        ("ends with tw", ["two"], "ends with tw", "end"),
        ("日本\n\nx", ["\n\n"], "日本", "stop"),
        ("plain", [], "plain", "end"),
    ],
)
def test_stop_texts_end_it_whatever_tokens_they_span(
    tmp_path: Path, text: str, stop: list[str], shown: str, stopped: str
) -> None:
    pieces, why = _continuation(tmp_path, text, stop)
    assert ("".join(pieces), why) == (shown, stopped)


def test_a_strangers_checkpoint_cannot_name_other_files(tmp_path: Path) -> None:
    """Only files of the manifest by plain names that travel, none larger than such files are."""
    extra = {"tokenizer_config.json": b"{}", "additional_chat_templates.a.jinja": b"x", "README.md": b"x"}
    saved = save_model(
        tmp_path, random_model(model_config("llama")), extra={**extra, "chat_template.jinja": b"y" * 5_000_000}
    )
    with pytest.raises(CheckpointError):
        files_of(Checkpoint(saved))
    other = save_model(tmp_path / "other", random_model(model_config("llama")), extra=extra)
    assert set(files_of(Checkpoint(other))) == {"tokenizer_config.json", "additional_chat_templates.a.jinja"}
    assert yaml.safe_load((other / "config.yaml").read_text())["name"] == "small"
