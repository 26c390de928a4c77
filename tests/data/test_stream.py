from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.constants import IGNORE_INDEX
from orchestrator.data import stream as stream_module
from orchestrator.data.sequences import _fields, blank_batch
from orchestrator.data.store import TokenStore
from orchestrator.data.stream import (
    Batch,
    Position,
    StepLoader,
    TokenStream,
)
from orchestrator.data.validation_sets import validation_batches
from orchestrator.errors import DataError

from .conftest import MakeStore, numbered_texts

SEQ = 32
EOS = 256


@pytest.fixture
def store(make_store: MakeStore) -> TokenStore:
    return make_store(numbered_texts(60), fraction=0.2, shard_tokens=500)


def make_stream(*stores: TokenStore, seed: int = 7, **rest: object) -> TokenStream:
    options: dict[str, object] = {"weights": [1.0] * len(stores), "split": "train", "seq_len": SEQ, **rest}
    return TokenStream(stores, seed=seed, **options)  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def slow_fields(window: list[int], document_mask: bool) -> dict[str, list[int]]:
    """What the vectorised version computes, a position at a time."""
    result: dict[str, list[int]] = {"tokens": [], "targets": [], "documents": [], "positions": []}
    document = position = 0
    for token, following in itertools.pairwise(window):
        result["tokens"].append(token)
        result["targets"].append(IGNORE_INDEX if token == EOS else following)
        result["documents"].append(document)
        result["positions"].append(position)
        position += 1
        if token == EOS and document_mask:
            document, position = document + 1, 0
    if not document_mask:
        del result["documents"]
    return result


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(2, 20).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from([1, 2, EOS]), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    document_mask=st.booleans(),
)
def test_fields_against_a_slow_reference(rows: list[list[int]], document_mask: bool) -> None:
    batch = _fields(np.array(rows), np.array([[EOS, -1]] * len(rows)), document_mask)
    for number, row in enumerate(rows):
        assert {name: array[number].tolist() for name, array in batch.items()} == slow_fields(row, document_mask)
    assert all(array.dtype == np.int64 and array.flags.c_contiguous for array in batch.values())


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=4), min_size=2, max_size=6),
    form=st.sampled_from(["eos", "bos and eos", "one token for both", "bos"]),
    cut=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_documents_are_told_apart_in_every_form(texts: list[list[int]], form: str, cut: tuple[int, int]) -> None:
    bos, eos = {"eos": ([], [9]), "bos and eos": ([8], [9]), "one token for both": ([9], [9]), "bos": ([8], [])}[form]
    pairs = [(token, number) for number, text in enumerate(texts) for token in bos + text + eos]
    window = pairs[cut[0] : len(pairs) - cut[1]]
    if len(window) < 2:
        return
    boundary = (9 if eos else -1, -1 if form in ("eos", "bos and eos") else bos[0])
    batch = _fields(np.array([[token for token, _ in window]]), np.array([boundary]), True)
    numbers = [number for _, number in window]
    assert batch["documents"][0].tolist() == [number - numbers[0] for number in numbers[:-1]]
    assert batch["positions"][0].tolist() == [i - numbers.index(numbers[i]) for i in range(len(numbers) - 1)]
    crosses = [a != b and bool(eos) for a, b in itertools.pairwise(numbers)]
    wanted = [IGNORE_INDEX if crossed else token for crossed, (token, _) in zip(crosses, window[1:], strict=True)]
    assert batch["targets"][0].tolist() == wanted


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_blank_batch_looks_like_a_real_one(store: TokenStore, document_mask: bool) -> None:
    real = make_stream(store, document_mask=document_mask).batch(range(3))
    blank = blank_batch(3, SEQ, document_mask)
    assert ("documents" in real) == document_mask
    described = [{name: (array.shape, array.dtype) for name, array in one.items()} for one in (real, blank)]
    assert described[0] == described[1]
    assert not any(array.any() for array in blank.values())


def test_an_epoch_covers_every_window_once_and_the_next_is_another_order(store: TokenStore) -> None:
    stream = make_stream(store)
    (windows,) = stream.windows
    assert windows == (store.split("train").tokens - 1) // SEQ
    epochs = [[stream.locate(epoch * windows + i) for i in range(windows)] for epoch in range(3)]
    orders = [[window for _, window in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(windows)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(windows))


def test_a_sequence_is_its_window(store: TokenStore) -> None:
    stream, split = make_stream(store), store.split("train")
    for index in (0, 3, 1000):
        start = stream.locate(index)[1] * SEQ
        window = split.read(start, start + SEQ + 1).tolist()
        sequence = stream.sequence(index)
        assert {name: array.tolist() for name, array in sequence.items()} == slow_fields(window, True)


def test_the_order_is_a_function_of_the_seed_alone(store: TokenStore) -> None:
    stream, again, other = make_stream(store), make_stream(store), make_stream(store, seed=8)
    indices = [10_000_000, 0, 5, 77, 5]
    forward = {index: stream.sequence(index) for index in indices}
    assert all(same(again.sequence(index), forward[index]) for index in reversed(indices))
    assert stream.fingerprint == again.fingerprint != other.fingerprint
    assert [stream.locate(i) for i in range(20)] != [other.locate(i) for i in range(20)]
    # Run seeds that follow each other are not epochs of each other.
    (windows,) = stream.windows
    assert [stream.locate(windows + i)[1] for i in range(20)] != [other.locate(i)[1] for i in range(20)]


def test_the_order_stays_what_it_was(make_store: MakeStore) -> None:
    """Positions in checkpoints rely on it: a change of this order needs a new STREAM_VERSION."""
    store = make_store(numbered_texts(60))
    stream = make_stream(store, store, weights=[2.0, 1.0], seed=0)
    assert [stream.locate(i) for i in [0, 1, 2, 3, 4, 5, 1_000_000]] == GOLDEN


GOLDEN = [(0, 100), (0, 54), (1, 90), (0, 25), (0, 38), (1, 2), (0, 66)]


def test_any_seed_is_accepted(store: TokenStore) -> None:
    for seed in (-1, 2**63, 0):
        make_stream(store, seed=seed).sequence(0)


def test_everything_that_matters_is_in_the_fingerprint(store: TokenStore, make_store: MakeStore) -> None:
    other = make_store(numbered_texts(50), "other")
    streams = [
        make_stream(store),
        make_stream(other),
        make_stream(store, seed=1),
        make_stream(store, split="validation"),
        make_stream(store, seq_len=16),
        make_stream(store, document_mask=False),
        make_stream(store, repeat=False),
        make_stream(store, other),
        make_stream(store, other, weights=[1.0, 2.0]),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)


def test_a_mixture_keeps_its_proportions(make_store: MakeStore) -> None:
    stores = [make_store(numbered_texts(count), f"s{count}") for count in (20, 40, 30)]
    stream = make_stream(*stores, weights=[0.5, 0.3, 0.2])
    located = [stream.locate(index) for index in range(2000)]
    counts = Counter(number for number, _ in located)
    assert [counts[number] / 2000 for number in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.005)
    for number, windows in enumerate(stream.windows):
        own = [window for store, window in located if store == number]
        for epoch in range(len(own) // windows):
            assert sorted(own[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_without_repeat_the_stream_ends(store: TokenStore) -> None:
    stream = make_stream(store, repeat=False)
    assert len(stream) == stream.windows[0]
    stream.sequence(len(stream) - 1)
    with pytest.raises(IndexError):
        stream.sequence(len(stream))
    with pytest.raises(IndexError):
        stream.sequence(-1)


def test_too_little_data_is_explained_by_numbers(make_store: MakeStore) -> None:
    store = make_store(["x" * 31])
    with pytest.raises(DataError, match=r"train split is shorter[\s\S]*32 tokens[\s\S]*at least 33"):
        make_stream(store)
    with pytest.raises(DataError, match=r"validation split[\s\S]*0 tokens"):
        make_stream(store, split="validation")
    assert make_stream(make_store(["x" * 32], "enough")).windows == (1,)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_ranks_together_see_the_global_batch(store: TokenStore, world: int, prefetch: int) -> None:
    stream = make_stream(store)
    ranks = [list(StepLoader(stream, 8, rank, world, Position(3, 24), 5, prefetch)) for rank in range(world)]
    for number in range(5):
        whole = stream.batch(range((3 + number) * 8, (4 + number) * 8))
        for name, array in whole.items():
            interleaved = np.empty_like(array)
            for rank in range(world):
                assert ranks[rank][number][name].shape == (8 // world, SEQ)
                interleaved[rank::world] = ranks[rank][number][name]
            assert np.array_equal(interleaved, array)


def test_starting_later_is_skipping(store: TokenStore) -> None:
    stream = make_stream(store)
    loader = StepLoader(stream, 4, 1, 2, Position(), 10)
    later = StepLoader(stream, 4, 1, 2, Position(6, 24), 4)
    assert (len(loader), len(later)) == (10, 4)
    batches = list(loader)
    assert all(same(one, other) for one, other in zip(batches[6:], later, strict=True))
    assert all(same(one, other) for one, other in zip(batches, loader, strict=True)), "again from its start"
    state = json.loads(json.dumps(loader.state(6)))
    facts = {"fingerprint": stream.fingerprint, "facts": stream.facts}
    assert state == {"next_sequence": 24, "tokens": 24 * stream.seq_len, **facts}


def test_another_batch_goes_on_behind_the_last_sequence_that_was_read(store: TokenStore) -> None:
    """Ten steps of 4 sequences, then 2 of 6: every sequence once, in the order of the stream."""
    stream = make_stream(store)
    before = StepLoader(stream, 4, 0, 1, Position(), 10)
    state = before.state(10)
    after = StepLoader(stream, 6, 0, 1, Position(10, state["next_sequence"], state["tokens"]), 2)
    read = np.concatenate([batch["tokens"] for batch in (*before, *after)])
    assert np.array_equal(read, stream.batch(range(52))["tokens"])
    assert after.tokens_after(12) == 52 * stream.seq_len
    assert after.state(12)["next_sequence"] == 52


def test_an_indivisible_batch_is_explained_by_numbers(store: TokenStore) -> None:
    with pytest.raises(DataError, match=r"6 sequences[\s\S]*4 data ranks[\s\S]*train.global_batch_tokens=256"):
        StepLoader(make_stream(store), 6, 0, 4, Position(), 1)
    with pytest.raises(DataError, match="global_batch_tokens=64"):
        StepLoader(make_stream(store), 0, 0, 2, Position(), 1)


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_errors_in_the_reading_thread_arrive(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(store)
    loader = StepLoader(stream, 2, 0, 1, Position(), 5)
    real = stream.batch

    def failing(indices: range) -> Batch:
        if indices[0] >= 4:
            raise OSError("the disk is gone")
        return real(indices)

    monkeypatch.setattr(stream, "batch", failing)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    assert not read_ahead_threads()


def test_leaving_early_ends_the_thread(store: TokenStore) -> None:
    iterator = iter(StepLoader(make_stream(store), 2, 0, 1, Position(), 1_000_000))
    next(iterator)
    assert read_ahead_threads()
    iterator.close()  # type: ignore[attr-defined]
    assert not read_ahead_threads()


def test_reading_ahead_is_bounded() -> None:
    produced = []

    def source() -> Iterator[Batch]:
        for number in range(100):
            produced.append(number)
            yield {"number": np.array(number)}

    iterator = stream_module.read_ahead(source(), 2)
    next(iterator)
    time.sleep(0.3)
    assert len(produced) <= 5
    assert [int(batch["number"]) for batch in iterator] == list(range(1, 100))


def test_an_unfinished_iterator_does_not_hold_up_the_interpreter(store: TokenStore) -> None:
    code = (
        "import sys; from orchestrator.data.store import TokenStore; from orchestrator.data.stream import *\n"
        "s = TokenStream([TokenStore.open(sys.argv[1])], [1.0], 'train', 32, 0)\n"
        "kept = iter(StepLoader(s, 2, 0, 1, Position(), 10**6)); next(kept); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(store.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.mark.parametrize("sequences", [1, 7, 8, 9])
def test_validation_is_one_set_for_every_world(store: TokenStore, sequences: int) -> None:
    stream = make_stream(store, split="validation", repeat=False)
    assert len(stream) >= 9
    wanted = stream.batch(range(sequences))
    for world in (1, 2, 4):
        ranks = [validation_batches(stream, sequences, 2, rank, world) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        rows = []
        for batches in zip(*ranks, strict=True):
            assert all(batch["tokens"].shape == (2, SEQ) for batch in batches)
            rows += [batch["targets"][row] for row in range(2) for batch in batches]
        real = [row for row in rows if (row != IGNORE_INDEX).any()]
        assert len(rows) == len(ranks[0]) * 2 * world
        assert np.array_equal(np.stack(real), wanted["targets"])


def test_validation_is_no_longer_than_its_split(store: TokenStore) -> None:
    stream = make_stream(store, split="validation", repeat=False)
    batches = validation_batches(stream, 10_000, 4)
    assert batches.sequences == len(stream)
    assert len(list(batches)) == len(batches) == -(-len(stream) // 4)


def test_a_sequence_costs_little(make_store: MakeStore) -> None:
    stream = make_stream(make_store(["word " * 40] * 1000), seq_len=1024)
    stream.sequence(0)
    best = min(_seconds(stream, first) for first in range(0, 160, 16))
    assert best < 1e-3, f"{best * 1e3:.3f} ms; about 0.05 on an idle core"


def _seconds(stream: TokenStream, first: int) -> float:
    # Of this thread alone: what else the machine does is not the stream's cost.
    start = time.thread_time()
    stream.batch(range(first, first + 16))
    return (time.thread_time() - start) / 16
