"""Orders of passes, worked off by simulated ranks: nothing waits for ever, nothing is left out."""

from __future__ import annotations

from collections import Counter, deque

import pytest

from orchestrator.config.schema import LayoutConfig
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.sharding.pipeline import rank_of_stage
from orchestrator.strategies.pipeline_schedule import actions_of

CASES = [
    (schedule, pipeline, count)
    for schedule in ("1f1b", "interleaved", "zero_bubble", "dualpipe_v")
    for pipeline, count in ((2, 1), (2, 3), (2, 4), (2, 8), (4, 2), (4, 8), (4, 12))
]


def _layout(schedule: str, pipeline: int) -> Layout:
    return resolve_layout(LayoutConfig(pipeline=pipeline, schedule=schedule), pipeline)


@pytest.mark.parametrize(("schedule", "pipeline", "count"), CASES)
def test_every_pass_is_made_once_and_every_message_arrives_in_order(schedule, pipeline, count):
    layout = _layout(schedule, pipeline)
    queues = {rank: deque(actions_of(layout, rank, count)) for rank in range(pipeline)}
    passes: Counter = Counter()
    sent: dict[tuple[int, int], deque] = {}
    posted: dict[tuple[int, int], deque] = {}
    done: set = set()
    while any(queues.values()):
        before = sum(map(len, queues.values()))
        for rank, queue in queues.items():
            while queue:
                kind, stage, number = queue[0]
                other = stage + 1 if kind in ("SEND_F", "RECV_B", "B", "I") else stage - 1
                if kind in ("SEND_F", "SEND_B"):
                    sent.setdefault((rank, rank_of_stage(layout, other)), deque()).append((kind[-1], other, number))
                elif kind in ("RECV_F", "RECV_B"):
                    posted.setdefault((rank_of_stage(layout, other), rank), deque()).append((kind[-1], stage, number))
                elif not _ready(kind, stage, number, layout, done):
                    break
                else:
                    passes[kind, stage, number] += 1
                    done.add((rank, kind, stage, number))
                queue.popleft()
        _deliver(sent, posted, done)
        if sum(map(len, queues.values())) == before and not _deliver(sent, posted, done):
            raise AssertionError({rank: queue[0] for rank, queue in queues.items() if queue})
    assert not any(sent.values())
    assert not any(posted.values())
    for stage in range(layout.stages):
        for number in range(count):
            assert passes["F", stage, number] == 1
            whole, apart = passes["B", stage, number], (passes["I", stage, number], passes["W", stage, number])
            assert (whole, apart) in ((1, (0, 0)), (0, (1, 1)))


def _ready(kind, stage, number, layout, done) -> bool:
    rank = rank_of_stage(layout, stage)
    if kind == "W":
        return (rank, "I", stage, number) in done
    if kind == "F":
        if stage == 0 or (rank, "F", stage - 1, number) in done:
            return True
        return (rank, "arrived", "F", stage, number) in done
    if (rank, "F", stage, number) not in done:
        return False
    if stage + 1 == layout.stages or {(rank, kind, stage + 1, number) for kind in "BI"} & done:
        return True
    return (rank, "arrived", "B", stage, number) in done


def _deliver(sent, posted, done) -> bool:
    """Messages between two ranks arrive in the order in which they were sent and asked for, or not at all."""
    any_came = False
    for pair in sent:
        while sent[pair] and posted.get(pair):
            message = sent[pair].popleft()
            assert message == posted[pair].popleft(), "sent and received in another order"
            done.add((pair[1], "arrived", *message))
            any_came = True
    return any_came


def test_one_forward_one_backward_keeps_few_micro_batches_at_a_time():
    for rank in range(4):
        held, most = 0, 0
        for kind, _, _ in actions_of(_layout("1f1b", 4), rank, 12):
            held += {"F": 1, "B": -1}.get(kind, 0)
            most = max(most, held)
        assert most == 4 - rank
