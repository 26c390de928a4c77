from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.tokenize import EOS, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from orchestrator.errors import ConfigError, DataError

TEXTS = ["def encode(text):\n    return text\n", "the quick brown fox — naïve café 日本語 🙂\n", "a b c\r\n\t end"] * 5
BPE = train_bpe(iter(TEXTS), 300)
BYTES = byte_tokenizer()


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_text_survives_a_round_trip_even_where_it_spells_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    text = f"{text}{EOS}{text}"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


def test_bytes_are_their_own_tokens() -> None:
    assert BYTES.vocab_size == 257
    assert BYTES.eos_id == 256
    assert BYTES.encode("é\0") == [0xC3, 0xA9, 0]
    assert BYTES.decode(range(257)).endswith(EOS)


def test_the_file_of_the_byte_tokenizer_says_the_same_to_the_library() -> None:
    # is_bytes takes a short cut; without it the library has to give the same tokens.
    other = Tokenizer(json.dumps(BYTES._content))
    other.is_bytes = False
    everything = "".join(map(chr, range(0x300))) + "日本語 🙂"
    assert other.encode(everything) == BYTES.encode(everything)


def test_parts_of_characters_decode_to_replacement_characters() -> None:
    assert BYTES.decode(BYTES.encode("日")[:2]) == "\ufffd"
    assert BYTES.decode([65, 1000, -1, 66]) == "AB"  # ids beyond the vocabulary, as a padded embedding may give


def test_lone_surrogates_are_encoded() -> None:
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a?b"
    assert BPE.decode(BPE.encode("a\ud800b")) == "a?b"


def test_batch_equals_one_by_one() -> None:
    for tokenizer in (BPE, BYTES):
        assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]


def test_training_is_deterministic_and_makes_the_wanted_size() -> None:
    again = train_bpe(iter(TEXTS), 300)
    assert again.fingerprint == BPE.fingerprint
    assert BPE.vocab_size == 300
    assert train_bpe(iter(TEXTS), 301).fingerprint != BPE.fingerprint


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="257 and more"):
        train_bpe(iter(TEXTS), 256)


def test_saved_tokenizers_are_the_same_again(tmp_path: Path) -> None:
    for name, tokenizer in (("bpe", BPE), ("bytes", BYTES)):
        file = tokenizer.save(tmp_path / name)
        for path in (file, tmp_path / name):
            loaded = load_tokenizer(path)
            assert loaded.fingerprint == tokenizer.fingerprint
            assert loaded.eos_id == tokenizer.eos_id
            assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
            assert loaded.is_bytes == (tokenizer is BYTES)


def _foreign(tmp_path: Path, eos: str) -> Path:
    content = json.loads(json.dumps(BPE._content).replace(EOS, eos))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": eos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {eos: {"id": eos, "ids": [0], "tokens": [eos]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


def test_a_foreign_tokenizer_neither_adds_tokens_nor_cuts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_foreign(tmp_path, "</s>"))
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.encode(TEXTS[0]) == BPE.encode(TEXTS[0])


def test_the_end_of_text_token_can_be_named(tmp_path: Path) -> None:
    file = _foreign(tmp_path, "<fin>")
    with pytest.raises(DataError, match=r"does not say which token ends a document[\s\S]*<fin>[\s\S]*eos_token"):
        load_tokenizer(file)
    for named in ("<fin>", {"content": "<fin>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer(file).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nix>"}))
    with pytest.raises(DataError, match=r"does not have its end-of-text token[\s\S]*<nix>"):
        load_tokenizer(file)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"vocab": {}}}', '{"model": {"vocab": {"</s>": 0}}}'])
def test_other_files_are_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path / "nothing")


def test_arrays_decode_too() -> None:
    assert BPE.decode(np.array(BPE.encode("fox"), dtype=np.uint16)) == "fox"
