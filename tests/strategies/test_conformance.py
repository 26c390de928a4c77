"""The suite that every strategy and layout passes: one configuration, one result.

A new strategy or backend is added to `CASES`; the reference is one process of the torch-native strategy, whose
steps `test_reference_is_a_plain_loop` compares with a hand-written loop.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.convert import to_dict
from orchestrator.sharding.layout import Layout
from tests.lab.ranks import run_ranks
from tests.lab.runs import assert_trained_alike, checkpoint, losses, resolved_run, small_config, train
from tests.lab.slow import cases, slow
from tests.lab.tensors import read_all

RELATIVE = 1e-5  # of the losses, in fp32, over 20 steps (contract 2)

# Sequences of a step are divided among data-parallel ranks, so the global batch of 8 is cut in every way.
CASES = {
    "fsdp2": ["layout.fsdp=2"],
    "fsdp4": ["layout.fsdp=4"],
    "fsdp3": ["layout.fsdp=3", "train.global_batch_tokens=384"],  # 3 divides no size: uneven and empty shards
    "tensor2": ["layout.tensor=2"],
    "context2": ["layout.context=2"],
    "replicate2": ["layout.replicate=2", "layout.fsdp=1"],
    "fsdp2_tensor2": ["layout.fsdp=2", "layout.tensor=2"],
    "replicate2_fsdp2": ["layout.replicate=2", "layout.fsdp=2"],
    "context2_tensor2": ["layout.context=2", "layout.tensor=2"],
    "fsdp2_context2": ["layout.fsdp=2", "layout.context=2"],
    "replicate2_fsdp2_tensor2": ["layout.replicate=2", "layout.fsdp=2", "layout.tensor=2"],
    "ring2": ["layout.context=2", "layout.context_kind=ring"],
    "ring4": ["layout.context=4", "layout.context_kind=ring"],
    "ring2_tensor2": ["layout.context=2", "layout.tensor=2", "layout.context_kind=ring"],
    "fsdp2_ring2": ["layout.fsdp=2", "layout.context=2", "layout.context_kind=ring"],
    "ulysses2": ["layout.context=2", "layout.context_kind=ulysses"],
    "ulysses4": ["layout.context=4", "layout.context_kind=ulysses"],
    "ulysses2_tensor2": ["layout.context=2", "layout.tensor=2", "layout.context_kind=ulysses"],
    "fsdp2_ulysses2": ["layout.fsdp=2", "layout.context=2", "layout.context_kind=ulysses"],
}
SIZES = {
    name: int(
        np.prod([int(degree) for word in words if (degree := word.split("=")[1]).isdigit() and "layout." in word])
    )
    for name, words in CASES.items()
}

FEATURES = {
    "gpt2": [
        "model=tiny_gpt2",
        "model.vocab_size=auto",
        "model.dim=64",
        "model.layers=2",
        "model.heads=4",
        "model.kv_heads=4",
    ],
    "qwen3": [
        "model=tiny_qwen3",
        "model.vocab_size=auto",
        "model.dim=64",
        "model.layers=2",
        "model.heads=4",
        "model.kv_heads=2",
    ],
    "accumulation": ["train.micro_batch_size=1"],
    "remat": ["train.remat=full"],
    "window": ["model.sliding_window=24"],
    "gpt-oss attention": [
        "model.attention_sinks=true",
        "model.windows=[24,null]",
        "model.activation=swiglu_clamped",
        "model.rope_scaling={kind:yarn,factor:4.0,original_max_seq_len:16,truncate:false}",
    ],
    "olmo": [
        "model.norm_placement=post",
        "model.qk_norm=true",
        "model.qk_norm_over=width",
        "model.logit_softcap=10.0",
    ],
    "gemma": [
        *(
            "model.norm=rms_offset",
            "model.norm_placement=both",
            "model.attention_softcap=5.0",
            "model.activation=geglu",
        ),
        *("model.windows=[24,null]", "model.rope_local_theta=500.0", "model.qk_norm=true", "model.embedding_scale=8.0"),
        *("model.residual_scale=0.5", "model.attention_scale=0.2", "model.tied_embeddings=true"),
    ],
    "cohere": [
        *("model.residual=parallel_one_norm", "model.norm=layer_no_bias", "model.rope_share=0.5"),
        *("model.rope_layout=interleaved", "model.rope_layers=[true,false]", "model.logit_scale=0.25"),
        *("model.layer_heads=[4,8]", "model.layer_kv_heads=[2,4]", "model.head_dim=16"),
    ],
    "one document": ["data.document_mask=false"],
    "latent": [
        *("model.mla.kv_lora_rank=16", "model.mla.q_lora_rank=24", "model.mla.nope_head_dim=12"),
        *("model.mla.rope_head_dim=4", "model.mla.v_head_dim=8", "model.heads=4", "model.kv_heads=4"),
        *("model.rope_layout=interleaved", "model.attention_bias=true", "model.output_bias=true"),
    ],
    "variety": ["model.windows=[16,null]", "model.attention_softcap=4", "model.attention_sinks=true"],
}


def _reference(case: list[str]) -> list[str]:
    return [word for word in case if not word.startswith("layout.")]


def _rows(run_dir: Path) -> list[dict]:
    from tests.lab.runs import read_rows

    return read_rows(run_dir)


FURTHER = ("fsdp4", "tensor2", "replicate2", "ring2", "ring4", "fsdp2_ring2", "context2_tensor2")
FURTHER += ("ulysses2", "ulysses4", "fsdp2_ulysses2", "ulysses2_tensor2", "ring2_tensor2", "replicate2_fsdp2_tensor2")


@pytest.mark.parametrize("name", cases(CASES, quick=[name for name in CASES if name not in FURTHER]))
def test_same_losses_norms_and_evaluation(runs, name):
    ours = _rows(runs(*CASES[name], size=SIZES[name]))
    theirs = _rows(runs(*_reference(CASES[name])))
    assert_trained_alike(ours, theirs, RELATIVE)


@pytest.mark.parametrize("feature", cases(FEATURES, quick=["remat"]))
@pytest.mark.parametrize(
    "name", cases(["fsdp2", "fsdp2_tensor2", "context2", "ring2_tensor2", "ulysses2_tensor2"], quick=["fsdp2_tensor2"])
)
def test_features_agree_too(runs, name, feature):
    ours = _rows(runs(*FEATURES[feature], *CASES[name], size=SIZES[name]))
    theirs = _rows(runs(*[word for word in FEATURES[feature] if "micro_batch" not in word and "remat" not in word]))
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=RELATIVE)


SEVERAL = "train.micro_batch_size=1"
ACCUMULATED = ["fsdp2", "fsdp3", "replicate2", "fsdp2_tensor2", "fsdp2_context2", "replicate2_fsdp2"]
ACCUMULATED += ["replicate2_fsdp2_tensor2"]
WHEN = [(name, "each") for name in ACCUMULATED] + [
    (name, "last") for name in ("fsdp3", "fsdp2_tensor2", "replicate2_fsdp2")
]


QUICK = [("fsdp3", "each"), ("replicate2_fsdp2", "last")]


@pytest.mark.parametrize(("name", "when"), cases(WHEN, quick=QUICK))
def test_several_micro_batches_give_the_same_step_whenever_they_are_reduced(runs, name, when):
    ours = _rows(runs(SEVERAL, f"train.reduce_gradients={when}", *CASES[name], size=SIZES[name]))
    theirs = _rows(runs(*_reference(CASES[name])))
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=RELATIVE)
    norms = [[row["grad_norm"] for row in rows if "loss" in row] for rows in (ours, theirs)]
    np.testing.assert_allclose(*norms, rtol=1e-4)


RESUMED = [(name, when) for name in ("fsdp2_tensor2", "replicate2_fsdp2") for when in ("each", "last")]
RESUMED += [("ring2_tensor2", "each"), ("ulysses2_tensor2", "each")]


@pytest.mark.parametrize(("name", "when"), cases(RESUMED, quick=[("replicate2_fsdp2", "last")]))
def test_a_run_with_several_micro_batches_is_resumed_bitwise(runs, tmp_path, name, when):
    words = (SEVERAL, f"train.reduce_gradients={when}", *CASES[name])
    whole = runs(*words, size=SIZES[name])
    rows = train(small_config(runs.tmp, *words), SIZES[name], tmp_path / "resumed", checkpoint(whole, 10))
    assert losses(rows) == losses(_rows(whole))[10:]
    before, after = (read_all(checkpoint(run_dir)) for run_dir in (whole, tmp_path / "resumed"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    (handover,) = json.loads((tmp_path / "resumed" / "handover.json").read_text())
    assert [handover[key]["difference"] for key in ("loss", "grad_norm", "logits")] == [0, 0, 0]


def _initial(world, data, layout_words):
    import hashlib

    from orchestrator.config.convert import from_dict
    from orchestrator.config.schema import RunConfig
    from orchestrator.hardware.target_table import get_target
    from orchestrator.models.decoder import Decoder
    from orchestrator.sharding import rules
    from orchestrator.training.job import make_strategy

    resolved = resolved_run(from_dict(RunConfig, data), world, vocab_size=257)
    config, parallel = resolved.config, make_strategy(resolved, get_target("cpu"), world)
    parallel.join()
    with torch.device("meta"):
        model = Decoder(config.model)
    parallel.shard(model, rules.place(model.logical_axes(), {n: tuple(p.shape) for n, p in model.named_parameters()}))
    parallel.initialize(model, config.seed)
    shards = parallel.state_shards(model, None)
    parallel.leave()
    return [
        (s.name, s.shape, s.slices, hashlib.sha256(s.data.numpy().tobytes()).hexdigest(), s.data.numpy().copy())
        for s in shards
    ]


@pytest.mark.parametrize("name", [name for name in CASES if "ring" not in name and "ulysses" not in name])
def test_initial_weights_are_bitwise_those_of_one_process(runs, name):
    config = to_dict(small_config(runs.tmp, *CASES[name]))
    single = to_dict(small_config(runs.tmp, *_reference(CASES[name])))
    whole = {name: array for name, _, _, _, array in run_ranks(1, _initial, single, [])[0]}
    for shards in run_ranks(SIZES[name], _initial, config, CASES[name]):
        assert {shard[0] for shard in shards} == set(whole)
        for tensor, _, slices, _, array in shards:
            np.testing.assert_array_equal(array, whole[tensor][slices])


@pytest.mark.parametrize("name", ["fsdp4", "fsdp2_tensor2", "replicate2_fsdp2", "context2"])
def test_a_checkpoint_moves_to_any_layout_bitwise(runs, name):
    """Saved on one layout, loaded on another and saved again without a step between: the same bits."""
    source = checkpoint(runs(*CASES["fsdp2_tensor2"], size=4), 10)
    target = runs.tmp / f"moved-{name}"
    words = [*CASES[name], "train.max_steps=11", "checkpoint.every_steps=11"]
    moved = run_ranks(SIZES[name], _load_and_save, to_dict(small_config(runs.tmp, *words)), source, target)
    before, after = read_all(source), read_all(Path(moved[0]["path"]))
    assert before.keys() == after.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in before)
    for key in before:
        assert torch.equal(before[key], after[key]), key
    tokens = np.concatenate([part["tokens"] for part in {result["data_rank"]: result for result in moved}.values()])
    expected = run_ranks(1, _load_and_save, to_dict(small_config(runs.tmp)), source, runs.tmp / f"single-{name}")[0][
        "tokens"
    ]
    assert sorted(map(bytes, tokens)) == sorted(map(bytes, expected)), "the next batch has other tokens"


def _load_and_save(world, data, source, target):
    from orchestrator.checkpoint.writer import Contents, save
    from orchestrator.config.convert import from_dict
    from orchestrator.config.schema import RunConfig
    from orchestrator.data.prepare import prepare
    from orchestrator.hardware.target_table import get_target
    from orchestrator.training.job import build, make_strategy

    resolved = resolved_run(from_dict(RunConfig, data), world, target, source, checkpoints=target)
    parallel = make_strategy(resolved, get_target("cpu"), world)
    parallel.join()
    target.mkdir(exist_ok=True)
    job = build(resolved, parallel, prepare(resolved.config.data, progress=False), leg=0)
    shards = parallel.state_shards(job.module.model, job.module.optimizer)
    path = save(target, 10, shards, parallel, Contents(job.restored.state(), {}))
    data_rank = parallel.layout.data_rank(world.rank)
    batch = next(iter(job.loader))
    job.watchers.channels.close()
    parallel.leave()
    return {"path": str(path), "data_rank": data_rank, "tokens": batch["tokens"]}


def test_reference_is_a_plain_loop(runs):
    """One process gives, bit for bit, what a loop of a few lines on plain tensors gives."""
    from orchestrator.data.prepare import prepare
    from orchestrator.data.stream import Position, StepLoader, TokenStream
    from orchestrator.models.decoder import Decoder
    from orchestrator.models.init import draw_slice
    from orchestrator.optim.schedule import learning_rate
    from orchestrator.training.check import resolve_model

    config = small_config(runs.tmp)
    data = prepare(config.data, progress=False)
    model = Decoder(resolve_model(config.model, data.vocab_size))
    for name, init in model.initializers().items():
        parameter = model.get_parameter(name)
        whole = tuple(slice(0, size) for size in parameter.shape)
        parameter.data.copy_(draw_slice(init, name, config.seed, tuple(parameter.shape), whole))
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    stream = TokenStream(data.stores, data.weights, "train", 64, config.seed)
    expected = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step, batch in enumerate(StepLoader(stream, 8, 0, 1, Position(), 20)):
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, config.optim.lr, config.optim.schedule)
        loss = model(**tensors) / (tensors["targets"] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    torch.set_num_threads(threads)
    np.testing.assert_allclose(losses(_rows(runs())), expected, rtol=1e-6)


def test_the_checkpoint_says_where_it_comes_from(runs):
    found = Checkpoint(checkpoint(runs(*CASES["fsdp2_tensor2"], size=4)))
    state = found.state()
    assert (state["step"], found.step) == (20, 20)
    assert state["layout"] == Layout(fsdp=2, tensor=2).as_dict()
    assert state["data"]["next_sequence"] == 20 * 8
    assert state["software"]["torch"] == torch.__version__
    assert found.config()["layout"]["fsdp"] == 2


def test_bf16_stays_within_its_tolerance(runs):
    """Matrix products in bf16, everything that is summed in fp32: the declared tolerance is 1% of the loss."""
    short = ("train.max_steps=6", "hardware.precision=bf16", "train.eval_tokens=128")
    exact = losses(_rows(runs()))[:6]
    for layout, size in ((), 1), (("layout.fsdp=2", "layout.tensor=2"), 4), (("layout.fsdp=2", SEVERAL), 2):
        ours = losses(_rows(runs(*short, *layout, size=size)))
        # The schedule's length differs, which warm-up, the first five steps, does not feel.
        np.testing.assert_allclose(ours[:5], exact[:5], rtol=1e-2)
        assert ours != exact


@slow
@pytest.mark.parametrize("name", ["fsdp2", "ring2", "ulysses2"])
def test_compiled_blocks_train_alike(runs, name):
    ours = losses(_rows(runs("hardware.compile=true", *CASES[name], size=2)))
    np.testing.assert_allclose(ours, losses(_rows(runs())), rtol=RELATIVE)
