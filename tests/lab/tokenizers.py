"""Directories of tokenizers as models of the three common kinds have them, small: every file that travels is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "def encode(text):\n    return text\n",
    "the quick brown fox — naïve café 日本語 🙂\n",
    "the cat sat on the mat",
] * 8
KINDS = ("llama", "llama3", "qwen")
MORE_KINDS = ("gemma", "olmo")  # of which only what travels is looked at
_TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}" + _TURN + "{% endfor %}"


def byte_level(specials: list[str], size: int = 320) -> Tokenizer:
    """A byte-level BPE whose special tokens come after the vocabulary, as those of Llama 3 and Qwen do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    return backend


def sentencepiece_like() -> Tokenizer:
    """A BPE with byte fallback and `▁` for spaces, as converted from Llama 2's and Mistral's SentencePiece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    content = json.loads(backend.to_str())
    # The bytes are pieces of the model and no special tokens.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials]
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = template("<s>", 1)
    return backend


def unigram() -> Tokenizer:
    """Its special tokens are pieces of the model too, so text that spells one becomes the token."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([*TEXTS, "</s> <unk>"], trainer)
    return backend


def template(first: str, number: int) -> Any:
    return processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, number)]
    )


def save(folder: Path, backend: Tokenizer, **files: Any) -> Path:
    """`tokenizer.json` and other files, whose names have `_` for each dot: text and bytes as they are, else JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, **files)


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem}.{suffix}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
    return folder


def make(folder: Path, kind: str) -> Path:
    """A directory of a kind, with all that instruct models have beside their weights."""
    if kind == "llama":
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        config = {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
        }
        return save(
            folder,
            sentencepiece_like(),
            tokenizer_config_json={**config, **named, "model_max_length": 4096, "chat_template": TEMPLATE},
            special_tokens_map_json={key: {"content": text, "lstrip": False} for key, text in named.items()},
            generation_config_json={"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6, "top_p": 0.9},
            tokenizer_model=b"\n\x0e\n\x05<unk> and the rest",
        )
    if kind == "llama3":
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
        backend = byte_level(specials)
        first = backend.token_to_id("<|begin_of_text|>")
        backend.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), template("<|begin_of_text|>", first)]
        )
        ends = [backend.token_to_id(text) for text in ("<|end_of_text|>", "<|eot_id|>")]
        write(folder / "additional_chat_templates", tool_use_jinja="tools: " + TEMPLATE)
        return save(
            folder,
            backend,
            tokenizer_config_json={
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>",
                "pad_token": "<|end_of_text|>",
                "model_max_length": 131072,
            },
            chat_template_jinja=TEMPLATE,
            generation_config_json={"bos_token_id": first, "eos_token_id": ends, "do_sample": True},
        )
    if kind == "gemma":
        specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
        backend = byte_level(specials)
        pad, eos, bos, _, end = (backend.token_to_id(text) for text in specials)
        backend.post_processor = template("<bos>", bos)
        templates = [{"name": name, "template": f"{{# {name} #}}{TEMPLATE}"} for name in ("default", "tool_use", "rag")]
        return save(
            folder,
            backend,
            tokenizer_config_json={
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": None,
                "extra_special_tokens": {"turn_token": "<start_of_turn>"},
                "chat_template": templates,
                "model_max_length": 8192,
            },
            generation_config_json={"bos_token_id": bos, "eos_token_id": [eos, end], "pad_token_id": pad, "top_k": 64},
        )
    if kind == "olmo":
        backend = byte_level(["<|endoftext|>", "<|pad|>", "<|im_end|>"])
        return save(
            folder,
            backend,
            tokenizer_config_json={
                "tokenizer_class": "GPT2TokenizerFast",
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|pad|>",
                "add_prefix_space": False,
                "model_max_length": 4096,
            },
            special_tokens_map_json={
                "eos_token": "<|endoftext|>",
                "pad_token": {"content": "<|pad|>", "lstrip": False},
            },
            chat_template_jinja="{{ bos_token }}" + TEMPLATE.replace("<|im_end|>", "{{ eos_token }}"),
            generation_config_json={"eos_token_id": backend.token_to_id("<|endoftext|>"), "repetition_penalty": 1.1},
        )
    backend = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.normalizer = normalizers.NFC()
    content = json.loads(backend.to_str())
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in content["added_tokens"]}
    return save(
        folder,
        backend,
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": decoder,
            "model_max_length": 32768,
            "chat_template": TEMPLATE,
        },
        special_tokens_map_json={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        added_tokens_json={token["content"]: token["id"] for token in content["added_tokens"]},
        vocab_json=content["model"]["vocab"],
        merges_txt="#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in content["model"]["merges"]),
        generation_config_json={"eos_token_id": [backend.token_to_id("<|im_end|>"), 0], "pad_token_id": 0},
    )


def samples() -> Iterator[str]:
    """Texts on which tokenizers differ: spaces, line ends, other scripts, parts of special tokens."""
    yield from TEXTS[:3]
    yield from ("", " ", "  two  spaces ", "a\r\n\tb", "<|im_", "s>", "it's I'LL 12345", "ﬁ e\u0301", "\u200b🙂\x00")


def add_llama(folder: Path, window: int, spread: float, multiple: int = 1, seed: int = 0, **more: Any) -> Any:
    """Put a small Llama of random weights beside a tokenizer, as on the hub; returns the model, in fp32.

    Args:
        folder: has the tokenizer.
        window: positions that the model sees.
        spread: of its weights.
        multiple: to which its vocabulary is filled up, so that devices divide it.
        seed: of the weights.
        **more: keys of its configuration.
    """
    import torch
    import transformers

    vocab = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=-(-vocab // multiple) * multiple,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=spread,
        **more,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "weights")
    for name in ("model.safetensors", "config.json"):
        (folder / "weights" / name).rename(folder / name)
    return model
