"""`python -m orchestrator data`: prepare token stores, and look into them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from orchestrator.config.schema import TokenizerConfig
    from orchestrator.data.store import TokenStore

SUMMARY = "turn text into a token store that every run can read, or look into one"
_PROGRAM = "python -m orchestrator data"


@dataclass(frozen=True)
class PrepareOptions:
    """Options of `data prepare`."""

    input: tuple[str, ...] = option(help="files, globs or directories, comma-separated; or builtin")
    output: str = option(help="directory of the new store")
    tokenizer: str = option("bpe", help="bpe (trained on the input), bytes, the path of a tokenizer.json, or none")
    vocab_size: int | None = option(None, help="tokens of a trained BPE (4096), or of the input's without tokenizer")
    eos_id: int | None = option(None, help="of an input of tokens: which of them ends a document")
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = option(None, help="of tokens in files without header")
    column: str | None = option(None, help="column of token ids: tables and data sets are read as tokens")
    packed: bool = option(False, help="rows of tokens were cut from one sequence: documents end at eos_id alone")
    bos: bool | Literal["auto"] = option("auto", help="BOS in front of documents; auto: as the tokenizer's files say")
    bos_token: str | None = option(None, help="another token to put there")
    eos: bool | Literal["auto"] = option("auto", help="the end-of-text token after documents; auto: yes")
    eos_token: str | None = option(None, help="another token to put there than the tokenizer's files name")
    special_tokens_in_text: Literal["text", "token", "error"] = option(
        "text", help="a special token that a text spells is text (plain), token (what it spells) or error"
    )
    text_field: str = option("text", help="field of rows; text.content: of a nested object")
    text_template: str | None = option(None, help="several fields instead: '{title}\\n\\n{body}'")
    messages: Literal["plain", "chat", "preference"] | None = option(
        None, help="chat (by the model's template), plain ('role: content' of each), preference (chosen and rejected)"
    )
    chat_template: str | None = option(None, help="of messages=chat: simple, chatml, or a file; else the model's own")
    loss_on: Literal["assistant", "last", "all"] = option("assistant", help="of messages=chat: what the loss counts")
    chat_date: str | None = option(None, help="YYYY-MM-DD, for chat templates that write today's date")
    chat_variables: str | None = option(None, help="of the chat template: '{enable_thinking: false}'")
    on_null: Literal["error", "skip"] = option("error", help="rows whose field is null or missing; skip: counted")
    reader: str | None = option(None, help="your own: package.module.function, called with each path")
    transform: str | None = option(None, help="your own: package.module.function, called with each document's text")
    validation_fraction: float = option(0.02, help="of the tokens, held out")
    workers: int | Literal["auto"] = option("auto", help="threads that tokenise")
    progress: bool = option(True, help="show a progress bar")


@dataclass(frozen=True)
class InspectStoreOptions:
    """Options of `data inspect`."""

    path: str = option(help="directory of the store")
    split: Literal["train", "validation"] = option("train", help="where the sample is from")
    document: int = option(0, help="number of the sample document")
    tokens: int = option(200, help="tokens of it that are shown")
    verify: bool = option(False, help="read and hash every file")


def main(argv: list[str]) -> int:
    """Run the verb; `argv` is what follows `data`. Returns the exit status.

    Raises:
        UserError: wrong options, or data that cannot be read.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in _SUBVERBS:
        close = difflib.get_close_matches(name, _SUBVERBS, n=1)
        raise ConfigError(
            f"there is no '{name}' under 'data'",
            got=name,
            allowed=", ".join(_SUBVERBS),
            fix=f"did you mean '{close[0]}'?" if close else f"see {_PROGRAM} --help",
        )
    subverb = _SUBVERBS[name]
    if any(word in ("-h", "--help") for word in rest):
        example = f"Example: {_PROGRAM} {name} {subverb.example}"
        print(f"usage: {_PROGRAM} {name} key=value ...\n\n{subverb.summary}\n")
        print(describe_options(subverb.options))
        if subverb.describe:
            print(f"\n{subverb.describe()}")
        print(f"\n{example}")
        return 0
    return subverb.run(parse_options(subverb.options, rest))


def _help() -> str:
    rows = "\n".join(f"  {name:<8}  {subverb.summary}" for name, subverb in _SUBVERBS.items())
    return f"usage: {_PROGRAM} SUBVERB key=value ...\n\n{SUMMARY}\n\n{rows}\n\nOptions: {_PROGRAM} SUBVERB --help"


def _prepare(options: PrepareOptions) -> int:
    from orchestrator.config.schema import ChatConfig, DataConfig, SourceConfig, TokensConfig
    from orchestrator.config.validate_data import check_chat
    from orchestrator.data.documents import spec_of
    from orchestrator.data.own_documents import own_documents
    from orchestrator.data.prepare import build_store

    data = DataConfig(
        text_field=options.text_field,
        text_template=options.text_template,
        messages=options.messages,
        chat=ChatConfig(
            template=options.chat_template,
            loss_on=options.loss_on,
            date=options.chat_date,
            variables=_mapping(options.chat_variables, "chat_variables"),
        ),
        on_null=options.on_null,
        reader=_own_part(options.reader, "reader"),
        transform=_own_part(options.transform, "transform"),
    )
    if problems := list(check_chat(data)):
        raise ConfigErrors(problems)
    store = build_store(
        options.input,
        options.output,
        _tokenizer_config(options),
        spec=spec_of(data, data.sources[0]),
        validation_fraction=options.validation_fraction,
        workers=options.workers,
        progress=options.progress,
        tokens=TokensConfig(
            vocab_size=options.vocab_size if options.tokenizer == "none" else None,
            eos_id=options.eos_id,
            dtype=options.dtype,
            column=options.column,
            packed=options.packed,
        ),
        own=own_documents(data, SourceConfig(path="")),
        chat=data.chat,
    )
    _print_facts(store)
    print("\nTrain on it:")
    print(f"  python -m orchestrator train data=store data.sources='[{{path: {_yaml(options.output)}, weight: 1}}]'")
    return 0


def _own_part(text: str | None, key: str) -> dict[str, Any]:
    """Return a part as `data.reader` describes it in a configuration, from a dotted name or a mapping."""
    from orchestrator.config import registry

    if text is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(text) if text.startswith("{") else {registry.TARGET: text}
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the option '{key}' cannot be read",
            got=text,
            allowed="package.module.function, or {_target_: package.module.function, ARGUMENT: VALUE}",
        ) from error
    registry.permit(named for _, named in registry.targets(found) if isinstance(named, str))
    return dict(found)


def _inspect(options: InspectStoreOptions) -> int:
    from pathlib import Path

    from orchestrator.data.store import TokenStore

    store = TokenStore.open(Path(options.path).expanduser(), verify=options.verify)
    _print_facts(store)
    if options.verify:
        print("every file has the content that the index lists")
    split = store.split(options.split)
    if not 0 <= options.document < split.documents:
        raise ConfigError(
            f"the {options.split} split has no such document",
            got=f"document={options.document}",
            allowed=f"0 to {split.documents - 1}" if split.documents else "none: the split is empty",
        )
    tokens, mask = split.document(options.document), split.document_mask(options.document)
    print(f"\n{options.split} document {options.document}, {min(options.tokens, tokens.size)} of {tokens.size} tokens:")
    print(store.tokenizer.decode(tokens[: max(0, options.tokens)]))
    if mask is not None:
        print(f"\nof these the loss counts {mask[: max(0, options.tokens)].sum()}:")
        print(store.tokenizer.decode(tokens[: max(0, options.tokens)][mask[: max(0, options.tokens)]]))
    return 0


def _mapping(text: str | None, key: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text) if text is not None else {}
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"the option '{key}' cannot be read", got=text, allowed="{NAME: VALUE, ...}")
    return found


def _tokenizer_config(options: PrepareOptions) -> TokenizerConfig:
    from orchestrator.config.schema import TokenizerConfig

    own = options.tokenizer in ("bpe", "bytes", "none")
    return TokenizerConfig(
        kind=options.tokenizer if own else "file",  # type: ignore[arg-type]
        vocab_size=options.vocab_size or TokenizerConfig().vocab_size,
        path=None if own else options.tokenizer,
        bos=options.bos,
        bos_token=options.bos_token,
        eos=options.eos,
        eos_token=options.eos_token,
        special_tokens_in_text=options.special_tokens_in_text,
    )


def _print_facts(store: TokenStore) -> None:
    from orchestrator.data.documents import describe_left_out

    index = store.index
    splits = list(index.splits.values())
    text_bytes, tokens = sum(split.text_bytes for split in splits), sum(split.tokens for split in splits)
    rows: list[tuple[str, str]] = [("store", str(store.path))]
    for name, split in index.splits.items():
        rows.append(
            (name, f"{split.tokens:,} tokens in {split.documents:,} documents, {split.text_bytes:,} bytes of text")
        )
    rows += [
        ("bytes per token", f"{text_bytes / max(1, tokens):.2f}" if text_bytes else "unknown"),
        *([("counted", f"{_counted(store)}")] if store.holds_conversations else []),
        ("vocabulary", f"{index.vocab_size:,} tokens, end of text is {index.eos_id}"),
        ("documents", store.tokenizer.describe_documents()),
        ("unigram entropy", f"{index.unigram_entropy_nats:.3f} nats (a model has to reach a lower loss)"),
        ("shards", f"{len(index.shards)}, {sum(shard.bytes for shard in index.shards):,} bytes, {index.dtype}"),
        ("source", ", ".join(map(str, index.source.get("inputs", ()))) or "unknown"),
        ("fingerprint", index.fingerprint[:16]),
    ]
    rows += [("tokens", str(line)) for line in index.source.get("tokens") or ()]
    rows += [("left out", line) for line in describe_left_out(index.source.get("left_out") or {})]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))


def _counted(store: TokenStore) -> str:
    of, counted = store.index.conversations, store.index.conversations["counted"]
    shares = [f"{counted[name]:,} of {split.tokens:,} ({name})" for name, split in store.index.splits.items()]
    return f"tokens in the loss: {', '.join(shares)}; loss on {of['loss_on']}"


def _yaml(path: str) -> str:
    """Return a path as Hydra's grammar for lists takes it."""
    plain = all(character.isalnum() or character in "/._-" for character in path)
    return path if plain else '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class _Subverb:
    summary: str
    options: type[Any]
    run: Callable[[Any], int]
    example: str
    describe: Callable[[], str] | None = None


def _formats() -> str:
    from orchestrator.data.formats.known_formats import describe_formats

    return f"What is read, known by its content and its name together:\n{describe_formats()}"


_SUBVERBS = {
    "prepare": _Subverb(
        "tokenise files into a new store",
        PrepareOptions,
        _prepare,
        "input='docs/*.jsonl' output=data/docs tokenizer=bpe",
        _formats,
    ),
    "inspect": _Subverb("show what a store holds", InspectStoreOptions, _inspect, "path=data/docs"),
}
