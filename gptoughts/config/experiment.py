"""The typed tree that describes one run; the command line, ``--help`` and YAML files are made from it.

Fields that DeepSpeed's JSON may also hold default to ``None`` (unset): the JSON, the flag or the default of
``config.deepspeed_json`` fills them in, see docs/config.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gptoughts.config.model import ModelConfig


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are arranged, and what each keeps of a layer's forward; data parallelism takes what is left of the
    world size."""

    tensor: int = 1
    """Ranks that share each layer's matrices (tensor parallelism)."""
    pipeline: int = 1
    """Pipeline stages: ranks that hold consecutive layers and hand their activations on."""
    virtual_pipeline: int = 1
    """Chunks of layers per stage (interleaved schedule): idle time shrinks by this factor, communication grows."""
    pipeline_layout: str | None = None
    """Layers of each stage, in the order of the model, e.g. 5,3 (with virtual_pipeline: of each chunk, chunk i on stage
    i mod pipeline); unset: equal parts."""
    expert: int = 1
    """Data-parallel ranks that share each layer's routed experts (expert parallelism; needs a model with experts)."""
    context: int = 1
    """Ranks that share each sequence (context parallelism)."""
    context_method: Literal["ulysses", "ring"] = "ulysses"
    """What they send each other in attention: ulysses exchanges heads for tokens, so that num_attention_heads / tensor
    has to be a multiple of context; ring hands keys and values round, with any number of heads."""
    sequence: bool = False
    """Shard norms and residuals over the tensor-parallel ranks along the sequence (needs tensor > 1)."""
    recompute_granularity: Literal["none", "full", "selective"] = "none"
    """Activations that backward computes anew instead of keeping them: none, those of whole layers (full), or those of
    the parts of every layer that recompute_modules names (selective). Numbers stay the same to the bit."""
    recompute_method: Literal["uniform", "block"] | None = None
    """full only: every layer, in groups of recompute_num_layers of which the input alone is kept (uniform, the
    default), or the first recompute_num_layers layers of each stage's chunk and no others (block)."""
    recompute_num_layers: int | None = None
    """full only: layers per group (uniform) or per chunk (block); unset: 1."""
    recompute_modules: str | None = None
    """selective only, e.g. core_attn,mlp: of core_attn, layernorm, mlp, and where the model has them mla_up_proj, moe,
    shared_experts; unset: core_attn."""
    timeout_seconds: float = 600.0
    """How long a collective may wait before the run fails, in seconds."""
    heartbeat_seconds: float = 30.0
    """How long a rank may show no sign of life before the others end and name it, in seconds; 0: nobody watches."""


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    train: list[str] = field(default_factory=list)
    """Indexed corpora: PREFIX, several PREFIXes, or WEIGHT PREFIX pairs (blended by weight); ``--data`` for short."""
    valid: list[str] = field(default_factory=list)
    """Indexed validation corpora; empty: PREFIX_valid beside a training PREFIX where it exists."""
    tokenizer: str | None = None
    """tokenizer.json or a folder with one; unset: the one recorded beside the corpus."""
    cache_dir: str | None = None
    """Folder for megatron-core's index caches; unset: a folder beside the corpus."""
    prefetch_steps: int = 2
    """Steps whose batches a background thread reads ahead; 0: each batch is read when it is needed."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the learning-rate schedule."""

    lr: float | None = None
    """Peak learning rate; unset: the preset's."""
    min_lr_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warmup: cosine decay, warmup-stable-decay, or constant."""
    warmup_steps: int | None = None
    """Steps of linear warmup from zero; unset: 2% of train.steps, at least 10 and at most 2000."""
    decay_fraction: float = 0.2
    """wsd only: the fraction of train.steps, at the end, over which the rate decays."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and scalars have none."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision of the run."""

    steps: int = 1000
    """Optimizer updates of the whole run; the schedule spans them."""
    global_batch_size: int | None = None
    """Samples per step over all ranks; accumulation follows from it. Unset: batch_size x data-parallel ranks x
    accumulation."""
    gradient_accumulation_steps: int | None = None
    """Microbatches per step and rank; stays unset where it follows from train.global_batch_size, so that a saved
    configuration fits any number of ranks."""
    stop_after_steps: int | None = None
    """Save and leave at this step, with schedules as for the whole run (as a preempted job does)."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of forward and backward; unset: the JSON's bf16/fp16 block, else bf16."""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Whose linear layers, norms and attention: Transformer Engine's, or ours on torch (local). auto: Transformer
    Engine's where it runs, but for a run in emulated FP8."""
    valid_interval_steps: int = 100
    """Validate every so many steps (and at the end); 0: at the end only."""
    valid_samples: int = 64
    """Samples per validation, the same ones each time; -1 takes the whole validation corpus."""
    deterministic: bool = True
    """Deterministic kernels, so that two runs in one place are equal to the bit."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, when, and how much of it is kept."""

    interval_steps: int = 500
    """Save every so many steps (and at the end); 0: only at the end and on a signal."""
    keep_last: int = 2
    """Newest checkpoints that stay; 0 keeps all."""
    asynchronous: bool = False
    """Train on while files are written; takes memory for a copy of what each rank writes (12 bytes per parameter)."""


Action = Literal["skip", "rollback", "fallback", "cut_lr", "stop"]


@dataclass(frozen=True)
class StabilityConfig:
    """The guard that watches loss and gradient norm, and what it does when a run goes wrong (docs/stability.md)."""

    enabled: bool = True
    """Watch. Without it a step with non-finite gradients is still skipped, but nothing else is done about it."""
    on_non_finite: Action = "skip"
    """Loss or gradient norm is NaN or infinite. skip: drop the update; rollback: go back to the last good state and
    leave the samples out; fallback: roll back and take layers out of FP8; cut_lr: roll back and lower the learning rate
    for some steps; stop: put back the last good state, save it, end the run."""
    on_loss_spike: Action = "skip"
    """The loss lies more than loss_zscore above what it was."""
    on_grad_spike: Action = "skip"
    """The gradient norm lies more than grad_norm_zscore above what it was."""
    loss_zscore: float = 10.0
    """Limit in robust standard deviations (1.4826 times the median distance from the median) over window_steps."""
    grad_norm_zscore: float = 20.0
    """The same for the gradient norm, which varies more."""
    window_steps: int = 64
    """Applied steps that a figure is compared with."""
    min_window_steps: int = 16
    """Applied steps before anything counts as a spike."""
    snapshot_interval_steps: int = 100
    """Copy this rank's weights and moments to the host's memory every so many steps (12 bytes per parameter of the
    rank); 0: roll back to checkpoints only."""
    max_skips: int = 3
    """Updates skipped without calm_steps between them; the next trouble rolls back."""
    max_rollbacks: int = 2
    """Rollbacks without calm_steps between them; the next trouble takes layers out of FP8, or where none is in it cuts
    the learning rate."""
    fallback_layers: list[str] = field(default_factory=list)
    """What a fallback takes out of FP8, in the words of fp8.keep_bf16; empty: the layer in which the first non-finite
    value appeared, or everything where that is not known."""
    max_lr_cuts: int = 2
    """Cuts without calm_steps between them; the next trouble stops the run."""
    calm_steps: int = 20
    """Steps beyond the latest trouble after which what was done about it is forgotten and snapshots are taken again."""
    lr_cut_factor: float = 0.5
    """What cut_lr multiplies the learning rate by."""
    lr_cut_steps: int = 100
    """For how many steps."""
    replay: bool = True
    """Run the microbatches of a non-finite step once more, with hooks that find where the first such value appears."""


@dataclass(frozen=True)
class Fp8Config:
    """FP8 with delayed scaling (docs/fp8.md); the JSON's ``fp8`` block is its home, flags fill ``"auto"`` there."""

    format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: E4M3 forward, E5M2 for gradients; e4m3: E4M3 for both. Unset: the JSON's, else hybrid."""
    recipe: Literal["delayed"] | None = None
    """How scales are found: from the largest magnitudes of earlier steps. Unset: delayed."""
    margin: int | None = None
    """Scales are divided by 2^margin, which leaves room below the largest FP8 number; unset: the JSON's, else 0."""
    amax_history_len: int | None = None
    """Updates over which largest magnitudes are remembered; unset: the JSON's, else 1024."""
    amax_compute_algo: Literal["max", "most_recent"] | None = None
    """The scale follows the largest magnitude in the history (max) or the newest. Unset: the JSON's, else max."""
    backend: Literal["auto", "te", "emulated"] | None = None
    """te: Transformer Engine's kernels; emulated: the same numbers on any device; auto: te where it runs."""
    keep_bf16: list[str] = field(default_factory=list)
    """Layers that stay out of FP8: first_N_layers, last_N_layers, names of modules with * and ?, or auto, which reads
    them from fp8.report; embedding and output_layer always do."""
    report: str | None = None
    """For keep_bf16 auto: run folder (trained with log.fp8) or fp8.jsonl that says which layers FP8 does not suit."""


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    interval_steps: int = 10
    """One line in metrics.jsonl (and one event to each monitor) every so many steps."""
    progress: Literal["auto", "always", "never"] = "auto"
    """The progress bar; auto shows it on a terminal and prints plain lines elsewhere."""
    fp8: bool = False
    """Every so many steps write what FP8 casts lose, per layer and role, to OUTPUT_DIR/fp8.jsonl (emulated layers;
    tools/fp8_report.py reads it)."""
    plot: bool = True
    """Draw OUTPUT_DIR/loss.png when the run ends."""


@dataclass(frozen=True)
class ExperimentConfig:
    """One run."""

    model_type: str = "gpt"
    """Model family."""
    size: str = "debug"
    """Preset of the family."""
    batch_size: int | None = None
    """Samples per microbatch and data-parallel rank; unset: the JSON's, else the preset's."""
    block_size: int | None = None
    """Sequence length in tokens; unset: the preset's."""
    grad_clip: float | None = None
    """Largest global gradient norm; 0 switches clipping off; unset: the JSON's, else 1.0."""
    use_fp8: bool | None = None
    """FP8 on or off; unset: what the JSON's fp8 block says."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file; unset: ZeRO stage 0."""
    output_dir: str = "runs/default"
    """Folder of this run: checkpoints, metrics.jsonl, loss.png, config.yaml."""
    seed: int = 1234
    """Seeds initial weights, data order, dropout and noise."""
    resume: str = "auto"
    """auto: the newest good checkpoint in output_dir, if any; none: start anew; or a checkpoint's folder."""
    init_from: str | None = None
    """Start at step 0 from the weights, and the shape, of a Hugging Face folder, a run or a checkpoint. Not read where
    --resume auto finds a checkpoint of this run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    log: LogConfig = field(default_factory=LogConfig)
