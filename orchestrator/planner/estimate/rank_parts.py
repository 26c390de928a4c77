"""What each rank of a pipeline has of the model, and of how many micro-batches it holds activations. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planner.estimate.stages import layers_of_ranks
from orchestrator.planner.estimate.work import sparse_layers
from orchestrator.planner.spec import JobSpec, ParallelPlan


@dataclass(frozen=True)
class Part:
    """What one rank of a pipeline has of the model.

    Attributes:
        layers: of them, how many have no experts, and how many have.
        first: the embedding is here.
        last: so is the head.
        in_flight: micro-batches that have gone forward through these layers and not backward, at most.
    """

    layers: tuple[int, int]
    first: bool = True
    last: bool = True
    in_flight: float = 1.0


def parts_of(job: JobSpec, plan: ParallelPlan) -> list[Part]:
    """List the parts of the ranks of a pipeline; without one there is one part, the whole.

    Args:
        job: model, batch and precision.
        plan: the layout and its settings.
    """
    shape, pipeline = job.model, plan.pipeline
    dense = shape.layers - sparse_layers(shape)
    if pipeline == 1:
        return [Part((dense, shape.layers - dense))]
    found = []
    ranks = layers_of_ranks(shape, job.seq_len, pipeline, plan.virtual_stages, plan.schedule)
    for rank, stages in enumerate(ranks):
        layers = [layer for stage in stages for layer in stage]
        without = sum(layer < dense for layer in layers)
        last = layers[-1] == shape.layers - 1
        flying = in_flight(plan, rank, plan.micro_batches(job) or 2 * pipeline)
        found.append(Part((without, len(layers) - without), layers[0] == 0, last, flying))
    return found


def in_flight(plan: ParallelPlan, rank: int, micro_batches: int) -> float:
    """Return how many micro-batches a rank's layers hold activations of, at most: of chunks, the mean over a rank's.

    1F1B runs as many forward passes ahead as there are later ranks; interleaved chunks twice as many and those of all
    chunks but one; a zero bubble waits with the gradients of weights until all ranks hold as many as the first; and
    DualPipeV holds one more than the ranks on each. Sources: `torch.distributed.pipelining.schedules`.

    Args:
        plan: the layout and its settings.
        rank: of the pipeline.
        micro_batches: of a step.
    """
    ranks, chunks = plan.pipeline, plan.virtual_stages
    if plan.schedule == "zero_bubble":
        return float(min(micro_batches, ranks))
    if plan.schedule == "dualpipe_v":
        return min(float(micro_batches), ranks + 0.5)
    if chunks == 1:
        return float(min(micro_batches, ranks - rank))
    in_round = micro_batches // max(1, micro_batches // ranks)
    return min(float(micro_batches), ((chunks - 1) * in_round + 2 * (ranks - 1 - rank) + 1) / chunks)
