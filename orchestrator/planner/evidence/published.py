"""Published runs as jobs, clusters and plans for the estimators.

One row of the CSV is one metric; rows of one run share the `id` up to the colon. What a page does not state is
either known of its software (then it is named in `PublishedRun.assumed`) or a reason to leave the run out.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.chips.load import load_catalogue
from orchestrator.planner.estimate.memory import step_memory
from orchestrator.planner.estimate.work import model_flops_per_token, parameters
from orchestrator.planner.evidence.calibration import Calibration
from orchestrator.planner.spec import Cluster, JobSpec, ModelShape, ParallelPlan, Precision, Remat

Row = Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """Facts about the pages whose ids begin alike.

    Attributes:
        stack: the key of `calibration.yaml`.
        remat: where the rows do not state it; `least`: none if that fits, else full; None leaves such rows out.
        micro_batch: sequences of a forward pass where the rows do not state it; 0 for the whole local batch, None
            leaves such rows out.
        flops: which operations a stated FLOP/s or MFU counts: `full` or `half` attention; None: not to be used.
        inter: bytes/s per chip of that page's network, where it is not the catalogue's first.
        zero: what the data-parallel axis shards where the rows give `dp` only.
    """

    stack: str
    remat: Remat | Literal["least"] | None = None
    micro_batch: int | None = None
    flops: str | None = None
    inter: float | None = None
    zero: int = 1
    attention: str = "flash"
    sequence_parallel: bool = True


SOURCES: dict[str, Source] = {
    "tt": Source("torchtitan"),
    "mosaic": Source("composer", inter=25e9),
    "mcore": Source("megatron-2024", remat="none", micro_batch=1, flops="full"),
    "meg21": Source("megatron-2021", micro_batch=1, flops="hardware", inter=25e9, attention="fused",
                    sequence_parallel=False),
    "kort22": Source("megatron-2021", inter=25e9, attention="fused"),
    "mbridge": Source("megatron", remat="none"),
    "nemo2407": Source("megatron-2024", remat="none"),
    "nanotron": Source("nanotron", remat="none", flops="full"),
    "maxtext": Source("maxtext", micro_batch=0, flops="half"),
    "trec": Source("maxtext", micro_batch=0),
    "ironwood": Source("maxtext", micro_batch=0),
    "torchprime": Source("torchprime", micro_batch=0),
    "gcp": Source("maxtext-gpu", micro_batch=0),
    "axlearn": Source("axlearn", micro_batch=0, remat="selective"),
    "neuron": Source("neuron", remat="selective"),
    "amd": Source("primus", remat="least"),
    "fms": Source("fms-fsdp"),
    "megascale": Source("megatron-2021", remat="selective", micro_batch=1, inter=25e9),
    "bloom": Source("megatron-deepspeed", inter=6.25e9, attention="fused", sequence_parallel=False),
    "bloomsweep": Source("megatron-deepspeed", inter=6.25e9, attention="fused", sequence_parallel=False),
    "primerl": Source("prime-rl"),
    "palm": Source("palm", micro_batch=0),
    "aa": Source("aleph-alpha"),
}  # fmt: skip
PRECISIONS: dict[str, Precision] = {
    **dict.fromkeys(("bf16", "fp16", "bf16-SR"), "bf16"),
    **dict.fromkeys(("fp8", "fp8-cs", "mxfp8", "fp8-tensorwise", "fp8-full", "fp8-blockwise"), "fp8"),
}
REMAT: dict[str, Remat] = {
    **{name: name for name in ("none", "selective", "full", "offload")},
    **dict.fromkeys(
        ("minimal", "minimal_with_context", "dots_saveable", "save_dot_with_context_except_mlp", "custom"), "selective"
    ),
}
LATENT = {"latent_q": 1536, "latent_kv": 512, "rope_dim": 64}  # DeepSeek-V3's config.json
GLOBAL_SHARE = {"gpt-oss": 1 / 2, "gemma3": 1 / 6}  # layers that see everything, of those that alternate
INTERLEAVED = {"llama4-maverick": 2}  # every second layer has experts


@dataclass(frozen=True)
class PublishedRun:
    """One published run.

    Attributes:
        key: its id.
        source: page it is from.
        family: what is fitted or held out as a whole: software stack and model, or the sheet of a sweep.
        job: model, batch and precision.
        cluster: chips and links.
        plan: the layout and its settings.
        seconds: measured, per optimizer step; None where it ran out of memory.
        memory: measured peak in bytes.
        out_of_memory: None where the source does not sort its runs by it.
        assumed: what the page does not state.
    """

    key: str
    source: str
    family: str
    job: JobSpec
    cluster: Cluster
    plan: ParallelPlan
    seconds: float | None = None
    memory: float | None = None
    out_of_memory: bool | None = None
    assumed: tuple[str, ...] = ()

    @property
    def vendor(self) -> str:
        """Of its chips."""
        return self.cluster.chip.vendor


@dataclass(frozen=True)
class LeftOutRun:
    """A published run that is not used, and why.

    Attributes:
        key: its id.
        reason: why it is not used.
    """

    key: str
    reason: str


class NotStatedError(Exception):
    """A page lacks what an estimate needs, or has what the planner does not model."""


def read(*paths: Path) -> tuple[list[PublishedRun], list[LeftOutRun]]:
    """Read all runs of the CSV files, and those that cannot be used, each with the reason.

    Args:
        *paths: of the files.
    """
    groups: dict[str, dict[str, Row]] = {}
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                key, _, metric = row["id"].partition(":")
                groups.setdefault(key, {})[metric] = row
    runs, left_out = [], []
    for key, rows in groups.items():
        try:
            runs.append(_run(key, rows))
        except NotStatedError as reason:
            left_out.append(LeftOutRun(key, str(reason)))
    return runs, left_out


def held_out_families(runs: Iterable[PublishedRun]) -> set[str]:
    """Choose the families that no fit may see: of each stack's, alphabetically, every second; and a sole one.

    Args:
        runs: published runs.
    """
    by_stack: dict[str, set[str]] = {}
    for run in runs:
        by_stack.setdefault(run.family.partition(":")[0], set()).add(run.family)
    held: set[str] = set()
    for families in by_stack.values():
        ordered = sorted(families)
        held.update(ordered if len(ordered) == 1 else ordered[1::2])
    return held


def _run(key: str, rows: Mapping[str, Row]) -> PublishedRun:
    row = next(iter(rows.values()))
    prefix = re.match(r"[a-z]+(?:\d\d+)?", key)
    source = SOURCES.get(prefix.group() if prefix else "") or SOURCES.get(re.sub(r"\d+$", "", key.split("-")[0]))
    if source is None:
        raise NotStatedError("the page does not state the layout, the batch or what its figures count")
    notes = _notes(row["notes"])
    assumed: list[str] = []
    _refuse(key, row, rows, notes)
    shape = _shape(row, notes, assumed)
    cluster = _cluster(key, row, source)
    stack = _stack(key, source, cluster, notes)
    plan = _plan(key, row, notes, source, cluster, shape, assumed)
    job = JobSpec(
        shape, int(row["seq_len"]), _batch(row, plan, assumed), precision=PRECISIONS[row["precision"]], stack=stack
    )
    if source.remat == "least" and "remat" in assumed and not _fits(job, cluster, plan):
        plan = replace(plan, remat="full")
    if not plan.micro_batches(job):
        raise NotStatedError("the stated batch does not divide over the stated layout")
    sheet = row["source"].rsplit("/", 1)[-1].removesuffix(".xlsx")
    software = re.sub(r"-(20\d\d|deepspeed)$", "", stack.split("+")[0])  # one family whatever the version
    family = f"{software}:{sheet if key.startswith('aa-') else row['model']}"
    seconds = _seconds(rows, job, cluster, source)
    oom = None
    if key.startswith("aa-"):
        oom = "oom" in rows
        if not oom and seconds is None:
            raise NotStatedError("the sweep did not run it")
    memory = _memory(rows)
    if seconds is None and memory is None and oom is None:
        raise NotStatedError("only an MFU or FLOP/s whose convention the page does not state")
    return PublishedRun(key, row["source"], family, job, cluster, plan, seconds, memory, oom, tuple(assumed))


def _fits(job: JobSpec, cluster: Cluster, plan: ParallelPlan) -> bool:
    """By the literature's constants, so that reading the data does not depend on what was fitted to it."""
    return step_memory(job, cluster, plan, Calibration("literature", cluster.chip.vendor)).fits is True


def _notes(text: str) -> dict[str, str]:
    notes = {}
    for part in text.split(";"):
        name, mark, value = part.strip().partition("=")
        notes[name if mark else part.strip()] = value if mark else ""
    return notes


def _refuse(key: str, row: Row, rows: Mapping[str, Row], notes: Mapping[str, str]) -> None:
    text = row["notes"]
    if "INCONSISTENT" in text:
        raise NotStatedError("the page's figures contradict each other")
    if "not_run" in rows:
        raise NotStatedError("the sweep did not run it")
    if row["source"].startswith("memory-unverified"):
        raise NotStatedError("no source confirms it")
    if row["precision"] not in PRECISIONS:
        raise NotStatedError(f"the planner has no {row['precision']}")
    if "changes the model" in text:
        raise NotStatedError("the model was changed in a way the planner has no shape for")
    if not row["layers"] or not row["hidden"] or not row["vocab"]:
        raise NotStatedError("the model's sizes are not stated")
    if not row["seq_len"]:
        raise NotStatedError("the sequence length is not stated")


def _shape(row: Row, notes: Mapping[str, str], assumed: list[str]) -> ModelShape:
    dim = int(row["hidden"])
    heads = int(row["heads"]) if row["heads"] else dim // 128
    if not row["heads"]:
        assumed.append("heads")
    model = row["model"]
    layers, mlp = int(row["layers"]), int(row["ffn"])
    experts = int(notes.get("experts", 0))
    head_dim = int(notes["head_dim"].split()[0]) if "head_dim" in notes else dim // heads
    if "head_dim=256" in row["notes"]:
        head_dim = 256
    sizes: dict[str, Any] = {
        "name": model, "layers": layers, "dim": dim, "mlp_dim": mlp, "heads": heads,
        "kv_heads": int(row["kv_heads"] or heads), "head_dim": head_dim, "vocab": int(row["vocab"]),
        "experts": experts, "experts_per_token": int(notes.get("topk", 0)),
        "shared_experts": int(notes.get("shared", 0)), "expert_dim": int(notes.get("moe_ffn", 0)),
        "dense_layers": int(notes.get("dense_layers", 0)),
    }  # fmt: skip
    if "MLA" in notes:
        sizes.update(LATENT, head_dim=128)
    if "sliding_window" in notes:
        sizes["window"] = int(notes["sliding_window"])
        share = next((part for name, part in GLOBAL_SHARE.items() if name in model), 0)
        sizes["global_layers"] = round(layers * share)
    for name, step in INTERLEAVED.items():
        if name in model:
            sizes["dense_layers"] = layers - layers // step
    return _closest(sizes, row, notes)


def _closest(sizes: dict[str, Any], row: Row, notes: Mapping[str, str]) -> ModelShape:
    """Return the shape that fits the stated number of parameters best.

    Gated or not, tied or not, with a table of positions or not: as the notes say, else as that number tells.
    """
    gated = [kind for kind in (True, False) if f"arch:{'gated' if kind else 'ungated'}" in notes] or [False, True]
    tied = [True] if "tied_embeddings" in notes else [False, True]
    positions = [0] if gated == [True] else [0, int(row["seq_len"])]
    shapes = [ModelShape(**sizes, gated=g, tied=t, learned_positions=p) for g in gated for t in tied for p in positions]
    if not row["params"]:
        return shapes[0]
    return min(shapes, key=lambda shape: abs(parameters(shape) - float(row["params"])))


def _cluster(key: str, row: Row, source: Source) -> Cluster:
    chips = load_catalogue()
    if row["chip"] not in chips.chips:
        raise NotStatedError(f"the catalogue has no {row['chip']}")
    inter = source.inter
    if "400Gbps per node" in row["notes"]:
        inter = 400e9 / 8 / 8
    if "800Gbps per node" in row["notes"]:
        inter = 800e9 / 8 / 8
    slices = re.search(r"-(\d+)x(\d+)$", key) if row["chip"].startswith("tpu") else None
    domain = int(slices.group(2)) if slices and int(slices.group(1)) > 1 else None
    if "a3-" in key:
        inter = 12.5e9
    return Cluster(chips.get(row["chip"]), int(row["chips"]), inter, domain)


def _stack(key: str, source: Source, cluster: Cluster, notes: Mapping[str, str]) -> str:
    stack = source.stack
    if stack == "axlearn" or (stack == "maxtext" and cluster.chip.vendor != "google"):
        stack += {"nvidia": "-gpu", "aws": "-trainium"}.get(cluster.chip.vendor, "")
    if notes.get("container", "26.06") < "26.06":
        stack = "megatron-2025"
    if "asynctp" in key or "asyncTP" in notes:
        stack += "+asynctp"
    return stack


def _plan(
    key: str,
    row: Row,
    notes: Mapping[str, str],
    source: Source,
    cluster: Cluster,
    shape: ModelShape,
    assumed: list[str],
) -> ParallelPlan:
    tensor, pipeline, context, expert = (int(row[name] or 1) for name in ("tp", "pp", "cp", "ep"))
    data = cluster.devices // (tensor * pipeline * context)
    if not row["dp"] and not row["fsdp"]:
        raise NotStatedError("how the data-parallel axis shards is not stated")
    sharded = bool(row["fsdp"])
    replicate, fsdp = int(row["dp"] or 1), int(row["fsdp"] or 1)
    zero = 3
    if not sharded:
        level = int(notes["ZeRO-0"] or 0) if "ZeRO-0" in notes else source.zero
        level = 0 if "ZeRO-0" in notes else 1 if "ZeRO-1" in notes else level
        replicate, fsdp, zero = (replicate, 1, 1) if level == 0 else (1, replicate, level)
    if notes.get("sharding") == "SHARD_GRAD_OP":
        zero = 2
    if replicate * fsdp != data:
        raise NotStatedError("the stated degrees do not multiply to the number of devices")
    # Pages count the expert axis within the devices that share the state; where it is larger, over the tensor axis too.
    expert = math.gcd(expert, fsdp) if shape.experts else 1
    text = row["notes"]
    kernel = notes.get("kernel", "")
    attention = source.attention
    if kernel:
        attention = {"torch": "eager", "fused": "fused", "flash_attentionv1.0.8": "flash1"}.get(kernel, "flash")
    sequence = source.sequence_parallel and "no sequence parallel" not in text
    if "sequence_parallel" in notes and key.startswith("aa-"):
        sequence = notes["sequence_parallel"] == "True"
    compiled = "RMS kernel" in kernel if kernel else "eager" not in notes
    plan = ParallelPlan(
        replicate=replicate, fsdp=fsdp // expert, context=context, tensor=tensor, pipeline=pipeline,
        expert=expert, zero=zero,  # type: ignore[arg-type]
        virtual_stages=int(notes.get("virtual_pp") or notes.get("interleave") or 1),
        sequence_parallel=sequence, compiled=compiled, attention=attention,  # type: ignore[arg-type]
        remat=_remat(row, source, shape, assumed),
    )  # fmt: skip
    return replace(plan, micro_batch=_micro_batch(row, notes, source, plan, assumed))


def _remat(row: Row, source: Source, shape: ModelShape, assumed: list[str]) -> Remat:
    if row["remat"]:
        return REMAT[row["remat"]]
    if source.remat is None:
        raise NotStatedError("remat is not stated")
    assumed.append("remat")
    return "none" if source.remat == "least" else source.remat


def _micro_batch(row: Row, notes: Mapping[str, str], source: Source, plan: ParallelPlan, assumed: list[str]) -> int:
    local = None
    if row["global_batch_tokens"]:
        local = int(row["global_batch_tokens"]) // int(row["seq_len"]) // plan.data_parallel
    if "local_batch" in notes:
        return 1 if plan.pipeline > 1 else int(notes["local_batch"].split()[0])
    if "micro_batch" in notes:
        return int(notes["micro_batch"])
    if "batch" in notes and "per GPU" in notes["batch"]:
        return int(notes["batch"].split()[0])
    if source.micro_batch == 0 and local:
        return max(1, local // int(notes.get("grad_accum", 1)))
    if "1 seq per GPU" in row["notes"]:
        return 1
    if source.micro_batch is None:
        raise NotStatedError("the micro-batch is not stated")
    assumed.append("micro_batch")
    return source.micro_batch or 1


def _batch(row: Row, plan: ParallelPlan, assumed: list[str]) -> int:
    if row["global_batch_tokens"]:
        return int(row["global_batch_tokens"])
    assumed.append("global_batch_tokens")
    return plan.micro_batch * plan.data_parallel * int(row["seq_len"])


def _seconds(rows: Mapping[str, Row], job: JobSpec, cluster: Cluster, source: Source) -> float | None:
    if "step_time_s" in rows:
        return float(rows["step_time_s"]["value"])
    if "tokens_per_s_per_chip" in rows:
        return job.global_batch_tokens / cluster.chips / float(rows["tokens_per_s_per_chip"]["value"])
    if source.flops is None:
        return None
    peak = cluster.chip.bf16_flops.value or 0.0
    if "hw_tflops_per_s_per_chip" in rows and source.flops == "hardware":
        rate = float(rows["hw_tflops_per_s_per_chip"]["value"]) * 1e12
        head = 6.0 * job.model.vocab * job.model.dim
        per_token = (model_flops_per_token(job.model, job.seq_len, False) - head) * 4 / 3 + head
    elif "tflops_per_s_per_chip" in rows:
        rate = float(rows["tflops_per_s_per_chip"]["value"]) * 1e12
        per_token = model_flops_per_token(job.model, job.seq_len, source.flops == "half")
    elif "mfu_pct" in rows:
        rate = float(rows["mfu_pct"]["value"]) / 100 * peak
        per_token = model_flops_per_token(job.model, job.seq_len, source.flops == "half")
    else:
        return None
    return job.global_batch_tokens * per_token / cluster.chips / rate


def _memory(rows: Mapping[str, Row]) -> float | None:
    if "peak_mem_gib" in rows:
        return float(rows["peak_mem_gib"]["value"]) * 2**30
    if "peak_mem_gb" in rows:
        return float(rows["peak_mem_gb"]["value"]) * 1e9
    return None


@functools.cache
def shipped(folder: Path) -> tuple[tuple[PublishedRun, ...], tuple[LeftOutRun, ...]]:
    """Read the published runs and the sweep that lie in `folder`."""
    runs, left_out = read(folder / "published_runs.csv", folder / "layout_sweep_a100.csv")
    return tuple(runs), tuple(left_out)
