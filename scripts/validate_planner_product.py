"""The planner's memory against the product's own strategies: traces of the torch-native step, and compiled XLA steps.

Both were taken without devices and are kept as data (`tests/planner/data/product_*.yaml`), so that the comparison takes
a second. A line of `CASES` reads: model, degrees of the layout, then `seq=` tokens, `batch=` sequences of a micro-batch
and data-parallel group, `micro=` micro-batches, `reduce=last` where only the last one's gradients are reduced (else
each one's), `vocab=` where the model leaves it to the tokenizer, precision,
`remat=`, `schedule=` of a pipeline, and `mask` where attention stays within documents.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.chips.load import load_catalogue
from orchestrator.config.compose import compose
from orchestrator.config.schema import RunConfig
from orchestrator.planner.estimate.memory import estimate_memory
from orchestrator.planner.spec import Cluster, JobSpec, MemoryEstimate, ModelShape, ParallelPlan
from orchestrator.sharding.axes import MESH_AXES
from orchestrator.sharding.layout import VIRTUAL_STAGES

if TYPE_CHECKING:
    from orchestrator.rehearsal.memory_trace import Trace

ROOT = Path(__file__).parents[1]
TRACES = ROOT / "tests" / "planner" / "data" / "product_traces.yaml"
COMPILED = ROOT / "tests" / "planner" / "data" / "product_compiled.yaml"
DOCUMENT = ROOT / "docs" / "planner-accuracy-product.md"
GIB = 2**30
VOCABULARY = 4096  # of models that leave it to the tokenizer
CHIPS = {"v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e"}

CASES = """
tiny seq=256 batch=16 fp32
tiny fsdp=8 seq=256 batch=16 fp32
tiny fsdp=4,tensor=2 seq=256 batch=8 fp32 mask
tiny_gpt2 replicate=2,fsdp=4 seq=256 batch=8 fp32
tiny_qwen3 fsdp=4,context=2 seq=256 batch=8 fp32
llama_20m seq=256 batch=16 fp32 mask
llama_20m fsdp=2 seq=256 batch=8 fp32 mask
llama_20m seq=256 batch=8 micro=4 fp32
llama_125m fsdp=8 seq=1024 batch=8 fp32
llama_125m fsdp=8 seq=1024 batch=8 bf16 remat=selective
llama_125m replicate=8 seq=1024 batch=4 bf16
gpt2 fsdp=8 seq=1024 batch=8 fp32
gpt2 replicate=2,fsdp=4 seq=1024 batch=8 bf16 remat=full
gpt2 seq=1024 batch=4 fp32
llama3_2_1b fsdp=8 seq=4096 batch=1 bf16
llama3_2_1b fsdp=8 seq=4096 batch=2 bf16 remat=full
llama3_2_1b fsdp=8 seq=4096 batch=1 micro=4 bf16
llama3_2_1b fsdp=8 seq=4096 batch=1 micro=4 reduce=last bf16
llama3_2_1b fsdp=4,context=4 seq=32768 batch=1 bf16 remat=selective
llama3_2_1b fsdp=8,tensor=4 seq=8192 batch=2 bf16 remat=selective
llama3_8b fsdp=8 seq=4096 batch=1 bf16 remat=full
llama3_8b fsdp=64 seq=4096 batch=1 bf16
llama3_8b fsdp=64 seq=8192 batch=2 bf16 remat=selective
llama3_8b fsdp=64 seq=8192 batch=4 bf16 remat=full
llama3_8b fsdp=8,tensor=8 seq=8192 batch=1 bf16
llama3_8b fsdp=8,tensor=8 seq=8192 batch=4 bf16 remat=selective
llama3_8b fsdp=8,tensor=8 seq=8192 batch=4 bf16 remat=full
llama3_8b fsdp=32,tensor=8 seq=4096 batch=4 fp32
llama3_8b replicate=4,fsdp=64 seq=8192 batch=1 bf16 remat=full
llama3_8b replicate=4,fsdp=8,tensor=2 seq=4096 batch=2 bf16 remat=selective
llama3_8b fsdp=16,context=4 seq=32768 batch=1 bf16 remat=full
llama3_8b fsdp=64 seq=4096 batch=1 micro=4 bf16
llama3_8b fsdp=64 seq=4096 batch=1 micro=4 reduce=last bf16
llama3_8b fsdp=8,tensor=8 seq=8192 batch=1 micro=4 bf16 remat=full
llama3_8b fsdp=8,tensor=8 seq=8192 batch=1 micro=4 reduce=last bf16 remat=full
llama3_8b fsdp=64 seq=4096 batch=1 bf16 mask
llama3_8b fsdp=64 seq=4096 batch=1 bf16 remat=full mask
mistral_7b fsdp=32 seq=8192 batch=1 bf16 remat=selective
qwen3_8b fsdp=32 seq=4096 batch=1 bf16
qwen3_8b fsdp=32 seq=4096 batch=2 bf16 remat=full
llama3_70b fsdp=256 seq=8192 batch=1 bf16 remat=full
llama3_70b fsdp=32,tensor=8 seq=8192 batch=2 bf16 remat=selective
llama3_70b fsdp=64,tensor=8 seq=8192 batch=4 bf16 remat=full
llama3_70b fsdp=32,context=2,tensor=8 seq=16384 batch=1 bf16 remat=full
llama3_405b fsdp=64,tensor=8 seq=8192 batch=1 bf16 remat=full
qwen3_14b fsdp=16,tensor=4 seq=4096 batch=2 bf16 remat=selective
qwen3_0_6b fsdp=4,tensor=2 seq=2048 batch=4 micro=2 bf16
qwen3_0_6b fsdp=4,tensor=2 seq=2048 batch=4 micro=2 reduce=last bf16
mistral_7b fsdp=8,context=2,tensor=2 seq=16384 batch=1 bf16 remat=full mask
llama3_405b replicate=2,fsdp=32,tensor=8 seq=4096 batch=1 bf16 remat=selective
gpt2 replicate=2,fsdp=4 seq=1024 batch=4 micro=2 bf16 remat=full
gpt2 replicate=2,fsdp=4 seq=1024 batch=4 micro=2 reduce=last bf16 remat=full
llama_125m replicate=8 seq=1024 batch=2 micro=2 bf16
llama3_8b replicate=4,fsdp=64 seq=8192 batch=1 micro=2 bf16 remat=full
llama3_70b fsdp=64,tensor=8 seq=8192 batch=1 micro=4 bf16 remat=full
tiny_moe seq=256 batch=16 fp32
tiny_moe expert=4 seq=256 batch=16 fp32
mixtral_8x7b fsdp=8,expert=8 seq=4096 batch=1 bf16 remat=full
mixtral_8x7b fsdp=8,expert=8 seq=4096 batch=1 bf16
mixtral_8x7b fsdp=64 seq=4096 batch=1 bf16 remat=full
tiny_moe fsdp=2,expert=2 seq=256 batch=8 bf16
mixtral_8x7b fsdp=4,expert=8,tensor=2 seq=4096 batch=2 bf16 remat=selective
qwen3_30b_a3b fsdp=4,expert=16 seq=4096 batch=2 bf16 remat=full
mixtral_8x7b replicate=2,fsdp=8,expert=4 seq=8192 batch=1 micro=2 bf16 remat=full
qwen3_30b_a3b expert=32,context=2 seq=8192 batch=1 bf16
tiny pipeline=2 seq=256 batch=4 micro=4 fp32
tiny pipeline=2,fsdp=2 seq=256 batch=4 micro=4 bf16
tiny_moe pipeline=2,expert=2 seq=256 batch=4 micro=4 fp32
tiny pipeline=2 schedule=interleaved seq=256 batch=4 micro=4 fp32
"""


@dataclass(frozen=True)
class Case:
    """A line of `CASES`."""

    text: str

    @cached_property
    def _words(self) -> dict[str, str]:
        words = dict.fromkeys(self.text.replace(",", " ").split()[1:], "")
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def number(self, name: str) -> int:
        return int(self._words.get(name, 1))

    @cached_property
    def plan(self) -> ParallelPlan:
        degrees = {axis: self.number(axis) for axis in MESH_AXES}
        remat: Any = self._words.get("remat", "none")
        reduce: Any = self._words.get("reduce", "each")
        schedule: Any = self._words.get("schedule", "1f1b")
        return ParallelPlan(
            **degrees,
            micro_batch=self.number("batch"),
            remat=remat,
            reduce_gradients=reduce,
            schedule=schedule,
            virtual_stages=VIRTUAL_STAGES[schedule] if degrees["pipeline"] > 1 else 1,
        )

    @cached_property
    def config(self) -> RunConfig:
        """The run that is traced. Without dropout, whose attention on a CPU is another kernel than elsewhere."""
        plan, seq_len = self.plan, self.number("seq")
        tokens = seq_len * plan.micro_batch * self.number("micro") * plan.data_parallel
        precision = "fp32" if "fp32" in self._words else "bf16"
        config = compose(
            [
                "hardware=cpu",
                f"hardware.precision={precision}",
                f"model={self.text.split()[0]}",
                "model.dropout=0",
                *(f"layout.{axis}={getattr(plan, axis)}" for axis in MESH_AXES),
                f"layout.schedule={plan.schedule}",
                f"train.remat={plan.remat}",
                f"train.reduce_gradients={plan.reduce_gradients}",
                f"train.seq_len={seq_len}",
                f"train.micro_batch_size={plan.micro_batch}",
                f"train.global_batch_tokens={tokens}",
                f"data.document_mask={'mask' in self._words}",
            ]
        ).config
        if config.model.vocab_size == "auto":
            size = int(self._words.get("vocab", VOCABULARY))
            config = replace(config, model=replace(config.model, vocab_size=size))
        return config

    @cached_property
    def job(self) -> JobSpec:
        config = self.config
        precision: Any = config.hardware.precision
        return JobSpec(
            ModelShape.of(config.model),
            config.train.seq_len,
            config.train.global_batch_tokens,
            precision=precision,
            stack="orchestrator",
            loss_chunk_tokens=config.train.loss_chunk_tokens,
            document_mask=config.data.document_mask,
        )

    def predict(self, chip: str = "cpu-generic") -> MemoryEstimate:
        """For a device whose kernels are those of the trace."""
        cluster = Cluster(load_catalogue().get(chip), self.plan.devices)
        return estimate_memory(self.job, cluster, self.plan)


def cases() -> list[Case]:
    return [Case(line) for line in CASES.strip().splitlines()]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {} if path.exists() else {}


def _fullest(case: Case) -> Trace:
    """Trace a step; on a pipeline the first rank of each of its stages, with all layers."""
    from orchestrator.rehearsal.memory_trace import trace_deep, trace_step

    plan = case.plan
    if plan.pipeline == 1:
        return trace_deep(case.config, plan.devices)
    stride = plan.shards * plan.tensor
    traces = [trace_step(case.config, plan.devices, rank * stride) for rank in range(plan.pipeline)]
    return max(traces, key=lambda found: found.peak.total)


def trace(limit: float) -> None:
    """Trace up to `limit` of the cases that have no trace yet; each takes seconds and is kept when it is done."""
    from tqdm import tqdm

    known = read(TRACES)
    missing = [case for case in cases() if case.text not in known]
    for case in tqdm(missing[: int(min(limit, len(missing)))]):
        found = _fullest(case)
        known[case.text] = {phase: round(memory.total) for phase, memory in found.phases.items()}
        ordered = {one.text: known[one.text] for one in cases() if one.text in known}
        TRACES.write_text(
            "# Bytes alive on rank 0 at the fullest moment of each phase of a step; scripts/validate_planner_product.\n"
            + yaml.safe_dump(ordered, sort_keys=False, width=120)
        )


def traced_table() -> tuple[list[str], list[float]]:
    """Rows of the table, and the relative errors of the peaks."""
    known, errors = read(TRACES), []
    lines = ["| case | predicted GiB | traced GiB | error | fullest in |", "|---|---|---|---|---|"]
    for case in cases():
        if case.text not in known:
            continue
        phases = known[case.text]
        peak, at = max(phases.values()), max(phases, key=lambda phase: phases[phase])
        predicted = case.predict().total
        errors.append(predicted / peak - 1)
        where = at.replace("_", " ")
        lines.append(f"| {case.text} | {predicted / GIB:.2f} | {peak / GIB:.2f} | {100 * errors[-1]:+.1f}% | {where} |")
    return lines, errors


def compiled_table() -> tuple[list[str], list[float]]:
    """The same of programs that the TPU's compiler has compiled, with `rehearse`."""
    errors = []
    lines = ["| case | topology | predicted GiB | compiled GiB | error |", "|---|---|---|---|---|"]
    for text, found in read(COMPILED).items():
        case, topology, peak = Case(text), found["topology"], found["peak_bytes"]
        predicted = case.predict(CHIPS[topology.partition(":")[0]]).total
        errors.append(predicted / peak - 1)
        lines.append(f"| {text} | {topology} | {predicted / GIB:.2f} | {peak / GIB:.2f} | {100 * errors[-1]:+.1f}% |")
    return lines, errors


def summary(errors: Sequence[float]) -> str:
    sizes = sorted(map(abs, errors))
    p90 = sizes[math.ceil(0.9 * len(sizes)) - 1]
    return (
        f"{len(sizes)} cases: median absolute error {100 * statistics.median(sizes):.1f}%, 90th percentile "
        f"{100 * p90:.1f}%, largest {100 * sizes[-1]:.1f}%."
    )


def renew(name: str, lines: Sequence[str]) -> None:
    """Put `lines` into the document, between the marks of `name`."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert end, f"{DOCUMENT} has no place for {name}"
    DOCUMENT.write_text(before + mark + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="trace the cases that have no trace yet")
    parser.add_argument("--limit", type=float, default=math.inf, help="of the cases to trace")
    parser.add_argument("--write", action="store_true", help=f"renew {DOCUMENT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.trace:
        trace(arguments.limit)
    tables = {"traced": traced_table(), "compiled": compiled_table()}
    for name, (lines, errors) in tables.items():
        told = [*lines, "", summary(errors)]
        print("\n".join(["", name, *told]))
        if arguments.write:
            renew(name, told)


if __name__ == "__main__":
    main()
