"""The configuration of a run as frozen dataclasses, read by every package.

Values come from the YAML files in `conf/`, whose comments explain each key to the user; this file is
what they are checked against. "auto" is filled in later: the target fills precision and
device counts, `sharding.layout` the degrees, the tokenizer the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from orchestrator.config.launch_schema import LaunchConfig as LaunchConfig
from orchestrator.config.launch_schema import LocalLaunch as LocalLaunch
from orchestrator.config.model_schema import GATED as GATED
from orchestrator.config.model_schema import Auto as Auto
from orchestrator.config.model_schema import MLAConfig as MLAConfig
from orchestrator.config.model_schema import ModelConfig as ModelConfig
from orchestrator.config.model_schema import MoEConfig as MoEConfig
from orchestrator.config.model_schema import RopeScalingConfig as RopeScalingConfig

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "dualpipe_v"]
ContextKind = Literal["gather", "ring", "ulysses"]
StateDtype = Literal["fp32", "bf16", "int8"]


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
class TokenizerConfig:
    """The tokenizer of sources that are not prepared stores, and the document format of all."""

    kind: Literal["auto", "bpe", "file", "bytes", "none"] = "auto"  # auto: file where a path is given, else bpe
    vocab_size: int = 4096  # of a trained BPE, special tokens included
    path: str | None = None  # tokenizer.json for kind=file
    bos: bool | Auto = "auto"  # BOS in front of every document and prompt; auto: as the tokenizer's own files say
    bos_token: str | None = None  # another token to put there
    eos: bool | Auto = "auto"  # the end-of-text token after every document; auto: yes
    eos_token: str | None = None  # another token to put there; null: the one that the tokenizer's files name
    special_tokens_in_text: Literal["text", "token", "error"] = "text"  # what a text that spells one means

    @property
    def made_from(self) -> str:
        """`kind`, with `auto` filled in."""
        return self.kind if self.kind != "auto" else "bpe" if self.path is None else "file"


@dataclass(frozen=True)
class TokensConfig:
    """How sources that are tokenized already are read."""

    vocab_size: int | None = None  # ids are below it; null: the tokenizer's
    eos_id: int | None = None  # the token that ends a document; null: the tokenizer's
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None  # of files without it; null: as small as fits
    column: str | None = None  # of tables and data sets, which are read as tokens then
    packed: bool = False  # rows are cut from one sequence: documents end at eos_id alone


@dataclass(frozen=True)
class SourceConfig:
    """One source of the training mixture."""

    path: str = "builtin"  # "builtin", a prepared store, or files and folders (glob)
    weight: float = 1.0
    text_field: str | None = None  # of this source's rows; None: as in data.text_field and data.text_template
    text_template: str | None = None
    reader: dict[str, Any] = field(default_factory=dict)  # of one's own, for this source; {}: data.reader


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data."""

    name: str = "builtin"
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokensConfig = TokensConfig()
    validation_fraction: float = 0.02  # of the tokens, held out
    validation: str | None = None  # files or a store to evaluate on; then nothing is held out of the sources
    document_mask: bool = True  # attention does not cross documents packed into one sequence
    text_field: str = "text"  # field of rows (JSON, CSV, Parquet, Arrow); text.content: of a nested object
    text_template: str | None = None  # several fields instead: "{title}\\n\\n{body}"
    messages: Literal["plain"] | None = None  # what a list of messages becomes: "role: content", an empty line between
    on_null: Literal["error", "skip"] = "error"  # rows whose field is null or missing
    reader: dict[str, Any] = field(default_factory=dict)  # of one's own, by _target_; {}: files are read by format
    transform: dict[str, Any] = field(default_factory=dict)  # of every document, by _target_; {}: none
    skip: tuple[tuple[int, int], ...] = ()  # ranges of training sequences to leave out: first, and behind the last
    cache_dir: str | Auto = "auto"
    workers: int | Auto = "auto"  # threads that tokenise
    prefetch: int = 2  # steps read ahead by the training process


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps. `wsd` is warm-up, stable, decay."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    _target_: str | None = None  # an own schedule, called with (step, max_steps, lr); null: by `kind`
    arguments: dict[str, Any] = field(default_factory=dict)  # of an own schedule
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2  # of max_steps, for wsd


@dataclass(frozen=True)
class OptimGroupConfig:
    """Parameters with a rate or a decay of their own; of several entries the first that matches counts."""

    match: str = ""  # pattern over names of parameters: embed.weight, layers.0.*, *.attn.*
    lr_factor: float = 1.0  # of optim.lr, and of optim.adamw.lr where Muon leaves them to AdamW
    weight_decay: float | None = None  # in place of the optimizer's, on vectors too; null: as without this entry


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with decoupled weight decay; none on norms and biases."""

    name: Literal["adamw"] = "adamw"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    state_dtype: StateDtype = "fp32"  # of the moments of matrices
    grad_clip: float | None = 1.0  # global L2 norm
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class MuonRestConfig:
    """AdamW beside Muon: of embeddings, head, norms and biases."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # none on norms and biases
    state_dtype: StateDtype = "fp32"  # of the moments of matrices


@dataclass(frozen=True)
class MuonConfig:
    """Muon on the matrices of the blocks, AdamW on everything else."""

    name: Literal["muon"] = "muon"
    lr: float = 0.02  # of Muon; that of the rest is adamw.lr
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    ns_steps: int = 5  # of the Newton-Schulz iteration
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    ns_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the iteration; auto: fp32 on a CPU, else bf16
    eps: float = 1e-7  # least norm that a matrix is divided by
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    adamw: MuonRestConfig = MuonRestConfig()
    grad_clip: float | None = 1.0
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor: of a matrix's variances a row's and a column's are kept. No weight decay on norms and biases."""

    name: Literal["adafactor"] = "adafactor"
    lr: float = 0.01  # relative to a parameter's size; at most 1 / sqrt(step) is used
    beta2_decay: float = -0.8
    eps_update: float | None = None  # null: the dtype's resolution
    eps_parameter: float = 1e-3
    clip_threshold: float = 1.0  # of an update's root mean square
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class SGDConfig:
    """SGD with momentum. Weight decay is added to the gradient; none on norms and biases."""

    name: Literal["sgd"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9  # 0: none, and no state
    nesterov: bool = False
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class OwnOptimConfig:
    """An optimizer that the user names. The class is imported where the user gave it, never from a checkpoint."""

    _target_: str = ""  # package.module.Class
    name: str = "own"
    lr: float = 1e-3
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of its constructor
    grad_clip: float | None = 1.0
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


OptimConfig: TypeAlias = AdamWConfig | MuonConfig | AdafactorConfig | SGDConfig | OwnOptimConfig


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
class SampleConfig:
    """Text generated during the run and at its end."""

    prompt: str | None = None  # null: the beginning of a held-out document
    tokens: int = 64  # 0: no samples
    temperature: float = 0.8
    every_steps: int | None = None


@dataclass(frozen=True)
class SpikeConfig:
    """What a spike is: steps in a row whose loss or gradient norm is far above what the steps before had."""

    window: int = 128  # steps before, whose median and median absolute deviation count
    deviations: float = 6.0  # above the median, in robust standard deviations
    steps: int = 3  # in a row


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch size, evaluation and numerical settings of the training."""

    max_steps: int = 300
    seq_len: int = 256
    global_batch_tokens: int = 4096  # per optimizer step, over all devices
    micro_batch_size: int | Auto = "auto"  # sequences per device and backward pass; auto: all of a step's
    reduce_gradients: Literal["each", "last"] = "each"  # micro-batch of a step; the strategies say what it means
    remat: Literal["auto", "none", "selective", "full"] = "none"  # auto: with the layout, if that is planned; else none
    eval_every: int | None = 100  # steps
    eval_tokens: int = 65536
    loss_chunk_tokens: int = 2048  # tokens whose logits are alive at one time
    deterministic: bool = False
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"  # of a step whose loss or gradient norm is not finite
    max_skips: int = 10  # steps in a row that on_nonfinite=skip leaves out; one more, and the run stops
    max_rewinds: int = 10  # of a run, all its legs together; one more, and the run stops
    on_spike: Literal["ignore", "warn", "rewind"] = "warn"
    spike: SpikeConfig = SpikeConfig()
    check_replicas_every: int | None = None  # steps; that devices which must hold the same bits do; None: not asked
    rewind_skip_steps: int = 0  # least batches that a rewind leaves out, from its checkpoint on
    init_from: str | None = None  # weights to start from: latest, a run directory or a checkpoint directory
    objective: Literal["val_loss", "best_val_loss", "loss", "loss_mean", "tokens_per_second"] = "val_loss"  # of a sweep
    sample: SampleConfig = SampleConfig()


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
    train: TrainConfig = TrainConfig()
    callbacks: tuple[dict[str, Any], ...] = ()  # of Lightning's: {_target_: package.module.Name, ARGUMENT: VALUE}
