"""The `islands` group of the configuration: one run on devices that cannot all-reduce with each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from orchestrator.config.model_schema import Auto

Algorithm = Literal["diloco", "decoupled", "synchronous"]
Exchange = Literal["fp32", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class IslandConfig:
    """One island: devices with an engine, a layout and a place of their own."""

    name: str | Auto = "auto"  # auto: island-0, island-1, ...
    hardware: str = "auto"  # an option of the group `hardware`
    devices: int | Auto = "auto"  # hardware.devices
    layout: dict[str, int | str] = field(default_factory=dict)  # keys of the group `layout`: {fsdp: 2, tensor: 2}
    share: float | Auto = "auto"  # of the tokens, relative to the others; auto: by measured speed
    place: Literal["local", "remote"] = "local"  # remote: somebody starts it there with islands.join=ADDRESS
    python: str | None = None  # interpreter of its environment; null: this one
    overrides: tuple[str, ...] = ()  # further words of train, for this island alone


@dataclass(frozen=True)
class OuterConfig:
    """The outer optimizer, whose gradient is what the islands have moved away from the outer weights."""

    lr: float | Auto = "auto"  # auto: 1 (averaging) with fewer than 100 exchanges, else 0.7
    momentum: float | Auto = "auto"  # auto: 0 with fewer than 100 exchanges, else 0.9
    nesterov: bool = True


@dataclass(frozen=True)
class IslandsConfig:
    """Several islands that train one model at the same time, and exchange rarely."""

    name: str = "none"
    members: tuple[IslandConfig, ...] = ()  # `islands=[...]` on the command line
    join: str | None = None  # tcp://HOST:PORT of the hub of a run: this process trains one of its islands
    island: str | None = None  # the name of the island that joins
    key_file: str | None = None  # file of the key that all islands share; null: islands/key in the run's directory
    bind: str = "tcp://127.0.0.1:*"  # where the hub listens; tcp://0.0.0.0:PORT for islands on other hosts
    algorithm: Algorithm = "diloco"
    inner_steps: int = 64  # H: optimizer steps of an island between two exchanges of a tensor
    fragments: int = 1  # parts of the model that are exchanged one after the other
    overlap_steps: int = 0  # inner steps that an island goes on with before it needs the answer
    overlap_mix: float | None = None  # weight of the local weights when it comes; null: steps made meanwhile are kept
    eager: bool = False  # go on from what the answer will probably be
    exchange: Exchange = "fp32"  # numbers on the way
    error_feedback: bool = True  # what rounding has left out is sent the next time
    outer: OuterConfig = OuterConfig()
    grace_seconds: float = 0.0  # decoupled: that the hub waits for further islands before it merges
    stale_weight: float = 1.0  # decoupled: factor on the weight of a contribution per merge that it has missed
    patience_seconds: float = 120.0  # that the tokens of a lost island are kept for it, and diloco waits for it
    timeout_seconds: float = 30.0  # without a sign of life, after which an island is lost
    retained_mib: int = 1024  # of exchanges that the hub keeps for islands that come back
    schedule: str | None = None  # file of recorded exchanges (islands/exchanges.jsonl of a run) to repeat exactly
