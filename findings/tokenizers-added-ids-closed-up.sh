#!/usr/bin/env bash
# tokenizers 0.23.3: the ids of added_tokens in a tokenizer.json are not kept where they leave a gap.
# Tokens that stand there with ids 7 and 9, above a vocabulary of four, get 4 and 5 without a word, and are written back so.
# A model that was trained with the ids of the file reads other rows of its embedding.
# Seen: <pad> 7 -> 4, <eos> 9 -> 5, a vocabulary of 6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$work"
cat >check.py <<'PY'
import json

from tokenizers import Tokenizer

given = {"<pad>": 7, "<eos>": 9}
flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
spec = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "added_tokens": [{"id": number, "content": content, **flags} for content, number in given.items()],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2, "<unk>": 3}, "unk_token": "<unk>"},
}
tokenizer = Tokenizer.from_str(json.dumps(spec))
seen = {content: tokenizer.token_to_id(content) for content in given}
written = {entry["content"]: entry["id"] for entry in json.loads(tokenizer.to_str())["added_tokens"]}
print(f"in the file {given}, loaded {seen}, vocabulary {tokenizer.get_vocab_size()}, written {written}")
assert seen == written == {"<pad>": 4, "<eos>": 5}, "it has changed"
assert tokenizer.encode("a <eos>").ids == [0, 5]
PY
"$work/venv/bin/python" -W ignore check.py
