"""Conversations from files over stores and sequences to batches, held against transformers' own path."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.compose import compose
from orchestrator.config.schema import ChatConfig, DataConfig, SourceConfig, TokenizerConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.conversation import conversation_of
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.packing import best_fit
from orchestrator.data.prepare import PreparedData, build_store, prepare
from orchestrator.data.sequences import blank_batch
from orchestrator.data.store import TokenStore
from orchestrator.data.stream import TokenStream
from orchestrator.errors import ConfigErrors, DataError, UserError
from orchestrator.training.callbacks.evaluation import opening
from tests.lab import chat

transformers = pytest.importorskip("transformers")
SEQ = 48


def talks(count: int = 40) -> list[list[dict[str, Any]]]:
    """Conversations that all differ, of different lengths, some of several turns."""
    return [
        [
            {"role": role, "content": f"{number} {text} " * (1 + (number * 7 + turn) % 5)}
            for turn in range(1 + number % 2)
            for role, text in (("user", "the cat?"), ("assistant", "sat on the mat"))
        ]
        for number in range(count)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(
    tmp_path: Path,
    path: str,
    family: str = "chatml",
    fraction: float = 0.0,
    more: dict[str, Any] | None = None,
    **of_chat: Any,
) -> PreparedData:
    folder = tmp_path / family
    if not folder.exists():
        chat.make(folder, family)
    config = DataConfig(
        sources=(SourceConfig(path),),
        tokenizer=TokenizerConfig(kind="file", path=str(folder)),
        validation_fraction=fraction,
        messages="chat",
        chat=ChatConfig(**of_chat),
        cache_dir=str(tmp_path / "cache"),
        workers=2,
        **(more or {}),
    )
    return prepare(config, progress=False)


def rows_of(store: TokenStore, split: str = "train") -> list[tuple[list[int], list[int]]]:
    part = store.split(split)
    found = [(part.document(number), part.document_mask(number)) for number in range(part.documents)]
    return [(ids.tolist(), mask.astype(int).tolist()) for ids, mask in found if mask is not None]


def theirs(tmp_path: Path, family: str, messages: Any) -> tuple[list[int], list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / family)
    made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    return made["input_ids"], made["assistant_masks"]


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_a_store_has_the_tokens_and_masks_of_transformers(tmp_path: Path, family: str) -> None:
    data = prepared(tmp_path, write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks()]), family)
    wanted = [theirs(tmp_path, family, talk) for talk in talks()]
    assert Counter(map(str, rows_of(data.stores[0]))) == Counter(map(str, wanted))
    store = TokenStore.open(data.stores[0].path, verify=True)
    assert store.index.version == 3
    assert store.index.conversations["counted"]["train"] == sum(sum(mask) for _, mask in wanted)


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def arrow(path: Path, rows: list[dict[str, Any]]) -> str:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def comma_separated(path: Path, rows: list[dict[str, Any]]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_all_formats_and_columns_give_the_same_tokens(tmp_path: Path) -> None:
    talk = [talk for talk in talks() if len(talk) == 2]
    pairs = [(talk[0]["content"], talk[1]["content"]) for talk in talk]
    lists = [{"messages": talk, "id": 1, "more": {"x": [1]}} for talk in talk]
    named = {"user": "human", "assistant": "gpt"}
    shared = [{"conversations": [{"from": named[m["role"]], "value": m["content"]} for m in t]} for t in talk]
    halves = [user.split(" ", 1) for user, _ in pairs]
    inputs = {
        "lists.jsonl": write_rows(tmp_path / "lists.jsonl", lists),
        "shared.jsonl": write_rows(tmp_path / "shared.jsonl", shared),
        "lists.parquet": parquet(tmp_path / "lists.parquet", lists),
        "shared.arrow": arrow(tmp_path / "shared.arrow", shared),
        "pairs.parquet": parquet(tmp_path / "pairs.parquet", [{"prompt": a, "completion": b} for a, b in pairs]),
        "pairs.csv": comma_separated(tmp_path / "pairs.csv", [{"question": a, "answer": b} for a, b in pairs]),
        "array.json": str(tmp_path / "array.json"),
        "text.jsonl": write_rows(tmp_path / "text.jsonl", [{"messages": json.dumps(talk)} for talk in talk]),
    }
    (tmp_path / "array.json").write_text(json.dumps([{"instruction": a, "input": "", "output": b} for a, b in pairs]))
    found = {name: Counter(map(str, rows_of(prepared(tmp_path, path).stores[0]))) for name, path in inputs.items()}
    assert len(set(map(str, (sorted(one.items()) for one in found.values())))) == 1, found.keys()
    parts = [{"instruction": a, "input": b, "output": "c", "system": "Be brief."} for a, b in halves]
    with_input = prepared(tmp_path, write_rows(tmp_path / "input.jsonl", parts)).stores[0]
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "c"}
    wanted = [[system, {"role": "user", "content": f"{a}\n\n{b}"}, answer] for a, b in halves]
    assert Counter(map(str, rows_of(with_input))) == Counter(str(theirs(tmp_path, "chatml", talk)) for talk in wanted)


def test_of_a_prompt_that_is_a_conversation_the_completion_alone_counts(tmp_path: Path) -> None:
    talk = chat.CONVERSATIONS[1]
    row = {"prompt": talk[:3], "completion": talk[3:]}
    store = prepared(tmp_path, write_rows(tmp_path / "a.jsonl", [row])).stores[0]
    ((ids, mask),) = rows_of(store)
    said = [number for number, counts in zip(ids, mask, strict=True) if counts]
    assert store.tokenizer.decode(said) == "def encode(text):\n    return text<|im_end|>"
    last = prepared(tmp_path, write_rows(tmp_path / "b.jsonl", [{"messages": talk}]), loss_on="last").stores[0]
    assert rows_of(last) == [(ids, mask)]
    whole = prepared(tmp_path, write_rows(tmp_path / "b.jsonl", [{"messages": talk}]), loss_on="all").stores[0]
    assert rows_of(whole) == [(ids, [1] * len(ids))]


def test_tools_come_with_a_conversation(tmp_path: Path) -> None:
    for number, tools in enumerate((chat.TOOLS, json.dumps(chat.TOOLS))):
        path = write_rows(tmp_path / f"{number}.jsonl", [{"messages": chat.WITH_TOOLS, "tools": tools}])
        ((ids, mask),) = rows_of(prepared(tmp_path, path).stores[0])
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "chatml")
        made = tokenizer.apply_chat_template(chat.WITH_TOOLS, tools=chat.TOOLS, return_assistant_tokens_mask=True)
        assert (ids, mask) == (made["input_ids"], made["assistant_masks"])


# From the store to batches


def stream_of(
    data: PreparedData, seq_len: int = SEQ, seed: int = 3, repeat: bool = False, **of_chat: Any
) -> TokenStream:
    mask = of_chat.pop("document_mask", True)
    return TokenStream(data.stores, data.weights, "train", seq_len, seed, mask, repeat, ChatConfig(**of_chat))


@pytest.mark.parametrize("packing", [True, False])
def test_every_conversation_is_whole_once_in_an_epoch_and_no_other_target_counts(tmp_path: Path, packing: bool) -> None:
    data = prepared(tmp_path, write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks()]))
    stream = stream_of(data, 256, packing=packing)
    found = []
    for index in range(len(stream)):
        row = stream.sequence(index)
        for number in np.unique(row["documents"]):
            ours = row["documents"] == number
            assert np.array_equal(row["positions"][ours], np.arange(ours.sum()))
            tokens, targets = row["tokens"][ours], row["targets"][ours]
            if (targets != IGNORE_INDEX).any():
                found.append((tokens.tolist(), targets.tolist()))
            else:
                assert set(tokens.tolist()) == {data.tokenizer.eos_id}, "what is left over"
    wanted = []
    for ids, mask in rows_of(data.stores[0]):
        targets = [number if counts else IGNORE_INDEX for number, counts in zip(ids[1:], mask[1:], strict=True)]
        wanted.append((ids[:-1], targets))
    assert sorted(found) == sorted(wanted)
    assert (len(stream) == 40) == (not packing)
    prompt = opening(stream)
    at = len(prompt)
    assert any(ids[:at] == prompt and mask[at] and not any(mask[:at]) for ids, mask in rows_of(data.stores[0]))
    described = [
        {name: (a.shape, a.dtype) for name, a in one.items()}
        for one in (stream.batch([0, 1]), blank_batch(2, 256, True))
    ]
    assert described[0] == described[1]


def test_sequences_are_a_function_of_data_seed_and_index(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks()])
    data = prepared(tmp_path, path)
    one, same, other = (
        stream_of(data, repeat=True),
        stream_of(prepared(tmp_path, path), repeat=True),
        stream_of(data, seed=4, repeat=True),
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.fingerprint != stream_of(data, repeat=True, packing=False).fingerprint
    for index in (0, 1, 17, 100):
        assert all(np.array_equal(array, same.sequence(index)[name]) for name, array in one.sequence(index).items())
    first = [one.locate(index)[1] for index in range(len(one._rows[0]))]
    assert sorted(first) == list(range(len(first)))
    assert first != [other.locate(index)[1] for index in range(len(first))]
    assert "documents" not in stream_of(data, document_mask=False).sequence(0)


def test_conversations_that_are_too_long_are_counted_and_said(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "the cat " * 50}, {"role": "assistant", "content": "late"}]
    cut = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat " * 50}]
    data = prepared(tmp_path, write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in (long, cut, *talks(1))]))
    rows = stream_of(data, too_long="truncate")._rows[0]
    assert "1 conversation is longer than train.seq_len=48, and is cut there" in rows.lines()[1]
    assert "1 conversation is left out: without an answer within train.seq_len=48" in rows.lines()[2]
    batch = rows.read(range(len(rows)), True)
    assert (batch["targets"] != IGNORE_INDEX).any(axis=1).all()
    assert (
        "2 conversations are left out: longer than train.seq_len=48"
        in stream_of(data, too_long="drop")._rows[0].lines()[1]
    )
    with pytest.raises(
        DataError, match=r"longer than a sequence[\s\S]*2 of the train split[\s\S]*too_long=truncate or drop"
    ):
        stream_of(data, too_long="error")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_puts_everything_once_where_it_fits(sizes: list[int]) -> None:
    places = np.array(sizes, dtype=np.int64)
    rows = best_fit(places, np.arange(len(sizes)), 20)
    assert sorted(number for row in rows for number in row.tolist()) == list(range(len(sizes)))
    assert all(places[row].sum() <= 20 for row in rows)
    # Never worse than twice the room that is needed: no two sequences are half empty.
    assert sum(places[row].sum() <= 10 for row in rows) <= 1


def test_a_large_number_is_packed_fast_and_full() -> None:
    places = np.random.default_rng(0).integers(5, 2000, 200_000)
    rows = best_fit(places, np.arange(places.size), 4096)
    assert places.sum() / (len(rows) * 4096) > 0.99


# What travels, what is held out, what is refused


def test_a_template_that_is_given_travels_in_place_of_the_models(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks()])
    own = prepared(tmp_path, path)
    assert own.given_files == {}
    given = prepared(tmp_path, path, template="simple")
    assert given.fingerprint != own.fingerprint
    assert given.given_files == {"chat_template.jinja": given.stores[0].tokenizer.files["chat_template.jinja"]}
    ids, mask = rows_of(given.stores[0])[0]
    assert given.tokenizer.decode(ids).startswith("User: ")
    said = given.tokenizer.decode([number for number, counts in zip(ids, mask, strict=True) if counts])
    assert said.startswith(" ")
    assert "<|im_end|>" in said
    (tmp_path / "mine.jinja").write_text(chat.LLAMA3.replace("bos_token", "''"))
    mine = prepared(tmp_path, path, template=str(tmp_path / "mine.jinja"))
    assert "<|start_header_id|>user" in mine.tokenizer.decode(rows_of(mine.stores[0])[0][0])


def test_whole_conversations_are_held_out_and_copies_stay_together(tmp_path: Path) -> None:
    rows = [{"messages": talk} for talk in talks() for _ in range(2)]
    store = prepared(tmp_path, write_rows(tmp_path / "a.jsonl", rows), fraction=0.2).stores[0]
    held, trained = rows_of(store, "validation"), rows_of(store)
    assert 0 < len(held) < 40
    assert not {str(one) for one in held} & {str(one) for one in trained}
    assert {str(one) for one in [*held, *trained]} == {str(theirs(tmp_path, "chatml", talk)) for talk in talks()}


def test_a_mixture_of_text_and_conversations_has_batches_of_both(tmp_path: Path) -> None:
    talk = prepared(tmp_path, write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks()])).stores[0]
    text = write_rows(tmp_path / "b.jsonl", [{"text": f"the cat {number} " * 20} for number in range(20)])
    tokenizer = TokenizerConfig(kind="file", path=str(tmp_path / "chatml"))
    plain = build_store([text], tmp_path / "plain", tokenizer, progress=False)
    mixed = DataConfig(
        sources=(SourceConfig(str(talk.path)), SourceConfig(str(plain.path))), cache_dir=str(tmp_path / "c")
    )
    data = prepare(mixed, progress=False)
    batch = TokenStream(data.stores, data.weights, "train", SEQ, 0).batch(range(8))
    counted = (batch["targets"] != IGNORE_INDEX).mean(axis=1)
    assert sorted(counted > 0.9) == [False] * 4 + [True] * 4
    assert "conversations" in TokenStream(data.stores, data.weights, "train", SEQ, 0).facts
    assert "conversations" not in TokenStream([plain], [1.0], "train", SEQ, 0).facts, "positions of older runs stay"


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": talk} for talk in talks(4)]
    rows += [{"messages": talks(1)[0][:1]}, {"messages": []}, {"messages": None}, {"other": 1}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    store = prepared(tmp_path, path, more={"on_null": "skip"}).stores[0]
    assert store.index.splits["train"].documents == 4
    left_out = store.index.source["left_out"]
    assert [left_out[name] for name in ("unanswered", "empty_documents", "null_rows")] == [1, 1, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"no conversation: .*a\.jsonl:1[\s\S]*columns text"),
        ({"messages": None}, r"no conversation: .*a\.jsonl:1[\s\S]*null"),
        ({"messages": "x"}, r"not JSON: .*a\.jsonl:1"),
        ({"messages": 3}, "no list of messages"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "3"}, "no list of functions"),
        ({"messages": [{"role": "user", "content": 3}]}, r"does not render this conversation: .*a\.jsonl:1"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answers[\\s\\S]*1 conversations"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, write_rows(tmp_path / "a.jsonl", [row]))


def test_text_and_templates_that_read_the_clock_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    with pytest.raises(DataError, match="holds text, and no conversations"):
        prepared(tmp_path, str(tmp_path / "a.txt"))
    path = write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks(3)])
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%Y') }} " + chat.CHATML)
    with pytest.raises(DataError, match=r"depend on the day[\s\S]*data\.chat\.date=2024-07-26"):
        prepared(tmp_path, path, template=str(tmp_path / "dated.jinja"))
    dated = prepared(tmp_path, path, template=str(tmp_path / "dated.jinja"), date="2024-07-26")
    assert dated.tokenizer.decode(rows_of(dated.stores[0])[0][0]).startswith("2024<")
    with pytest.raises(UserError, match="chat template cannot be read"):
        prepared(tmp_path, path, template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.chat.template=simple"], "only used where conversations become tokens"),
        (["data.messages=chat", "data.text_template='{a}'"], "not by a template of fields"),
        (["data.messages=chat", "data.chat.date=26.7.2024"], "data.chat.date"),
        (["data.messages=chat", "data.chat.variables={tools: 1}"], "data.chat.variables"),
    ],
)
def test_settings_that_mean_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigErrors, match=message):
        compose(words)


def test_a_mask_that_was_changed_is_found_when_it_is_read(tmp_path: Path) -> None:
    store = prepared(tmp_path, write_rows(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks()])).stores[0]
    file = store.path / "mask-00000.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged: .*mask-00000\.bin"):
        TokenStore.open(store.path).split("train").read_mask(0, 10)
    with pytest.raises(DataError, match="damaged"):
        TokenStore.open(store.path, verify=True)


def test_builtin_conversations_need_no_download(tmp_path: Path) -> None:
    from orchestrator.data.builtin_conversations import conversations_about
    from orchestrator.data.formats.find import find_inputs

    (item,) = [item for item in find_inputs(["builtin"]).inputs if item.name == "textwrap.py"]
    found = list(conversations_about(item))
    dedent = next(one for one in found if "textwrap.dedent" in one.messages[0]["content"])
    assert dedent.messages[1]["content"] == "Remove any common leading whitespace from every line in `text`."
    assert dedent.messages[3]["content"] == "textwrap.dedent(text)"
    assert conversation_of({"messages": list(dedent.messages)}, None, "here") is not None


@pytest.mark.parametrize(
    ("more", "kind"), [({"messages": []}, "chat"), ({"chosen": "a", "rejected": "b"}, "preference")]
)
def test_who_reads_conversations_as_text_learns_how_they_are_read(more: dict[str, Any], kind: str) -> None:
    with pytest.raises(DataError, match=f"data.messages={kind} in a run"):
        TextSpec().text_of(more, "a.jsonl:1")
