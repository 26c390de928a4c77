"""The order in which the ranks of a pipeline work off the micro-batches of a step.

The orders of the interleaved, zero-bubble and DualPipeV schedules are torch's (`torch.distributed.pipelining`), and so
is the placing of sends and receives, which cannot deadlock. Nothing here needs a process group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _ComputationType

from orchestrator.sharding.layout import Layout
from orchestrator.sharding.pipeline import rank_of_stage, schedule_problem

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
"""Passes: forward; backward, whole or first for what came in and later for the weights."""
SEND, RECEIVE, SEND_GRADIENT, RECEIVE_GRADIENT = "SEND_F", "RECV_F", "SEND_B", "RECV_B"

_TORCH: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}
_Orders = dict[int, list[_Action | None]]


class Action(NamedTuple):
    """Something that a rank does.

    Attributes:
        kind: one of the constants of this module.
        stage: number of the stage: its own, that computes, sends or receives.
        micro_batch: number of the micro-batch in the step.
    """

    kind: str
    stage: int
    micro_batch: int


@functools.lru_cache(maxsize=64)
def actions_of(layout: Layout, rank: int, micro_batches: int) -> tuple[Action, ...]:
    """List what a rank of a pipeline does in a step, in order.

    A number of micro-batches that the schedule does not take (in the handover check there is one) goes forward through
    all stages, and then backward.

    Args:
        layout: of the job.
        rank: of the pipeline.
        micro_batches: of the step.
    """
    if layout.schedule != "1f1b" and not schedule_problem(layout, micro_batches):
        order = _torch_order(layout, micro_batches)
    elif layout.virtual_stages == 1:
        order = _one_forward_one_backward(layout, micro_batches)
    else:
        order = _there_and_back(layout, micro_batches)
    computing = {one: [action for action in actions if action is not None] for one, actions in order.items()}
    whole = _add_send_recv(computing, lambda stage: rank_of_stage(layout, stage), layout.stages)
    return tuple(_flat(whole[rank]))


def _torch_order(layout: Layout, micro_batches: int) -> _Orders:
    # What the constructors of the schedules read of a stage.
    stages: Sequence[Any] = [
        SimpleNamespace(num_stages=layout.stages, group_size=layout.pipeline, group_rank=0, submod=None)
        for _ in range(layout.virtual_stages)
    ]
    order: _Orders = _TORCH[layout.schedule](stages, micro_batches).pipeline_order
    return order


def _one_forward_one_backward(layout: Layout, micro_batches: int) -> _Orders:
    order: _Orders = {}
    for rank in range(layout.pipeline):
        ahead = min(micro_batches, layout.pipeline - rank - 1)
        forward, backward = (
            [_Action(rank, _ComputationType(kind), number) for number in range(micro_batches)] for kind in "FB"
        )
        both = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
        order[rank] = [*forward[:ahead], *both, *backward[micro_batches - ahead :]]
    return order


def _there_and_back(layout: Layout, micro_batches: int) -> _Orders:
    order: _Orders = {rank: [] for rank in range(layout.pipeline)}
    for kind, stages in (("F", range(layout.stages)), ("B", range(layout.stages - 1, -1, -1))):
        for number in range(micro_batches):
            for stage in stages:
                order[rank_of_stage(layout, stage)].append(_Action(stage, _ComputationType(kind), number))
    return order


def _flat(actions: Sequence[_Action]) -> Iterator[Action]:
    for action in actions:
        if action.sub_actions is not None:  # a forward and a backward pass that may overlap
            yield from _flat(action.sub_actions)
        elif action.microbatch_index is not None:
            yield Action(action.computation_type.value, action.stage_index, action.microbatch_index)
