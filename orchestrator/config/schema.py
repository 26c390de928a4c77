"""The configuration of a run as frozen dataclasses, read by every package.

Values come from the YAML files in `conf/`, whose comments explain each key to the user; this file is
what they are checked against. "auto" is filled in later: the target fills precision and
device counts, `sharding.layout` the degrees, the tokenizer the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.data_schema import ChatConfig as ChatConfig
from orchestrator.config.data_schema import DataConfig as DataConfig
from orchestrator.config.data_schema import SourceConfig as SourceConfig
from orchestrator.config.data_schema import TokenizerConfig as TokenizerConfig
from orchestrator.config.data_schema import TokensConfig as TokensConfig
from orchestrator.config.islands_schema import IslandConfig as IslandConfig
from orchestrator.config.islands_schema import IslandsConfig as IslandsConfig
from orchestrator.config.islands_schema import OuterConfig as OuterConfig
from orchestrator.config.launch_schema import LaunchConfig as LaunchConfig
from orchestrator.config.launch_schema import LocalLaunch as LocalLaunch
from orchestrator.config.model_schema import GATED as GATED
from orchestrator.config.model_schema import Auto as Auto
from orchestrator.config.model_schema import MLAConfig as MLAConfig
from orchestrator.config.model_schema import ModelConfig as ModelConfig
from orchestrator.config.model_schema import MoEConfig as MoEConfig
from orchestrator.config.model_schema import RopeScalingConfig as RopeScalingConfig
from orchestrator.config.optim_schema import AdafactorConfig as AdafactorConfig
from orchestrator.config.optim_schema import AdamWConfig as AdamWConfig
from orchestrator.config.optim_schema import MuonConfig as MuonConfig
from orchestrator.config.optim_schema import MuonRestConfig as MuonRestConfig
from orchestrator.config.optim_schema import OptimConfig as OptimConfig
from orchestrator.config.optim_schema import OptimGroupConfig as OptimGroupConfig
from orchestrator.config.optim_schema import OwnOptimConfig as OwnOptimConfig
from orchestrator.config.optim_schema import ScheduleConfig as ScheduleConfig
from orchestrator.config.optim_schema import SGDConfig as SGDConfig
from orchestrator.config.optim_schema import StateDtype as StateDtype
from orchestrator.config.optim_schema import TransferBaseConfig as TransferBaseConfig
from orchestrator.config.train_schema import BatchStageConfig as BatchStageConfig
from orchestrator.config.train_schema import EmaConfig as EmaConfig
from orchestrator.config.train_schema import LoraConfig as LoraConfig
from orchestrator.config.train_schema import PreferenceConfig as PreferenceConfig
from orchestrator.config.train_schema import SampleConfig as SampleConfig
from orchestrator.config.train_schema import SpikeConfig as SpikeConfig
from orchestrator.config.train_schema import TrainConfig as TrainConfig

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "dualpipe_v"]
ContextKind = Literal["gather", "ring", "ulysses"]


@dataclass(frozen=True)
class Fp8Config:
    """Products in 8-bit floats, where `precision` is fp8: how they are scaled, and which layers stay in bf16."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_gw_hp", "mxfp8"] = "tensorwise"
    skip: tuple[str, ...] = ()  # patterns over names of modules, such as layers.0.*: these stay in bf16
    min_dim: int = 16  # a matrix that is narrower than this on a device stays in bf16


@dataclass(frozen=True)
class HardwareConfig:
    """The hardware target, its devices, and how processes use them."""

    target: Literal["auto", "cpu", "cuda", "rocm", "tpu", "trainium"] = "auto"
    devices: int | Auto = "auto"  # devices on this host; one process each on torch-native targets
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # of the matrix products; master weights are fp32
    fp8: Fp8Config = Fp8Config()
    chip: str = "auto"  # key of the chip catalogue, for peak rates
    threads: int | Auto = "auto"  # CPU threads per process
    compile: bool = False  # torch.compile of every block
    runtime: Literal["auto", "torch", "torchneuron", "torch_tpu", "torch_xla"] = "auto"  # what drives the devices
    compilation_cache: str | None = "auto"  # of XLA: where compiled graphs are kept; auto: per user, none to rehearse
    simulate: int | None = None  # devices that this CPU stands in for, in place of a TPU or Trainium: a rehearsal
    instance: str | None = None  # of a rehearsal: the machine whose topology is meant, such as trn2.48xlarge
    check_memory: bool = True  # refuse a run that the memory model says does not fit
    timeout_seconds: int = 600  # without progress, after which a run hangs and is ended
    environment: dict[str, str] = field(default_factory=dict)  # set in every worker before torch loads


@dataclass(frozen=True)
class LayoutConfig:
    """Degrees of the mesh axes, and how the work is arranged on them.

    The first `auto` one of fsdp, replicate, context, tensor, expert, pipeline takes what remains.
    """

    name: str = "auto"
    replicate: int | Auto = 1
    pipeline: int | Auto = 1
    fsdp: int | Auto = "auto"
    expert: int | Auto = 1
    context: int | Auto = 1
    tensor: int | Auto = 1
    schedule: Schedule | Auto = "1f1b"  # in which the micro-batches pass the pipeline; auto: planned, or 1f1b
    virtual_stages: int | Auto = "auto"  # of each of its ranks; auto: 2 with interleaved and dualpipe_v, else 1
    stage_layers: tuple[int, ...] = ()  # layers of each stage, the first one's first; empty: divided by their cost
    context_kind: ContextKind | Auto = "gather"  # how the parts of a sequence attend; auto: planned, or gather


@dataclass(frozen=True)
class HandoverConfig:
    """The handover check: short sequences and the model's results for them, saved with each checkpoint."""

    enabled: bool = True
    sequences: int = 2
    seq_len: int | Auto = "auto"  # tokens of each, at most train.seq_len; auto: by the size of a step
    on_mismatch: Literal["stop", "warn"] = "stop"


@dataclass(frozen=True)
class SnapshotConfig:
    """Snapshots of the run in the memory of its hosts and of their peers, between the checkpoints in storage."""

    enabled: bool = False
    every_steps: int = 10
    dir: str | Auto = "auto"  # folder of a memory file system; auto: /dev/shm

    @property
    def place(self) -> Path:
        """Folder of the memory file system."""
        return Path("/dev/shm" if self.dir == "auto" else self.dir)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, where, and which checkpoints are kept."""

    dir: str | Auto = "auto"  # auto: <run directory>/checkpoints; a path, or s3://..., gs://...
    every_steps: int | None = 100
    keep_last: int = 2
    keep_every_steps: int | None = None  # checkpoints at multiples of this are kept for good
    at_end: bool = True
    asynchronous: bool = True  # the step waits for a copy in host memory only
    verify_on_load: bool = True
    hash: Literal["sha256", "blake3"] = "sha256"  # of what is written; blake3 takes a fraction of the time
    store_timeout_seconds: int = 180  # of one operation of an object store, all its attempts together
    handover: HandoverConfig = HandoverConfig()
    memory: SnapshotConfig = SnapshotConfig()
    signing_key: str | None = None  # path of an Ed25519 private key (PEM): signs every manifest
    model_signing_key: str | None = None  # path of an ECDSA key: signs files in the format of OpenSSF Model Signing
    statement: bool = False  # an in-toto statement, signed by these keys
    trusted_keys: tuple[str, ...] = ()  # paths of public keys (PEM); a signature by another is refused
    require_signature: bool = False  # refuse checkpoints whose manifest is not signed by a trusted key


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases: whether to log there, the project, the entity (user or team), and the mode."""

    enabled: bool = False
    project: str = "orchestrator"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True)
class PrometheusConfig:
    """Metrics for Prometheus, served by the first process, or in a file for node_exporter."""

    enabled: bool = False
    port: int | None = 9464  # 0: any that is free, which is said; null: nothing is served
    address: str = "127.0.0.1"  # 0.0.0.0: for other hosts, too
    textfile: str | None = None  # NAME.prom in the folder of node_exporter's textfile collector


@dataclass(frozen=True)
class LoggerConfig:
    """Outputs of the metrics beside metrics.jsonl, which is always written."""

    name: str = "default"
    every_steps: int = 10  # how often buffered metrics are fetched from the device and written
    progress: bool = True
    tensorboard: bool = True
    wandb: WandbConfig = WandbConfig()
    prometheus: PrometheusConfig = PrometheusConfig()
    own: tuple[dict[str, Any], ...] = ()  # loggers of Lightning's: {_target_: package.module.Name, ARGUMENT: VALUE}


@dataclass(frozen=True)
class RunConfig:
    """The complete configuration of a run."""

    name: str = "run"
    seed: int = 0
    runs_dir: str = "runs"
    run_id: str | None = None  # the last part of the run's directory, instead of the time; resume=auto finds it by that
    resume: str | None = None  # "latest", "auto", a run directory or a checkpoint directory; a path or a URL
    resume_allow: tuple[Literal["batch", "data", "schedule"], ...] = ()  # what a resumed run may break of its promise
    experiment: str | None = None  # the option that was chosen, for the record
    hardware: HardwareConfig = HardwareConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = AdamWConfig()
    layout: LayoutConfig = LayoutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logger: LoggerConfig = LoggerConfig()
    launch: LaunchConfig = LocalLaunch()
    islands: IslandsConfig = IslandsConfig()
    train: TrainConfig = TrainConfig()
    callbacks: tuple[dict[str, Any], ...] = ()  # of Lightning's: {_target_: package.module.Name, ARGUMENT: VALUE}
