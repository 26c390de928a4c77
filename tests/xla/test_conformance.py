"""The XLA strategy on virtual devices against the torch-native one: the same losses, the same checkpoints."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lab.cli import only_run, run
from tests.lab.run_server import ROOT, RunServer
from tests.lab.runs import assert_trained_alike, checkpoint, losses, read_rows, small_overrides
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all

RELATIVE = 1e-5
# The torch-native side runs where users run it: in the environment of the current torch.
NATIVE = os.environ.get("ORCHESTRATOR_VENV", str(ROOT / ".venv")) + "/bin/python"


def simulate(devices: int, *layout: str) -> list[str]:
    return ["hardware=tpu", f"hardware.simulate={devices}", *layout]


XLA = {
    "1": simulate(1),
    "fsdp4": simulate(4, "layout.fsdp=4"),
    "tensor2": simulate(2, "layout.tensor=2"),
    "replicate4": simulate(4, "layout.replicate=4", "layout.fsdp=1"),
    "context2_fsdp2": simulate(4, "layout.context=2", "layout.fsdp=2"),
    "fsdp2_tensor2": simulate(4, "layout.fsdp=2", "layout.tensor=2"),
    "replicate2_fsdp2_tensor2": simulate(8, "layout.replicate=2", "layout.fsdp=2", "layout.tensor=2"),
}


class Trained:
    """Runs by their overrides and environment, each trained when it is first asked for.

    Args:
        path: folders that hold parts of a user's own.
    """

    def __init__(self, tmp: Path, *path: str):
        self.tmp, self._path = tmp, path
        self._done: dict[tuple, Path] = {}
        self._servers: dict[str, RunServer] = {}

    def __call__(self, *words: str, python: str = sys.executable, resume_from: Path | None = None) -> Path:
        key = (words, python, resume_from)
        if key not in self._done:
            overrides = small_overrides(self.tmp, *words, "checkpoint.keep_last=5")
            self._done[key] = self.server(python).train(overrides, self.tmp / f"r{len(self._done)}", resume_from)
        return self._done[key]

    def server(self, python: str) -> RunServer:
        if python not in self._servers:
            self._servers[python] = RunServer(python, *self._path)
        return self._servers[python]

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories by overrides, each trained once."""
    trained = Trained(tmp_path_factory.mktemp("runs"))
    yield trained
    trained.close()


QUICK = ["fsdp4", "context2_fsdp2", "fsdp2_tensor2", "replicate2_fsdp2_tensor2"]


@pytest.mark.parametrize("name", cases(XLA, quick=QUICK))
def test_same_losses_norms_and_evaluation_as_torch_native(runs, name):
    ours, theirs = read_rows(runs(*XLA[name])), read_rows(runs(python=NATIVE))
    assert_trained_alike(ours, theirs, RELATIVE)


LONG = ["train.seq_len=1024", "model.max_seq_len=1024", "train.global_batch_tokens=4096", "train.max_steps=8"]
LONG += ["data.validation_fraction=0.3", "checkpoint.every_steps=null"]
LATENT = ["model.mla.kv_lora_rank=16", "model.mla.q_lora_rank=24", "model.mla.nope_head_dim=12", "model.kv_heads=4"]
LATENT += ["model.mla.rope_head_dim=4", "model.mla.v_head_dim=8", "model.rope_layout=interleaved"]
FEATURES = {
    "accumulation": ["train.micro_batch_size=1"],
    "remat": ["train.remat=full"],
    "qwen3": ["model=tiny_qwen3", "model.dim=64", "model.layers=2", "model.heads=4", "model.kv_heads=2"],
    "gpt2": ["model=tiny_gpt2", "model.dim=64", "model.layers=2", "model.heads=4", "model.kv_heads=4"],
    "windows, sinks and caps": [
        *("model.attention_sinks=true", "model.windows=[24,null]", "model.qk_norm=true", "model.qk_norm_over=width"),
        *(
            "model.norm_placement=both",
            "model.norm=rms_offset",
            "model.attention_softcap=5.0",
            "model.logit_softcap=10.0",
        ),
    ],
    "sinks in blocks": [*LONG, "model.attention_sinks=true", "model.windows=[96,null]", "train.remat=full"],
    "loss chunks": ["train.loss_chunk_tokens=64"],
    "attention in blocks": [*LONG, "train.remat=full"],
    "attention in blocks, one document": [*LONG, "data.document_mask=false"],
    "latent attention in blocks": [*LONG, *LATENT],
    "transfer": [
        *("optim.transfer=completep", "optim.base.dim=16", "optim.base.layers=1", "optim.base.head_dim=8"),
        *("model.tied_embeddings=true", "optim.groups=[{match: '*.attn.*', lr_factor: 0.5}]"),
    ],
}


@pytest.mark.parametrize("feature", cases(FEATURES, quick=["accumulation", "remat", "gpt2", "attention in blocks"]))
def test_features_agree_too(runs, feature):
    words = FEATURES[feature]
    reference = [word for word in words if word.startswith(("model", "data", "optim")) or word in LONG]
    ours, theirs = runs(*words, *XLA["fsdp2_tensor2"]), runs(*reference, python=NATIVE)
    np.testing.assert_allclose(losses(read_rows(ours)), losses(read_rows(theirs)), rtol=RELATIVE)


@pytest.mark.parametrize("name", cases(["replicate4", *QUICK], quick=["context2_fsdp2"]))
def test_several_micro_batches_agree_on_every_kind_of_layout(runs, name):
    ours, theirs = runs(*FEATURES["accumulation"], *XLA[name]), runs(python=NATIVE)
    np.testing.assert_allclose(losses(read_rows(ours)), losses(read_rows(theirs)), rtol=RELATIVE)


@pytest.mark.parametrize("micro_batch", ["auto", "1"])
def test_nothing_is_compiled_after_the_second_step(runs, micro_batch):
    words = [
        f"train.micro_batch_size={micro_batch}",
        "checkpoint.every_steps=null",
        "train.remat=none",
        "optim.schedule.warmup_steps=3",
        "train.sample.every_steps=5",
    ]
    counts = [row["compilations"] for row in read_rows(runs(*words, *XLA["fsdp2_tensor2"])) if "loss" in row]
    assert counts[3] == counts[1] > 0
    # The first sample makes two programs: over its prompt, and over one more token.
    assert counts[-1] == counts[6] == counts[1] + 2


def test_bf16_stays_within_its_tolerance(runs):
    ours = losses(read_rows(runs("hardware.precision=bf16", *XLA["fsdp4"])))
    exact = losses(read_rows(runs(python=NATIVE)))
    np.testing.assert_allclose(ours, exact, rtol=1e-2)
    assert ours != exact


NATIVE_LAYOUTS = {
    "native 1": (1, []),
    "native fsdp4": (4, ["layout.fsdp=4"]),
    "native fsdp2_tensor2": (4, ["layout.fsdp=2", "layout.tensor=2"]),
}
SOURCES = {
    **{name: (NATIVE, [*words, f"hardware.devices={size}"]) for name, (size, words) in NATIVE_LAYOUTS.items()},
    **{f"xla {name}": (sys.executable, XLA[name]) for name in ("fsdp4", "fsdp2_tensor2", "replicate2_fsdp2_tensor2")},
}


TARGETS = ["native fsdp2_tensor2", "xla fsdp4", "xla replicate2_fsdp2_tensor2"]


@pytest.mark.parametrize("target", cases(SOURCES, quick=TARGETS))
def test_every_checkpoint_loads_everywhere_bitwise(runs, target, tmp_path):
    """For all pairs: every tensor bitwise, optimizer included; the same next batch; the first resumed loss."""
    assert_exchanged(runs, SOURCES, target, tmp_path)


def assert_exchanged(runs, layouts, target: str, tmp_path: Path, *words: str) -> None:
    """See that the checkpoint of every one of `layouts` is read on `target` as it was written.

    Args:
        layouts: name -> Python and overrides.
        words: overrides of all of them.
    """
    python, layout = layouts[target]
    saved = {name: runs(*words, *each, python=which) for name, (which, each) in layouts.items()}
    sources = [checkpoint(run_dir, 10) for run_dir in saved.values()]
    results = runs.server(python).exchange(small_overrides(runs.tmp, *words, *layout), sources, tmp_path)
    for (name, run_dir), source, result in zip(saved.items(), sources, results, strict=True):
        before, after = read_all(source), read_all(Path(result["path"]))
        assert before.keys() == after.keys()
        assert any(key.startswith("optimizer.exp_avg_sq.") for key in before)
        for key in before:
            assert torch.equal(before[key], after[key]), f"{key} of {name}"
        np.testing.assert_allclose(result["loss"], losses(read_rows(run_dir))[10], rtol=RELATIVE)
    assert len({result["tokens"] for result in results}) == 1


@pytest.mark.parametrize("features", [pytest.param([], marks=slow), ["model.dropout=0.1"]], ids=["plain", "dropout"])
def test_resume_is_bitwise_on_the_same_layout(runs, tmp_path, features):
    whole = runs(*XLA["fsdp2_tensor2"], *features)
    words = small_overrides(runs.tmp, *XLA["fsdp2_tensor2"], *features, f"runs_dir={tmp_path}")
    result = run("train", *words, f"resume={checkpoint(whole, 10)}")
    assert result.returncode == 0, result.stderr
    resumed = only_run(tmp_path)
    # The rows of the first ten steps have come along with the checkpoint.
    assert losses(read_rows(resumed)) == losses(read_rows(whole))
    before, after = read_all(checkpoint(whole)), read_all(checkpoint(resumed))
    assert all(torch.equal(before[key], after[key]) for key in before)
