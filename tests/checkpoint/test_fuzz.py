"""Checkpoints of ill will: whatever was changed, a clean error or the same as before, in little memory and time."""

from __future__ import annotations

import copy
import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import CONFIG, ITEM_BYTES, MANIFEST, STATE, _digest
from orchestrator.checkpoint.hashing import Piece, StoredFile
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.storage import PIECE_BYTES
from orchestrator.checkpoint.tensorfile import TensorFile
from orchestrator.distributed.exchange import SingleProcess
from orchestrator.errors import CheckpointError
from orchestrator.sharding.layout import Layout
from tests.lab.checkpoints import shards_of, write

TENSORS = {
    "model.a": torch.arange(30.0).reshape(6, 5),
    "model.b": torch.arange(7, dtype=torch.bfloat16),
    "model.step": torch.tensor(3),
}
FILE = "rank-00000.safetensors"
# Of a checkpoint of a few kilobytes: what looking at it may take.
MAX_BYTES, MAX_SECONDS = 64 << 20, 20.0  # tracing the memory takes most of the time
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

JUNK = [
    *(None, True, -1, 0, 1, 2, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 70, 1.5, float("inf"), "", "x", "../x"),
    *("/etc/passwd", "model.a", "F32", "F8", "0" * 64, "\x1b[2J", "a" * 600, [], {}, [[]], [0], [1 << 62] * 16),
    *(
        [1] * 17,
        {"a": {}},
        MANIFEST,
        STATE,
        CONFIG,
        FILE,
        "rank-00001.safetensors",
        "manifest.sig",
        ".",
        "..",
        "\ud800",
    ),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    layout = Layout(fsdp=2)
    config = {"name": "test", "optim": {"lr": 1e-3, "betas": [0.9, 0.95]}}
    results = write(folder, lambda rank: shards_of(TENSORS, layout, rank), 2, config=config)
    assert isinstance(results[0], Path)
    return {path.name: path.read_bytes() for path in results[0].iterdir()}


@pytest.fixture
def place(tmp_path, good):
    _restore(tmp_path, good)
    return tmp_path


def _restore(place: Path, good: dict[str, bytes]) -> None:
    for path in place.iterdir():
        if path.name not in good or path.is_symlink() or path.is_dir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in good.items():
        (place / name).write_bytes(content)


def _sign(data: dict) -> bytes:
    """A manifest with a digest that fits: what an attacker writes."""
    body = {key: value for key, value in data.items() if key != "digest"}
    return json.dumps({**body, "digest": _digest(body)}, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _resign(place: Path, names: list[str]) -> None:
    """Put the hashes of changed files into the manifest."""
    import hashlib

    data = json.loads((place / MANIFEST).read_text())
    for name in names:
        content = (place / name).read_bytes()
        pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
        hashed = [[len(piece), hashlib.sha256(piece).hexdigest()] for piece in pieces]
        data["files"][name] = {"bytes": len(content), "pieces": hashed}
    (place / MANIFEST).write_bytes(_sign(data))


def _refusal(action: Callable[[], object]) -> CheckpointError | None:
    try:
        action()
    except CheckpointError as error:
        return error
    return None


def _look(place: Path) -> bool:
    """All that is ever done with a checkpoint. Whether it was taken; any error but the clean one escapes."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        checkpoint = Checkpoint(place)
        shards = shards_of({name: torch.zeros_like(t) for name, t in TENSORS.items()}, Layout(), 0)
        wrong, damage = (
            _refusal(lambda: read_into(checkpoint, shards, check=SingleProcess())),
            _refusal(checkpoint.verify),
        )
        assert damage is None or wrong is not None, "reading finds what verifying does"
        if damage:
            raise damage
        checkpoint.state()
        checkpoint.config()
        read_into(checkpoint, shards)
        for shard in shards:
            assert shard.data.isfinite().all() or shard.data.dtype != torch.int64
        return True
    except CheckpointError as error:
        text = str(error)
        assert len(text) < 4000
        assert text.isprintable() or set(text) - set("\n") == {c for c in text if c.isprintable()}, repr(text)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MAX_BYTES, f"{peak:,} bytes"
        assert time.process_time() - begin < MAX_SECONDS


def _mutate(data: object, chance: random.Random, times: int) -> object:
    """Change places of a tree of JSON: replace, remove, double, swap, rename, nest."""
    root = [copy.deepcopy(data)]
    for _ in range(times):
        spots: list[tuple[object, object]] = []
        stack: list[object] = [root]
        while stack and len(spots) < 5000:
            value = stack.pop()
            for key in list(value) if isinstance(value, dict) else range(len(value)):  # type: ignore[arg-type]
                spots.append((value, key))
                if isinstance(value[key], (dict, list)):  # type: ignore[index]
                    stack.append(value[key])  # type: ignore[index]
        where, key = chance.choice(spots)
        kind = chance.randrange(6)
        if kind == 1 and where is not root:
            del where[key]  # type: ignore[attr-defined]
        elif kind == 2 and isinstance(where, list) and where is not root:
            where.insert(chance.randrange(len(where) + 1), copy.deepcopy(where[key]))  # type: ignore[index]
        elif kind == 3:
            other, name = chance.choice(spots)
            if name in (other if isinstance(other, dict) else range(len(other))):  # type: ignore[arg-type]
                where[key] = copy.deepcopy(other[name])  # type: ignore[index]
        elif kind == 4 and isinstance(where, dict):
            where[str(chance.choice(JUNK))[:700]] = where.pop(key)
        elif kind == 5 and isinstance(where[key], int):  # type: ignore[index]
            where[key] += chance.choice([-1, 1, 4, 1 << 40])  # type: ignore[index]
        else:
            where[key] = copy.deepcopy(chance.choice(JUNK))  # type: ignore[index]
    return root[0]


@FUZZ
@given(seed=st.integers(0, 2**40), times=st.integers(1, 4))
def test_a_mutated_manifest(place, good, seed, times):
    """Signed anew. What is still taken has the tensors that it had: their files are what they were."""
    _restore(place, good)
    data = _mutate(json.loads(good[MANIFEST]), random.Random(seed), times)
    (place / MANIFEST).write_bytes(_sign(data) if isinstance(data, dict) else json.dumps(data).encode())
    _look(place)


def _split(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@FUZZ
@given(seed=st.integers(0, 2**40), times=st.integers(1, 3), keep=st.booleans())
def test_a_mutated_header_with_hashes_that_fit(place, good, seed, times, keep):
    _restore(place, good)
    header, body = _split(good[FILE])
    text = json.dumps(_mutate(header, random.Random(seed), times)).encode("utf-8", "surrogatepass")
    length = len(text) if keep else random.Random(seed).choice([0, 7, len(text) + 1, 1 << 40, (1 << 64) - 1])
    (place / FILE).write_bytes(length.to_bytes(8, "little") + text + body)
    _resign(place, [FILE])
    if _look(place):
        # What is read can only be bytes that lie in the file.
        file = TensorFile(place / FILE)
        assert sum(stop - start for start, stop in file.spans().values()) <= len(body)


@FUZZ
@given(seed=st.integers(0, 2**40), times=st.integers(1, 3))
def test_a_mutated_state(place, good, seed, times):
    _restore(place, good)
    (place / STATE).write_text(json.dumps(_mutate(json.loads(good[STATE]), random.Random(seed), times)))
    _resign(place, [STATE])
    _look(place)


YAML_PARTS = [f"!!{tag} " for tag in ["timestamp", "int", "float", "bool", "binary", "set", "omap", "pairs", "null"]]
YAML_PARTS += [
    *"{}[]x1|>%@'#\t\n",
    "!!python/object/apply:os.system ",
    "&a ",
    "*a ",
    "<<: ",
    "? ",
    "- ",
    ": ",
    '"',
    "  ",
]
YAML_PARTS += ["1:1:1", "0x", ".inf", "2001-99-99", "---\n"]


@FUZZ
@given(
    st.one_of(
        st.binary(max_size=400),
        st.text(max_size=400).map(lambda text: text.encode("utf-8", "replace")),
        st.lists(
            st.sampled_from(YAML_PARTS),
            max_size=30,
        ).map(lambda parts: "".join(parts).encode()),
    )
)
def test_any_bytes_as_state_and_configuration(place, good, content):
    _restore(place, good)
    for name in (STATE, CONFIG):
        (place / name).write_bytes(content)
    _resign(place, [STATE, CONFIG])
    _look(place)


@FUZZ
@given(name=st.sampled_from([MANIFEST, FILE, STATE, CONFIG]), seed=st.integers(0, 2**40), data=st.data())
def test_any_bytes_anywhere(place, good, name, seed, data):
    """Cut, doubled, overwritten and inserted, with hashes that fit where there are any."""
    _restore(place, good)
    content = bytearray(good[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        junk = data.draw(st.binary(max_size=20))
        end = min(len(content), at + data.draw(st.sampled_from([0, 1, len(junk), 64])))
        content[at:end] = junk
    (place / name).write_bytes(content)
    if name != MANIFEST:
        _resign(place, [name])
    _look(place)


BOMBS = {
    "deep lists": b"[" * 200_000,
    "deep mappings": b'{"a":' * 100_000,
    "deep yaml": b"- " * 100_000,
    "flow yaml": b"{a: " * 50_000,
    "many": b"[" + b"0," * 50_000 + b"0]",
    "many lines": b"- 0\n" * 16_000,
    "deep below the limit": b"- " * 29 + b"[" * 300,
    "long number": b"9" * 200_000,
    "sexagesimal": b"a: 1" + b":59" * 60_000,
    "billion laughs": b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    "merge": b"a: {<<: {b: 1}}\n" * 1000,
    "keys": b"? [1,2]\n: 3\n",
    "zeros": b"\0" * 100_000,
    "surrogates": b'{"\\ud800": "\\ud800"}',
    "timestamp": b"a: !!timestamp x",
    "empty int": b"a: !!int ''",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("name", [MANIFEST, STATE, CONFIG, FILE])
def test_bombs(place, bomb, name):
    if name == FILE:
        bomb = len(bomb).to_bytes(8, "little") + bomb
    (place / name).write_bytes(bomb)
    if name != MANIFEST:
        _resign(place, [name])
    _look(place)


@pytest.mark.parametrize("name", [MANIFEST, STATE, CONFIG, FILE, "manifest.sig"])
@pytest.mark.parametrize("kind", ["link", "link to itself", "directory", "pipe", "device", "sparse"])
def test_what_is_no_file_in_place_of_one(place, good, name, kind):
    path, outside = place / name, place.parent / f"{place.name} outside"
    outside.write_bytes(good.get(name, b"{}"))
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    assert not _look(place)


def test_a_sparse_file_as_large_as_the_manifest_says(place, good):
    """A terabyte that no tensor needs is refused before a byte of it is read."""
    for name in (FILE, STATE):
        _restore(place, good)
        with open(place / name, "r+b") as file:
            file.truncate(1 << 40)
        data = json.loads(good[MANIFEST])
        data["files"][name] = {"bytes": 1 << 40, "pieces": [[1 << 40, "0" * 64]]}
        (place / MANIFEST).write_bytes(_sign(data))
        assert not _look(place)


def test_many_shards_that_are_no_grid(place, good):
    """Comparing each with each takes the square of the time."""
    data = json.loads(good[MANIFEST])
    count = 20_000
    rows = [(row, 0, 3) if row % 2 else (row, 0, 2) for row in range(count)]
    rows += [(row, stop, 5) for row, _, stop in rows]
    shards = [{"file": FILE, "key": f"k{n}", "start": [r, a], "stop": [r + 1, b]} for n, (r, a, b) in enumerate(rows)]
    data["tensors"]["model.a"] = {"dtype": "F32", "shape": [count, 5], "shards": shards}
    (place / MANIFEST).write_bytes(_sign(data))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="no grid"):
        Checkpoint(place)
    assert time.process_time() - begin < MAX_SECONDS


def test_two_tensors_in_the_same_bytes(place, good):
    header, body = _split(good[FILE])
    first, second = [key for key in header if key != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second] = header[first]
    text = json.dumps(header).encode()
    (place / FILE).write_bytes(len(text).to_bytes(8, "little") + text + body)
    _resign(place, [FILE])
    with pytest.raises(CheckpointError, match="overlap or leave holes"):
        TensorFile(place / FILE)
    assert not _look(place)


def test_dims_without_end(place, good):
    """Their product is a number of millions of digits."""
    header, body = _split(good[FILE])
    header[next(iter(header))]["shape"] = [(1 << 62)] * 200_000
    text = json.dumps(header).encode()
    (place / FILE).write_bytes(len(text).to_bytes(8, "little") + text + body)
    _resign(place, [FILE])
    assert not _look(place)


def test_pieces_are_looked_at_a_few_at_a_time(place, good):
    data = json.loads(good[MANIFEST])
    data["files"][STATE]["pieces"] = [[1, "0" * 64]] * data["files"][STATE]["bytes"]
    (place / MANIFEST).write_bytes(_sign(data))
    assert not _look(place)
    data["files"][STATE]["pieces"] = [[0, "0" * 64]] * 1000 + data["files"][STATE]["pieces"]
    (place / MANIFEST).write_bytes(_sign(data))
    with pytest.raises(CheckpointError, match="has no bytes or no hash"):
        Checkpoint(place)


def test_the_pieces_of_a_file_tile_it():
    file = StoredFile(9, (Piece(4, "a" * 64), Piece(5, "b" * 64)))
    assert [offset for offset, _ in file.ranges()] == [0, 4]


def test_the_schema_and_the_reader_know_the_same_dtypes():
    from orchestrator.checkpoint import format as format_module

    text = Path(format_module.__file__).with_name("manifest.schema.json").read_text()
    assert json.loads(text)["$defs"]["tensor"]["properties"]["dtype"]["enum"] == list(ITEM_BYTES)


def test_the_good_one_is_good(place, good):
    assert _look(place)
    assert yaml.safe_load(good[CONFIG])["name"] == "test"
