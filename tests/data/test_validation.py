"""What a run is evaluated on, known before anything is started."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import DataConfig, RunConfig, SourceConfig, TokenizerConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.prepare import PreparedData, build_store, prepare
from orchestrator.data.store import TokenStore
from orchestrator.data.stream import TokenStream, mixture_shares
from orchestrator.data.validation import check_data, mixture_lines, validation_data
from orchestrator.data.validation_sets import ValidationBatches
from orchestrator.errors import DataError

from .conftest import MakeStore, numbered_texts

SEQ = 16
BYTES = TokenizerConfig(kind="bytes")


def run_config(eval_every: int | None = 10, eval_tokens: int = 4096, **data: Any) -> RunConfig:
    plain = RunConfig()
    train = replace(plain.train, seq_len=SEQ, eval_every=eval_every, eval_tokens=eval_tokens)
    return replace(plain, train=train, data=replace(plain.data, **data))


def of(*stores: TokenStore, weights: tuple[float, ...] = (1.0,)) -> PreparedData:
    names = tuple(store.path.name for store in stores)
    return PreparedData(stores, weights, stores[0].tokenizer, names=names)


def test_no_held_out_data_is_allowed_where_none_is_used(make_store: MakeStore) -> None:
    data = of(make_store(numbered_texts(30)))
    with pytest.raises(DataError, match=r"nothing to evaluate on[\s\S]*data\.validation=[\s\S]*eval_every=null"):
        check_data(run_config(), data)
    config = run_config(eval_every=None)
    assert check_data(config, data) == []
    validation = validation_data(config, data)
    assert validation.stream(True) is None
    assert validation.lines() == ["none: held out are 0 tokens of store; no evaluation is made"]


def test_a_small_source_does_not_veto_a_mixture(make_store: MakeStore) -> None:
    large, small = make_store(numbered_texts(200), "large", 0.1), make_store(["x" * 40], "small", 0.1)
    tiny = make_store(numbered_texts(20), "tiny", 0.02)
    data = of(large, small, tiny, weights=(0.2, 0.4, 0.4))
    assert check_data(run_config(), data) == []
    validation = validation_data(run_config(), data)
    lines = validation.lines()
    assert "of large (" in lines[0]
    assert lines[1].startswith("none of small: what it holds out (5 tokens) is shorter than a sequence")
    stream = validation.stream(True)
    assert stream is not None
    windows = {part.name: part.sequences for part in validation.used}
    assert len(stream) == sum(windows.values()) > 40
    located = [stream.locate(index) for index in range(len(stream))]
    assert len(set(located)) == len(located), "every window once, though one source ends early"
    both = min(windows.values())
    early = Counter(store for store, _ in located[: both // 2])
    assert early[1] == pytest.approx(2 * early[0], abs=1)


def test_one_source_is_evaluated_on_as_it_always_was(make_store: MakeStore) -> None:
    store = make_store(numbered_texts(200), fraction=0.2)
    stream = validation_data(run_config(), of(store)).stream(True)
    assert stream is not None
    old = TokenStream([store], [1.0], "validation", SEQ, 0, True, repeat=False)
    assert [stream.locate(i) for i in range(len(old))] == [old.locate(i) for i in range(len(old))]


def test_a_source_without_a_sequence_to_train_on_is_named_before_the_start(make_store: MakeStore) -> None:
    data = of(make_store(numbered_texts(50)), make_store(["ab"], "short"), weights=(0.5, 0.5))
    with pytest.raises(DataError, match=r"train split is shorter than one sequence: .*short"):
        check_data(run_config(eval_every=None), data)


def test_a_split_that_is_hardly_enough_is_warned_of(make_store: MakeStore) -> None:
    data = of(make_store(numbered_texts(40), fraction=0.02))
    (warning,) = check_data(run_config(), data)
    assert "too few for more than a rough figure" in warning
    assert check_data(run_config(eval_tokens=SEQ), data) == [], "no more was asked for"


@pytest.fixture
def docs(tmp_path: Path) -> dict[str, str]:
    places = {}
    for name, count in (("train", 60), ("held", 20)):
        places[name] = str(tmp_path / f"{name}.jsonl")
        rows = [json.dumps({"text": f"{name} {text}"}) for text in numbered_texts(count)]
        Path(places[name]).write_text("\n".join(rows))
    return places


def text_of(stream: TokenStream, data: PreparedData) -> str:
    return "".join(data.tokenizer.decode(stream.sequence(index)["tokens"]) for index in range(len(stream)))


@pytest.mark.parametrize("prepared", [False, True])
def test_validation_data_of_its_own(docs: dict[str, str], tmp_path: Path, prepared: bool) -> None:
    place = docs["held"]
    if prepared:
        place = str(build_store([place], tmp_path / "held", BYTES, validation_fraction=0.0, progress=False).path)
    settings = DataConfig(sources=(SourceConfig(docs["train"]),), tokenizer=BYTES, validation=place)
    data = prepare(settings, progress=False)
    assert data.stores[0].index.splits["validation"].tokens == 0, "nothing is held out of the sources"
    config = run_config(validation=place, eval_tokens=1024)
    assert check_data(config, data) == []
    validation = validation_data(config, data)
    assert place in validation.lines()[0]
    stream = validation.stream(True)
    assert stream is not None
    text = text_of(stream, data)
    assert "held 3" in text
    assert "train 3" not in text
    assert data.describe()["validation"]["splits"]["train"]["documents"] == 20


def test_a_store_with_a_held_out_part_is_evaluated_on_that(docs: dict[str, str], tmp_path: Path) -> None:
    store = build_store([docs["held"]], tmp_path / "held", BYTES, validation_fraction=0.3, progress=False)
    settings = DataConfig(sources=(SourceConfig(docs["train"]),), tokenizer=BYTES, validation=str(store.path))
    (part,) = validation_data(run_config(validation=str(store.path)), prepare(settings, progress=False)).used
    assert part.split == "validation"


def test_validation_data_of_another_tokenizer_is_refused(docs: dict[str, str], tmp_path: Path) -> None:
    store = build_store([docs["held"]], tmp_path / "held", TokenizerConfig(vocab_size=300), progress=False)
    settings = DataConfig(sources=(SourceConfig(docs["train"]),), tokenizer=BYTES, validation=str(store.path))
    with pytest.raises(DataError, match=r"different tokenizers[\s\S]*data\.validation="):
        prepare(settings, progress=False)


@pytest.mark.parametrize("weights", [(0.665, 0.335), (0.5, 0.3, 0.2), (0.7, 0.3), (1.0, 0.1)])
def test_the_shares_that_are_said_are_those_of_the_stream(make_store: MakeStore, weights: tuple[float, ...]) -> None:
    stores = [make_store(numbered_texts(20), f"s{number}") for number in range(len(weights))]
    stream = TokenStream(stores, weights, "train", SEQ, 0)
    shares = mixture_shares(weights)
    period = 100 * round(1 / min(shares))
    counts = Counter(stream.locate(index)[0] for index in range(period))
    assert [counts[number] / period for number in range(len(weights))] == pytest.approx(shares, abs=2 / period)
    if weights[0] == 0.665:
        lines = mixture_lines(of(*stores, weights=weights))
        assert lines[0] == "66.67% of the sequences from s0 (asked for 66.50%: shares are ratios of whole numbers)"


def test_sets_by_name(docs: dict[str, str], tmp_path: Path) -> None:
    named = {"held": docs["held"], "seen": docs["train"]}
    settings = DataConfig(sources=(SourceConfig(docs["train"]),), tokenizer=BYTES, validation=named)
    data = prepare(settings, progress=False)
    validation = validation_data(run_config(validation=named, eval_tokens=160), data)
    assert validation.sequences == 20, "of each as many as an evaluation takes"
    assert "20 sequences of 16 tokens, of held (" in validation.lines()[0]
    held, seen = validation.sets(True)
    assert (held.label, seen.label, len(held.indices), len(seen.indices)) == ("held", "seen", 10, 10)
    batches = ValidationBatches((held, seen), 3)
    assert batches.numbers == [0] * 4 + [1] * 4
    assert len(list(batches)) == 8
    texts = [text_of(one.stream, data) for one in (held, seen)]
    assert [("held 3" in text, "train 3" in text) for text in texts] == [(True, False), (False, True)]
    assert set(data.describe()["validation"]) == {"held", "seen"}


def test_what_the_sources_hold_out_is_evaluated_by_source(make_store: MakeStore) -> None:
    stores = [make_store(numbered_texts(150 + number), f"s{number}", 0.2) for number in range(3)]
    validation = validation_data(run_config(eval_tokens=64 * SEQ), of(*stores, weights=(0.5, 0.25, 0.25)))
    sets = validation.sets(True)
    assert [one.label for one in sets] == ["s0", "s1", "s2"]
    assert sorted(index for one in sets for index in one.indices) == list(range(64)), "the same sequences as ever"
    assert [len(one.indices) for one in sets] == [32, 16, 16]
    for number, one in enumerate(sets):
        assert {one.stream.locate(index)[0] for index in one.indices} == {number}
    for world in (1, 2, 4):
        ranks = [list(ValidationBatches(sets, 3, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        real = sum(int((batch["targets"] != IGNORE_INDEX).any(1).sum()) for batches in ranks for batch in batches)
        assert real == 64


def test_no_evaluation_is_made_where_there_is_nothing_for_it(make_store: MakeStore) -> None:
    from orchestrator.training.data_module import TokenDataModule

    class OneProcess:
        data_share = (0, 1)

    tokens = TokenDataModule(run_config(eval_every=None), of(make_store(numbered_texts(30))))
    one: Any = OneProcess()
    assert tokens.held_out is None
    assert tokens.evaluation(one) is None
