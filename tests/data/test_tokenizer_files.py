"""The files around a vocabulary are read as transformers reads them, within bounds; other files are named."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config.schema import DataConfig, SourceConfig, TokenizerConfig
from orchestrator.data import model_files
from orchestrator.data.as_trained import as_trained
from orchestrator.data.document_format import DocumentFormat, SpecialTokens
from orchestrator.data.prepare import build_store, prepare
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenize import Tokenizer, from_files, load_tokenizer
from orchestrator.errors import ConfigError, DataError, UserError
from tests.lab import tokenizers as lab

AUTO = TokenizerConfig()


def auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def assert_same_ids(folder: Path, *more: str) -> Tokenizer:
    """Ids as AutoTokenizer gives them, with special tokens around the text and without, and spelled ones in it."""
    theirs, ours = auto_tokenizer(folder), load_tokenizer(folder, TokenizerConfig(special_tokens_in_text="token"))
    for text in [*lab.samples(), *more]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)
        whole = theirs.encode(text, add_special_tokens=True)
        assert ours.prompt_ids(text) == (whole or [ours.eos_id]), repr(text)
    assert ours.eos_id == theirs.eos_token_id
    return ours


@pytest.mark.parametrize("kind", lab.KINDS)
def test_ids_are_those_of_transformers_with_special_tokens_and_without(tmp_path: Path, kind: str) -> None:
    ours = assert_same_ids(lab.make(tmp_path / kind, kind), "<|im_start|>user\nhi<|im_end|>", "[INST] x </s>")
    assert bool(ours.documents.bos_ids) == (kind != "qwen")


# What other files than tokenizer.json say

_FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
SAID_ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "eos_in_special_tokens_map": ({"special_tokens_map_json": {"eos_token": {"content": "<|im_end|>"}}}, "<|im_end|>"),
    "special_tokens_map_before_the_configuration": (
        {"tokenizer_config_json": {"eos_token": "<x>"}, "special_tokens_map_json": {"eos_token": "<|im_end|>"}},
        "<|im_end|>",
    ),
    "added_tokens_decoder": (
        {
            "tokenizer_config_json": {
                "eos_token": "<|last|>",
                "added_tokens_decoder": {
                    "323": {**_FLAGS, "content": "<|last|>"},
                    "324": {**_FLAGS, "content": "<tool>", "special": False},
                },
            },
            "special_tokens_map_json": {"eos_token": "<x>"},
        },
        "<|last|>",
    ),
    "added_tokens_decoder_changes_a_flag": (
        {
            "tokenizer_config_json": {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {"321": {**_FLAGS, "content": "<|im_end|>", "lstrip": True}},
            }
        },
        "<|im_end|>",
    ),
    "added_tokens_json": (
        {"tokenizer_config_json": {"eos_token": "<|last|>"}, "added_tokens_json": {"<|last|>": 323, "<plain>": 324}},
        "<|last|>",
    ),
    "first_space_of_a_class": (
        {
            "tokenizer_config_json": {
                "tokenizer_class": "GPT2TokenizerFast",
                "add_prefix_space": True,
                "eos_token": "<|endoftext|>",
            }
        },
        "<|endoftext|>",
    ),
    "first_space_that_no_class_reads": (
        {
            "tokenizer_config_json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_prefix_space": True,
                "eos_token": "<|endoftext|>",
            }
        },
        "<|endoftext|>",
    ),
}


@pytest.mark.parametrize("what", SAID_ELSEWHERE)
def test_what_only_the_files_beside_it_say_is_read_as_transformers_does(tmp_path: Path, what: str) -> None:
    files, eos = SAID_ELSEWHERE[what]
    files = {"tokenizer_config_json": {"tokenizer_class": "PreTrainedTokenizerFast"}, **files}
    folder = lab.save(tmp_path / "given", lab.byte_level(["<|endoftext|>", "<|im_end|>", "<x>"]), **files)
    ours = assert_same_ids(folder, f"a {eos} b <tool> c <plain> d")
    assert ours.eos_token == eos


def test_where_generation_stops_names_the_token_that_nothing_else_names(tmp_path: Path) -> None:
    backend = lab.byte_level(["<|endoftext|>", "<end>"])
    number = backend.token_to_id("<end>")
    folder = lab.save(tmp_path / "given", backend, generation_config_json={"eos_token_id": number})
    assert load_tokenizer(folder).eos_id == number
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [number, 3]}))
    assert load_tokenizer(folder).eos_token == "<|endoftext|>", "a list names none of them"


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "gpt2", "qwen2"])
def test_vocab_and_merges_are_built_exactly(tmp_path: Path, name: str) -> None:
    content = json.loads(lab.byte_level([]).to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in content["merges"])
    vocab = {**content["vocab"], "<|endoftext|>": len(content["vocab"])}
    config = {"eos_token": "<|endoftext|>"} | ({"tokenizer_class": name} if name[0].isupper() else {})
    beside = {} if name[0].isupper() else {"config_json": {"model_type": name}}
    folder = lab.write(tmp_path / "given", vocab_json=vocab, merges_txt=merges, tokenizer_config_json=config, **beside)
    ours = assert_same_ids(folder, "a<|endoftext|>b")
    assert "was made of vocab.json and merges.txt" in ours.notes[0]
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", AUTO).encode("the cat") == ours.encode("the cat")


# Tokenizers of other forms

FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "sentencepiece": ({"tokenizer_model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"}, "SentencePiece"),
    "tiktoken_as_llama3_has_it": ({"tokenizer_model": base64.b64encode(b"the") + b" 0\nIA== 1\n"}, "tiktoken"),
    "tiktoken": ({"cl100k_base_tiktoken": "IQ== 0\nIg== 1\n"}, "tiktoken"),
    "tekken": ({"tekken_json": {"config": {}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}}, "tekken"),
    "wordpiece": ({"vocab_txt": "[PAD]\n[UNK]\nthe\n"}, "WordPiece"),
    "merges_of_an_unnamed_class": ({"vocab_json": {"a": 0, "b": 1}, "merges_txt": "a b\n"}, "unnamed class"),
    "vocabulary_alone": ({"vocab_json": {"a": 0, "b": 1}}, "without its merges"),
    "merges_alone": ({"merges_txt": "#version: 0.2\na b\n"}, "merges of a BPE"),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("as_file", [False, True], ids=["directory", "file"])
def test_a_tokenizer_of_another_form_is_named_for_what_it_is(tmp_path: Path, what: str, as_file: bool) -> None:
    files, kind = FOREIGN[what]
    folder = lab.write(tmp_path / "given", **files)
    if as_file and what == "merges_of_an_unnamed_class":
        return
    if not as_file and what in ("vocabulary_alone", "merges_alone"):
        kind = "no tokenizer.json"
    with pytest.raises(DataError, match=kind) as caught:
        load_tokenizer(next(folder.iterdir()) if as_file else folder)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "mistralai/Mistral-7B-v0.1"])
def test_a_name_on_the_hub_is_no_missing_file(name: str) -> None:
    with pytest.raises(DataError, match=rf"nothing is downloaded[\s\S]*hf download {name} [\s\S]*give tokenizers/"):
        load_tokenizer(name)


# Bounds, before memory is spent


def _mutant(tmp_path: Path, change: Any) -> Path:
    folder = lab.make(tmp_path / "given", "qwen")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


MUTANTS = {
    "absurd_id": (lambda c: c["model"]["vocab"].update(zzz=4_000_000_000), "out of bounds"),
    "id_beyond_the_integers": (lambda c: c["model"]["vocab"].update(zzz=10**30), "out of bounds"),
    "negative_id": (lambda c: c["model"]["vocab"].update(zzz=-1), "out of bounds"),
    "id_of_another_type": (lambda c: c["model"]["vocab"].update(zzz="x"), "out of bounds"),
    "absurd_added_id": (lambda c: c["added_tokens"][-1].update(id=4_000_000_000), "out of bounds"),
    "added_ids_with_a_hole": (lambda c: c["added_tokens"][-1].update(id=900), "another id for an added token"),
    "added_token_without_text": (lambda c: c["added_tokens"][-1].pop("content"), "added_tokens without text"),
    "an_added_token_that_is_text": (lambda c: c["added_tokens"].append("x"), "added_tokens without text"),
    "added_tokens_that_are_a_number": (lambda c: c.update(added_tokens=0.5), "added_tokens without text"),
    "added_tokens_of_another_type": (lambda c: c.update(added_tokens={"a": 1}), "added_tokens without text"),
    "merges_of_unknown_pieces": (
        lambda c: c["model"]["merges"].append(["zz", "yy"]),
        "not a tokenizer that can be read",
    ),
    "no_vocabulary": (lambda c: c["model"].pop("vocab"), "no model with a vocab"),
    "model_of_another_type": (lambda c: c.update(model=[1]), "no model with a vocab"),
    "unknown_steps": (lambda c: c.update(normalizer={"type": "Nix"}), "not a tokenizer that can be read"),
}


@pytest.mark.parametrize("alone", [False, True], ids=["directory", "file_alone"])
@pytest.mark.parametrize("what", MUTANTS)
def test_a_damaged_tokenizer_is_one_error(tmp_path: Path, what: str, alone: bool) -> None:
    change, message = MUTANTS[what]
    folder = _mutant(tmp_path, change)
    if alone:
        (tmp_path / "alone").mkdir()
        folder = (folder / "tokenizer.json").rename(tmp_path / "alone" / "tokenizer.json")
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder, AUTO)


def test_a_tokenizer_that_cannot_be_copied_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads some files once and not what it makes of them."""
    tokenizer = load_tokenizer(lab.make(tmp_path / "given", "qwen"))
    written = json.loads(tokenizer._backend.to_str())
    written["model"]["merges"].append(["zz", "yy"])
    copied = type("Once", (), {"to_str": lambda self: json.dumps(written)})()
    monkeypatch.setattr(tokenizer, "_backend", copied)
    with pytest.raises(DataError, match="not a tokenizer that can be read"):
        tokenizer.with_documents(tokenizer.documents)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[1]", "{", "\ud800"], ids=len)
def test_deep_and_broken_json_is_one_error(tmp_path: Path, name: str, content: str) -> None:
    folder = lab.make(tmp_path / "given", "llama")
    (folder / name).write_text(content, errors="surrogatepass")
    with pytest.raises(DataError, match=r"not JSON|not a JSON object|not UTF-8"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt"])
def test_a_file_without_an_end_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = lab.make(tmp_path / "given", "qwen")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match="not a plain file"):
        load_tokenizer(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a plain file"):
        load_tokenizer(folder)
    with pytest.raises(DataError, match="not a plain file"):
        load_tokenizer("/dev/zero")


def test_a_file_larger_than_such_files_are_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lab.make(tmp_path / "given", "llama")
    monkeypatch.setitem(model_files.CARRIED, "tokenizer_config.json", 100)
    with pytest.raises(DataError, match="too large"):
        load_tokenizer(folder)


def test_an_absurd_vocabulary_to_train_is_refused_before_memory_is_allocated() -> None:
    code = "from orchestrator.data.tokenize import train_bpe; train_bpe(iter(['a']), 10**12)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError" in done.stderr
    assert "1,048,576" in done.stderr


# Special tokens that a text spells

SPELLED = "one </s> two <s> three"


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_special_tokens_in_text_are_text_tokens_or_an_error(tmp_path: Path, kind: str) -> None:
    backend = lab.sentencepiece_like() if kind == "sentencepiece" else lab.unigram()
    folder = lab.save(tmp_path / "given", backend, tokenizer_config_json={"eos_token": "</s>", "bos_token": "<s>"})
    ways: tuple[SpecialTokens, ...] = ("text", "token", "error")
    text, token, error = (load_tokenizer(folder, TokenizerConfig(special_tokens_in_text=way)) for way in ways)
    assert not {1, 2} & set(text.encode(SPELLED))
    assert text.decode(text.encode(SPELLED)).replace("▁", " ").strip() == SPELLED
    assert [i for i in token.encode(SPELLED) if i in (1, 2)] == [2, 1]
    with pytest.raises(DataError, match=r"spells a special token[\s\S]*</s> in 'one </s> two"):
        error.encode(SPELLED)
    for tokenizer in (text, token, error):
        assert tokenizer.encode("one two") == text.encode("one two")
        assert not {1, 2} & set(text.encode("a <unk> b"))


def test_separators_in_text_separate_documents_where_they_are_tokens(tmp_path: Path) -> None:
    """As in corpora that put <|endoftext|> between their stories."""
    (tmp_path / "stories.txt").write_text("one day<|endoftext|>\n\ntwo days<|endoftext|>three<|endoftext|>")
    found = {}
    for way in ("text", "token"):
        config = TokenizerConfig(kind="bytes", special_tokens_in_text=way)  # type: ignore[arg-type]
        store = build_store(
            [str(tmp_path / "stories.txt")], tmp_path / way, config, validation_fraction=0, progress=False
        )
        split = store.split("train")
        found[way] = sorted(store.tokenizer.decode(split.document(i)) for i in range(split.documents))
    end = "<|endoftext|>"
    assert found["token"] == sorted([f"one day{end}", f"\n\ntwo days{end}", f"three{end}"])
    assert len(found["text"]) == 1
    assert found["text"][0].count(end) == 4
    config = TokenizerConfig(kind="bytes", special_tokens_in_text="error")
    with pytest.raises(DataError, match="spells a special token"):
        build_store([str(tmp_path / "stories.txt")], tmp_path / "error", config, progress=False)


# What begins and ends a document


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"the cat {number} sat on the mat\n" * (number + 1))
    return str(folder)


def _documents(store: TokenStore) -> list[list[int]]:
    split = store.split("train")
    return [split.document(number).tolist() for number in range(split.documents)]


@pytest.mark.parametrize(
    ("kind", "config", "first", "last"),
    [
        ("llama", TokenizerConfig(), ["<s>"], ["</s>"]),
        ("llama", TokenizerConfig(bos=False), [], ["</s>"]),
        ("llama", TokenizerConfig(eos=False), ["<s>"], []),
        ("llama3", TokenizerConfig(), ["<|begin_of_text|>"], ["<|eot_id|>"]),
        ("llama3", TokenizerConfig(eos_token="<|end_of_text|>"), ["<|begin_of_text|>"], ["<|end_of_text|>"]),
        ("qwen", TokenizerConfig(), [], ["<|im_end|>"]),
        ("qwen", TokenizerConfig(bos_token="<|endoftext|>", eos=False), ["<|endoftext|>"], []),
        ("qwen", TokenizerConfig(bos_token="<|im_end|>"), ["<|im_end|>"], ["<|im_end|>"]),
    ],
    ids=str,
)
def test_documents_begin_and_end_as_the_tokenizer_says_or_the_options_do(
    tmp_path: Path, corpus: str, kind: str, config: TokenizerConfig, first: list[str], last: list[str]
) -> None:
    from dataclasses import replace

    config = replace(config, path=str(lab.make(tmp_path / kind, kind)))
    store = build_store([corpus], tmp_path / "store", config, validation_fraction=0, progress=False)
    theirs = auto_tokenizer(Path(str(config.path)))
    before, after = theirs.convert_tokens_to_ids(first), theirs.convert_tokens_to_ids(last)
    texts = sorted(path.read_text() for path in Path(corpus).iterdir())
    wanted = [before + theirs.encode(text, add_special_tokens=False) + after for text in texts]
    assert sorted(_documents(store)) == sorted(wanted)
    opened = TokenStore.open(store.path, verify=True)
    assert opened.documents == DocumentFormat(tuple(before), bool(after))
    assert opened.tokenizer.record() == store.tokenizer.record()
    # A BOS behind the end of another document is no target, so it is not among what a baseline has to guess.
    counts = np.bincount([token for ids in wanted for token in (ids[1:] if before and after else ids)])
    share = counts[counts > 0] / counts.sum()
    assert opened.unigram_entropy_nats == pytest.approx(float(-(share * np.log(share)).sum()))


def test_bos_in_the_text_is_not_doubled(tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text("<s>[INST] hi</s>")
    path = str(lab.make(tmp_path / "llama", "llama"))
    config = TokenizerConfig(path=path, special_tokens_in_text="token")
    store = build_store([str(tmp_path / "chat.txt")], tmp_path / "store", config, validation_fraction=0, progress=False)
    (ids,) = _documents(store)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids[-1] == 2
    assert ids.count(2) == 1
    assert load_tokenizer(path, config).prompt_ids("<s>[INST] hi").count(1) == 1


def test_options_that_name_what_is_not_there_are_refused(tmp_path: Path, corpus: str) -> None:
    qwen = str(lab.make(tmp_path / "qwen", "qwen"))
    for config, message in (
        (TokenizerConfig(path=qwen, bos=True), "names no BOS token"),
        (TokenizerConfig(path=qwen, bos_token="<nix>"), "does not have this token"),
        (TokenizerConfig(path=qwen, eos_token="<nix>"), "does not have"),
        (TokenizerConfig(path=qwen, eos=False), "cannot be told apart"),
        (TokenizerConfig(kind="bytes", bos=True), "names no BOS token"),
    ):
        with pytest.raises(UserError, match=message):
            build_store([corpus], tmp_path / "store", config, progress=False)
    assert not (tmp_path / "store").exists()


def test_a_store_of_before_the_options_has_no_bos(tmp_path: Path, corpus: str) -> None:
    path = str(lab.make(tmp_path / "llama", "llama"))
    store = build_store([corpus], tmp_path / "store", TokenizerConfig(path=path, bos=False), progress=False)
    index = json.loads((store.path / "index.json").read_text())
    del index["documents"]
    (store.path / "index.json").write_text(json.dumps(index))
    old = TokenStore.open(store.path, verify=True)
    assert old.documents == DocumentFormat()
    assert old.fingerprint == store.fingerprint
    assert old.tokenizer.prompt_ids("x") == old.tokenizer.encode("x")
    index["documents"] = {"bos_ids": [10**9], "eos": True, "special_tokens_in_text": "text"}
    (store.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="damaged"):
        TokenStore.open(store.path)


def _data(tmp_path: Path, *paths: str, **tokenizer: Any) -> DataConfig:
    sources = tuple(SourceConfig(path, 1.0) for path in paths)
    return DataConfig(sources=sources, tokenizer=TokenizerConfig(**tokenizer), cache_dir=str(tmp_path / "cache"))


def test_every_option_is_in_the_key_of_the_cache(tmp_path: Path, corpus: str) -> None:
    path = str(lab.make(tmp_path / "llama3", "llama3"))
    ways: list[dict[str, Any]] = [
        {},
        {"bos": False},
        {"eos": False},
        {"bos_token": "<|im_start|>"},
        {"eos_token": "<|end_of_text|>"},
        {"special_tokens_in_text": "token"},
    ]
    paths = [prepare(_data(tmp_path, corpus, path=path, **way), progress=False).stores[0].path for way in ways]
    assert len(set(paths)) == len(ways)
    again = prepare(_data(tmp_path, corpus, path=path), progress=False)
    assert again.stores[0].path == paths[0]
    assert again.tokenizer.documents.bos_ids


def test_stores_that_are_otherwise_than_asked_for_are_refused(tmp_path: Path, corpus: str) -> None:
    path = str(lab.make(tmp_path / "llama", "llama"))
    bare = build_store([corpus], tmp_path / "bare", TokenizerConfig(path=path, bos=False), progress=False)
    whole = build_store([corpus], tmp_path / "whole", TokenizerConfig(path=path), progress=False)
    assert prepare(_data(tmp_path, str(bare.path)), progress=False).tokenizer.documents.bos_ids == ()
    for asked, fix in (
        ({"bos": True}, r"data\.tokenizer\.bos=false"),
        ({"eos_token": "<s>"}, r"'data\.tokenizer\.eos_token=\"</s>\"'"),
    ):
        with pytest.raises(DataError, match=rf"prepared otherwise than asked for[\s\S]*{fix}"):
            prepare(_data(tmp_path, str(bare.path), **asked), progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="begin or end their documents differently"):
        prepare(_data(tmp_path, str(bare.path), str(whole.path)), progress=False)
    with pytest.raises(DataError, match="begin or end their documents differently"):
        prepare(_data(tmp_path, str(bare.path), corpus, path=path), progress=False)
    mixed = prepare(_data(tmp_path, str(bare.path), corpus, path=path, bos=False), progress=False)
    assert mixed.stores[1].documents == DocumentFormat()


def test_a_path_means_a_file(tmp_path: Path, corpus: str) -> None:
    path = str(lab.make(tmp_path / "llama", "llama"))
    assert prepare(_data(tmp_path, corpus, path=path), progress=False).vocab_size == 330


# Files that say what a model was trained with


@pytest.mark.parametrize("kind", lab.KINDS)
def test_files_that_say_it_already_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    files = model_files.collect(lab.make(tmp_path / kind, kind))
    assert as_trained(files, from_files(files, AUTO)) == (files, [])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", TokenizerConfig(bos=False)),
        ("llama3", TokenizerConfig(bos=False, eos_token="<|end_of_text|>")),
        ("qwen", TokenizerConfig(bos_token="<|endoftext|>")),
    ],
)
def test_files_are_made_to_say_what_the_model_was_trained_with(
    tmp_path: Path, kind: str, config: TokenizerConfig
) -> None:
    files = model_files.collect(lab.make(tmp_path / kind, kind))
    trained = from_files(files, config)
    result, notes = as_trained(files, trained)
    assert notes
    for name, content in model_files.as_transformers_names(result).items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    theirs = auto_tokenizer(tmp_path / "out")
    for text in lab.samples():
        assert (theirs.encode(text) or [trained.eos_id]) == trained.prompt_ids(text)
    assert theirs.eos_token_id == trained.eos_id
    assert as_trained(result, from_files(result, AUTO))[1] == []


def test_decoding_keeps_the_space_after_the_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(lab.make(tmp_path / "llama", "llama"), AUTO)
    before, after = tokenizer.prompt_ids("the cat"), tokenizer.encode("sat")
    assert tokenizer.decode(after) == "sat"
    assert tokenizer.decode_after(before, after) == " sat"
    whole = tokenizer.encode("火")
    assert tokenizer.decode_after(before, whole[:-1]).endswith("\ufffd")
    assert tokenizer.decode_after(before + whole[:-1], whole[-1:]) == "火"


def test_both_errors_of_a_format_without_boundaries() -> None:
    with pytest.raises(ConfigError, match="cannot be told apart"):
        DocumentFormat((), False)
