"""Load, evaluate and generate from trained models in Python, on one device, in the calling process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.api.configs import compose
from orchestrator.api.drawing import check_drawing
from orchestrator.api.runs import Run
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.storage import AnyPath, is_remote
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import HardwareConfig, RunConfig, SourceConfig
from orchestrator.config.validate import validate
from orchestrator.data.prepare import prepare
from orchestrator.data.validation import validation_data
from orchestrator.data.validation_sets import ValidationBatches
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors
from orchestrator.hardware.target_table import resolve
from orchestrator.runs import init_from, resume
from orchestrator.runs.messages import warn
from orchestrator.runs.stored_model import find_checkpoint, tokenizer_of

if TYPE_CHECKING:
    from orchestrator.data.tokenize import Tokenizer
    from orchestrator.hardware.target import Target
    from orchestrator.models.decoder import Decoder

Where = str | Path | Checkpoint | Run
"""A checkpoint: `latest`, a path or URL of it, of a run or of a directory of checkpoints; a `Run` means its newest."""
Device = Literal["auto", "cpu", "cuda", "rocm"]

_BATCH_TOKENS = 8192  # of a forward pass of `evaluate`
_ALL_TOKENS = 10**12  # the most that `train.eval_tokens` takes


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model and tokenizer: `model, tokenizer = load_model(...)`.

    Attributes:
        model: a `torch.nn.Module` in fp32, in inference mode: `model(tokens)` gives logits [B, T, V].
        tokenizer: with the documents that the model was trained on; None where the checkpoint carries none.
        checkpoint: where they come from.
        target: the hardware that the model is on.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint
    target: Target

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))


@dataclass(frozen=True)
class Generated:
    """Generated text. `str` gives prompt and continuation.

    Attributes:
        prompt: what it continues.
        text: the continuation.
        ids: its tokens.
        stopped: by what it ended: `end` (the model's own end of text), `stop` (a stop text) or `tokens` (their number).
    """

    prompt: str
    text: str
    ids: list[int]
    stopped: Literal["end", "stop", "tokens"]

    def __str__(self) -> str:
        return self.prompt + self.text


@dataclass(frozen=True)
class Evaluation:
    """A measured loss.

    Attributes:
        loss: nats per token, the mean over the target tokens.
        tokens: target tokens.
        sequences: that they are in.
        checkpoint: whose model it is.
        data: what it was measured on, a line for each part.
    """

    loss: float
    tokens: int
    sequences: int
    checkpoint: Checkpoint
    data: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """`exp` of the loss; infinite where that does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def load_model(where: Where = "latest", *, hardware: Device = "auto", runs_dir: str | Path = "runs") -> LoadedModel:
    """Load the model and the tokenizer of a checkpoint onto one device.

    Args:
        where: the checkpoint.
        hardware: `auto` takes the best that is here.
        runs_dir: where `latest` looks.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        HardwareError: the hardware is not here.
    """
    checkpoint = Checkpoint(_find(where, runs_dir))
    target = _target(hardware)

    from orchestrator.inference.generator import load_decoder

    return LoadedModel(load_decoder(checkpoint, target.device(0)), tokenizer_of(checkpoint), checkpoint, target)


def generate(
    prompt: str,
    where: Where | LoadedModel = "latest",
    *,
    tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    special_tokens_in_text: Literal["text", "token", "error"] | None = None,
    hardware: Device = "auto",
    runs_dir: str | Path = "runs",
) -> Generated:
    """Continue a prompt; `generate_many` takes several.

    Args:
        prompt: the beginning of a document.
        where: a checkpoint, or what `load_model` returned, which is not loaded again.
        tokens: to write at most.
        temperature: 0 takes the likeliest token each time.
        top_k: draw among the k likeliest tokens.
        top_p: draw among the likeliest that have this probability together.
        min_p: draw among those of this part of the likeliest one's probability.
        repetition_penalty: above 1: tokens that are there already become less likely.
        stop: texts at which to end; they are not part of the continuation.
        seed: of the draws: the same one gives the same text.
        special_tokens_in_text: what special tokens in the prompt are; None: as the model was trained.
        hardware: as for `load_model`.
        runs_dir: where `latest` looks.

    Raises:
        ConfigErrors: settings that are out of range, all at once.
        CheckpointError: there is no such checkpoint, it is damaged, or it carries no tokenizer.
    """
    return generate_many(
        [prompt],
        where,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        special_tokens_in_text=special_tokens_in_text,
        hardware=hardware,
        runs_dir=runs_dir,
    )[0]


def generate_many(
    prompts: Sequence[str],
    where: Where | LoadedModel = "latest",
    *,
    tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    rows: int = 16,
    special_tokens_in_text: Literal["text", "token", "error"] | None = None,
    hardware: Device = "auto",
    runs_dir: str | Path = "runs",
) -> list[Generated]:
    """Continue prompts, several at a time; each text is the one that its prompt and the seed give alone.

    Args:
        prompts: beginnings of documents, of any lengths.
        where: as for `generate`, like the following.
        tokens: to write at most, of each.
        temperature: 0 takes the likeliest token each time.
        top_k: draw among the k likeliest tokens.
        top_p: draw among the likeliest that have this probability together.
        min_p: draw among those of this part of the likeliest one's probability.
        repetition_penalty: above 1: tokens that are there already become less likely.
        stop: texts at which to end; they are not part of the continuation.
        seed: of the draws of each text.
        rows: texts that are written at one time.
        special_tokens_in_text: what special tokens in the prompts are; None: as the model was trained.
        hardware: as for `load_model`.
        runs_dir: where `latest` looks.

    Raises:
        ConfigErrors: settings that are out of range, all at once.
        CheckpointError: there is no such checkpoint, it is damaged, or it carries no tokenizer.
    """
    problems = check_drawing(
        tokens=tokens,
        samples=1,
        rows=rows,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if problems:
        raise ConfigErrors(problems)
    loaded = where if isinstance(where, LoadedModel) else load_model(where, hardware=hardware, runs_dir=runs_dir)

    from orchestrator.inference.generator import Writer
    from orchestrator.inference.place import Place
    from orchestrator.inference.sampling import Sampling

    writer = Writer(loaded.checkpoint, Place(loaded.model), special_tokens_in_text)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    writing = writer.write([writer.request(prompt, tokens, sampling, seed, list(stop)) for prompt in prompts], rows)
    for _ in writing:
        pass
    pairs = zip(prompts, writing.texts, strict=True)
    return [Generated(prompt, str(text), text.ids, text.stopped) for prompt, text in pairs]


def evaluate(
    where: Where | LoadedModel = "latest",
    data: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    hardware: Device = "auto",
    runs_dir: str | Path = "runs",
) -> Evaluation:
    """Measure the loss of a checkpoint's model on data, in fp32 on one device.

    Args:
        where: a checkpoint, or what `load_model` returned.
        data: files (a glob, too), a folder or a token store: all of it, or of a store that holds tokens out, those.
            None: what its run was evaluated on; the loss is then that of the run's own evaluation.
        overrides: of the run's configuration, such as `["train.seq_len=512"]`; `train.eval_tokens=N` measures on the
            first sequences only.
        hardware: as for `load_model`.
        runs_dir: where `latest` looks.

    Raises:
        ConfigErrors: what is wrong with the overrides.
        CheckpointError: there is no such checkpoint, it is damaged, or the data has other tokens than its model.
        DataError: the data cannot be read, or is shorter than a sequence.
    """
    loaded = where if isinstance(where, LoadedModel) else load_model(where, hardware=hardware, runs_dir=runs_dir)
    checkpoint = loaded.checkpoint
    config = _measured(checkpoint, data, overrides, runs_dir)
    prepared = prepare(config.data)
    if loaded.tokenizer is not None and not loaded.tokenizer.agrees_with(prepared.tokenizer):
        raise CheckpointError(
            "the data has another tokenizer than the model",
            got=f"{prepared.tokenizer.vocab_size} tokens in the data, {loaded.tokenizer.vocab_size} in the checkpoint",
            fix=f"prepare the data with the tokenizer of {checkpoint.directory}",
        )
    if data is not None:
        # As data that is evaluated on, and not trained on.
        config = replace(config, data=replace(config.data, validation=str(data)))
        prepared = replace(prepared, validation={"": prepared.stores[0]})
    held_out = validation_data(config, prepared)
    sets = held_out.sets(config.data.document_mask)
    if not sets:
        raise held_out.problem()

    from orchestrator.training.checkpoint_loss import mean_loss

    size = min(held_out.sequences, max(1, _BATCH_TOKENS // config.train.seq_len))
    batches = ValidationBatches(sets, size)
    loss, tokens = mean_loss(loaded.model, batches, loaded.target.device(0))
    return Evaluation(loss, tokens, held_out.sequences, checkpoint, tuple(held_out.lines()))


def _measured(
    checkpoint: Checkpoint, data: str | Path | None, overrides: Sequence[str], runs_dir: str | Path
) -> RunConfig:
    """Return the configuration of a checkpoint's run, with other data and with overrides."""
    composed = compose([f"runs_dir={runs_dir}", *overrides])
    place = checkpoint.directory
    point = resume.find(str(place), str(runs_dir), True, warn, composed.config.checkpoint)
    result = to_dict(resume.merge(point, composed, warn))
    if data is not None:
        source = SourceConfig(str(data))
        result["data"] |= {"sources": [to_dict(source)], "validation": None, "validation_fraction": 0.0}
        if "train.eval_tokens" not in composed.overrides:
            result["train"]["eval_tokens"] = _ALL_TOKENS
        where = str(place if is_remote(place) else place.resolve())
        init_from.take_tokenizer(composed, checkpoint, result["data"]["tokenizer"], where)
    config = from_dict(RunConfig, result)
    if problems := validate(config):
        raise ConfigErrors(problems)
    return config


def _find(where: Where, runs_dir: str | Path) -> AnyPath:
    if isinstance(where, Checkpoint):
        return where.directory
    if isinstance(where, Run):
        return find_checkpoint(str(where.directory), str(runs_dir), warn)
    if not isinstance(where, (str, Path)):
        raise ConfigError("this is no checkpoint", got=repr(where), allowed="latest, a path, a Run or a Checkpoint")
    return find_checkpoint(str(where), str(runs_dir), warn)


def _target(hardware: Device) -> Target:
    return resolve(HardwareConfig(target=hardware, devices=1))
