"""A run that starts from the weights of a checkpoint (`train.init_from`): its model and tokenizer. No torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from orchestrator.checkpoint.adapters import adapter_record
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.storage import is_remote
from orchestrator.config import registry
from orchestrator.config.compose import Composed
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.config.validate import validate
from orchestrator.data.formats.find import BUILTIN
from orchestrator.data.model_files import TOKENIZER_FILE
from orchestrator.data.store import is_store
from orchestrator.data.tokenize import Tokenizer
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors
from orchestrator.runs import resume
from orchestrator.runs.stored_model import model_of, stored_config, tokenizer_of

# Keys that say which vocabulary it is; the others say what is made of it.
_WHICH_TOKENIZER = tuple(f"data.tokenizer{key}" for key in ("", ".kind", ".path", ".vocab_size"))


def settle(composed: Composed, verify: bool, report: Callable[[str], object]) -> RunConfig:
    """Return the configuration, with the model of the checkpoint where `train.init_from` names one.

    Args:
        composed: the configuration of this command line.
        verify: check the hashes of all but the tensors.
        report: told of what is passed over.

    Raises:
        UserError: as `find` and `settle_on`.
    """
    found = find(composed, verify, report)
    return settle_on(composed, None if found is None else found.checkpoint, report)


def find(composed: Composed, verify: bool, report: Callable[[str], object]) -> resume.ResumePoint | None:
    """Open the checkpoint that `train.init_from` names, if it names one.

    Args:
        composed: the command line.
        verify: as in `resume.find`.
        report: told of each checkpoint that is passed over.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is not trusted.
    """
    config = composed.config
    if config.train.init_from is None:
        return None
    return resume.find(config.train.init_from, config.runs_dir, verify, report, config.checkpoint)


def settle_on(composed: Composed, checkpoint: Checkpoint | None, report: Callable[[str], object]) -> RunConfig:
    """Return the configuration, with the model of `checkpoint` where the run starts from one.

    Keys of `model` on the command line are set on top of it, and `model=` replaces it. A tokenizer that travels with
    the checkpoint is used for text, unless the command line names one.

    Args:
        composed: the configuration of this command line.
        checkpoint: that the run starts from; None for random weights.
        report: told of what cannot be known.

    Raises:
        CheckpointError: it holds no model, or came without the tokenizer that its text needs.
        ConfigErrors: keys do not fit the model.
    """
    config = composed.config
    if checkpoint is None:
        return config
    found = checkpoint.directory
    # All processes read the same one, wherever they start and whatever is `latest` then.
    where = str(found if is_remote(found) else found.resolve())
    data = copy.deepcopy(to_dict(config))
    if "model" not in composed.overrides:
        own = config.model._target_ is not None
        data["model"] = to_dict(stored_config(checkpoint).model if own else model_of(checkpoint))
        resume.apply(composed, data, [key for key in composed.overrides if key.startswith("model.")])
    if TOKENIZER_FILE not in checkpoint.manifest.files:
        named = any(key in composed.overrides for key in _WHICH_TOKENIZER)
        _refuse_new_tokens(config, checkpoint, named, report)
    take_tokenizer(composed, checkpoint, data["data"]["tokenizer"], where)
    data["train"]["init_from"] = where
    _take_adapters(composed, checkpoint, data["train"]["lora"], report)
    registry.refuse_stored(data, composed.data, where)
    result = from_dict(RunConfig, data)
    if problems := validate(result):
        raise ConfigErrors(problems)
    return result


def _take_adapters(
    composed: Composed, checkpoint: Checkpoint, settings: dict[str, Any], report: Callable[[str], object]
) -> None:
    """Set `train.lora` as the checkpoint's adapters are, where they are to be trained on; else they are merged.

    Raises:
        ConfigError: other adapters are asked for.
    """
    if adapter_record(checkpoint) is None:
        return
    if settings["rank"] is None:
        report(f"the adapters of {checkpoint.directory} are merged into the weights, all of which are trained")
        return
    stored = to_dict(stored_config(checkpoint).train.lora)
    asked = {key: settings[key] for key in stored if f"train.lora.{key}" in composed.overrides}
    if other := [key for key in asked if key != "dropout" and asked[key] != stored[key]]:
        raise ConfigError(
            "the checkpoint holds other adapters than those to be trained",
            got=", ".join(f"train.lora.{key}={asked[key]}" for key in other),
            allowed=", ".join(f"train.lora.{key}={stored[key]}" for key in other),
            fix="leave these out; or start from whole weights: checkpoint export merges adapters into them",
        )
    settings |= stored | asked


def _refuse_new_tokens(config: RunConfig, checkpoint: Checkpoint, named: bool, report: Callable[[str], object]) -> None:
    """Weights that came without their tokenizer are not trained on one that is made on the spot.

    Raises:
        CheckpointError: the data is text, and nothing says which tokens to make of it.
    """
    text = [source.path for source in config.data.sources if source.path == BUILTIN or not is_store(source.path)]
    imported = "imported" in checkpoint.state()
    if imported and text and not named and config.data.tokenizer.made_from != "file":
        raise CheckpointError(
            "the weights came without their tokenizer, and the data is text",
            got=f"{checkpoint.directory}, data {text[0]}",
            fix="name the model's: data.tokenizer.path=TOKENIZER.json, or import it again "
            "with tokenizer=PATH. Other tokens than the model's, which mean nothing to it, are taken by name alone: "
            "data.tokenizer.kind=...",
        )
    report("the weights came without their tokenizer: nothing can show whether the data has the same tokens")


def take_tokenizer(composed: Composed, checkpoint: Checkpoint, settings: dict[str, Any], where: str) -> None:
    """Set what the command line does not: the checkpoint's tokenizer, and documents as the model was trained on.

    Args:
        composed: the command line.
        checkpoint: whose tokenizer it is; without one nothing is set.
        settings: `data.tokenizer` as plain data.
        where: the checkpoint is.
    """
    stored = tokenizer_of(checkpoint)
    if stored is None or any(key in composed.overrides for key in _WHICH_TOKENIZER):
        return
    # One in a store has to be fetched by hand: `data.tokenizer.path` is a file.
    if not is_remote(checkpoint.directory):
        settings.update(kind="file", path=where)
    documents = stored.documents
    first = {"bos": bool(documents.bos_ids), "bos_token": stored.bos_token if len(documents.bos_ids) == 1 else None}
    last = {"eos": documents.eos, "eos_token": stored.eos_token}
    for taken in (first, last, {"special_tokens_in_text": documents.special_tokens_in_text}):
        if not any(f"data.tokenizer.{key}" in composed.overrides for key in taken):
            settings.update(taken)


def check_tokenizer(
    config: RunConfig, checkpoint: Checkpoint | None, tokenizer: Tokenizer, report: Callable[[str], object]
) -> None:
    """Check that the data has the tokens that the weights were trained on.

    Args:
        config: the run.
        checkpoint: that the run starts from or, later, goes on from; None without one.
        tokenizer: of the data.
        report: told where documents begin or end otherwise than those that the model was trained on.

    Raises:
        CheckpointError: the data has other tokens than the checkpoint of a run that began with `train.init_from`.
    """
    if config.train.init_from is None or checkpoint is None:
        return
    stored = tokenizer_of(checkpoint)
    if stored is not None and not stored.agrees_with(tokenizer):
        raise CheckpointError(
            "the data has another tokenizer than the weights that the run starts from",
            got=f"{tokenizer.vocab_size} tokens in the data, {stored.vocab_size} in {checkpoint.directory}",
            fix=f"prepare the data with it: data prepare tokenizer={checkpoint.directory / TOKENIZER_FILE} ..., "
            "or leave out data.tokenizer",
        )
    if stored is not None and stored.record() != tokenizer.record():
        report(
            f"the model was trained on documents that are {stored.describe_documents()}; "
            f"this run's are {tokenizer.describe_documents()}"
        )
