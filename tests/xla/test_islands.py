"""A torch-native island (two gloo ranks, the current torch) and one of torch_xla (four devices) train one model.

Exchanged gradients are those of one process; exchanged weights have the same bits on both and at the hub, and again in
a second run.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.islands.island_messages import Terms
from orchestrator.sharding.shard import Shard
from tests.lab.islands import LabRun
from tests.lab.run_server import RunServer
from tests.lab.runs import losses, read_rows, small_overrides
from tests.xla.test_conformance import NATIVE

QUICK = ("train.sample.tokens=0", "data.document_mask=true")
ISLANDS = {
    "native": ["hardware.devices=2", "layout.fsdp=2"],
    "xla": ["hardware=tpu", "hardware.simulate=4", "layout.fsdp=2", "layout.tensor=2"],
}


@pytest.fixture(scope="module")
def servers():
    made = {"native": RunServer(NATIVE), "xla": RunServer(sys.executable)}
    yield made
    for server in made.values():
        server.end()


def together(servers, folder: Path, terms: Terms, *words: str) -> LabRun:
    """Train both islands to the end."""
    run = LabRun(folder, terms, (*QUICK, *words), expected={"native": 1.0, "xla": 1.0})
    joins = [f"islands.join={run.address}", f"islands.key_file={run.key}"]
    failed: list[BaseException] = []

    def train(name: str) -> None:
        overrides = small_overrides(folder, *QUICK, *words, *joins, f"islands.island={name}", *ISLANDS[name])
        try:
            servers[name].train(overrides, folder / name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train, args=(name,), daemon=True) for name in ISLANDS]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not failed:
        time.sleep(0.1)
    try:
        assert not failed, failed
        run.finish(30)
    finally:
        run.close()
    assert run.ledger()["problems"] == []
    return run


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of an island's last checkpoint."""
    checkpoint, found = Checkpoint(committed(folder / "checkpoints")[0]), {}
    for name, stored in checkpoint.manifest.tensors.items():
        if name.startswith("model."):
            found[name] = torch.empty(stored.shape)
    parts = [
        Shard(name, tuple(data.shape), tuple(slice(0, n) for n in data.shape), data) for name, data in found.items()
    ]
    read_into(checkpoint, parts, ["optimizer."])
    return {name: data.numpy() for name, data in found.items()}


def test_exchanged_gradients_are_those_of_one_process(servers, tmp_path):
    run = together(servers, tmp_path / "both", Terms("synchronous"))
    alone = servers["native"].train(small_overrides(tmp_path / "both", *QUICK), tmp_path / "alone")
    np.testing.assert_allclose(list(run.losses().values()), losses(read_rows(alone)), rtol=1e-5)
    last = [row["val_loss"] for row in read_rows(alone) if "val_loss" in row][-1]
    assert run.validation() == pytest.approx(last, rel=1e-5)
    assert {name: sum(b - a for a, b in ranges) for name, ranges in run.ledger()["booked"].items()} == {
        "native": 80,
        "xla": 80,
    }


def test_exchanged_weights_have_the_same_bits_everywhere_and_again(servers, tmp_path):
    terms = Terms(inner_steps=5, fragments=2, overlap_steps=1, exchange="int8", lr=0.7, momentum=0.9)
    found = []
    for name in ("one", "two"):
        run = together(servers, tmp_path / name, terms)
        outer = run.outer()
        for island in ISLANDS:
            mine = weights(tmp_path / name / island)
            assert mine.keys() == outer.keys()
            assert all(mine[tensor].tobytes() == outer[tensor].tobytes() for tensor in outer)
        found.append({tensor: array.tobytes() for tensor, array in outer.items()})
    assert found[0] == found[1]
