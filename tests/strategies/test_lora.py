"""Adapters on every layout: the losses of one process, a base that stays as it is, and checkpoints that move."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.adapters import STATE_KEY, is_adapter
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.compose import compose
from orchestrator.config.convert import to_dict
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.launch.plan import find_plan
from tests.lab.ranks import run_ranks
from tests.lab.runs import (
    assert_trained_alike,
    checkpoint,
    losses,
    read_rows,
    resolved_run,
    small_config,
    small_overrides,
    train,
)
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all

RELATIVE = 1e-5
LORA = ("train.lora.rank=4", "train.lora.alpha=8", "optim.lr=0.01")
LAYOUTS = {
    "fsdp2": (2, "layout.fsdp=2"),
    "fsdp3": (3, "layout.fsdp=3", "train.global_batch_tokens=384"),  # of rank 4 the third process has nothing
    "tensor2": (2, "layout.tensor=2"),
    "fsdp2_tensor2": (4, "layout.fsdp=2", "layout.tensor=2"),
    "context2": (2, "layout.context=2"),
    "ring2_tensor2": (4, "layout.context=2", "layout.tensor=2", "layout.context_kind=ring"),
    "pipeline2": (2, "layout.pipeline=2", "train.micro_batch_size=2"),
    "zero_bubble2": (2, "layout.pipeline=2", "layout.schedule=zero_bubble", "train.micro_batch_size=2"),
    "pipeline2_fsdp2": (4, "layout.pipeline=2", "layout.fsdp=2", "train.micro_batch_size=2"),
    "replicate2": (2, "layout.replicate=2", "layout.fsdp=1"),
}
QUICK = ["fsdp2_tensor2"]
LATENT = (
    *("model.mla.kv_lora_rank=16", "model.mla.q_lora_rank=24", "model.mla.nope_head_dim=12"),
    *("model.mla.rope_head_dim=4", "model.mla.v_head_dim=8", "model.heads=4", "model.kv_heads=4"),
    *("model.rope_layout=interleaved", "model.attention_bias=true", "model.output_bias=true"),
)


@pytest.fixture(scope="module")
def base(runs):
    """A checkpoint of whole weights that adapters lie beside, by the model's words."""
    return lambda *model: checkpoint(runs("train.max_steps=2", "checkpoint.every_steps=2", *model), 2)


def _lora(base, *words):
    model = [word for word in words if word.startswith("model")]
    return (f"train.init_from={base(*model)}", *LORA, *words)


@pytest.mark.parametrize("name", cases(LAYOUTS, quick=QUICK))
def test_losses_norms_and_evaluation_are_those_of_one_process(runs, base, name):
    size, *words = LAYOUTS[name]
    ours = read_rows(runs(*_lora(base, *words), size=size))
    theirs = read_rows(runs(*_lora(base, *(word for word in words if "batch_tokens" in word))))
    assert_trained_alike(ours, theirs, RELATIVE)
    assert losses(ours)[-1] < losses(ours)[0]


MODELS = {
    "latent": LATENT,
    "biases, tied": (
        *("model=tiny_gpt2", "model.vocab_size=auto", "model.dim=64", "model.layers=2", "model.heads=4"),
        "model.kv_heads=4",
    ),
    "experts": ("model=tiny_moe", "model.vocab_size=auto", "model.layers=2"),
}


@slow
@pytest.mark.parametrize("name", ["fsdp2_tensor2", "pipeline2"])
@pytest.mark.parametrize("model", MODELS)
def test_other_models_train_alike(runs, base, model, name):
    size, *words = LAYOUTS[name]
    more = [*MODELS[model], "train.lora.dropout=0.0", "train.remat=full"]
    ours = read_rows(runs(*_lora(base, *more, *words), size=size))
    theirs = read_rows(runs(*_lora(base, *more)))
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=RELATIVE)


@slow
def test_dropout_is_drawn_on_a_layout_too(runs, base):
    words = _lora(base, "train.lora.dropout=0.5", *LAYOUTS["fsdp2_tensor2"][1:])
    rows, plain = read_rows(runs(*words, size=4)), read_rows(runs(*_lora(base)))
    assert losses(rows) != losses(plain)
    np.testing.assert_allclose(losses(rows), losses(plain), rtol=0.1)


def test_a_checkpoint_holds_adapters_alone_and_names_what_lies_beneath(runs, base):
    saved = Checkpoint(checkpoint(runs(*_lora(base, *LAYOUTS["fsdp2_tensor2"][1:]), size=4)))
    names = saved.manifest.tensors
    assert {name for name in names if not is_adapter(name)} == set()
    assert {name.split(".")[0] for name in names} == {"model", "optimizer"}
    assert len([name for name in names if name.startswith("model.")]) == 2 * 7 * 2  # layers, matrices, A and B
    record = saved.state()[STATE_KEY]
    assert record["base"] == str(base())
    assert (saved.directory / record["beside"]).resolve() == base()
    assert record["scale"] == 2.0


@pytest.mark.parametrize("name", cases(["one process", "fsdp2_tensor2", "pipeline2_fsdp2"], quick=["one process"]))
def test_a_run_goes_on_bitwise(runs, base, tmp_path, name):
    size, *layout = LAYOUTS.get(name, (1,))
    words = _lora(base, *layout)
    whole = runs(*words, size=size)
    train(small_config(runs.tmp, *words), size, tmp_path / "resumed", checkpoint(whole, 10))
    before, after = (read_all(checkpoint(run_dir)) for run_dir in (whole, tmp_path / "resumed"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    (handover,) = json.loads((tmp_path / "resumed" / "handover.json").read_text())
    assert [handover[key]["difference"] for key in ("loss", "grad_norm", "logits")] == [0, 0, 0]


def test_adapters_move_between_layouts_bitwise(runs, base, tmp_path):
    whole = runs(*_lora(base, *LAYOUTS["fsdp2_tensor2"][1:]), size=4)
    alone = train(small_config(runs.tmp, *_lora(base)), 1, tmp_path / "alone", checkpoint(whole, 10))
    np.testing.assert_allclose(losses(alone), losses(read_rows(whole))[10:], rtol=RELATIVE)
    (handover,) = json.loads((tmp_path / "alone" / "handover.json").read_text())
    assert handover["other_bits"] == []


def test_weights_beneath_that_were_moved_are_named_where_a_run_goes_on(runs, base, tmp_path):
    saved = checkpoint(runs(*_lora(base, *LAYOUTS["fsdp2_tensor2"][1:]), size=4), 10)
    place, moved = base(), tmp_path / "moved"
    words = [*small_overrides(runs.tmp), f"resume={saved}"]
    place.rename(moved)
    try:
        with pytest.raises(CheckpointError, match="not where the checkpoint says"):
            find_plan(compose(words), main=True, alone=True)
        plan = find_plan(compose([*words, f"train.init_from={moved}"]), main=True, alone=True)
        assert (plan.config.train.init_from, plan.config.train.lora.rank) == (str(moved), 4)
        with pytest.raises(ConfigError, match="keeps its adapters"):
            find_plan(compose([*words, f"train.init_from={moved}", "train.lora.rank=8"]), main=True, alone=True)
    finally:
        moved.rename(place)


def test_the_weights_beneath_stay_bitwise_as_they_were(runs, base):
    words = _lora(base, *LAYOUTS["pipeline2"][1:], "train.max_steps=3", "checkpoint.every_steps=null")
    source, run_dir, seen = read_all(base()), runs.tmp / "base-untouched", set()
    for shards in run_ranks(2, _trained, to_dict(small_config(runs.tmp, *words)), run_dir):
        seen |= {name for name, *_ in shards}
        for name, slices, array in shards:
            if is_adapter(name):
                assert name.endswith("_a") or np.any(array)
            else:
                np.testing.assert_array_equal(array.view(np.int32), source[name].numpy()[slices].view(np.int32))
    assert {name for name in source if name.startswith("model.")} < seen
    # The schedules differ in length, which warm-up, the first five steps, does not feel.
    np.testing.assert_allclose(losses(read_rows(run_dir)), losses(read_rows(runs(*_lora(base))))[:3], rtol=RELATIVE)


def _trained(world, data, run_dir):
    from orchestrator.config.convert import from_dict
    from orchestrator.config.schema import RunConfig
    from orchestrator.data.prepare import prepare
    from orchestrator.hardware.target_table import get_target
    from orchestrator.training.job import build, make_strategy

    resolved = resolved_run(from_dict(RunConfig, data), world, run_dir)
    parallel = make_strategy(resolved, get_target("cpu"), world)
    parallel.join()
    run_dir.mkdir(exist_ok=True)
    job = build(resolved, parallel, prepare(resolved.config.data, progress=False), leg=0)
    job.trainer.fit(job.module, job.loader)
    assert job.module.step == 3
    shards = parallel.state_shards(job.module.model, None)
    job.watchers.channels.close()
    parallel.leave()
    return [(shard.name, shard.slices, shard.data.numpy().copy()) for shard in shards]
