"""The memory of the product's own model on one device, against a trace of every tensor that a step allocates."""

from __future__ import annotations

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from orchestrator.config.schema import ModelConfig
from orchestrator.models.decoder import Decoder
from orchestrator.models.remat import apply_remat
from orchestrator.planner.estimate.memory import estimate_memory
from orchestrator.planner.spec import JobSpec, ModelShape, ParallelPlan
from tests.planner.shapes import cluster

LLAMA = ModelConfig(vocab_size=1024, dim=128, layers=3, heads=4, kv_heads=2, mlp_dim=384)
GPT = ModelConfig(vocab_size=1024, dim=128, layers=3, heads=4, kv_heads=4, mlp_dim=512, activation="gelu")
WORDS = ModelConfig(vocab_size=8192, dim=128, layers=2, heads=4, kv_heads=2, mlp_dim=384)
SEQUENCES, SEQ_LEN, CHUNK = 4, 128, 128


def traced_peak(config: ModelConfig, remat: str, micro_batches: int) -> int:
    """Bytes alive at the peak of a training step in fp32."""
    model = Decoder(config, CHUNK)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    apply_remat(model, remat)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 1024, (SEQUENCES, SEQ_LEN))
    model(tokens, targets=tokens).backward()
    optimizer.step()  # the first one makes the moments
    optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for index in range(micro_batches):
            if index:
                tracker.reset_mod_stats()
            model(tokens, targets=tokens).backward()
        optimizer.step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return int(snapshot["Total"])


@pytest.mark.parametrize(
    ("config", "remat", "micro_batches"),
    [(LLAMA, "none", 1), (LLAMA, "selective", 2), (GPT, "full", 1), (WORDS, "none", 2)],
    ids=["llama", "selective, accumulated", "gpt, full", "a large vocabulary"],
)
def test_estimate_against_trace(config, remat, micro_batches):
    work = JobSpec(
        ModelShape.of(config), SEQ_LEN, micro_batches * SEQUENCES * SEQ_LEN, precision="fp32", stack="orchestrator",
        loss_chunk_tokens=CHUNK,
    )  # fmt: skip
    plan = ParallelPlan(micro_batch=SEQUENCES, remat=remat, compiled=False)
    found = estimate_memory(work, cluster("cpu-generic", 1), plan)
    without_runtime = found.total - found.overhead
    assert without_runtime == pytest.approx(traced_peak(config, remat, micro_batches), rel=0.08)
