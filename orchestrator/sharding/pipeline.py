"""A pipeline: which layers a rank has, and how many micro-batches its schedule takes. Pure.

The layers are divided into stages in their order, one or more for each rank. The first stage has what is before the
layers, the last one norm and head. Schedules with one stage per rank give stage s to rank s; `interleaved` and
`zero_bubble` deal the stages out in rounds; `dualpipe_v` goes there and back, so that the first rank has the first
stage and the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.schema import ModelConfig
from orchestrator.errors import LayoutError
from orchestrator.sharding.layout import VIRTUAL_STAGES, Layout

DIVIDED_BACKWARD = ("zero_bubble", "dualpipe_v")
"""Schedules that compute the gradients of activations and of weights apart."""
_BUSY = 4  # micro-batches per rank with which a pipeline idles little


@dataclass(frozen=True)
class Stage:
    """A stretch of the model.

    Attributes:
        index: of the stage, from 0.
        count: stages that there are.
        layers: numbers of its layers.
    """

    index: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether it begins with the tokens."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it ends with the head."""
        return self.index + 1 == self.count


def stages_of(layout: Layout, layers: int) -> list[Stage]:
    """Divide the layers into stages: as the layout says, else evenly, with the longer ones in the middle.

    Args:
        layout: of the job.
        layers: of the model.

    Raises:
        LayoutError: there are fewer layers than stages, or the layout's numbers do not add up.
    """
    sizes = layout.stage_layers or even_stages(layers, layout.stages)
    if problem := _division_problem(layout, layers):
        raise problem
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        Stage(index, len(sizes), range(start, start + size))
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def even_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Divide `layers` over `stages`; those that have one more are in the middle, as the ends have other work.

    Args:
        layers: of the model.
        stages: of the pipeline.
    """
    each, more = divmod(layers, stages)
    first = (stages - more) // 2
    return tuple(each + (first <= index < first + more) for index in range(stages))


def rank_of_stage(layout: Layout, stage: int) -> int:
    """Return which rank of a pipeline has a stage.

    Args:
        layout: of the job.
        stage: its number.
    """
    turn, at = divmod(stage, layout.pipeline)
    return layout.pipeline - 1 - at if layout.schedule == "dualpipe_v" and turn % 2 else at


def micro_batch_of(layout: Layout, sequences: int) -> int:
    """Choose the size of micro-batches for a pipeline: large ones, as long as the ranks have enough to do.

    Args:
        layout: of the job.
        sequences: of a step, for each data-parallel group.
    """
    sizes = [size for size in range(sequences, 0, -1) if sequences % size == 0]
    fitting = [size for size in sizes if not schedule_problem(layout, sequences // size)]
    busy = [size for size in fitting if sequences // size >= _BUSY * layout.pipeline]
    return (busy or fitting[-1:] or [1])[0]


def schedule_problem(layout: Layout, micro_batches: int) -> str:
    """Return what is wrong with a number of micro-batches, for a message; empty where nothing is.

    Args:
        layout: of the job.
        micro_batches: of a step, for each data-parallel group.
    """
    least = layout.pipeline * (2 if layout.schedule == "dualpipe_v" else 1)
    if micro_batches < least:
        return f"{least} or more"
    rounds = micro_batches // layout.pipeline
    if layout.schedule in ("interleaved", "zero_bubble") and micro_batches % rounds:
        return f"a multiple of {rounds}, as they go through in {rounds} rounds"
    return ""


def no_pipelines(layout: Layout) -> LayoutError:
    """Return what is said of a pipeline on torch_xla.

    Args:
        layout: of the job.
    """
    return LayoutError(
        "there are no pipelines on torch_xla: one program there spans all devices, and does the same on each",
        got=f"layout.pipeline={layout.pipeline}",
        allowed="1",
        fix="divide by layout.fsdp or layout.tensor instead; TPUs and Trainium have pipelines through "
        "hardware.runtime=torch_tpu and torchneuron",
    )


def check_pipeline(
    layout: Layout,
    model: ModelConfig,
    sequences: int,
    micro_batch: int | None,
    compiled: bool = False,
    remat: str = "none",
) -> list[LayoutError]:
    """List what the model and the batch do not allow of a pipeline.

    Args:
        layout: of the job.
        model: of the run.
        sequences: of a step, for each data-parallel group.
        micro_batch: sequences of each; None: `micro_batch_of` chooses.
        compiled: whether blocks are compiled.
        remat: `train.remat`.
    """
    if layout.pipeline == 1:
        return []
    problems = []
    if model._target_ is None and (problem := _division_problem(layout, model.layers)):
        problems.append(problem)
    size = micro_batch_of(layout, sequences) if micro_batch is None else micro_batch
    count = -(-sequences // size)
    if allowed := schedule_problem(layout, count):
        problems.append(
            LayoutError(
                f"the schedule {layout.schedule} cannot be filled by the micro-batches of a step",
                got=f"{sequences} sequences per data-parallel group in micro-batches of {size}: {count}",
                allowed=f"{allowed}, with layout.pipeline={layout.pipeline}",
                fix="change train.micro_batch_size or train.global_batch_tokens, or lower layout.pipeline",
            )
        )
    if layout.schedule in DIVIDED_BACKWARD:
        for wrong, what, got, fix in (
            (compiled, "compiled blocks", "hardware.compile=true", "hardware.compile=false"),
            (remat == "selective", "blocks that keep some activations", "train.remat=selective", "train.remat=full"),
        ):
            if wrong:
                problems.append(
                    LayoutError(
                        f"{what} cannot compute the gradients of activations and of weights apart",
                        got=f"layout.schedule={layout.schedule} with {got}",
                        fix=f"set {fix}, or layout.schedule=1f1b or interleaved",
                    )
                )
    return problems


def _division_problem(layout: Layout, layers: int) -> LayoutError | None:
    sizes, stages = layout.stage_layers, layout.stages
    if layout.pipeline == 1:
        return None
    if layers < stages:
        several = layout.virtual_stages > 1
        return LayoutError(
            "the pipeline is deeper than the model",
            got=f"layout.pipeline={layout.pipeline}{f' x {layout.virtual_stages} stages' if several else ''} with "
            f"model.layers={layers}",
            allowed=f"at most {layers} stages: each has a layer or more",
            fix="lower layout.pipeline"
            + (", or set layout.schedule=1f1b, with one stage for each rank" if several else ""),
        )
    if sizes and (len(sizes) != stages or sum(sizes) != layers or min(sizes) < 1):
        return LayoutError(
            "layout.stage_layers does not divide the model",
            got=f"{list(sizes)}: {len(sizes)} stages with {sum(sizes)} layers",
            allowed=f"{stages} numbers from 1 on whose sum is model.layers={layers}",
            fix="leave it out: layers are then divided by their cost",
        )
    if layout.schedule in ("1f1b", "dualpipe_v") and layout.virtual_stages != VIRTUAL_STAGES[layout.schedule]:
        fixed = VIRTUAL_STAGES[layout.schedule]
        return LayoutError(
            f"the schedule {layout.schedule} has {fixed} stage{'s' if fixed > 1 else ''} per rank",
            got=f"layout.virtual_stages={layout.virtual_stages}",
            fix="leave it out, or set layout.schedule=interleaved",
        )
    return None
