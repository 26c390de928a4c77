"""The configuration of a run's training; `config.schema` hands it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.model_schema import Auto


@dataclass(frozen=True)
class PreferenceConfig:
    """Learning from pairs of responses, of which one was preferred (DPO)."""

    loss: Literal["sigmoid", "ipo", "hinge"] | None = None  # null: none of it; sigmoid is DPO's own
    beta: float = 0.1  # how far from the reference model: the larger, the nearer
    label_smoothing: float = 0.0  # of the sigmoid: the share of pairs that are taken to be the wrong way round
    reference: Literal["cached", "live"] = "cached"  # its log-probabilities: computed once, or in every step

    def holds_copy(self, lora: LoraConfig) -> bool:
        """Whether a second model lies on the devices, beside the one that is trained.

        Args:
            lora: of the run; beneath adapters lies the reference itself.
        """
        return self.loss is not None and self.reference == "live" and lora.rank is None


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
class LoraConfig:
    """Low-rank adapters, trained beside weights that stay as they are. The names are PEFT's."""

    rank: int | None = None  # null: none; the weights themselves are trained
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    rslora: bool = False


@dataclass(frozen=True)
class BatchStageConfig:
    """Steps at the beginning with a smaller global batch."""

    steps: int = 0
    tokens: int = 0  # of each of these steps


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights, beside them."""

    decay: float | None = None  # what the average keeps of itself at each update; None: there is none
    every_steps: int = 1  # between two updates


@dataclass(frozen=True)
class TasksConfig:
    """Tasks of lm-eval that the model is asked during the run and at its end."""

    names: tuple[str, ...] = ()  # of tasks and groups, or YAML files of tasks, or folders of them; (): none
    include: tuple[str, ...] = ()  # folders of YAML files, whose tasks can be named
    every_steps: int | None = None  # None: at the end alone
    limit: float | None = None  # documents of each task, or the part of them where it is below 1; None: all
    num_fewshot: int | None = None  # examples in front of each question; None: as the task says
    batch_tokens: int = 8192  # of a batch on each device, about


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch size, evaluation and numerical settings of the training."""

    max_steps: int = 300
    seq_len: int = 256
    global_batch_tokens: int = 4096  # per optimizer step, over all devices
    batch_warmup: tuple[BatchStageConfig, ...] = ()  # one after the other, before global_batch_tokens
    micro_batch_size: int | Auto = "auto"  # sequences per device and backward pass; auto: all of a step's
    reduce_gradients: Literal["each", "last"] = "each"  # micro-batch of a step; the strategies say what it means
    remat: Literal["auto", "none", "selective", "full"] = "none"  # auto: with the layout, if that is planned; else none
    eval_every: int | None = 100  # steps
    eval_tokens: int = 65536
    loss_chunk_tokens: int = 2048  # tokens whose logits are alive at one time
    z_loss: float = 0.0  # coefficient of the squared logarithm of the softmax's normaliser, added to the loss
    deterministic: bool = False
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"  # of a step whose loss or gradient norm is not finite
    max_skips: int = 10  # steps in a row that on_nonfinite=skip leaves out; one more, and the run stops
    max_rewinds: int = 10  # of a run, all its legs together; one more, and the run stops
    on_spike: Literal["ignore", "warn", "rewind"] = "warn"
    spike: SpikeConfig = SpikeConfig()
    check_replicas_every: int | None = None  # steps; that devices which must hold the same bits do; None: not asked
    rewind_skip_steps: int = 0  # least batches that a rewind leaves out, from its checkpoint on
    init_from: str | None = None  # weights to start from: latest, a run, a checkpoint, or hf:DIRECTORY
    preference: PreferenceConfig = PreferenceConfig()
    lora: LoraConfig = LoraConfig()
    ema: EmaConfig = EmaConfig()
    objective: Literal["val_loss", "best_val_loss", "loss", "loss_mean", "tokens_per_second"] = "val_loss"  # of a sweep
    sample: SampleConfig = SampleConfig()
    tasks: TasksConfig = TasksConfig()
