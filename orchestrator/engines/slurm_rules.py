"""What Slurm would refuse, or take for something else, found before a job is submitted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from orchestrator.config.launch_schema import SlurmLaunch
from orchestrator.engines.engine import Rendered
from orchestrator.engines.engine_job import EngineJob
from orchestrator.engines.shell_text import bad_variables
from orchestrator.engines.slurm_script import SCRIPT, gres
from orchestrator.errors import ConfigError, UserError, shown

_TIME = re.compile(
    r"(?P<minutes>\d+)(:(?P<seconds>[0-5]?\d))?"
    r"|(?P<hours>\d+):(?P<m>[0-5]?\d):(?P<s>[0-5]?\d)"
    r"|(?P<days>\d+)-(?P<h>\d+)(:(?P<dm>[0-5]?\d)(:(?P<ds>[0-5]?\d))?)?"
)
_UNLIMITED = ("INFINITE", "UNLIMITED", "infinite", "unlimited")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
_WORDS = re.compile(rf"{_WORD.pattern}(,{_WORD.pattern})*")
_GRES = re.compile(r"[a-z][a-z0-9_]*(:[A-Za-z][A-Za-z0-9_.-]*)?(:[1-9]\d*)?")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*")
_OPTION = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.,&|*()\[\]:=@+-]+")
_MOUNT = re.compile(r"/[^:,]*:/[^:,]*(:(ro|rw|[a-z,+]+))?")
# What the product decides, and where it takes it from.
_OURS = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "launch.nodes and hardware.devices"),
    **dict.fromkeys(("requeue", "no-requeue", "open-mode", "output", "error", "job-name", "chdir"), "the product"),
    **dict.fromkeys(("wrap", "array", "parsable", "test-only", "wait", "hold"), "the product"),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres"), "launch.gres"),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "launch.mem"),
    **dict.fromkeys(("cpus-per-task", "partition", "account", "qos", "time", "reservation", "constraint"), "launch."),
    **dict.fromkeys(("exclusive", "signal"), "launch."),
    **dict.fromkeys(("export", "export-file", "get-user-env"), "launch.environment"),
}
_LINE_LIMIT = 4096
_SPARE = 60  # seconds that Slurm may be early with a signal


def slurm_problems(job: EngineJob, rendered: Rendered) -> list[UserError]:
    """List what is wrong with a job for Slurm.

    Args:
        job: what is to run.
        rendered: its files.
    """
    launch = cast(SlurmLaunch, job.config.launch)
    found: list[UserError] = [
        *_formats(launch),
        *_time(launch),
        *_devices(job),
        *_extra(launch),
        *bad_variables("launch.environment", launch.environment),
        *_container(job),
        *_script(job, rendered.files.get(SCRIPT, "")),
    ]
    return found


def seconds_of(limit: str | int) -> int | None:
    """Return a time limit of Slurm in seconds; None where it is none, or without end.

    Args:
        limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
    """
    match = _TIME.fullmatch(str(limit))
    if match is None:
        return None
    part = {name: int(value) for name, value in match.groupdict().items() if value is not None}
    if "minutes" in part:
        return part["minutes"] * 60 + part.get("seconds", 0)
    hours = part.get("hours", 0) + part.get("h", 0) + 24 * part.get("days", 0)
    return hours * 3600 + (part.get("m", 0) + part.get("dm", 0)) * 60 + part.get("s", 0) + part.get("ds", 0)


def _formats(launch: SlurmLaunch) -> Iterator[ConfigError]:
    rules: tuple[tuple[str, re.Pattern[str], str], ...] = (
        ("partition", _WORDS, "names, separated by commas"),
        ("account", _WORD, "a name"),
        ("qos", _WORD, "a name"),
        ("reservation", _WORDS, "names, separated by commas"),
        ("constraint", _CONSTRAINT, "features with & | , * ( ) [ ]"),
        ("mem", re.compile(r"\d+[KMGT]?"), "megabytes, or a number with K, M, G or T: 64G"),
        ("gres", re.compile(rf"{_GRES.pattern}(,{_GRES.pattern})*"), "name[:type]:number, such as gpu:h100:8"),
        ("python", re.compile(r"[^\x00-\x1f]+"), "a path or a name"),
    )
    for key, rule, allowed in rules:
        value = getattr(launch, key)
        if value is not None and not rule.fullmatch(value):
            yield ConfigError(f"'launch.{key}' is not as Slurm has it", got=shown(value), allowed=allowed)
    for module in launch.modules:
        if not _MODULE.fullmatch(module):
            yield ConfigError("no name of a module", got=shown(module), allowed="such as cuda/13.0")
    counts: tuple[tuple[str, int], ...] = (("cpus_per_task", 1 << 12), ("jobs_at_once", 1 << 16))
    for key, most in counts:
        value = getattr(launch, key)
        if value is not None and not 1 <= value <= most:
            yield ConfigError(f"'launch.{key}' is out of range", got=value, allowed=f"1 to {most}")


def _time(launch: SlurmLaunch) -> Iterator[ConfigError]:
    signal = launch.signal_seconds
    if not 0 <= signal <= 65535:
        yield ConfigError("'launch.signal_seconds' is out of range", got=signal, allowed="0 to 65535")
    if launch.time is None or str(launch.time) in _UNLIMITED:
        return
    limit = seconds_of(launch.time)
    if limit is None:
        allowed = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes:seconds"
        yield ConfigError("'launch.time' is no time limit of Slurm's", got=shown(launch.time), allowed=allowed)
    elif limit == 0:
        yield ConfigError("a time limit of 0 is none: Slurm takes the partition's", got=launch.time, fix="leave it out")
    elif signal and signal + _SPARE > limit:
        yield ConfigError(
            "the run would be asked to stop as soon as it starts, again and again",
            got=f"launch.time={launch.time} with launch.signal_seconds={signal}",
            allowed=f"a limit of {signal + _SPARE} s or more: Slurm may be {_SPARE} s early",
            fix="give more time, or a smaller launch.signal_seconds",
        )


def _devices(job: EngineJob) -> Iterator[ConfigError]:
    target, given = job.config.hardware.target, gres(job)
    if target in ("cuda", "rocm") and job.devices_per_node is None:
        yield ConfigError(
            "Slurm has to be told how many GPUs a node is to give",
            got=f"hardware={target} with hardware.devices=auto",
            fix="set hardware.devices, such as hardware.devices=8",
        )
    counts = [int(part.rpartition(":")[2]) for part in (given or "").split(",") if re.fullmatch(r"gpu(:.*)?:\d+", part)]
    if target in ("cuda", "rocm") and counts and job.devices_per_node not in (None, sum(counts)):
        yield ConfigError(
            "launch.gres and hardware.devices say different numbers of GPUs",
            got=f"launch.gres={given} with hardware.devices={job.devices_per_node}",
            fix="leave out launch.gres, or make them equal",
        )
    if target == "cpu" and "gpu" in (given or ""):
        yield ConfigError("GPUs are asked for that hardware=cpu would not use", got=f"launch.gres={given}")


def _extra(launch: SlurmLaunch) -> Iterator[ConfigError]:
    for name, value in launch.extra.items():
        if name in _OURS:
            owner = _OURS[name]
            owner = f"{owner}{name.replace('-', '_')}" if owner == "launch." else owner
            yield ConfigError(
                "this option of sbatch has another place",
                got=f"launch.extra.{shown(name)}",
                fix=f"it is set by {owner}",
            )
        elif not _OPTION.fullmatch(name):
            allowed = "the long name of an option without its dashes, such as mail-type"
            yield ConfigError("no option of sbatch", got=shown(name), allowed=allowed)
        elif not value or not re.fullmatch(r"[^\x00-\x1f\x7f\"\\]*", value):
            allowed = "one line without double quotes and backslashes"
            yield ConfigError(
                f"'launch.extra.{name}' cannot be written into a script", got=shown(value), allowed=allowed
            )


def _container(job: EngineJob) -> Iterator[ConfigError]:
    launch = cast(SlurmLaunch, job.config.launch)
    if launch.container_image is None:
        if launch.container_mounts:
            yield ConfigError("mounts without a container", got="launch.container_image=null", fix="name an image")
        return
    if launch.container_image.startswith("-") or re.search(r"[\x00-\x20]", launch.container_image):
        yield ConfigError("no name of an image", got=shown(launch.container_image), allowed="one word")
    for mount in launch.container_mounts:
        if not _MOUNT.fullmatch(mount):
            allowed = "/FROM:/TO, both absolute; /FROM:/TO:ro to read only"
            yield ConfigError("no mount of a container", got=shown(mount), allowed=allowed)


def _script(job: EngineJob, text: str) -> Iterator[ConfigError]:
    """Check the script itself, which a person may have changed."""
    if not text.startswith("#!"):
        yield ConfigError("a batch script begins with #! and a shell", got=shown(text.partition("\n")[0], 80))
    if re.search(r"[\x00-\x1f\"\\]", str(job.folder)):
        fix = "use other names of folders: runs_dir, name, run_id"
        yield ConfigError("a line of the script cannot hold this path", got=shown(job.folder), fix=fix)
    for line in text.splitlines():
        if line.startswith("#SBATCH") and len(line) > _LINE_LIMIT:
            yield ConfigError("a line of options is too long for sbatch", got=shown(line, 80))
    if len(text) > 4 << 20:
        yield ConfigError(
            "the script is larger than Slurm takes", got=f"{len(text):,} bytes", allowed="4 MiB", fix="a smaller sweep"
        )
