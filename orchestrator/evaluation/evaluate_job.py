"""Evaluation of a checkpoint's model: what the processes of the verb `evaluate` do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.convert import from_dict
from orchestrator.config.schema import DataConfig
from orchestrator.data.tokenize import Tokenizer
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.evaluation.evaluate_tasks import Evaluated
from orchestrator.observe.bar import Bar
from orchestrator.runs.stored_model import tokenizer_of
from orchestrator.strategies.served_model import ServedModel


def evaluate_tasks(served: ServedModel, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Evaluate tasks of lm-eval's: a task of `launch.model_job`.

    Args:
        served: the model.
        arguments: `tasks`, the fields of a `TaskRequest`, and what `_evaluated` reads.

    Returns:
        The results, with lm-eval's own keys; None on the processes that follow.
    """

    def work(evaluated: Evaluated) -> dict[str, Any] | None:
        def ask(model: Any) -> dict[str, Any]:
            from orchestrator.evaluation.harness_tasks import HarnessTasks, TaskRequest

            return HarnessTasks(TaskRequest.from_dict(arguments["tasks"])).run(model)

        return evaluated.lead_harness(ask)

    return _watched(served, arguments, work)


def evaluate_texts(served: ServedModel, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Measure the loss on texts: a task of `launch.model_job`.

    Args:
        served: the model.
        arguments: `path`, `split`, `limit`, `data` (the group of the configuration), and what `_evaluated` reads.

    Returns:
        What was measured; None on the processes that follow.
    """

    def work(evaluated: Evaluated) -> dict[str, Any] | None:
        from orchestrator.evaluation.text_loss import measure_texts, read_texts

        def measure(score: Any) -> dict[str, Any]:
            config = from_dict(DataConfig, dict(arguments["data"]))
            texts = read_texts(arguments["path"], evaluated.tokenizer, config, arguments["split"])
            found = measure_texts(texts, score, evaluated.longest, arguments["limit"])
            return {"data": arguments["path"], **found.to_dict(), **dict(evaluated.facts or {})}

        return evaluated.lead_scores(measure)

    return _watched(served, arguments, work)


def _watched(
    served: ServedModel, arguments: Mapping[str, Any], work: Callable[[Evaluated], dict[str, Any] | None]
) -> dict[str, Any] | None:
    shown = served.parallel.rank == 0 and served.config.logger.progress
    with Bar("evaluate", None, shown, unit=" requests") as bar:
        return work(_evaluated(served, arguments, bar.add))


def _evaluated(served: ServedModel, arguments: Mapping[str, Any], heard: Callable[[int], object]) -> Evaluated:
    checkpoint, parallel, config = served.checkpoint, served.parallel, served.config
    longest, most = arguments["max_length"] or config.model.max_seq_len, config.model.max_seq_len
    if longest > most:
        raise ConfigError("the model takes fewer tokens", got=f"max_length={longest}", allowed=f"1 to {most}")
    layout = {axis: degree for axis, degree in parallel.layout.as_dict().items() if degree != 1}
    facts = {
        "model_args": {
            "checkpoint": str(checkpoint.directory),
            "step": checkpoint.step,
            "target": parallel.target.name,
            "layout": layout,
        },
        "model_num_parameters": sum(math.prod(p.shape) for p in parallel.placements[served.model].values()),
        "model_dtype": parallel.precision,
    }
    return Evaluated(
        served.model,
        parallel,
        needed_tokenizer(checkpoint),
        longest,
        arguments["batch_tokens"],
        arguments["add_bos_token"],
        facts,
        heard,
    )


def needed_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Return the tokenizer that travels with a checkpoint.

    Args:
        checkpoint: whose model is given text.

    Raises:
        CheckpointError: there is none.
    """
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None or tokenizer.is_nameless:
        raise CheckpointError(
            "the checkpoint carries no tokenizer, so its model cannot be given text",
            got=Path(str(checkpoint.directory)),
            fix="import it again with the model's: checkpoint import ... tokenizer=PATH of a tokenizer.json",
        )
    return tokenizer
