#!/usr/bin/env bash
# transformers 5.23.0: GPT-NeoX's output head has one name in memory and another in the file that it saves.
# GPTNeoXForCausalLM.state_dict() calls it `lm_head.weight`; save_pretrained() writes `embed_out.weight`, the name of older
# versions, and renames it again on loading. Who saves `state_dict()` by safetensors' own save_file gets a file of other names
# than any that save_pretrained has written, and a reader that knows one name finds no head in the other's files.
# Seen: lm_head.weight in the state_dict, embed_out.weight in model.safetensors, and neither name in the other place.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy
cd "$work"
cat >check.py <<'PY'
from safetensors import safe_open
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

config = GPTNeoXConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64, max_position_embeddings=32
)
model = GPTNeoXForCausalLM(config)
model.save_pretrained("model")
with safe_open("model/model.safetensors", "pt") as file:
    saved = set(file.keys())
heads = {"lm_head.weight", "embed_out.weight"}
in_memory, in_file = heads & set(model.state_dict()), heads & saved
print("in memory:", in_memory, "in the file:", in_file)
assert in_memory == {"lm_head.weight"} and in_file == {"embed_out.weight"}, "it has changed"
PY
"$work/venv/bin/python" check.py
