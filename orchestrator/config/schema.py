"""The configuration of a run as frozen dataclasses, read by every package.

Values come from the YAML files in `conf/`, whose comments explain each key to the user; this file is
what they are checked against. "auto" is filled in later: the target fills precision and
device counts, `sharding.layout` the degrees, the tokenizer the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Auto = Literal["auto"]
Schedule = Literal["1f1b", "interleaved", "zero_bubble", "dualpipe_v"]
ContextKind = Literal["gather", "ring", "ulysses"]
Norm = Literal["rms", "rms_offset", "rms_plain", "layer", "layer_no_bias", "layer_plain"]
Activation = Literal["swiglu", "swiglu_clamped", "geglu", "gelu", "gelu_erf", "relu2"]
GATED = ("swiglu", "swiglu_clamped", "geglu")  # activations with a matrix for the gate


@dataclass(frozen=True)
class HardwareConfig:
    """The hardware target, its devices, and how processes use them."""

    target: Literal["auto", "cpu", "cuda", "rocm", "tpu", "trainium"] = "auto"
    devices: int | Auto = "auto"  # devices on this host; one process each on torch-native targets
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the matrix products; master weights are fp32
    chip: str = "auto"  # key of the chip catalogue, for peak rates
    threads: int | Auto = "auto"  # CPU threads per process
    compile: bool = False  # torch.compile of every block
    runtime: Literal["auto", "torch", "torchneuron", "torch_tpu", "torch_xla"] = "auto"  # what drives the devices
    compilation_cache: str | None = "auto"  # of XLA: where compiled graphs are kept; auto: per user, none to rehearse
    simulate: int | None = None  # devices that this CPU stands in for, in place of a TPU or Trainium: a rehearsal
    instance: str | None = None  # of a rehearsal: the machine whose topology is meant, such as trn2.48xlarge
    check_memory: bool = True  # refuse a run that the memory model says does not fit
    timeout_seconds: int = 600  # of a collective, before the run is called hung
    environment: dict[str, str] = field(default_factory=dict)  # set in every worker before torch loads


@dataclass(frozen=True)
class RopeScalingConfig:
    """RoPE scaling for long contexts; the parameters carry the names of Hugging Face configurations."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_seq_len: int = 8192
    truncate: bool = True  # yarn: bounds of the blend are whole pairs
    attention_factor: float | None = None  # yarn: on cosine and sine; null: 0.1 ln(factor) + 1


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the feed-forward. Sizes count elements; `experts: 0` is a dense model."""

    experts: int = 0  # routed ones; 0: none
    top_k: int = 2  # experts of a token
    mlp_dim: int | Auto = "auto"  # inner width of one expert; auto: model.mlp_dim
    shared_mlp_dim: int = 0  # inner width of a feed-forward beside them that every token takes; 0: none
    shared_gate: bool = False  # a gate of its own for each token on that feed-forward
    dense_layers: int = 0  # the first layers, which have a feed-forward of model.mlp_dim instead
    score: Literal["softmax", "sigmoid", "softmax_chosen"] = "softmax"  # of the router; the last over the chosen alone
    normalize: bool = True  # the weights of a token's experts add up to one
    scale: float = 1.0  # factor on those weights
    groups: int = 1  # of experts, of which a token's experts come from the best ones
    top_groups: int = 1  # how many of them
    router_bias: bool = False
    expert_bias: bool = False
    capacity_factor: float | None = None  # of a sequence's even share, that an expert takes at most; null: dropless
    balance_loss: float = 0.0  # coefficient of the sequence-wise balance loss
    z_loss: float = 0.0  # coefficient of the router's z-loss
    balance_bias: bool = False  # an offset per expert, for the choice alone, that evens the load out
    balance_bias_rate: float = 0.001  # by which it changes in a step

    def width(self, model: ModelConfig) -> int:
        """Inner width of one expert.

        Args:
            model: whose experts they are.
        """
        return model.mlp_dim if self.mlp_dim == "auto" else self.mlp_dim


@dataclass(frozen=True)
class ModelConfig:
    """A decoder language model. Sizes count elements; `vocab_size: auto` takes the tokenizer's.

    A model of the user's own is named by `_target_`: it is made of the same description, and of `arguments`.
    """

    name: str = "tiny"
    _target_: str | None = None  # package.module.Name of an own model, or an installed entry point; null: Decoder
    arguments: dict[str, Any] = field(default_factory=dict)  # of an own model, beside the description
    vocab_size: int | Auto = "auto"
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int | Auto = "auto"  # auto: dim / heads
    mlp_dim: int = 384
    moe: MoEConfig = MoEConfig()
    max_seq_len: int = 2048
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_placement: Literal["pre", "post", "both"] = "pre"  # of the residual branches' input, output, or both
    residual: Literal["sequential", "parallel", "parallel_one_norm"] = "sequential"
    residual_scale: float = 1.0  # on what a branch adds to the stream
    activation: Activation = "swiglu"
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None  # of layers with a window, which are not scaled then; null: as the others
    rope_layers: tuple[bool, ...] = ()  # repeated over the layers: those that turn queries and keys; (): all
    rope_share: float = 1.0  # of a head, from its beginning, that is turned
    rope_layout: Literal["half", "interleaved"] = "half"  # partners: half the turned width apart, or neighbours
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    qk_norm: bool = False
    qk_norm_over: Literal["head", "width"] = "head"  # each head by itself, or all heads together
    qk_norm_after_rope: bool = False
    attention_bias: bool = False  # on the query, key and value projections
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    attention_scale: float | None = None  # on the scores; null: head_dim ** -0.5
    attention_softcap: float | None = None  # c tanh(scores / c)
    attention_sinks: bool = False  # a learned logit per head that takes part in the softmax, and has no value
    sliding_window: int | None = None  # tokens that a position sees, itself included
    windows: tuple[int | None, ...] = ()  # repeated over the layers, in place of sliding_window
    layer_heads: tuple[int, ...] = ()  # heads of each layer, where they differ
    layer_kv_heads: tuple[int, ...] = ()
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02

    @property
    def head_width(self) -> int:
        """`head_dim`, with `auto` filled in."""
        return self.dim // self.heads if self.head_dim == "auto" else self.head_dim

    @property
    def rope_width(self) -> int:
        """Elements of a head that rotary positions turn."""
        return int(self.head_width * self.rope_share)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a position of a layer sees, itself included; None: all before it.

        Args:
            layer: its number.
        """
        return self.windows[layer % len(self.windows)] if self.windows else self.sliding_window

    def rope_of(self, layer: int) -> Literal["global", "local"] | None:
        """Which rotary positions a layer has.

        Args:
            layer: its number.
        """
        if self.positions != "rope" or (self.rope_layers and not self.rope_layers[layer % len(self.rope_layers)]):
            return None
        local = self.rope_local_theta is not None and self.window_of(layer) is not None
        return "local" if local else "global"

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Count the query heads, and the key and value heads, of a layer.

        Args:
            layer: its number.
        """
        heads = self.layer_heads[layer] if self.layer_heads else self.heads
        return heads, self.layer_kv_heads[layer] if self.layer_kv_heads else self.kv_heads


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
class AdamWConfig:
    """AdamW with decoupled weight decay; none on norms and biases."""

    name: Literal["adamw"] = "adamw"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0  # global L2 norm
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class MuonRestConfig:
    """AdamW beside Muon: of embeddings, head, norms and biases."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # none on norms and biases


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
    schedule: ScheduleConfig = ScheduleConfig()


@dataclass(frozen=True)
class OwnOptimConfig:
    """An optimizer that the user names. The class is imported where the user gave it, never from a checkpoint."""

    _target_: str = ""  # package.module.Class
    name: str = "own"
    lr: float = 1e-3
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of its constructor
    grad_clip: float | None = 1.0
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
    schedule: Schedule = "1f1b"  # in which the micro-batches pass the pipeline
    context_kind: ContextKind = "gather"  # how the parts of a sequence attend to each other


@dataclass(frozen=True)
class HandoverConfig:
    """The handover check: short sequences and the model's results for them, saved with each checkpoint."""

    enabled: bool = True
    sequences: int = 2
    seq_len: int | Auto = "auto"  # tokens of each, at most train.seq_len; auto: by the size of a step
    on_mismatch: Literal["stop", "warn"] = "stop"


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
class LoggerConfig:
    """Outputs of the metrics beside metrics.jsonl, which is always written."""

    name: str = "default"
    every_steps: int = 10  # how often buffered metrics are fetched from the device and written
    progress: bool = True
    tensorboard: bool = True
    wandb: WandbConfig = WandbConfig()
    own: tuple[dict[str, Any], ...] = ()  # loggers of Lightning's: {_target_: package.module.Name, ARGUMENT: VALUE}


@dataclass(frozen=True)
class SampleConfig:
    """Text generated during the run and at its end."""

    prompt: str | None = None  # null: the beginning of a held-out document
    tokens: int = 64  # 0: no samples
    temperature: float = 0.8
    every_steps: int | None = None


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
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a step does whose loss or gradient norm is not finite
    max_skips: int = 10  # steps in a row that on_nonfinite=skip leaves out; one more, and the run stops
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
    train: TrainConfig = TrainConfig()
    callbacks: tuple[dict[str, Any], ...] = ()  # of Lightning's: {_target_: package.module.Name, ARGUMENT: VALUE}
