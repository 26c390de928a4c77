from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import DataConfig, SourceConfig, TokenizerConfig
from orchestrator.data import make_tokenizer
from orchestrator.data import prepare as prepare_module
from orchestrator.data import store_cache as cache_module
from orchestrator.data.documents import find_corpus
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.prepare import build_store, prepare
from orchestrator.data.store import TokenStore
from orchestrator.errors import ConfigError, DataError

from .conftest import numbered_texts

BYTES = TokenizerConfig(kind="bytes")
BPE = TokenizerConfig(kind="bpe", vocab_size=300)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_docs(tmp_path / "docs")


def write_docs(folder: Path, count: int = 60) -> Path:
    folder.mkdir()
    rows = [json.dumps({"text": f"{folder.name} {text}"}) for text in numbered_texts(count)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    return folder


def config(*paths: object, tokenizer: TokenizerConfig = BYTES, **rest: Any) -> DataConfig:
    sources = tuple(path if isinstance(path, SourceConfig) else SourceConfig(str(path)) for path in paths)
    return DataConfig(sources=sources, tokenizer=tokenizer, **rest)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The stores that are built from now on."""
    built: list[Path] = []
    real = prepare_module.write_store

    def counted(folder: Path, *args: Any, **kwargs: Any) -> TokenStore:
        built.append(folder)
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(prepare_module, "write_store", counted)
    return built


def test_the_second_call_builds_nothing(docs: Path, builds: list[Path]) -> None:
    first = prepare(config(docs, tokenizer=BPE), progress=False)
    second = prepare(config(docs, tokenizer=BPE), progress=False)
    assert len(builds) == 1
    assert second.fingerprint == first.fingerprint
    assert second.vocab_size == first.vocab_size == first.stores[0].vocab_size == 300
    assert second.stores[0].tokenizer.fingerprint == second.tokenizer.fingerprint
    assert json.loads(json.dumps(first.describe()))["stores"][0]["weight"] == 1.0


def test_a_changed_file_is_prepared_again(docs: Path, builds: list[Path]) -> None:
    first = prepare(config(docs), progress=False)
    file = docs / "a.jsonl"
    stat = file.stat()
    file.write_text(file.read_text().replace("docs 1 ", "docs X "))  # as long as before
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = prepare(config(docs), progress=False)
    assert len(builds) == 2
    assert second.fingerprint != first.fingerprint
    (docs / "b.txt").write_text("more")
    assert prepare(config(docs), progress=False).fingerprint != second.fingerprint


def test_large_inputs_are_not_read_again(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    real = cache_module.hash_file

    def counted(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(cache_module, "hash_file", counted)
    monkeypatch.setattr(cache_module, "_MEMO_FROM_BYTES", 1)
    prepare(config(docs), progress=False)
    prepare(config(docs), progress=False)
    assert len(hashed) == 2, "a file that has just been written may be written again at the same time stamp"
    old = time.time() - 60
    os.utime(docs / "a.jsonl", (old, old))
    prepare(config(docs), progress=False)
    prepare(config(docs), progress=False)
    assert len(hashed) == 3
    (docs / "a.jsonl").write_text('{"text": "new"}')
    prepare(config(docs), progress=False)
    assert len(hashed) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": BPE},
        {"validation_fraction": 0.3},
        {"text_field": "body"},
        {"text_template": "{body} {text}"},
        {"on_null": "skip"},
        {"messages": "plain"},
    ],
    ids=lambda change: str(*change),
)
def test_settings_are_part_of_the_key(docs: Path, builds: list[Path], change: dict[str, Any]) -> None:
    (docs / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "body": t[::-1]}) for t in numbered_texts(60)))
    prepare(config(docs), progress=False)
    prepare(config(docs, **change), progress=False)
    assert len(builds) == 2


def test_workers_and_weights_are_not_part_of_the_key(docs: Path, builds: list[Path]) -> None:
    stores = [prepare(config(docs, workers=workers), progress=False).stores[0] for workers in (1, 3)]
    prepare(config(SourceConfig(str(docs), 5.0)), progress=False)
    assert len(builds) == 1
    assert stores[0].path == stores[1].path


def test_damage_in_the_cache_is_repaired(docs: Path, builds: list[Path]) -> None:
    first = prepare(config(docs), progress=False)
    (first.stores[0].path / "tokens-00000.bin").write_bytes(b"")
    assert prepare(config(docs), progress=False).fingerprint == first.fingerprint
    assert len(builds) == 2
    TokenStore.open(first.stores[0].path, verify=True)


def _interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_crash_leaves_nothing_that_looks_complete(
    docs: Path, cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.data.write.write_atomically", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(docs), progress=False)
    assert not [path for path in (cache / "stores").iterdir() if path.is_dir()]
    key = next((cache / "stores").glob("*.lock")).stem
    (cache / "stores" / f"{key}.building-1").mkdir()  # of a process that was killed
    store = prepare(config(docs), progress=False).stores[0]
    assert [path for path in (cache / "stores").iterdir() if path.is_dir()] == [store.path]


def _prepare_in_process(data: DataConfig, log: str, barrier: Any, results: Any) -> None:
    real = prepare_module.write_store

    def slow(folder: Path, *args: Any, **kwargs: Any) -> TokenStore:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.5)  # the other process meets the lock
        return real(folder, *args, **kwargs)

    prepare_module.write_store = slow
    barrier.wait()
    results.put(prepare(data, progress=False).fingerprint)


def test_processes_that_start_together_build_once(docs: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (config(docs), str(tmp_path / "log"), barrier, results)
    processes = [context.Process(target=_prepare_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    fingerprints = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(fingerprints) == 1
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_mixture_shares_a_vocabulary_and_normalises_weights(docs: Path, tmp_path: Path) -> None:
    other = write_docs(tmp_path / "other")
    unused = SourceConfig(str(tmp_path / "absent"), 0.0)
    data = prepare(
        config(SourceConfig(str(docs), 3.0), SourceConfig(str(other), 1.0), unused, tokenizer=BPE), progress=False
    )
    assert data.weights == (0.75, 0.25)
    assert {store.tokenizer.fingerprint for store in data.stores} == {data.tokenizer.fingerprint}
    entropies = [store.unigram_entropy_nats for store in data.stores]
    assert data.unigram_entropy_nats == pytest.approx(0.75 * entropies[0] + 0.25 * entropies[1])
    swapped = prepare(
        config(SourceConfig(str(docs), 1.0), SourceConfig(str(other), 1.0), tokenizer=BPE), progress=False
    )
    assert swapped.fingerprint != data.fingerprint


def test_a_store_brings_its_tokenizer_into_the_mixture(docs: Path, tmp_path: Path) -> None:
    store = build_store([str(docs)], tmp_path / "store", BPE, progress=False)
    other = write_docs(tmp_path / "other")
    data = prepare(config(store.path, other, tokenizer=TokenizerConfig()), progress=False)
    assert data.tokenizer.fingerprint == store.tokenizer.fingerprint
    assert data.stores[0].path == store.path
    alone = prepare(config(store.path), progress=False)
    assert alone.stores[0].fingerprint == store.fingerprint


def test_different_tokenizers_do_not_mix(docs: Path, tmp_path: Path) -> None:
    one = build_store([str(docs)], tmp_path / "one", BPE, progress=False)
    two = build_store([str(docs)], tmp_path / "two", BYTES, progress=False)
    with pytest.raises(DataError, match=r"different tokenizers[\s\S]*one and .*two"):
        prepare(config(one.path, two.path), progress=False)
    with pytest.raises(DataError, match=r"different tokenizers[\s\S]*data.tokenizer.path=.*one"):
        prepare(config(one.path, docs, tokenizer=BYTES), progress=False)
    file = TokenizerConfig(kind="file", path=str(one.path))
    assert prepare(config(one.path, docs, tokenizer=file), progress=False).vocab_size == one.vocab_size


def test_a_tokenizer_file_is_used_as_it_is(docs: Path, tmp_path: Path) -> None:
    store = build_store([str(docs)], tmp_path / "store", BPE, progress=False)
    file = TokenizerConfig(kind="file", path=str(store.path / "tokenizer.json"))
    other = build_store([str(docs)], tmp_path / "other", file, workers=1, progress=False)
    assert other.fingerprint == store.fingerprint


def test_large_inputs_give_a_bounded_sample(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (docs / f"{number}.txt").write_text(f"{number} " * 5000)
    monkeypatch.setattr(make_tokenizer, "BPE_SAMPLE_CHARACTERS", 9000)
    monkeypatch.setattr(make_tokenizer, "_MIN_FILE_SAMPLE", 1000)
    corpora = [find_corpus([str(docs / name)], TextSpec()) for name in ("*.txt", "a.jsonl")]
    sample = list(make_tokenizer._sample(corpora))
    assert 4500 < sum(map(len, sample)) <= 9000
    assert len({text.split()[0] for text in sample if not text.startswith("docs")}) >= 4
    assert sample == list(make_tokenizer._sample(corpora))


def test_nothing_is_overwritten(docs: Path, tmp_path: Path) -> None:
    store = build_store([str(docs)], tmp_path / "deep" / "store", BYTES, progress=False)
    with pytest.raises(DataError, match="token store already; nothing is overwritten"):
        build_store([str(docs)], store.path, BYTES, progress=False)
    with pytest.raises(DataError, match="not an empty directory; nothing is overwritten"):
        build_store([str(docs)], docs, BYTES, progress=False)
    assert [path.name for path in store.path.parent.iterdir()] == ["store"]
    (tmp_path / "empty").mkdir()
    build_store([str(docs)], tmp_path / "empty", BYTES, progress=False)


def test_text_that_is_left_out_is_counted(docs: Path, tmp_path: Path) -> None:
    (docs / "image.png").write_bytes(b"\x89PNG\0")
    assert build_store([str(docs)], tmp_path / "store", BYTES, progress=False).index.skipped_files == 1


def test_inputs_without_text_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text"):
        build_store([str(tmp_path / "in")], tmp_path / "store", BYTES, progress=False)
    assert not list(tmp_path.glob("store*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction=-0.1"),
        ({"workers": 0}, "workers=0"),
        ({"sources": ()}, "no source has a weight"),
        ({"sources": (SourceConfig(weight=0.0),)}, "no source has a weight"),
        ({"sources": (SourceConfig(), SourceConfig("x", -1.0))}, "weight of 'x'"),
        ({"sources": (SourceConfig(), SourceConfig("x", float("nan")))}, "weight of 'x'"),
        ({"tokenizer": TokenizerConfig(kind="file")}, r"tokenizer\.path"),
        ({"tokenizer": TokenizerConfig(kind="bpe", vocab_size=100)}, "vocab_size=100"),
    ],
)
def test_settings_out_of_range(docs: Path, change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"sources": (SourceConfig(str(docs)),), "tokenizer": BYTES, **change}
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig(**settings), progress=False)


def test_the_cache_can_be_elsewhere_and_says_when_it_cannot_be_written(docs: Path, tmp_path: Path) -> None:
    store = prepare(config(docs, cache_dir=str(tmp_path / "elsewhere")), progress=False).stores[0]
    assert store.path.is_relative_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache of prepared data cannot be written[\s\S]*data\.cache_dir"):
        prepare(config(docs, cache_dir=str(tmp_path / "file")), progress=False)


def test_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(cache_module.cache_root("auto")) == "/a"
    monkeypatch.delenv("ORCHESTRATOR_CACHE")
    assert str(cache_module.cache_root("auto")) == "/b/orchestrator"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_module.cache_root("auto") == Path.home() / ".cache" / "orchestrator"
    assert str(cache_module.cache_root("/c")) == "/c"


def test_a_file_that_changes_meanwhile_is_noticed(
    docs: Path, monkeypatch: pytest.MonkeyPatch, builds: list[Path]
) -> None:
    real = prepare_module.write_store

    def growing(folder: Path, *args: Any, **kwargs: Any) -> TokenStore:
        with open(docs / "a.jsonl", "a") as file:
            file.write('\n{"text": "late"}')
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(prepare_module, "write_store", growing)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(config(docs), progress=False)


def test_progress_in_a_log_has_no_carriage_returns(docs: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    build_store([str(docs)], tmp_path / "store", BYTES, progress=True)
    assert "\r" not in capfd.readouterr().err
