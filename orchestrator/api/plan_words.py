"""Parse the words of `plan` into fleets, and one job or several."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.api.island_planning import exchange_terms, read_sites
from orchestrator.config.batch_sizes import BatchSizes
from orchestrator.config.compose import Composed, compose, conf_dir, group_options, read_plain
from orchestrator.config.convert import convert_text, from_dict
from orchestrator.config.options import option
from orchestrator.errors import ConfigError, ConfigErrors, UserError
from orchestrator.models.shapes import trained_share
from orchestrator.planner.degrees import CONTEXT_KINDS, SCHEDULES
from orchestrator.planner.estimate.goodput import FailureOptions
from orchestrator.planner.estimate.optimizer_memory import optimizer_kind
from orchestrator.planner.explain import AXES
from orchestrator.planner.fleet import Fleet, FleetEntry, resolve_fleets, split_fleets
from orchestrator.planner.job_plan import Request
from orchestrator.planner.planned_models import planned_models
from orchestrator.planner.quantity import Value, given
from orchestrator.planner.search import Space
from orchestrator.planner.spec import COMPUTE_OPTIMAL, JobSpec, ModelShape, Precision

if TYPE_CHECKING:
    from orchestrator.chips.catalogue import Catalogue

ANY_SHAPE = ModelShape(COMPUTE_OPTIMAL, 2, 64, 256, 1, 1, 64, 32_768)
"""Stands for the model that `target_loss=` chooses, until the tokens are known."""
SEQ_LEN = 8192  # where neither the command line nor an experiment says; less for models made for less
_TOKENS = 1e12
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)([kKMBT]?)")
_SUFFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`; everything else is `train`'s."""

    fleet: str | None = option(None, help="the chips, see above")
    islands: str | None = option(None, help="[FLEET, {fleet: FLEET, gbit_per_s: 10}]: one run on several fleets")
    tokens: str | None = option(None, help="of the run: 15T, 200B; none: an experiment's, else a trillion")
    target_loss: float | None = option(None, help="loss to reach, nats per token; fit= says the tokens, and the model")
    fit: str | None = option(None, help="of target_loss=: a file of python -m orchestrator scaling-law")
    objective: Literal["time", "cost", "energy"] = option("time", help="fleets are ranked by it: time, cost, energy")
    precision: Literal["bf16", "fp8", "fp32"] | None = option(None, help="bf16, fp8, fp32; none: hardware.precision")
    axes: Literal["all", "train"] = option("all", help="all, or train: those that the strategies of train have")
    stack: str = option(
        "auto", help="software whose speed is meant; auto: the vendor's usual one, or ours with axes=train"
    )
    jobs: str | None = option(None, help="YAML of several jobs, to be split over the fleets")
    chips_file: str | None = option(None, help="YAML that adds chips or overrides figures of the catalogue")
    price_usd_per_chip_hour: float | None = option(None, help="for all fleets; none: the lowest list price")
    watts_per_chip: float | None = option(None, help="of the server, per chip; none: the catalogue's")
    pue: float | None = option(None, help="facility power over server power; none: by vendor")
    inter_gb_per_s: float | None = option(None, help="network one way and chip; none: the catalogue's")
    failures_per_chip_day: float | None = option(None, help="that stop a job; none: as published")
    recovery: Literal["auto", "restart", "replace"] = option("auto", help="restart, replace a failed group, or auto")
    restart_seconds: float | None = option(None, help="from a failure to the next step")
    replace_seconds: float | None = option(None, help="from a failure until the other groups go on")
    save_stall_seconds: float | None = option(None, help="that a save stops the step; none: predicted")
    repair_hours: float | None = option(None, help="until a failed host is back")
    measured: str | None = option(None, help="a run whose own figures replace assumptions: its directory or name")
    runs_dir: str = option("runs", help="where the run of measured= is looked for")
    max_days: float | None = option(None, help="fleets that take longer are ranked last")
    max_usd: float | None = option(None, help="fleets that cost more are ranked last")
    explain: str | None = option(None, help="print the derivation of a figure: cost, days, goodput, ..., or all")
    json: bool = option(False, help="print JSON")
    html: str | None = option(None, help="file for a report with plots")


@dataclass(frozen=True)
class JobEntry:
    """One job in a file of jobs; `overrides` are words as on the command line."""

    name: str | None = None
    model: str = ""
    tokens: str | None = None
    overrides: tuple[str, ...] = ()


def read_fleets(options: PlanOptions, catalogue: Catalogue, problems: list[UserError]) -> list[Fleet]:
    """Return the fleets of the command line, or of a file.

    Args:
        options: of the verb.
        catalogue: of chips.
        problems: gets what is wrong.
    """
    if (options.fleet is None) == (options.islands is None):
        fix = "give one: a fleet for the whole run, or islands=[FLEET, FLEET]"
        what = "'fleet' is missing" if options.fleet is None else "fleet= and islands= both say the chips"
        problems.append(ConfigError(what, fix=fix))
        return []
    names = {field.name for field in fields(FleetEntry)} & {field.name for field in fields(options)}
    defaults = FleetEntry(**{name: getattr(options, name) for name in names})
    items: list[str | FleetEntry] = []
    try:
        if options.fleet is None:
            items = [site.fleet for site in read_sites(options.islands or "")]
        elif not options.fleet.endswith((".yaml", ".yml")):
            items = list(split_fleets(options.fleet))
        else:
            for index, item in enumerate(_listed(options.fleet, "fleets")):
                try:
                    items.append(item if isinstance(item, str) else _from(FleetEntry, item, f"fleets[{index}]"))
                except UserError as error:
                    problems += _all(error)
        return resolve_fleets(items, catalogue, defaults)
    except UserError as error:
        problems += _all(error)
        return []


def read_requests(words: list[str], options: PlanOptions, problems: list[UserError]) -> dict[str, Request]:
    """Return what is planned, by name: one job of the command line, or several of a file.

    Args:
        words: overrides of the configuration.
        options: of the verb.
        problems: gets what is wrong.
    """
    requests: dict[str, Request] = {}
    try:
        if not options.jobs:
            request = read_request(words, options)
            return {request.job.model.name: request}
        for index, item in enumerate(_listed(options.jobs, "jobs")):
            try:
                entry = _from(JobEntry, item, f"jobs[{index}]")
                chosen = replace(options, tokens=entry.tokens or options.tokens)
                name = entry.name or f"{index + 1}-{entry.model}"
                requests[name] = read_request([*words, f"model={entry.model}", *entry.overrides], chosen)
            except UserError as error:
                problems += _all(error)
    except UserError as error:
        problems += _all(error)
    return requests


def read_request(words: list[str], options: PlanOptions) -> Request:
    """Return the one job of the command line.

    Args:
        words: overrides of the configuration.
        options: of the verb.

    Raises:
        ConfigErrors: all that is wrong with it.
    """
    problems: list[UserError] = []
    rest, config_dir = _without_config_dir(words)
    rest = _known_model(rest, config_dir, problems)
    shape, longest, rest = _planned_shape(rest, problems)
    asked = None
    try:
        asked = None if options.tokens is None else given("tokens", _amount(options.tokens), "tokens", "tokens=")
    except ConfigError as error:
        problems.append(error)
    given_keys = {word.partition("=")[0] for word in words}
    problems += _check_target(options, given_keys)
    chooses = options.target_loss is not None and not given_keys & {"model", "experiment"}
    if chooses:
        shape, longest, rest = ANY_SHAPE, SEQ_LEN, [*rest, f"model.max_seq_len={SEQ_LEN}"]
    if not given_keys & {"train.global_batch_tokens", "experiment"}:
        # Any batch will do while the configuration is checked: the real one follows the fleet.
        rest = [*rest, "train.global_batch_tokens=${train.seq_len}"]
    try:
        composed = compose(rest, config_dir)
        if not problems:
            if shape is None:
                shape, longest = _shape(composed), composed.config.model.max_seq_len
            request = _request(composed, shape, longest, given_keys, asked, options)
            if options.target_loss is None or options.fit is None:
                return request
            from orchestrator.api.target_requests import aimed  # with NumPy, too

            return aimed(request, options.target_loss, options.fit, chooses)
    except UserError as error:
        problems += _all(error)
    raise ConfigErrors(problems)


def _check_target(options: PlanOptions, keys: set[str]) -> list[UserError]:
    """Return what is wrong with `target_loss=` and `fit=` beside the other words."""
    if (options.target_loss is None) != (options.fit is None):
        got = f"target_loss={options.target_loss} fit={options.fit}"
        return [ConfigError("target_loss= and fit= belong together", got=got, fix="give both, or none")]
    if options.target_loss is None:
        return []
    others = [name for name in ("tokens", "jobs", "measured") if getattr(options, name) is not None]
    others += sorted(keys & {"train.max_steps"})
    if "model" not in keys and "experiment" not in keys:
        others += sorted(key for key in keys if key.startswith("model."))
    return [
        ConfigError(f"target_loss= decides what {name}= would say", got=f"{name}=", fix="leave out one")
        for name in others
    ]


def _request(
    composed: Composed, shape: ModelShape, longest: int, keys: set[str], asked: Value | None, options: PlanOptions
) -> Request:
    """Return the job of a composed configuration. `keys`: what the command line set of it."""
    train, experiment = composed.config.train, composed.choices.get("experiment") is not None
    seq_len = train.seq_len if experiment or "train.seq_len" in keys else min(SEQ_LEN, longest)
    batch = train.global_batch_tokens if experiment or "train.global_batch_tokens" in keys else None
    if batch is not None and batch % seq_len:
        raise ConfigError(
            "the global batch is not a whole number of sequences",
            got=f"train.global_batch_tokens={batch}, sequences of {seq_len}",
            fix=f"set train.global_batch_tokens={max(1, round(batch / seq_len)) * seq_len}, or train.seq_len",
        )
    if seq_len > longest:
        raise ConfigError("the sequences are longer than the model can see", got=seq_len, allowed=f"at most {longest}")
    tokens = asked or given("tokens", _TOKENS, "tokens", "tokens= was not given")
    if asked is None and (experiment or "train.max_steps" in keys):
        if batch is None:
            what = "steps do not say how many tokens the run has while the batch follows the fleet"
            raise ConfigError(what, got=f"train.max_steps={train.max_steps}", fix="set tokens=, or the batch too")
        whole = BatchSizes.of(train).upto(train.max_steps) if batch == train.global_batch_tokens else None
        total = float(train.max_steps * batch if whole is None else whole)
        tokens = given("tokens", total, "tokens", "train.max_steps x global_batch_tokens")
    widest = _widest(composed, keys, options)
    space, restricted = _space(composed, keys, widest)
    known = {field.name: getattr(options, field.name) for field in fields(FailureOptions) if field.name != "sources"}
    from orchestrator.api.measured_runs import read_measured  # with NumPy, which --help does without

    measured = None if options.measured is None else read_measured(options.measured, options.runs_dir)
    ours = options.axes == "train"
    job = JobSpec(
        shape,
        seq_len,
        0,
        tokens.value,
        _precision(composed, options),
        stack="orchestrator" if ours and options.stack == "auto" else options.stack,
        loss_chunk_tokens=train.loss_chunk_tokens if ours else None,
        document_mask=ours and composed.config.data.document_mask,
        optimizer=optimizer_kind(composed.config.optim) if ours else "adamw",
        trained=trained_share(composed.config.model, train.lora) if ours else 1.0,
        average=ours and train.ema.decay is not None,
        frozen_copy=ours and train.preference.holds_copy(train.lora),
    )
    failures = FailureOptions(**known)
    exchange = None
    if options.islands is not None:
        known_model = shape.name == composed.config.model.name
        exchange = exchange_terms(composed.config, shape.vocab if known_model else None)
    return Request(job, tokens, batch, space, widest, restricted, failures, measured=measured, exchange=exchange)


def _without_config_dir(words: list[str]) -> tuple[list[str], str | None]:
    """Return the words without `--config-dir DIR`, and the folder."""
    if "--config-dir" not in words:
        return words, None
    at = words.index("--config-dir")
    if at + 1 == len(words) or not Path(words[at + 1]).is_dir():
        raise ConfigError("--config-dir is not a folder", got=" ".join(words[at : at + 2]))
    return words[:at] + words[at + 2 :], words[at + 1]


def _known_model(words: list[str], config_dir: str | None, problems: list[UserError]) -> list[str]:
    """Return the words, without the model where it is not known, so that the others are still checked."""
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    known = [*group_options(folders)["model"], *planned_models()]
    for word in words:
        name = word.removeprefix("model=")
        if word.startswith("model=") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean '{close[0]}'?" if close else None
            problems.append(ConfigError(f"there is no model '{name}'", got=word, allowed=", ".join(known), fix=fix))
            return [other for other in words if other != word]
    return words


def _planned_shape(words: list[str], problems: list[UserError]) -> tuple[ModelShape | None, int, list[str]]:
    """Return a model that only the planner knows, with overrides of its sizes, and the words for the configuration."""
    named = [word.removeprefix("model=") for word in words if word.startswith("model=")]
    if not named or named[-1] not in planned_models():
        return None, 0, words
    model = planned_models()[named[-1]]
    known = [field.name for field in fields(ModelShape) if field.name != "name"]
    sizes: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        name = key.removeprefix("model.")
        if key.startswith("model.") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean 'model.{close[0]}'?" if close else None
            problems.append(ConfigError(f"there is no key '{key}'", got=word, allowed=", ".join(known), fix=fix))
        elif key.startswith("model."):
            try:
                sizes[name] = convert_text(ModelShape, name, text)
            except ConfigErrors as error:
                problems += error.problems
    rest = [word for word in words if not word.startswith(("model=", "model."))]
    return replace(model.shape, **sizes), model.max_seq_len, [*rest, f"model.max_seq_len={model.max_seq_len}"]


def _shape(composed: Composed) -> ModelShape:
    model, tokenizer = composed.config.model, composed.config.data.tokenizer
    if model.vocab_size == "auto" and tokenizer.made_from != "bpe":
        raise ConfigError(
            "the size of the vocabulary is not known without the data",
            got=f"model.vocab_size=auto with data.tokenizer.kind={tokenizer.made_from}",
            fix="set model.vocab_size",
        )
    return ModelShape.of(model, -(-tokenizer.vocab_size // 128) * 128)


def _widest(composed: Composed, keys: set[str], options: PlanOptions) -> Space:
    """All that the search may choose when the user fixes nothing."""
    compiled = composed.config.hardware.compile if "hardware.compile" in keys else True
    if options.axes == "train":
        kinds = CONTEXT_KINDS
        return Space(zeros=(3,), even=True, schedules=SCHEDULES, context_kinds=kinds, compiled=compiled)
    return Space(compiled=compiled)


def _space(composed: Composed, keys: set[str], widest: Space) -> tuple[Space, tuple[str, ...]]:
    """Return what the search may choose, and what the user fixed, in words."""
    train, layout = composed.config.train, composed.config.layout
    fixed: dict[str, Any] = {}
    said = []
    if "train.remat" in keys and train.remat != "auto":
        fixed["remats"] = (train.remat,)
        said.append(f"train.remat={train.remat}")
    if "train.micro_batch_size" in keys and train.micro_batch_size != "auto":
        fixed["micro_batch"] = train.micro_batch_size
        said.append(f"train.micro_batch_size={train.micro_batch_size}")
    if train.reduce_gradients != widest.reduce_gradients:
        fixed["reduce_gradients"] = train.reduce_gradients
        said.append(f"train.reduce_gradients={train.reduce_gradients}")
    for axis in reversed(AXES):
        degree = getattr(layout, axis)
        if degree != "auto" and keys & {f"layout.{axis}", "layout"}:
            fixed[axis] = degree
            said.append(f"layout.{axis}={degree}")
    if widest.schedules:
        for key, name in (("schedule", "schedules"), ("context_kind", "context_kinds")):
            value = getattr(layout, key)
            if value != "auto" and keys & {f"layout.{key}", "layout"}:
                fixed[name] = (value,)
                said.append(f"layout.{key}={value}")
    return replace(widest, **fixed), tuple(said)


def _precision(composed: Composed, options: PlanOptions) -> Precision:
    if options.precision is not None:
        return options.precision
    configured = composed.config.hardware.precision
    return "bf16" if configured == "auto" else configured


def _amount(text: str) -> float:
    match = _AMOUNT.fullmatch(text)
    if match is None or not float(match[1]):
        raise ConfigError("not a number of tokens", got=f"tokens={text}", allowed="15T, 200B, 1.5e12")
    return float(match[1]) * _SUFFIXES[match[2]]


def _listed(path: str, key: str) -> list[Any]:
    items = read_plain(Path(path).expanduser()).get(key)
    if not isinstance(items, list) or not items:
        raise ConfigError(f"the file has no list '{key}'", got=path, allowed=f"{key}: [...], one or more")
    return items


def _from(cls: type[Any], item: Any, path: str) -> Any:
    if not isinstance(item, dict):
        raise ConfigError(f"'{path}' is not a mapping", got=item)
    return from_dict(cls, item)


def _all(error: UserError) -> list[UserError]:
    return list(getattr(error, "problems", [error]))
