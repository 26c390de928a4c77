"""`python -m orchestrator rehearse`: whether a run fits a TPU, by Google's own compiler and without a TPU.

The optimizer step of the run is written down by a process with torch_xla (`rehearsal.stage`) and compiled by another
one with libtpu (`launch.tpu_compiler`). Nothing is executed and no weight is allocated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.config.options import describe_options, option, parse_options

if TYPE_CHECKING:
    from orchestrator.api.rehearsing import Rehearsal
    from orchestrator.config.compose import Composed
    from orchestrator.config.schema import RunConfig
    from orchestrator.rehearsal.tpu_compiler import Verdict

_PROGRAM = "python -m orchestrator rehearse"
_GIB = 1024**3
EXIT_CODES = {"fits": 0, "does not fit": 1, "unknown": 3}

_HELP = """usage: {program} topology=KIND:SIZE [group=option ...] [key=value ...]

Compile the training step for a TPU on a machine without one, and say whether it fits its memory. The configuration is
that of `train`; hardware=tpu is implied.

Options
{options}

Examples
  {program} topology=v5e:16x16 model=llama3_8b train.remat=full \\
      train.seq_len=2048 train.global_batch_tokens=65536 layout.fsdp=32 layout.tensor=8
  {program} topology=v6e:4x4 experiment=laptop_20m json=true
  {program} topology=2xv5p:4x4x4 model=llama3_8b layout.replicate=2 ...

Kinds of chip: v2, v3, v4, v5e, v5p, v6e, v7x. Chips of v2, v3 and v7x count as two devices each. With several slices,
layout.replicate is a multiple of their number.

Exits with 0 where it fits, 1 where it does not, 3 where the compiler gave no answer."""


@dataclass(frozen=True)
class RehearseOptions:
    """Options of `rehearse`; everything else is `train`'s."""

    topology: str = option(help="chips and how they are wired: v5e:16x16, v4:4x4x4; two slices: 2xv5e:16x16")
    timeout_seconds: float = option(1800.0, help="of the compiler, after which the verdict is unknown")
    json: bool = option(False, help="print JSON")


def main(argv: list[str]) -> int:
    """Run the verb. Returns a code of `EXIT_CODES`.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: what of the configuration, the topology or the environments is wrong.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP.format(program=_PROGRAM, options=describe_options(RehearseOptions)))
        return 0
    from orchestrator.config.compose import run_composed
    from orchestrator.planner.planned_models import refuse_planned_only

    refuse_planned_only(argv, "rehearse")
    own = [word for word in argv if word.partition("=")[0] in RehearseOptions.__dataclass_fields__]
    options = parse_options(RehearseOptions, own)
    words = [word for word in argv if word not in own]
    return run_composed(words, "orchestrator rehearse", lambda composed: _rehearse(composed, options))


def _rehearse(composed: Composed, options: RehearseOptions) -> int:
    from orchestrator.api.rehearsing import rehearse_config
    from orchestrator.interop.imported_source import with_imported
    from orchestrator.runs.init_from import settle

    config = settle(with_imported(composed), False, lambda text: None)
    result = rehearse_config(config, options.topology, options.timeout_seconds)
    if options.json:
        print(json.dumps({"topology": options.topology, **asdict(result)}, indent=2))
    else:
        print(_report(config, options.topology, result))
    return EXIT_CODES[result.verdict.status]


def _report(config: RunConfig, topology: str, result: Rehearsal) -> str:
    verdict, staged, train = result.verdict, result.staged, config.train
    sequences = train.global_batch_tokens // train.seq_len
    remat = "none" if train.remat == "auto" else train.remat  # a rehearsal plans nothing
    rows = [
        ("topology", f"{topology}, {result.devices} devices, {result.precision}"),
        ("batch", f"{train.global_batch_tokens:,} tokens = {sequences:,} sequences of {train.seq_len:,}"),
    ]
    if staged:
        rows += [
            ("model", f"{config.model.name}, {staged['parameters']:,} parameters, remat {remat}"),
            ("layout", staged["layout"]),
            ("step", f"{_passes(staged)}, written down in {staged['stage_seconds']:.1f} s"),
        ]
    rows.append(("verdict", verdict.status))
    if verdict.memory_bytes:
        rows += [("peak HBM", f"{_gib(verdict.memory_bytes['peak'])} per device"), ("of these", _parts(verdict))]
    if verdict.reason:
        rows.append(("reason" if verdict.status == "unknown" else "compiler", verdict.reason))
    if verdict.compile_seconds is not None:
        rows.append(("compiled", f"{verdict.compile_seconds:.1f} s"))
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def _passes(staged: dict[str, Any]) -> str:
    if staged["micro_batches"] == 1:
        return "one graph: forward, backward, clipping, optimizer"
    return f"graph of the last of {staged['micro_batches']} micro-batches of {staged['micro_batch']:,} sequences"


def _parts(verdict: Verdict) -> str:
    sizes = verdict.memory_bytes or {}
    kept = f"weights, optimizer state and batch {_gib(sizes['argument'])}"
    # Memory that is used again counts once in the peak and each time among the temporaries.
    reused = sizes["alias"] / max(1, sizes["output"])
    return f"{kept}; {reused:.0%} of the results take their place"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
