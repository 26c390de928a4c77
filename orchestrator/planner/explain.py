"""Explain in words why a layout was chosen, and why the others are slower."""

from __future__ import annotations

import math

from orchestrator.planner.search import Candidate
from orchestrator.planner.spec import Cluster, ParallelPlan, TimeEstimate
from orchestrator.sharding.axes import MESH_AXES

# The order of the axes on the devices, from the fastest links outwards.
_INSIDE_OUT = tuple(reversed(MESH_AXES))
AXES = _INSIDE_OUT
"""Axes whose traffic is a part of the step."""
PARTS = {
    "compute": "matrix products",
    "memory_bound": "memory-bound kernels",
    "tensor": "tensor-parallel traffic",
    "context": "context-parallel traffic",
    "expert": "expert traffic",
    "fsdp": "gathering and scattering of fsdp",
    "replicate": "gradients between copies",
    "pipeline": "traffic between stages",
    "bubble": "pipeline bubble",
    "other": "fixed costs and stragglers",
}


def parts(time: TimeEstimate) -> dict[str, float]:
    """Return the seconds of the step by what the device waits for.

    Args:
        time: of a step.
    """
    return {name: float(getattr(time, name)) for name in PARTS}


def layout_text(plan: ParallelPlan) -> str:
    """Format the degrees above one and the rest: `fsdp 128 x tensor 8, micro-batch 1, remat none`.

    Args:
        plan: the layout and its settings.
    """
    degrees = [(axis, getattr(plan, axis)) for axis in MESH_AXES]
    words = " x ".join(f"{axis} {degree:,}" for axis, degree in degrees if degree > 1) or "one device"
    if plan.schedule not in ("1f1b", "interleaved"):
        words += f", {plan.schedule}"
    if plan.virtual_stages > 1:
        words += f", {plan.virtual_stages} chunks a stage"
    if plan.context > 1 and plan.context_kind != "gather":
        words += f", {plan.context_kind}"
    if plan.zero != 3 and plan.fsdp * plan.expert > 1:
        words += f", zero-{plan.zero}"
    late = ", gradients reduced in the last one" if plan.reduce_gradients == "last" else ""
    return f"{words}, micro-batch {plan.micro_batch}{late}, remat {plan.remat}"


def link_of(axis: str, plan: ParallelPlan, cluster: Cluster) -> str:
    """Return the slowest link that an axis' traffic crosses.

    Args:
        axis: of the mesh.
        plan: the layout and its settings.
        cluster: chips and links.
    """
    chip = cluster.chip
    topology = chip.topology
    domain = (
        cluster.domain_chips or topology.domain_chips or topology.chips_per_host or 1
    ) * chip.logical_devices_per_chip
    span = math.prod(getattr(plan, name) for name in _INSIDE_OUT[: _INSIDE_OUT.index(axis) + 1])
    if span > domain:
        return "the network between slices" if chip.vendor == "google" else "the network between hosts"
    return {
        "google": "ICI",
        "nvidia": "NVLink",
        "amd": "xGMI",
        "aws": "NeuronLink",
    }.get(chip.vendor, "the links inside a host")


def bound(candidate: Candidate, cluster: Cluster) -> str:
    """Explain what limits the step: `compute, 71% of the step; next fsdp over the network between hosts, 12%`.

    Args:
        candidate: the layout.
        cluster: chips and links.
    """
    shares = sorted(parts(candidate.time).items(), key=lambda item: -item[1])
    said = [
        _part(name, candidate, cluster, seconds / candidate.time.step) for name, seconds in shares[:2] if seconds > 0
    ]
    return "; next ".join(said)


def loses(loser: Candidate, best: Candidate) -> str:
    """Explain why a runner-up is slower, by time per token: `7% slower: pipeline bubble +9%, fsdp -2%`.

    Args:
        loser: the runner-up.
        best: the layout.
    """
    per_token = 1 / best.tokens_per_second
    slower = 1 / loser.tokens_per_second / per_token - 1
    mine, theirs = _per_token(best), _per_token(loser)
    changes = sorted(((theirs[name] - mine[name]) / per_token, name) for name in PARTS)
    worse = [f"{PARTS[name]} +{change:.0%}" for change, name in reversed(changes) if change > 0.005][:2]
    better = [f"{PARTS[name]} {change:.0%}" for change, name in changes if change < -0.005][:1]
    return f"{slower:.1%} slower: {', '.join([*worse, *better]) or 'no part stands out'}"


def _part(name: str, candidate: Candidate, cluster: Cluster, share: float) -> str:
    over = ""
    if name in AXES:
        over = f" over {link_of(name, candidate.plan, cluster)}"
    return f"{PARTS[name]}{over} ({share:.0%} of the step)"


def _per_token(candidate: Candidate) -> dict[str, float]:
    return {name: seconds / candidate.job.global_batch_tokens for name, seconds in parts(candidate.time).items()}
