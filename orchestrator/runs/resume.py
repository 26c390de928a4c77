"""Find the checkpoint that a run resumes from, and merge the configurations. No torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import DIRECTORY, MANIFEST
from orchestrator.checkpoint.run_checkpoints import MARK, committed, open_newest, set_aside
from orchestrator.checkpoint.signing import Trust, trust
from orchestrator.checkpoint.storage import AnyPath, children, is_remote, locate, modified, resolved, there
from orchestrator.config import registry
from orchestrator.config.compose import Composed, read_plain
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import CheckpointConfig, RunConfig
from orchestrator.config.validate import check_stored
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors, UserError
from orchestrator.runs import run_directory
from orchestrator.runs.listing import Wanted, is_empty, latest_runs, runs_below
from orchestrator.runs.origin import refuse_foreign

LATEST, AUTO = "latest", "auto"

# Of a checkpoint's configuration, what could make this machine run, write or sign something for its writer.
_OF_THIS_MACHINE = ("runs_dir", "data.cache_dir", "hardware.environment", "checkpoint.memory.dir")
_OF_A_FOLDER = ("runs_dir", "data.cache_dir", "checkpoint.memory.dir")  # of which nothing is said
_TRUST = (
    "checkpoint.signing_key",
    "checkpoint.model_signing_key",
    "checkpoint.statement",
    "checkpoint.trusted_keys",
    "checkpoint.require_signature",
)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from.

    Attributes:
        checkpoint: opened and checked.
        run_dir: the run to go on in; None where that is not here, or the checkpoint is not its newest: then a new
            directory begins.
        saved: the configuration of the checkpoint's run, as plain data.
        newest: no later checkpoint lies beside it. An older one branches off: that is another run.
        trusted: by whom it may be signed.
    """

    checkpoint: Checkpoint
    run_dir: Path | None
    saved: dict[str, Any]
    newest: bool = True
    trusted: Trust = Trust()

    def __post_init__(self) -> None:
        _keep_documents(self.saved)

    @property
    def directory(self) -> AnyPath:
        """Of the checkpoint."""
        return self.checkpoint.directory


def find(
    resume: str,
    runs_dir: str,
    verify: bool,
    report: Callable[[str], object],
    settings: CheckpointConfig = CheckpointConfig(),
    wanted: Wanted = Wanted(),
) -> ResumePoint:
    """Find what `resume` means: `latest`, or the path or URL of a run, of runs, of checkpoints or of a checkpoint.

    Args:
        resume: `latest`, a path or a URL.
        runs_dir: where `latest` looks.
        verify: check the hashes of all but the tensors, which are checked when they are read.
        report: told of what is passed over.
        settings: as given on the command line. `latest` also looks below its `dir`, and its keys say who is trusted;
            a run directory's own configuration can add to that, a checkpoint's never.
        wanted: `latest` means the latest run of which this is true.

    Raises:
        CheckpointError: there is no such thing, nothing valid in it, or it is not trusted.
    """
    trusted = trust(settings.trusted_keys, settings.require_signature)
    if resume == LATEST:
        places: list[AnyPath] = [*latest_runs(Path(runs_dir))]
        if settings.dir != "auto":
            places += _kept_elsewhere(locate(settings.dir), places)
        return _in_runs(places, runs_dir, verify, report, trusted, wanted)
    path = locate(resume)
    whole = path if is_remote(path) else resolved(path)
    if is_checkpoint(resume):
        if why := set_aside(path):
            raise CheckpointError(
                f"this checkpoint was set aside: {why}",
                got=resume,
                fix=f"resume its run, which goes on from the newest one that was not; or remove {path / MARK}",
            )
        checkpoint = Checkpoint(path, trusted)
        if verify:
            checkpoint.verify_beside()
        saved = checkpoint.config()
        beside = [str(one) for one in committed(whole.parent)]
        goes_on = beside[:1] == [str(whole)]
        run_dir = run_of(whole, saved) if goes_on else None
        return ResumePoint(checkpoint, run_dir, saved, goes_on or str(whole) not in beside, trusted)
    if _has(path, run_directory.CONFIG) or committed(path):
        return _in_runs([path], resume, verify, report, trusted)
    if not is_remote(path) and (places := [*runs_below(path)]):
        return _in_runs(places, resume, verify, report, trusted)
    refuse_foreign(path)
    raise CheckpointError(
        "no checkpoint was found here",
        got=resume,
        allowed="latest, a run directory, the folder of its name, or a checkpoint directory (step-...)",
    )


def find_own(
    composed: Composed, name: str, verify: bool, report: Callable[[str], object]
) -> tuple[ResumePoint | None, Path, tuple[str, ...]]:
    """Find where the run that is known by `name` is to go on.

    Args:
        composed: the configuration of this command line.
        name: of the run.
        verify: as in `find`.
        report: told of what is passed over.

    Returns:
        Its newest valid checkpoint, None where it has saved none yet; its directory, which may not be there; and its
        `newest` checkpoints.

    Raises:
        CheckpointError: it has saved checkpoints, and none of them is valid.
    """
    config = composed.config
    run_dir = run_directory.named(config, name)
    trusted = trust(config.checkpoint.trusted_keys, config.checkpoint.require_signature)
    if _has(run_dir, run_directory.CONFIG):
        place: AnyPath = run_dir
        saved = run_directory.checkpoints_dir(run_dir, from_dict(RunConfig, read_plain(run_dir / run_directory.CONFIG)))
    else:
        # Its directory may have gone with the host that it was on.
        place = saved = run_directory.checkpoints_dir(run_dir, config)
    if not (found := newest(run_dir, saved)):
        return None, run_dir, found
    return _in_runs([place], str(saved), verify, report, trusted), run_dir, found


def newest(run_dir: Path, checkpoints: AnyPath) -> tuple[str, ...]:
    """Return the newest checkpoint of a run where it keeps them, and of those that no store has taken.

    Args:
        run_dir: the run's directory.
        checkpoints: where it keeps them.
    """
    places = dict.fromkeys([checkpoints, run_directory.beside(run_dir)])
    return tuple(str(found[0].name) for place in places if (found := committed(place)))


def is_checkpoint(resume: str) -> bool:
    """Whether `resume` names a checkpoint itself, and not where to look for one.

    Raises:
        CheckpointError: the place cannot be read.
    """
    if resume in (LATEST, AUTO):
        return False
    path = locate(resume)
    name = path.name if is_remote(path) else resolved(path).name
    return DIRECTORY.fullmatch(name) is not None or _has(path, MANIFEST)


def _has(directory: AnyPath, name: str) -> bool:
    try:
        return there(directory / name)
    except OSError as error:
        raise CheckpointError(
            f"the place to resume from cannot be read: {error.strerror or error}", got=directory
        ) from error


def run_of(checkpoint: AnyPath, saved: Mapping[str, Any]) -> Path | None:
    """Return the run directory that a checkpoint belongs to: around it, or, with a `checkpoint.dir`, of the same name.

    Args:
        checkpoint: the checkpoint.
        saved: its configuration.
    """
    named = Path(str(saved.get("runs_dir", ""))) / checkpoint.parent.parent.name / checkpoint.parent.name
    around = [] if is_remote(checkpoint) else [checkpoint.parent.parent]
    return next((path for path in (*around, named) if (path / run_directory.CONFIG).exists()), None)


def _kept_elsewhere(parent: AnyPath, runs: Sequence[AnyPath]) -> list[AnyPath]:
    """Directories of checkpoints `<parent>/<name>/<time>` of runs that are not here, the newest first."""
    here = {(run.parent.name, run.name) for run in runs}
    try:
        found = [run for name in children(parent) for run in children(name) if (name.name, run.name) not in here]
        dated = [(modified(newest[0] / MANIFEST), str(run), run) for run in found if (newest := committed(run))]
    except OSError as error:
        raise CheckpointError(f"checkpoint.dir cannot be read: {error.strerror or error}", got=parent) from error
    return [run for _, _, run in sorted(dated, reverse=True)]


def _in_runs(
    places: Sequence[AnyPath],
    where: str,
    verify: bool,
    report: Callable[[str], object],
    trusted: Trust,
    wanted: Wanted = Wanted(),
) -> ResumePoint:
    """Find the newest valid checkpoint of the first of `places` that has one: run directories, or such of checkpoints.

    A run that has none yet is passed over for an older one of its own name only: what is older and has another name is
    another experiment, which was not asked for.
    """
    others: list[str] = []
    without: AnyPath | None = None
    for place in places:
        point = _in_run(place, verify, report, trusted)
        if point is None:
            if isinstance(place, Path) and is_empty(place):
                continue  # a start that failed before its first step: nothing was lost, so nothing is to be said
            report(f"skipping {place}: it has no valid checkpoint")
            without = without or place
        elif miss := wanted.missed_by(point.saved):
            others.append(f"{place} ({miss})")
        elif without is not None and wanted.name is None and without.parent.name != place.parent.name:
            raise CheckpointError(
                "the newest run has no valid checkpoint yet, and the one before it has another name",
                got=f"{without}; before it {place}",
                fix=f"say which one you mean: resume={place}, or name=...",
            )
        else:
            return point
    if others:
        raise CheckpointError(
            f"no run here is the one that is asked for: {wanted}",
            got="; ".join(others[:5]) + ("; ..." if len(others) > 5 else ""),
            fix="start a new run: leave out resume. To go on with one of these: resume=DIRECTORY",
        )
    raise CheckpointError("no valid checkpoint was found", got=where, fix="start a new run: leave out resume")


def _in_run(place: AnyPath, verify: bool, report: Callable[[str], object], trusted: Trust) -> ResumePoint | None:
    run_dir, parent = None, place
    if _has(place, run_directory.CONFIG):
        try:
            config = from_dict(RunConfig, read_plain(place / run_directory.CONFIG))
        except UserError as error:
            report(f"skipping {place}: {error}")
            return None
        run_dir, parent = place, run_directory.checkpoints_dir(place, config)
        trusted = _or_own(trusted, config.checkpoint)
    found = open_newest(parent, verify, report, trusted)
    if run_dir is not None and is_remote(parent):
        # The last save that the store did not take.
        beside = open_newest(run_directory.beside(run_dir), verify, report, trusted)
        found = beside if found is None or (beside is not None and beside.step > found.step) else found
    return None if found is None else ResumePoint(found, run_dir, found.config(), trusted=trusted)


def _or_own(trusted: Trust, settings: CheckpointConfig) -> Trust:
    """Whom the command line trusts; where it names nobody, whom the run directory's own configuration names."""
    if trusted.keys:
        return trusted
    required = settings.require_signature or trusted.required
    return trust(settings.trusted_keys, required) if settings.trusted_keys else replace(trusted, required=required)


def merge(point: ResumePoint, composed: Composed, report: Callable[[str], object] = lambda text: None) -> RunConfig:
    """Return the saved run's configuration with what this command line asks for on top.

    A group given on the command line (`hardware=cuda`) replaces that group, a key replaces that key;
    everything else stays as it was when the checkpoint was written. A checkpoint may be untrusted: what
    concerns this machine and its keys is the run directory's, if it is one of `runs_dir`, else the command line's.

    Args:
        point: where the run goes on.
        composed: the configuration of this command line.
        report: told of what was saved and is not taken over.

    Raises:
        ConfigError: an experiment or an optimizer is asked for that is not the saved run's.
        ConfigErrors: what was saved is no configuration of this version, or names code that the command line does not.
    """
    if problems := check_stored(from_dict(RunConfig, point.saved)):
        raise ConfigErrors(problems)
    result = copy.deepcopy(dict(point.saved))
    _localize(result, point, composed, report)
    apply(composed, result, composed.overrides)
    _keep_optimizer(result, point)
    _keep_adapters(result, point)
    registry.refuse_stored(result, composed.data, point.directory)
    result["resume"] = composed.config.resume
    # What is allowed is allowed once.
    result["resume_allow"] = list(composed.config.resume_allow)
    return from_dict(RunConfig, result)


def _keep_optimizer(result: Mapping[str, Any], point: ResumePoint) -> None:
    """Refuse another optimizer than the saved run's."""
    was, now = _optimizer_of(point.saved), _optimizer_of(result)
    if was != now:
        raise ConfigError(
            "a resumed run keeps its optimizer: the checkpoint holds the state of that one alone",
            got=now,
            allowed=was,
            fix=f"leave it out; or start a new run from the weights: train.init_from={point.directory}",
        )


def _keep_adapters(result: Mapping[str, Any], point: ResumePoint) -> None:
    """Refuse other adapters than the saved run's."""
    kept = ("rank", "alpha", "target_modules", "rslora")
    was, now = ({key: _at(data, f"train.lora.{key}") for key in kept} for data in (point.saved, result))
    if _at(point.saved, "train.lora") is None:  # saved before there were adapters
        was["rank"], now = None, {**was, "rank": now["rank"]}
    if changed := [f"train.lora.{key}={now[key]}" for key in kept if was[key] != now[key]]:
        raise ConfigError(
            "a resumed run keeps its adapters: the checkpoint holds these alone",
            got=", ".join(changed),
            allowed=", ".join(f"train.lora.{key}={was[key]}" for key in kept if was[key] != now[key]),
            fix=f"leave it out; or start a new run from the weights: train.init_from={point.directory}",
        )


def _optimizer_of(data: Mapping[str, Any]) -> str:
    target = _at(data, "optim._target_")
    return f"optim={_at(data, 'optim.name') or 'adamw'}" if target is None else f"optim._target_={target}"


def apply(composed: Composed, result: dict[str, Any], keys: Iterable[str]) -> None:
    """Set what the command line says of `keys` in the plain data `result`.

    Args:
        composed: the configuration of this command line.
        result: plain data, changed in place.
        keys: dotted.

    Raises:
        ConfigError: an experiment is asked for that is not that of `result`.
    """
    for key in keys:
        # The weights that a run began with are behind it; the same command line is given at each start (resume=auto).
        # Beneath adapters they still are: where a user names them beside a checkpoint, they were moved.
        moved = key == "train.init_from" and composed.config.resume not in (None, AUTO)
        if key.split(".")[0] == "hydra" or (key == "train.init_from" and not moved):
            continue
        if key == "experiment":
            if composed.data["experiment"] != result.get("experiment"):
                raise ConfigError(
                    "a resumed run keeps its experiment",
                    got=f"experiment={composed.data['experiment']}",
                    allowed=f"experiment={result.get('experiment')}",
                    fix="leave it out, and give single keys to change",
                )
            continue
        _copy(composed.data, result, key.replace("/", ".") if composed.overrides[key] else key)
        if moved and "://" not in (place := str(result["train"]["init_from"])):
            result["train"]["init_from"] = str(Path(place).expanduser().resolve())


def _keep_documents(result: dict[str, Any]) -> None:
    """Of before BOS was an option: none was put, and a path without `kind=file` was not looked at."""
    tokenizer = _at(result, "data.tokenizer")
    if isinstance(tokenizer, dict) and "bos" not in tokenizer:
        tokenizer["bos"] = False
        if tokenizer.get("kind") != "file":
            tokenizer["path"] = None


def _localize(result: dict[str, Any], point: ResumePoint, composed: Composed, report: Callable[[str], object]) -> None:
    """Put what may not come from a checkpoint into `result`."""
    ours: Mapping[str, Any] = composed.data
    run_dir, runs_dir = point.run_dir, Path(composed.config.runs_dir).resolve()
    if run_dir is not None and resolved(run_dir).is_relative_to(runs_dir):
        ours = to_dict(from_dict(RunConfig, read_plain(run_dir / run_directory.CONFIG)))
    keys = [*_OF_THIS_MACHINE, *_TRUST]
    saved_dir = str(_at(result, "checkpoint.dir") or "auto")
    # Where the checkpoint was found at the user's word, the run goes on keeping others.
    if saved_dir != "auto" and not str(point.directory).startswith(f"{saved_dir.rstrip('/')}/"):
        keys.append("checkpoint.dir")
    for key in keys:
        was, value = _at(result, key), _at(ours, key)
        if was == value:
            continue
        if was and key not in composed.overrides and key not in _OF_A_FOLDER:
            report(f"the checkpoint's {key} is not taken over: give it on the command line if you want it (was {was})")
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = copy.deepcopy(value)


def _at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _copy(source: Mapping[str, Any], target: dict[str, Any], key: str) -> None:
    *parents, last = key.lstrip("+").split(".")
    for parent in parents:
        source, target = source[parent], target.setdefault(parent, {})
    target[last] = copy.deepcopy(source[last])
