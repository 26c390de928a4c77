#!/usr/bin/env bash
# lm-eval 0.4.13: with a tokenizer that puts BOS, loglikelihood_rolling scores that BOS as if it were part of the text.
# HFLM encodes the text with the tokenizer's own BOS and puts its prefix token, BOS again, in front: the sum has
# log P(BOS | BOS), and the text is predicted from two BOS, which no model was trained on. Perplexities of Llama, Gemma
# and Mistral kinds (wikitext and other rolling tasks) are those of a text with one token more. The per-byte figures
# divide by the bytes of the text alone. add_bos_token=False gives the text's own sum.
# Seen, in a random model: -92.31 by default and with add_bos_token=True; the text's own sum is -77.90, which
# add_bos_token=False gives; log P(BOS | BOS) is -17.00.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  lm-eval==0.4.13 transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 "datasets==5.2.0"
cd "$work"
cat >check.py <<'PY'
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "abcd"
vocab = {"<s>": 0, "</s>": 1}
vocab |= {character: at for at, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 2)}
raw = Tokenizer(models.BPE(vocab, []))
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
raw.decoder = decoders.ByteLevel()
raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), **sizes)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(8)


@torch.no_grad()
def log_probability(ids):  # of all but the first
    scores = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    return [scores[at, token].item() for at, token in enumerate(ids[1:])]


ids = [vocab[character] for character in TEXT]
own, doubled = log_probability([0, *ids]), log_probability([0, 0, *ids])
seen = {}
for add in (None, True, False):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", add_bos_token=add)
    [seen[add]] = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
print(f"the text's own sum: {sum(own):.2f}; log P(BOS | BOS): {doubled[0]:.2f}; loglikelihood_rolling: {seen}")
close = lambda a, b: abs(a - b) < 1e-3
assert close(seen[None], sum(doubled)) and close(seen[True], sum(doubled)), "it has changed"
assert close(seen[False], sum(own)) and not close(sum(own), sum(doubled)), "it has changed"
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" check.py 2>/dev/null
