"""A run that cannot fit is refused with figures before anything is made, and one that fits is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config.compose import compose
from orchestrator.errors import HardwareError
from orchestrator.hardware import host
from orchestrator.hardware.target import Probe
from orchestrator.hardware.target_table import get_target
from orchestrator.training import memory_check
from orchestrator.training.resolved import resolve_run

GIB = 2**30


@pytest.fixture
def memory(monkeypatch):
    """Gives this machine so many GiB."""

    def give(gib: float, limit: float | None = None) -> None:
        monkeypatch.setattr(host, "ram_bytes", lambda: int(gib * GIB))
        monkeypatch.setattr(host, "address_space_bytes", lambda: None if limit is None else int(limit * GIB))

    return give


def _check(*words: str, devices: int = 1, target=None, vocab_size: int = 128256) -> None:
    config = compose(["hardware=cpu", "data.document_mask=false", *words]).config
    target = target or get_target("cpu")
    if config.model.vocab_size != "auto":
        vocab_size = config.model.vocab_size
    resolved = resolve_run(config, target, devices, vocab_size)
    memory_check.check_memory(resolved, target, devices if target.name == "cpu" else 1)


def test_eight_billion_parameters_do_not_fit_a_laptop(memory):
    memory(24)
    with pytest.raises(HardwareError, match="does not fit the memory of this machine") as caught:
        _check("model=llama3_8b")
    # 8.03e9 parameters: 16 bytes each of weights, gradients and moments, and 12 for the copy that a save keeps.
    needs = float(caught.value.got.split("about ")[1].split(" GiB")[0])
    assert needs == pytest.approx(8.03e9 * 28 / GIB, rel=0.1)
    assert "has 24.0 GiB" in caught.value.got
    assert "fewer than 0.9B parameters" in caught.value.fix
    second = ["data.document_mask=true", "data.messages=preference", "train.preference.loss=sigmoid"]
    with pytest.raises(HardwareError) as caught:
        _check("model=llama3_8b", *second, "train.preference.reference=live")
    both = float(caught.value.got.split("about ")[1].split(" GiB")[0])
    assert both == pytest.approx(8.03e9 * 32 / GIB, rel=0.1), "a frozen model beside it"
    assert both > needs + 8e9 * 3.9 / GIB
    _check("model=llama3_8b", "hardware.check_memory=false")
    memory(400)
    _check("model=llama3_8b")


def test_what_would_fit_is_named(memory):
    words = (
        "model=llama_125m",
        "train.seq_len=1024",
        "train.global_batch_tokens=131072",
        "train.loss_chunk_tokens=1024",
    )
    memory(12)
    with pytest.raises(HardwareError) as caught:
        _check(*words)
    named = caught.value.fix.removeprefix("fits with ").partition(";")[0].split()
    assert named, caught.value.fix
    _check(*words, *named)


def test_processes_share_the_machine(memory):
    memory(8)
    _check("model=llama_125m", "train.micro_batch_size=1")
    with pytest.raises(HardwareError, match="for 8 processes"):
        _check("model=llama_125m", "train.micro_batch_size=1", "layout.replicate=8", devices=8)
    memory(64, limit=1.0)
    with pytest.raises(HardwareError):
        _check("model=llama_125m", "train.micro_batch_size=1")


def test_an_accelerator_is_held_against_its_own_memory(monkeypatch):
    target = get_target("cuda")
    probe = replace(Probe("cuda", True, 8, ("NVIDIA H100",)), device_memory_bytes=80 * 10**9)
    monkeypatch.setattr(target, "probe", lambda: probe)
    words = ("hardware=cuda", "hardware.precision=bf16", "train.seq_len=4096", "train.micro_batch_size=1")
    batch = "train.global_batch_tokens=32768"
    with pytest.raises(HardwareError, match="memory of each cuda device"):
        _check(*words, batch, "model=llama3_70b", "layout.fsdp=8", devices=8, target=target)
    _check(*words, batch, "model=llama3_8b", "layout.fsdp=8", devices=8, target=target)


@pytest.mark.parametrize("model", ["tiny", "llama_20m", "tiny_gpt2", "tiny_qwen3"])
def test_small_models_fit_a_small_machine(memory, model):
    memory(4)
    _check(f"model={model}", vocab_size=4096)
