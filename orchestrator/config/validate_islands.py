"""Rules of the `islands` group beyond types."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from orchestrator.config.islands_schema import IslandConfig, IslandsConfig
from orchestrator.config.optimizers import LARGEST
from orchestrator.config.schema import LayoutConfig, RunConfig
from orchestrator.config.validate_data import NAME
from orchestrator.config.validate_model import out_of_range
from orchestrator.errors import ConfigError

_COUNTS = {
    "inner_steps": (1, 10**9),
    "fragments": (1, 1 << 14),
    "overlap_steps": (0, 10**9),
    "retained_mib": (1, 1 << 30),
}
_TARGETS = ("auto", "cpu", "cuda", "rocm", "tpu", "trainium")
_ADDRESS = re.compile(r"tcp://[^/@\s]+:[0-9]{1,5}")
_BIND = re.compile(r"tcp://[^/@\s]+:([0-9]{1,5}|\*)")
_NAMED = "up to 100 letters, digits, '.', '_' and '-', the first no '.' or '-'"
# Groups and keys that are those of the whole run, or said to each island by whoever starts it.
_OF_THE_RUN = ("islands", "model", "data", "seed", "resume", "run_id", "runs_dir", "name", "launch")
_NOT_NEGATIVE = ("grace_seconds", "stale_weight", "patience_seconds")


def check_islands(islands: IslandsConfig) -> list[ConfigError]:
    """List the numbers of the group that are out of range, where their bounds are their own.

    Args:
        islands: the group.
    """
    found = [
        out_of_range(f"islands.{key}", value, f"{least} to {largest}")
        for key, (least, largest) in _COUNTS.items()
        if not least <= (value := getattr(islands, key)) <= largest
    ]
    found += [
        out_of_range(f"islands.{key}", value, f"0 to {LARGEST:g}")
        for key in _NOT_NEGATIVE
        if not 0 <= (value := getattr(islands, key)) <= LARGEST
    ]
    if not 0 < islands.timeout_seconds <= LARGEST:
        found.append(out_of_range("islands.timeout_seconds", islands.timeout_seconds, "more than 0"))
    lr, momentum, mix = islands.outer.lr, islands.outer.momentum, islands.overlap_mix
    if lr != "auto" and not 0 < lr <= 10:
        found.append(out_of_range("islands.outer.lr", lr, "auto, or more than 0 and at most 10"))
    if momentum != "auto" and not 0 <= momentum < 1:
        found.append(out_of_range("islands.outer.momentum", momentum, "auto, or 0 or more and less than 1"))
    if mix is not None and not 0 <= mix <= 1:
        found.append(out_of_range("islands.overlap_mix", mix, "null, or 0 to 1"))
    return found


def island_names(islands: IslandsConfig) -> tuple[str, ...]:
    """Return the names of the islands of a run, in the order in which they are configured.

    Args:
        islands: the group.
    """
    return tuple(f"island-{number}" if one.name == "auto" else one.name for number, one in enumerate(islands.members))


def check_islands_run(config: RunConfig) -> Iterator[ConfigError]:
    """Yield what a run of islands, or one island of it, cannot be.

    Args:
        config: of the run.
    """
    islands = config.islands
    if not islands.members and islands.join is None:
        if islands.island is not None:
            got = f"islands.island={islands.island}"
            yield ConfigError("an island belongs to a hub", got=got, fix="set islands.join=tcp://HOST:PORT, too")
        return
    yield from _joining(islands) if islands.join is not None else _members(config)
    yield from _algorithm(islands)
    yield from _unsuitable(config)


def _joining(islands: IslandsConfig) -> Iterator[ConfigError]:
    if islands.members:
        yield ConfigError(
            "one process starts the islands of a run, or is part of one of them",
            got=f"islands.join={islands.join} with {len(islands.members)} islands.members",
            fix="leave out islands=[...] where an island joins: its hub knows the others",
        )
    if not _ADDRESS.fullmatch(str(islands.join)):
        yield out_of_range("islands.join", islands.join, "tcp://HOST:PORT of the run's hub, which it says at its start")
    if islands.island is None:
        yield ConfigError(
            "an island that joins has a name", got=f"islands.join={islands.join}", fix="set islands.island=NAME"
        )
    elif not NAME.fullmatch(islands.island):
        yield out_of_range("islands.island", ascii(islands.island)[:300], _NAMED)
    if islands.key_file is None:
        yield ConfigError(
            "islands know each other by a key that they share",
            got=f"islands.join={islands.join} without islands.key_file",
            fix="set islands.key_file to a copy of the key of the run, islands/key in its directory",
        )


def _members(config: RunConfig) -> Iterator[ConfigError]:
    islands = config.islands
    names = island_names(islands)
    for number, (name, member) in enumerate(zip(names, islands.members, strict=True)):
        key = f"islands.members[{number}]"
        if not NAME.fullmatch(name):
            yield out_of_range(f"{key}.name", ascii(name)[:300], _NAMED)
        if name in names[:number]:
            yield ConfigError("two islands have one name", got=f"{key}.name={name}", fix="name each otherwise")
        yield from _member(key, member)
    if not _BIND.fullmatch(islands.bind):
        yield out_of_range("islands.bind", islands.bind, "tcp://ADDRESS:PORT, or tcp://ADDRESS:* for a free port")
    remote = [name for name, member in zip(names, islands.members, strict=True) if member.place == "remote"]
    if remote and _BIND.fullmatch(islands.bind) and ("127.0.0.1" in islands.bind or "localhost" in islands.bind):
        yield ConfigError(
            "islands on other hosts cannot reach a hub that listens for this host alone",
            got=f"islands.bind={islands.bind} with {', '.join(remote)} elsewhere (place: remote)",
            fix="set islands.bind=tcp://0.0.0.0:PORT",
        )
    train = config.train
    if train.seq_len > 0 and len(names) > (sequences := train.global_batch_tokens // train.seq_len) > 0:
        yield ConfigError(
            "the global batch has fewer sequences than there are islands",
            got=f"train.global_batch_tokens={train.global_batch_tokens}: {sequences} sequences, {len(names)} islands",
            fix=f"set train.global_batch_tokens={len(names) * train.seq_len} or more",
        )


def _member(key: str, member: IslandConfig) -> Iterator[ConfigError]:
    if member.hardware not in _TARGETS:
        yield out_of_range(f"{key}.hardware", ascii(member.hardware)[:100], ", ".join(_TARGETS))
    if member.devices != "auto" and not 1 <= member.devices <= 1 << 16:
        yield out_of_range(f"{key}.devices", member.devices, f"auto, or 1 to {1 << 16}")
    if member.share != "auto" and not 0 < member.share <= LARGEST:
        yield out_of_range(f"{key}.share", member.share, "auto, or more than 0: relative to those of the others")
    known = [field.name for field in dataclasses.fields(LayoutConfig) if field.name != "name"]
    for name in member.layout:
        if name not in known:
            yield ConfigError(f"there is no key '{name}' of a layout", got=f"{key}.layout", allowed=", ".join(known))
    for word in member.overrides:
        name, separator, _ = word.partition("=")
        if not separator or name.lstrip("+").partition(".")[0] in _OF_THE_RUN:
            yield ConfigError(
                "an island's own words set keys that may differ between islands",
                got=f"{key}.overrides: {ascii(word)[:200]}",
                allowed=f"KEY=VALUE, and none of {', '.join(_OF_THE_RUN)}",
                fix="leave it out, or give it for the whole run",
            )


def _algorithm(islands: IslandsConfig) -> Iterator[ConfigError]:
    """Yield what of the exchange does not go with the algorithm, or with each other."""
    exact, defaults = islands.algorithm == "synchronous", IslandsConfig()
    differing = [
        name
        for name in ("fragments", "overlap_steps", "overlap_mix", "eager", "exchange")
        if getattr(islands, name) != getattr(defaults, name)
    ]
    for name in differing if exact else []:
        yield _unfit(islands, name, "gradients are exchanged whole, in fp32, at every step", "islands=diloco")
    for name in ("grace_seconds", "stale_weight"):
        if islands.algorithm != "decoupled" and getattr(islands, name) != getattr(defaults, name):
            yield _unfit(islands, name, "all wait for all in every round", "islands=decoupled")
    if exact:
        return
    if islands.fragments > islands.inner_steps:
        got = f"islands.fragments={islands.fragments} with islands.inner_steps={islands.inner_steps}"
        yield ConfigError("a fragment is exchanged after an inner step of its own", got=got, fix="take fewer fragments")
    if islands.overlap_steps >= islands.inner_steps:
        yield ConfigError(
            "an answer is needed before the next exchange",
            got=f"islands.overlap_steps={islands.overlap_steps} with islands.inner_steps={islands.inner_steps}",
            allowed=f"less than islands.inner_steps={islands.inner_steps}",
        )
    if not islands.overlap_steps:
        for name in ("overlap_mix", "eager"):
            if getattr(islands, name) != getattr(defaults, name):
                yield _unfit(islands, name, "it waits for the answer", "islands.overlap_steps=N", "overlap_steps")
    elif islands.eager and islands.overlap_mix is not None:
        got = f"islands.eager=true with islands.overlap_mix={islands.overlap_mix:g}"
        yield ConfigError("the probable answer is corrected, and not mixed", got=got, fix="leave out one of them")


def _unfit(islands: IslandsConfig, name: str, why: str, fix: str, key: str = "algorithm") -> ConfigError:
    got = f"islands.{name}={getattr(islands, name)} with islands.{key}={getattr(islands, key)}"
    return ConfigError(f"a setting has no meaning here: {why}", got=got, fix=f"leave it out, or set {fix}")


def _unsuitable(config: RunConfig) -> Iterator[ConfigError]:
    """Yield what of the training itself a run of islands does not do."""
    train = config.train
    rewinds = [f"train.{key}=rewind" for key in ("on_nonfinite", "on_spike") if getattr(train, key) == "rewind"]
    stated = {
        "the hub deals out the batches of a run, all of one size": ["train.batch_warmup"] if train.batch_warmup else [],
        "no island can leave out data that the hub has dealt out": rewinds,
        "every sequence is trained on once": ["data.skip"] * bool(config.data.skip),
        "pairs of responses are not dealt out over islands": [f"train.preference.loss={train.preference.loss}"]
        * (train.preference.loss is not None),
        "an island is started again as a whole": ["launch.fault_tolerance=torchft"]
        * (config.launch.fault_tolerance == "torchft"),
        "the average of the weights is not exchanged": [f"train.ema.decay={train.ema.decay}"]
        * (train.ema.decay is not None),
        "snapshots in memory know nothing of the other islands": ["checkpoint.memory.enabled=true"]
        * config.checkpoint.memory.enabled,
    }
    moe = config.model.moe
    if config.islands.algorithm == "synchronous" and moe.experts and moe.balance_bias:
        stated["the offsets of experts follow the load of one island, and no gradient"] = [
            "model.moe.balance_bias=true"
        ]
    for why, found in stated.items():
        for got in found:
            yield ConfigError(f"not with islands: {why}", got=got, fix="leave it out, or train on one set of devices")
