"""Read the files beside a vocabulary: special tokens, added tokens, and the roles of the files.

They are read as `AutoTokenizer` of transformers 5 reads them, so that both give the same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.data.model_files import (
    ADDED_TOKENS_FILE,
    GENERATION_FILE,
    MERGES_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
)
from orchestrator.data.vocabulary import EOS
from orchestrator.errors import DataError

MAX_VOCAB = 1 << 22  # 16 times the largest vocabulary that is in use; an embedding has a row for each
ALLOWED = "a Hugging Face tokenizer.json, or the directory that holds one"
# What models in the field call the end of a document, most specific first.
_KNOWN_EOS = (EOS, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|eos|>", "<eos>", "</s>", "[EOS]", "<|im_end|>")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Classes whose own constructor splits text, with what a tokenizer.json beside them says of the first space or not.
_BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")
_CLASS_OF_TYPE = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def parse_json(content: bytes | str, name: object) -> dict[str, Any]:
    """Parse the object that a JSON file holds.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        DataError: it is not JSON, or no object.
    """
    try:
        value = json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise DataError(f"this is not JSON: {name}", got=why, allowed=ALLOWED) from None
    if not isinstance(value, dict):
        raise DataError(f"this is not a JSON object: {name}", got=type(value).__name__, allowed=ALLOWED)
    return value


class Beside:
    """The files beside a `tokenizer.json`.

    Args:
        files: by name; those that are missing say nothing.

    Raises:
        DataError: one of them is not JSON.
    """

    def __init__(self, files: Mapping[str, bytes]):
        names = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, GENERATION_FILE)
        config, special, added, generation = (parse_json(files.get(name, b"{}"), name) for name in names)
        self.config, self._generation = config, generation
        self._listed = config.get("added_tokens_decoder")
        # A list of added tokens in the configuration makes special_tokens_map.json a copy that is not read.
        self._tokens = {**special, **config} if isinstance(self._listed, dict) else {**config, **special}
        self._added = added

    def token(self, key: str) -> str | None:
        """Return the text of a token by its role.

        Args:
            key: the role, such as `eos_token`.
        """
        return _text(self._tokens.get(key))

    @property
    def eos_id(self) -> int | None:
        """The id that generation stops at, where that is one."""
        ids = stop_ids(self._generation)
        return ids[0] if len(ids) == 1 else None

    @property
    def class_name(self) -> str:
        """The tokenizer class that `tokenizer_config.json` names, without `Fast`; empty where it names none."""
        name = self.config.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else ""

    def added_tokens(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Id and entry of each token that stands in `added_tokens_decoder` or added_tokens.json.

        Raises:
            DataError: one has no id.
        """
        if isinstance(self._listed, dict):
            entries = [(_id(key, TOKENIZER_CONFIG_FILE), token) for key, token in self._listed.items()]
        else:
            roles = [self._tokens.get(key) for key in NAMED_TOKENS]
            more = [self._tokens.get(key) for key in ("extra_special_tokens", "additional_special_tokens")]
            special = {_text(token) for token in [*roles, *(t for part in more for t in _items(part))]}
            entries = []
            for content, number in self._added.items():
                flags = {"special": content in special, "normalized": content not in special}
                entries.append((_id(number, ADDED_TOKENS_FILE), {"content": content, **flags}))
        for number, token in sorted(entries, key=lambda entry: entry[0]):
            text = _text(token)
            if text:
                given = token if isinstance(token, dict) else {}
                yield number, {"content": text, **{flag: bool(given.get(flag, False)) for flag in _FLAGS}}


def stop_ids(generation: Mapping[str, Any]) -> list[int]:
    """Return the ids at which generation stops: one, a list, or none.

    Args:
        generation: content of a `generation_config.json` or `config.json`.
    """
    given = generation.get("eos_token_id")
    ids = given if isinstance(given, list) else [given]
    return [number for number in ids if isinstance(number, int) and not isinstance(number, bool) and number >= 0]


def complete(content: dict[str, Any], beside: Beside) -> bool:
    """Add to the content of a `tokenizer.json` what only the files beside it say. Returns whether anything was.

    Args:
        content: parsed `tokenizer.json`.
        beside: the files beside it.

    Raises:
        DataError: the content is no tokenizer, or an id is out of bounds.
    """
    changed = False
    vocabulary, added = _vocabulary(content), _added_tokens(content)
    places = {token["content"]: place for place, token in enumerate(added)}
    for number, token in beside.added_tokens():
        place = places.get(token["content"])
        entry = {"id": number, **token}
        if place is None:
            places[token["content"]] = len(added)
            added.append(entry)
            changed = True
        elif {**entry, "id": added[place].get("id")} != added[place]:
            added[place] = {**entry, "id": added[place].get("id")}
            changed = True
    for number in (*vocabulary.values(), *(token.get("id") for token in added)):
        _id(number, TOKENIZER_FILE)
    if changed:
        content["added_tokens"] = added
    space = beside.config.get("add_prefix_space")
    if isinstance(space, bool) and beside.class_name in _BYTE_LEVEL_CLASSES:
        for node in _nodes(content.get("pre_tokenizer"), "pretokenizers"):
            if node.get("type") == "ByteLevel" and node.get("add_prefix_space") != space:
                node["add_prefix_space"] = space
                changed = True
    return changed


def set_spaces_of_class(content: dict[str, Any], beside: Beside, model_type: str | None) -> None:
    """Put spaces between special tokens as transformers' class for Llama's SentencePiece vocabularies does.

    Its constructor makes them itself, by what tokenizer_config.json says, whatever a `tokenizer.json` beside it has.
    In a text without special tokens within both are the same.

    Args:
        content: parsed `tokenizer.json`.
        beside: the files beside it.
        model_type: of the model; the class is Llama's alone, whatever others name.
    """
    pieces = [node.get("type") for node in _nodes(content.get("pre_tokenizer"), "pretokenizers")]
    normal = [node.get("type") for node in _nodes(content.get("normalizer"), "normalizers")]
    ours = beside.class_name == "LlamaTokenizer" and model_type in (None, "llama")
    if not ours or not ("Metaspace" in pieces or "Prepend" in normal):
        return
    space = beside.config.get("add_prefix_space") is not False
    scheme = ("always" if beside.config.get("legacy") is True else "first") if space else "never"
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def template_prefix(content: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that the post-processor of a `tokenizer.json` puts in front of a text.

    Args:
        content: parsed `tokenizer.json`.
    """
    prefix: list[int] = []
    for node in _nodes(content.get("post_processor"), "processors"):
        ids: list[Any] = []
        if node.get("type") in ("BertProcessing", "RobertaProcessing"):
            ids = list(node.get("cls") or ())[1:2]
        elif node.get("type") == "TemplateProcessing":
            for item in node.get("single") or ():
                if not isinstance(item, dict) or "SpecialToken" not in item:
                    break
                known = (node.get("special_tokens") or {}).get(item["SpecialToken"].get("id")) or {}
                ids += known.get("ids") or ()
        prefix = [*ids, *prefix]
    return tuple(_id(number, "post_processor") for number in prefix)


def set_template_prefix(content: dict[str, Any], tokens: Mapping[str, int]) -> None:
    """Make the post-processor of a `tokenizer.json` put these tokens, and no others, in front of a text.

    Args:
        content: parsed `tokenizer.json`.
        tokens: text to id.
    """
    sequence: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    items: list[dict[str, Any]] = [{"SpecialToken": {"id": text, "type_id": 0}} for text in tokens]
    second = [{key: {**value, "type_id": 1} for key, value in item.items()} for item in items]
    template = {
        "type": "TemplateProcessing",
        "single": [*items, sequence],
        "pair": [*items, sequence, *second, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in tokens.items()},
    }
    puts = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
    kept = [node for node in _nodes(content.get("post_processor"), "processors") if node.get("type") not in puts]
    content["post_processor"] = {"type": "Sequence", "processors": [*kept, template]} if kept else template


def without_special_tokens(content: Mapping[str, Any]) -> str:
    """Return a `tokenizer.json` of the same ids whose special tokens no text can spell, nor pieces of its model.

    Args:
        content: parsed `tokenizer.json`.
    """
    special = {token["content"] for token in content["added_tokens"] if token.get("special")}

    def unspelt(text: str) -> str:
        return f"\U0010fffe{text}" if text in special else text  # no character, so no text has it

    model = dict(content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[unspelt(piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {unspelt(piece): number for piece, number in model["vocab"].items()}
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = unspelt(model["unk_token"])
    added = [{**token, "content": unspelt(token["content"])} for token in content["added_tokens"]]
    return json.dumps({**content, "model": model, "added_tokens": added, "post_processor": None})


def from_vocab_and_merges(files: Mapping[str, bytes], model_type: object, place: Path) -> str:
    """Build the `tokenizer.json` that vocab.json and merges.txt stand for, split as transformers' class does.

    Args:
        files: content by name.
        model_type: of the `config.json` beside them.
        place: of the files, for messages.

    Raises:
        DataError: nothing says which class that is, or it is one that is not known here.
    """
    beside = Beside(files)
    name = beside.class_name or _CLASS_OF_TYPE.get(str(model_type), "")
    if name not in _BYTE_LEVEL_CLASSES:
        raise foreign(
            place, f"{VOCAB_FILE} and {MERGES_FILE} of {name or 'an unnamed class'}, which say not how text is split"
        )
    vocab = parse_json(files[VOCAB_FILE], VOCAB_FILE)
    lines = files[MERGES_FILE].decode("utf-8", "replace").split("\n")
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    space = beside.config.get("add_prefix_space") is True
    byte_level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": True}
    qwen = name == "Qwen2Tokenizer"
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    parts = [split, {**byte_level, "use_regex": False}]
    named = {beside.token(key) or ("" if qwen and key == "bos_token" else "<|endoftext|>") for key in NAMED_TOKENS[:3]}
    flags = {**dict.fromkeys(_FLAGS, False), "special": True}
    specials = [{"id": vocab[text], "content": text, **flags} for text in sorted(named) if text in vocab]
    bpe = {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(specials, key=lambda token: str(token["id"])),
        "normalizer": {"type": "NFC"} if qwen else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts} if qwen else byte_level,
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {**bpe, "dropout": None, "unk_token": None, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }
    return json.dumps(content, ensure_ascii=False)


def refuse_foreign(path: Path) -> None:
    """Raise the error that names what lies at a path that is no `tokenizer.json`, and says how to get one.

    Args:
        path: a file or a directory.

    Raises:
        DataError: where it is something that is known, or nothing.
    """
    if not path.exists():
        if _HUB_NAME.fullmatch(str(path)):
            raise DataError(
                f"there is no file of this name, and nothing is downloaded: {path}",
                got=f"{path}, a name as on the Hugging Face hub",
                allowed=ALLOWED,
                fix=f"hf download {path} --include 'tokenizer*' '*token*.json' --local-dir tokenizers/{path.name}, "
                f"and give tokenizers/{path.name}",
            )
        return
    inside = [path / name for name in ("tokenizer.model", "tekken.json", "vocab.txt")] if path.is_dir() else [path]
    inside += sorted(path.glob("*.tiktoken")) if path.is_dir() else []
    for file in inside:
        if file.is_file() and (kind := _kind(file)):
            raise foreign(file, kind)


def foreign(path: Path, kind: str) -> DataError:
    """Make the error for a vocabulary of another form.

    Args:
        path: a file or a directory.
        kind: the form.
    """
    folder = path if path.is_dir() else path.parent
    save = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('OUT')"
    return DataError(
        f"this is a tokenizer of another form: {path}",
        got=kind,
        allowed=ALLOWED,
        fix="take the tokenizer.json from the model's repository for transformers; or write one: "
        f'python -c "from transformers import AutoTokenizer; {save}" and give OUT',
    )


def _kind(file: Path) -> str | None:
    with open(file, "rb") as stream:
        head = stream.read(4096)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return "a vocabulary of tiktoken: a line of base64 and a rank per token"
    if file.suffix == ".model" or head.startswith((b"\n\x0e\n\x05<unk>", b"\n\x05\n\x03")):
        return "a SentencePiece model (reading it takes the package sentencepiece)"
    if file.name == "tekken.json" or b'"token_bytes"' in head:
        return "Mistral's tekken vocabulary (reading it takes the package mistral-common)"
    if file.name == "vocab.txt":
        return "a WordPiece vocabulary, which says not how text is split"
    if head.startswith(b"#version") or file.name == MERGES_FILE:
        return f"the merges of a BPE; with {VOCAB_FILE} beside it give the directory"
    if file.name == VOCAB_FILE or re.match(rb'\s*\{\s*"[^"]*"\s*:\s*\d+\s*,', head):
        return f"a vocabulary without its merges; with {MERGES_FILE} beside it give the directory"
    return None


def _vocabulary(content: Mapping[str, Any]) -> dict[str, Any]:
    """Piece to id. Unigram models list [piece, score], the others map pieces to ids."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        return {str(entry[0]): number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    if isinstance(vocab, dict):
        return vocab
    raise DataError("this is not a tokenizer that can be read", got="no model with a vocab", allowed=ALLOWED)


def _added_tokens(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the tokens that were added to the vocabulary, each with its text."""
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) and _text(token) for token in added):
        raise DataError("this is not a tokenizer that can be read", got="added_tokens without text", allowed=ALLOWED)
    return added


def pieces_of(content: Mapping[str, Any]) -> set[str]:
    """Return every piece of the vocabulary, added tokens included.

    Args:
        content: parsed `tokenizer.json`.

    Raises:
        DataError: the content is no tokenizer.
    """
    return {*_vocabulary(content), *(token["content"] for token in _added_tokens(content))}


def _nodes(node: Any, children: str) -> Iterator[dict[str, Any]]:
    """Yield a step of a tokenizer, or the steps of a sequence of them."""
    if isinstance(node, dict):
        inner = node.get(children)
        if node.get("type") == "Sequence" and isinstance(inner, list):
            for one in inner:
                yield from _nodes(one, children)
        else:
            yield node


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _id(number: Any, where: str) -> int:
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 20:
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_VOCAB:
        raise DataError(
            f"a token's id in {where} is out of bounds", got=str(number)[:50], allowed=f"0 to {MAX_VOCAB - 1:,}"
        )
    return number


def guessed_eos(content: Mapping[str, Any]) -> str:
    """Return the token that is known to end texts.

    Args:
        content: parsed `tokenizer.json`.

    Raises:
        DataError: there is none.
    """
    pieces = pieces_of(content)
    for name in _KNOWN_EOS:
        if name in pieces:
            return name
    special = [token["content"] for token in _added_tokens(content)]
    raise DataError(
        "the tokenizer does not say which token ends a document",
        got=f"special tokens {', '.join(special[:20]) or 'none'}",
        allowed=f"one of {', '.join(_KNOWN_EOS)}, or the one that {TOKENIZER_CONFIG_FILE} names",
        fix="name one of its tokens: data.tokenizer.eos_token=... (data prepare: eos_token=...); or put a "
        f'{TOKENIZER_CONFIG_FILE} with {{"eos_token": "<the token>"}} beside it',
    )
