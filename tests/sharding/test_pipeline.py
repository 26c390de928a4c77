"""Stages of a pipeline: which rank has which layers, and what does not fit, said before anything starts."""

from __future__ import annotations

import pytest

from orchestrator.config.schema import LayoutConfig, ModelConfig
from orchestrator.sharding.layout import Layout, resolve_layout
from orchestrator.sharding.pipeline import (
    check_pipeline,
    even_stages,
    micro_batch_of,
    rank_of_stage,
    schedule_problem,
    stages_of,
)

MODEL = ModelConfig(layers=4, vocab_size=256)


def _layout(pipeline: int, **keys) -> Layout:
    return resolve_layout(LayoutConfig(pipeline=pipeline, **keys), pipeline)


def test_layers_are_divided_evenly_with_the_longer_stages_in_the_middle():
    assert even_stages(8, 4) == (2, 2, 2, 2)
    assert even_stages(6, 4) == (1, 2, 2, 1)
    stages = stages_of(_layout(4), 6)
    assert [list(stage.layers) for stage in stages] == [[0], [1, 2], [3, 4], [5]]
    assert [(stage.first, stage.last) for stage in stages] == [(True, False), *[(False, False)] * 2, (False, True)]


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("1f1b", [0, 1]), ("interleaved", [0, 1, 0, 1]), ("zero_bubble", [0, 1]), ("dualpipe_v", [0, 1, 1, 0])],
)
def test_stages_are_dealt_out_by_the_schedule(schedule, ranks):
    layout = _layout(2, schedule=schedule)
    assert [rank_of_stage(layout, stage) for stage in range(layout.stages)] == ranks


def test_without_a_pipeline_there_is_one_stage():
    (stage,) = stages_of(_layout(1, schedule="dualpipe_v", virtual_stages=2), 3)
    assert (stage.first, stage.last, list(stage.layers)) == (True, True, [0, 1, 2])


def test_micro_batches_are_large_while_every_rank_has_enough_to_do():
    assert micro_batch_of(_layout(2), 64) == 8
    assert micro_batch_of(_layout(4), 8) == 1
    assert micro_batch_of(_layout(2, schedule="dualpipe_v"), 4) == 1


@pytest.mark.parametrize(
    ("keys", "sequences", "micro_batch", "says"),
    [
        ({"pipeline": 8}, 32, 1, "deeper than the model"),
        ({"pipeline": 4, "schedule": "interleaved"}, 32, 1, "deeper than the model"),
        ({"pipeline": 2, "stage_layers": (3, 2)}, 8, 1, "stage_layers"),
        ({"pipeline": 2, "virtual_stages": 2}, 8, 1, "1 stage per rank"),
        ({"pipeline": 4}, 8, 4, "cannot be filled"),
        ({"pipeline": 2, "schedule": "interleaved"}, 5, 1, "cannot be filled"),
        ({"pipeline": 2, "schedule": "dualpipe_v"}, 3, 1, "cannot be filled"),
    ],
)
def test_what_does_not_fit_is_said_once(keys, sequences, micro_batch, says):
    (problem,) = check_pipeline(_layout(**keys), MODEL, sequences, micro_batch)
    assert says in str(problem)


def test_some_blocks_have_no_divided_backward_pass():
    layout = _layout(2, schedule="zero_bubble")
    (problem,) = check_pipeline(layout, MODEL, 8, 1, compiled=True)
    assert "compile" in str(problem)
    (problem,) = check_pipeline(layout, MODEL, 8, 1, remat="selective")
    assert "train.remat=full" in str(problem)
    assert not check_pipeline(layout, MODEL, 8, 1, remat="full")
    assert not check_pipeline(layout, MODEL, 8, 1)


def test_a_single_micro_batch_fits_no_pipeline():
    assert schedule_problem(_layout(2), 1) == "2 or more"
