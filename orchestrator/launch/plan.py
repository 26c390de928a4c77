"""Find the run that a command line means, and where it resumes: decided and checked once, by the launcher. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.checkpoint.adapters import adapter_record
from orchestrator.checkpoint.attestation import attester
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.hashing import new_hash
from orchestrator.checkpoint.run_checkpoints import committed, open_newest
from orchestrator.checkpoint.signing import Trust, signer, trust
from orchestrator.checkpoint.storage import AnyPath, locate
from orchestrator.config.compose import Composed
from orchestrator.config.convert import from_dict
from orchestrator.config.paths import absolute
from orchestrator.config.schema import RunConfig
from orchestrator.config.transfer import settle_transfer
from orchestrator.config.validate import validate
from orchestrator.errors import CheckpointError, ConfigError, ConfigErrors, DamagedError
from orchestrator.hardware.target import Target
from orchestrator.hardware.target_table import resolve
from orchestrator.interop.imported_source import with_imported
from orchestrator.launch import changes
from orchestrator.output import tell
from orchestrator.runs import identity, init_from, listing, resume, run_directory
from orchestrator.runs.messages import warn
from orchestrator.runs.stored_model import holds_model
from orchestrator.training.layout_choice import precision_of
from orchestrator.training.resolved import Resolved


@dataclass(frozen=True)
class Plan:
    """What is to be started.

    Attributes:
        config: of the run, as the user has it: what is `auto` is open still.
        target: that it runs on, looked at.
        trusted: whose checkpoints are believed.
        checkpoint: that the run goes on from, or starts from; opened and checked. None for random weights.
        resumes: it goes on.
        run_dir: to go on in; None for a new one.
        name: of the new run directory, by which a restarted job finds it; None to name it by the time.
        uuid: of the run, where it began in another place.
        patient: wait for an earlier process of the same job to end.
        newest: checkpoints of the run when it was looked for, as `resume.newest` names them: where they are others
            when the run is held, the plan is void. None where the user has said what to go on from.
        finished: why there is nothing left to do.
        words: what the run was composed from, for the record; None: the command line.
        began: when this start began, in seconds since the epoch; None: when the run directory is opened.
    """

    config: RunConfig
    target: Target
    trusted: Trust = Trust()
    checkpoint: Checkpoint | None = None
    resumes: bool = False
    run_dir: Path | None = None
    name: str | None = None
    uuid: str | None = None
    patient: bool = False
    newest: tuple[str, ...] | None = None
    finished: str | None = None
    words: tuple[str, ...] | None = None
    began: float | None = None

    @property
    def resume_from(self) -> AnyPath | None:
        """The checkpoint that the run goes on from."""
        return self.checkpoint.directory if self.resumes and self.checkpoint else None

    @property
    def takes_older(self) -> bool:
        """Where that is damaged an older one will do: the user has named the run, and not a checkpoint of it."""
        return self.resumes and self.config.resume is not None and not resume.is_checkpoint(self.config.resume)


def find_plan(composed: Composed, main: bool, alone: bool) -> Plan:
    """Find what `composed` means.

    Args:
        composed: the command line.
        main: this process speaks, checks and signs for the others.
        alone: no engine has started others.

    Raises:
        UserError: what is wrong. Nothing was written.
    """
    config = composed.config
    check = main and config.checkpoint.verify_on_load
    if config.resume is None:
        if config.run_id is not None and main:
            _refuse_taken(run_directory.named(config, config.run_id), config)
        return _new(composed, check, main, config.run_id)
    if config.resume != resume.AUTO:
        point = resume.find(config.resume, config.runs_dir, check, warn, config.checkpoint, listing.wanted_by(composed))
        if "train.init_from" in composed.overrides and adapter_record(point.checkpoint) is None:
            raise ConfigError(
                "a resumed run has its weights",
                got=f"resume={config.resume} and train.init_from={config.train.init_from}",
                fix="leave out one of them",
            )
        return _going_on(composed, point, config.run_id, check, main, alone)
    name = identity.name_of(config, composed.job)
    own, run_dir, newest = resume.find_own(composed, name, check, warn)
    if main:
        goes_on = f"goes on from {own.directory.name}" if own else "starts: it has no checkpoint yet"
        tell(f"run        {run_dir} {goes_on}")
    if own is None:
        return replace(_new(composed, check, main, name), patient=True, newest=newest)
    return replace(_going_on(composed, own, name, check, main, alone), patient=True, newest=newest)


def _refuse_taken(run_dir: Path, config: RunConfig) -> None:
    taken: AnyPath | None = run_dir if run_dir.exists() and not listing.is_empty(run_dir) else None
    if taken is None and config.checkpoint.dir != "auto":
        # The run may have been on another host.
        taken = next(iter(committed(run_directory.checkpoints_dir(run_dir, config))), None)
    if taken is not None:
        raise ConfigError(
            "there is a run of this run_id already",
            got=taken,
            fix="resume=auto goes on with it; or give another run_id",
        )


def _new(composed: Composed, check: bool, main: bool, name: str | None) -> Plan:
    composed = with_imported(composed, say=main)
    point = init_from.find(composed, check, warn)
    checkpoint = point.checkpoint if point else None
    if checkpoint is None and (rank := composed.config.train.lora.rank) is not None:
        raise ConfigError(
            "adapters lie beside weights, and the run has none to start from",
            got=f"train.lora.rank={rank} without train.init_from",
            fix="set train.init_from=CHECKPOINT or hf:DIRECTORY, or leave out train.lora.rank to train all weights",
        )
    config = settle_transfer(absolute(init_from.settle_on(composed, checkpoint, warn)))
    trusted = _check_places(config, main, point.trusted if point else None)
    return Plan(config, resolve(config.hardware), trusted, checkpoint, name=name)


def _going_on(
    composed: Composed, point: resume.ResumePoint, name: str | None, check: bool, main: bool, alone: bool
) -> Plan:
    """Go on from a checkpoint: in its run's directory, or in a new one called `name`."""
    merged = absolute(resume.merge(point, composed, warn))
    if point.run_dir is None:
        # What branches off is another run, and so is not found by the name of the one that it comes from.
        merged = replace(merged, run_id=composed.config.run_id)
    if problems := validate(merged):
        raise ConfigErrors(problems)
    merged = settle_transfer(merged)
    trusted, checkpoint = _check_places(merged, main, point.trusted), point.checkpoint
    state = checkpoint.state()
    if "data" not in state:
        raise CheckpointError(
            "the checkpoint holds weights alone: there is no run in it to resume",
            got=point.directory,
            fix=f"start a new run from its weights: train.init_from={point.directory}",
        )
    holds_model(checkpoint, merged.model, merged.train.init_from)
    step, target = checkpoint.step, resolve(merged.hardware)
    found = changes.changes(from_dict(RunConfig, point.saved), merged, step)
    if change := changes.precision_change(state.get("precision"), precision_of(merged, target)):
        found.append(change)
    for change in found if main else []:
        tell(f"changed    {change}")
    changes.check(found, merged.resume_allow)
    plan = Plan(
        merged,
        target,
        trusted,
        checkpoint,
        resumes=True,
        run_dir=point.run_dir,
        name=name,
        uuid=_moved(point, state.get("run"), merged.runs_dir),
    )
    left_out = point.run_dir and run_directory.read_run(point.run_dir).get("left_out")
    # How far a run with islands is, its hub knows.
    if step < merged.train.max_steps or merged.islands.join is not None or left_out:
        return plan
    if alone and check and (older := _before_damaged(plan)):
        return replace(plan, checkpoint=older)
    done = f"step {step} of train.max_steps={merged.train.max_steps} in {point.directory}"
    if composed.config.resume == resume.AUTO:
        return replace(plan, finished=f"finished   the run has all its steps: {done}")
    longer = f"set train.max_steps to more than {step} to train on"
    if merged.optim.schedule.kind != "constant":
        longer += ", and 'resume_allow=[schedule]': the schedule ends there"
    raise CheckpointError("the run is finished: there are no steps left to train", got=done, fix=longer)


def newest_of(plan: Plan, place: run_directory.RunPaths) -> Checkpoint | None:
    """Return the newest valid checkpoint that the run of `plan` has written itself; None where there is none yet.

    Args:
        plan: of the run.
        place: its directory.

    Raises:
        CheckpointError: the checkpoints cannot be listed.
    """
    check = plan.config.checkpoint.verify_on_load
    found = open_newest(place.checkpoints, check, warn, plan.trusted)
    beside = run_directory.beside(place.run_dir)
    if beside == place.checkpoints:
        return found
    last = open_newest(beside, check, warn, plan.trusted)  # that no store took
    return last if found is None or (last is not None and last.step > found.step) else found


def refreshed(plan: Plan, newest: Checkpoint | None, resolved: Resolved) -> Plan:
    """Return the plan of a run that is started again, in its own directory and on the hardware as it is now.

    Args:
        plan: of the last start.
        newest: checkpoint that the run has written; None: it begins where it began.
        resolved: what was decided then. The run stays on that kind of hardware.

    Raises:
        HardwareError: it is not usable any more.
    """
    target = resolve(replace(plan.config.hardware, target=resolved.config.hardware.target))
    plan = replace(plan, target=target, run_dir=resolved.place.run_dir)
    return plan if newest is None else replace(plan, checkpoint=newest, resumes=True)


def _moved(point: resume.ResumePoint, uuid: object, runs_dir: str) -> str | None:
    """Return the uuid of the checkpoint's run, where the run goes on here and its directory was left elsewhere."""
    if point.run_dir is not None or not point.newest or not identity.is_uuid(uuid):
        return None
    return None if listing.with_uuid(Path(runs_dir), str(uuid)) else str(uuid)


def _before_damaged(plan: Plan) -> Checkpoint | None:
    """Return an older checkpoint, where the last one of a finished run is damaged: later steps are trained again."""
    last = plan.checkpoint
    if last is None or not plan.takes_older:
        return None
    try:
        last.verify()
        return None
    except DamagedError as error:
        warn(f"skipping {last.directory}: {error}")
    return open_newest(last.directory.parent, True, warn, plan.trusted, before=last.directory)


def _check_places(config: RunConfig, signs: bool, known: Trust | None) -> Trust:
    """Libraries and keys that the first save would miss.

    Args:
        config: of the run.
        signs: here the manifest is written, for which alone the signing key is needed.
        known: what a checkpoint was opened under.

    Returns:
        Whose checkpoints the run believes.
    """
    settings = config.checkpoint
    if settings.dir != "auto":
        locate(settings.dir)
    if signs:
        if settings.signing_key:
            signer(settings.signing_key)
        attester(settings.signing_key, settings.model_signing_key, settings.statement)
    new_hash(settings.hash)
    if known is not None and known.is_of(settings.trusted_keys, settings.require_signature):
        return known
    return trust(settings.trusted_keys, settings.require_signature)
