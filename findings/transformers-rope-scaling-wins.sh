#!/usr/bin/env bash
# transformers 5.23.0: a rope_scaling beside rope_parameters in config.json silently replaces it.
# Version 5 writes rope_parameters; model cards still tell people to add rope_scaling for long contexts. A file with
# both is read with the older key, and what the newer one said is lost with it, the base frequency too: whoever adds the
# scaling to a file that version 5 saved gets a model with the default theta of 10,000.
# Seen: rope_parameters says default with a theta of 1,000,000, rope_scaling says linear x 4; the configuration is
# linear x 4 with a theta of 10,000.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$work"
cat >check.py <<'PY'
import json
import pathlib

from transformers import AutoConfig

sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=100)
config = {
    "model_type": "llama",
    **sizes,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
pathlib.Path("model").mkdir()
pathlib.Path("model/config.json").write_text(json.dumps(config))
seen = AutoConfig.from_pretrained("model").rope_parameters
print("read as:", seen)
assert (seen["rope_type"], seen["factor"], seen["rope_theta"]) == ("linear", 4.0, 10000.0), "it has changed"
PY
"$work/venv/bin/python" check.py
