"""The configuration of optimizers and their schedules; `config.schema` hands it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

StateDtype = Literal["fp32", "bf16", "int8"]
Transfer = Literal["none", "mup", "completep"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps. `wsd` is warm-up, stable, decay; of the keys of one length one is given at most."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    _target_: str | None = None  # an own schedule, called with (step, max_steps, lr); null: by `kind`
    arguments: dict[str, Any] = field(default_factory=dict)  # of an own schedule
    warmup_steps: int = 20
    warmup_fraction: float | None = None  # of max_steps, in place of warmup_steps
    warmup_tokens: int | None = None  # likewise
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2  # of max_steps, for wsd
    decay_steps: int | None = None  # in place of decay_fraction
    decay_shape: Literal["linear", "cosine", "1-sqrt", "exponential"] = "linear"  # of wsd
    horizon_steps: int | None = None  # where it ends; None: at max_steps


@dataclass(frozen=True)
class OptimGroupConfig:
    """Parameters with a rate or a decay of their own; of several entries the first that matches counts."""

    match: str = ""  # pattern over names of parameters: embed.weight, layers.0.*, *.attn.*
    lr_factor: float = 1.0  # of optim.lr, and of optim.adamw.lr where Muon leaves them to AdamW
    weight_decay: float | None = None  # in place of the optimizer's, on vectors too; null: as without this entry


@dataclass(frozen=True)
class TransferBaseConfig:
    """The model that hyper-parameters were found for; sizes count elements."""

    dim: int | None = None  # width of its residual stream
    layers: int | None = None  # null: as many as the model has
    heads: int | None = None  # query heads; null: of a total width in proportion to dim
    head_dim: int | None = None  # null: the model's
    mlp_dim: int | None = None  # null: in proportion to dim
    expert_dim: int | None = None  # inner width of an expert; null: in proportion, as mlp_dim or dim
    attention_scale: float | None = None  # its factors in the forward pass, as model.attention_scale and the others
    logit_scale: float = 1.0
    residual_scale: float = 1.0


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norm_and_bias: bool = False
    decay_embeddings: bool = True
    state_dtype: StateDtype = "fp32"  # of the moments of matrices
    grad_clip: float | None = 1.0  # global L2 norm
    transfer: Transfer = "none"  # muP for width, CompleteP for width and depth
    base: TransferBaseConfig = TransferBaseConfig()
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class MuonRestConfig:
    """AdamW beside Muon: of embeddings, head, norms and biases."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norm_and_bias: bool = False
    decay_embeddings: bool = True
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
    transfer: Transfer = "none"  # muP for width, CompleteP for width and depth
    base: TransferBaseConfig = TransferBaseConfig()
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor: of a matrix's variances a row's and a column's are kept."""

    name: Literal["adafactor"] = "adafactor"
    lr: float = 0.01  # relative to a parameter's size; at most 1 / sqrt(step) is used
    beta2_decay: float = -0.8
    eps_update: float | None = None  # null: the dtype's resolution
    eps_parameter: float = 1e-3
    clip_threshold: float = 1.0  # of an update's root mean square
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = False
    decay_embeddings: bool = True
    grad_clip: float | None = 1.0
    groups: tuple[OptimGroupConfig, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class SGDConfig:
    """SGD with momentum. Weight decay is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9  # 0: none, and no state
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = False
    decay_embeddings: bool = True
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
