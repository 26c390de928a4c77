#!/usr/bin/env bash
# transformers 5.23.0: the mask of apply_chat_template(..., return_assistant_tokens_mask=True) ends one token into a character.
# Where a {% generation %} block ends with a character that is several tokens (an emoji, a rare Han character in a byte-level
# vocabulary), only the first of these is marked: the end is looked up by char_to_token, which gives the first token of a
# character. So a model is not trained on the tokens that complete it. Blocks that end with a special token are not affected.
# Seen: of the five tokens of "a🙂" the first two are marked, and the three that complete the character are not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2 numpy
cd "$work"
cat >check.py <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
made = tokenizer.apply_chat_template([{"role": "assistant", "content": "a🙂"}], return_assistant_tokens_mask=True)
print(made["input_ids"], made["assistant_masks"])
assert len(made["input_ids"]) == 5 and made["assistant_masks"] == [1, 1, 0, 0, 0], "it has changed"
PY
"$work/venv/bin/python" check.py
