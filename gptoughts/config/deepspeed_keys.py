"""One table of DeepSpeed's JSON keys: honoured, translated into the tree, or refused with the reason.

DeepSpeed 0.19.8 ignores an unknown key at the top level silently, so nothing passes that the table does not name; a
test compares it with the installed DeepSpeed, and ds_configs/README.md prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["bool", "int", "number", "text", "block", "any"]


@dataclass(frozen=True)
class Rule:
    """What becomes of one key."""

    action: Literal["honoured", "translated", "refused"]
    note: str
    """What it does, where it goes, or why it is refused."""
    kind: Kind = "any"
    auto: bool = False
    """Whether ``"auto"`` has a value to fill in."""
    harmless: tuple[Any, ...] = (None, False)
    """Values with which a refused key asks for nothing; it is then taken out."""


def _honoured(kind: Kind, note: str, *, auto: bool = False) -> Rule:
    return Rule("honoured", note, kind, auto)


def _translated(kind: Kind, note: str) -> Rule:
    return Rule("translated", note, kind, auto=True)


def _refused(note: str, *harmless: Any) -> Rule:
    return Rule("refused", note, harmless=(None, False, *harmless))


_REMOVED = "DeepSpeed has removed it"
_NOT_OURS = "not part of gptoughts"

TOP_LEVEL: Mapping[str, Rule] = {
    "train_batch_size": _translated("int", "train.global_batch_size: samples per step over all ranks"),
    "train_micro_batch_size_per_gpu": _translated("int", "batch_size: samples per microbatch and data-parallel rank"),
    "gradient_accumulation_steps": _translated("int", "train.gradient_accumulation_steps; the schedule accumulates"),
    "gradient_clipping": _translated("number", "grad_clip: largest global gradient norm; 0: no clipping"),
    "optimizer": _translated("block", "optim.*: type AdamW (or Adam) with lr, betas, eps, weight_decay"),
    "scheduler": _translated("block", "optim.schedule, optim.warmup_steps: WarmupLR, WarmupDecayLR, WarmupCosineLR"),
    "fp8": _translated("block", "use_fp8 and fp8.*: FP8 with delayed scaling (docs/fp8.md)"),
    "bf16": _honoured("block", "bf16 weights and activations; ZeRO keeps fp32 master weights"),
    "fp16": _honoured("block", "fp16 with loss scaling; needs a device that has fp16"),
    "zero_optimization": _honoured("block", "ZeRO stage, buckets and offload"),
    "zero_force_ds_cpu_optimizer": _refused("the engine chooses DeepSpeedCPUAdam exactly where the state is on the CPU",
                                            True),
    "zero_allow_untested_optimizer": _refused("the optimizer is AdamW, which DeepSpeed has tested", True),
    "communication_data_type": _honoured("text", "dtype of ZeRO's gradient reduction: fp32, bf16 or fp16"),
    "tensorboard": _honoured("block", "TensorBoard monitor"),
    "wandb": _honoured("block", "Weights & Biases monitor; offline unless WANDB_MODE says otherwise"),
    "csv_monitor": _honoured("block", "CSV monitor"),
    "comet": _honoured("block", "Comet monitor"),
    "comms_logger": _honoured("block", "logs DeepSpeed's collectives"),
    "steps_per_print": _refused("log.interval_steps decides how often the run reports"),
    "wall_clock_breakdown": _honoured("bool", "DeepSpeed prints its timers (stages 1 to 3)"),
    "memory_breakdown": _honoured("bool", "DeepSpeed prints memory use (stages 1 to 3)"),
    "dump_state": _honoured("bool", "DeepSpeed prints its state at the start (stages 1 to 3)"),
    "timers": _honoured("block", "DeepSpeed's throughput timer"),
    "log_level": _honoured("text", "DeepSpeed's log level"),
    "managed_gradient_accumulation": _refused("the schedule accumulates, DeepSpeed must not divide a second time"),
    "prescale_gradients": _refused("gradients are scaled by the step's global denominator"),
    "gradient_predivide_factor": _refused("gradients are scaled by the step's global denominator", 1, 1.0),
    "gradient_allreduce_op": _refused("the loss is scaled for a mean over data-parallel ranks", "mean"),
    "seq_parallel_communication_data_type": _refused("belongs to DeepSpeed-Ulysses, which is not used"),
    "sequence_parallel_size": _refused("belongs to DeepSpeed-Ulysses; sequence parallelism is parallel.sequence", 1),
    "tensor_parallel": _refused("tensor parallelism is megatron-core's: parallel.tensor"),
    "expert_parallel": _refused("expert parallelism is megatron-core's: parallel.expert"),
    "use_data_before_expert_parallelism": _refused("expert parallelism is megatron-core's: parallel.expert"),
    "pipeline": _refused("pipeline parallelism is megatron-core's: parallel.pipeline"),
    "activation_checkpointing": _refused("set --parallel.recompute_granularity: the models never call DeepSpeed's"),
    "flops_profiler": _refused("FLOPs are counted from the shape: --dry_run, and mfu_fraction in metrics.jsonl"),
    "checkpoint": _refused("checkpoints are ours: --checkpoint.*"),
    "datastates_ckpt": _refused("checkpoints are ours: --checkpoint.*"),
    "dataloader_drop_last": _refused("the loader is ours and drops nothing"),
    "data_efficiency": _refused("the sampler is ours; curriculum and data routing are " + _NOT_OURS),
    "data_types": _honoured("block", "dtype in which gradients accumulate (stages 1 to 3)"),
    "torch_autocast": _refused("use bf16: weights are bf16 with fp32 masters"),
    "bfloat16": _refused("an old name; write 'bf16'"),
    "aio": _honoured("block", "how files are read and written where state is offloaded to NVMe"),
    "compile": _refused("DeepCompile refuses caller-owned accumulation (deepspeed 0.19.8, runtime/engine.py:2035)"),
    "disable_allgather": _refused("weights would not be gathered after a step"),
    "disable_python_gc": _honoured("bool", "DeepSpeed switches Python's garbage collector off while it trains"),
    "hybrid_engine": _refused("the engine for RLHF is " + _NOT_OURS),
    "autotuning": _refused("autotuning is " + _NOT_OURS),
    "weight_quantization": _refused("quantised inference is " + _NOT_OURS),
    "vocabulary_size": _refused("the vocabulary is the tokenizer's: model.vocab_size"),
    "nebula": _refused(_REMOVED),
    "compression_training": _refused(_REMOVED),
    "amp": _refused(_REMOVED + "; use bf16"),
    "quantize_training": _refused(_REMOVED),
    "sparse_gradients": _refused(_REMOVED),
    "eigenvalue": _refused(_REMOVED),
    "sparse_attention": _refused(_REMOVED),
    "elasticity": _refused(_REMOVED + "; a run resumes on another number of ranks by itself"),
    "graph_harvesting": _refused(_REMOVED),
    "curriculum_learning": _refused(_REMOVED),
    "progressive_layer_drop": _refused(_REMOVED),
}  # fmt: skip
"""Every top-level key."""

_NVME_PATH = _honoured("text", "nvme: folder on a local disk; auto: OUTPUT_DIR/swap", auto=True)
_MONITOR = {
    "enabled": _honoured("bool", "switches the monitor on"),
    "output_path": _honoured("text", "folder; auto or empty: OUTPUT_DIR/monitor", auto=True),
    "job_name": _honoured("text", "sub-folder; auto: the monitor's name", auto=True),
}
_QUANTIZED = _refused("ZeRO++'s quantised collectives are not exact, and resuming has to be")

BLOCKS: Mapping[str, Mapping[str, Rule]] = {
    "zero_optimization": {
        "stage": _honoured("int", "0: nothing sharded, 1: optimizer state, 2: and gradients, 3: and weights"),
        "reduce_bucket_size": _honoured("int", "elements reduced at once; auto: from the model's size", auto=True),
        "allgather_bucket_size": _honoured("int", "elements gathered at once; auto: from the model's size", auto=True),
        "stage3_prefetch_bucket_size": _honoured("int", "elements fetched ahead; auto: one layer's", auto=True),
        "stage3_param_persistence_threshold": _honoured(
            "int", "parameters with fewer elements stay whole; auto: 10 x hidden_size", auto=True
        ),
        "stage3_model_persistence_threshold": _honoured("int", "most elements that stay whole in all"),
        "stage3_max_live_parameters": _honoured("int", "most elements gathered at one time"),
        "stage3_max_reuse_distance": _honoured("int", "elements within which a parameter is kept for its next use"),
        "stage3_module_granularity_threshold": _honoured("int", "modules smaller than this are fetched whole"),
        "stage3_use_all_reduce_for_fetch_params": _honoured("bool", "fetch with all-reduce instead of all-gather"),
        "stage3_allgather_sequential": _honoured("bool", "gather parameters one after another"),
        "sub_group_size": _honoured(
            "int", "elements updated at once (stage 3); auto, with offload to NVMe: an eighth of a rank's", auto=True
        ),
        "overlap_comm": _honoured("bool", "overlap reduction with backward (stages 2 and 3)"),
        "contiguous_gradients": _honoured("bool", "copy gradients into one buffer as they appear"),
        "reduce_scatter": _honoured("bool", "reduce-scatter instead of all-reduce; left out: where that sends less"),
        "use_multi_rank_bucket_allreduce": _honoured("bool", "reduce a bucket for several ranks in one call"),
        "allgather_partitions": _honoured("bool", "gather with all-gather instead of broadcasts"),
        "round_robin_gradients": _honoured("bool", "spread gradient partitions for faster offload"),
        "ignore_unused_parameters": _honoured("bool", "accept parameters without a gradient"),
        "memory_efficient_linear": _refused(
            "it replaces torch.nn.functional.linear in the whole process; megatron-core's linears have their own"
        ),
        "override_module_apply": _honoured("bool", "gather parameters inside nn.Module.apply (stage 3)"),
        "log_trace_cache_warnings": _honoured("bool", "warn where the fetch order changes (stage 3)"),
        "enable_sanity_checks": _honoured("bool", "DeepSpeed's internal checks"),
        "offload_optimizer": _honoured("block", "where the optimizer's state lives"),
        "offload_param": _honoured("block", "where weights live (stage 3)"),
        "leaf_module": _refused("every module of these models runs on every rank; none has to be a leaf"),
        "parameter_alignment": _refused("it moves the partitions that our checkpoints read"),
        "compute_grad_norm": _refused("the gradient norm is logged and decides whether a step is applied", True),
        "load_from_fp32_weights": _refused("checkpoints are ours and always restore fp32 weights", True),
        "elastic_checkpoint": _refused("checkpoints are ours: --checkpoint.*"),
        "pipeline_loading_checkpoint": _refused("checkpoints are ours: --checkpoint.*"),
        "stage3_gather_16bit_weights_on_model_save": _refused("checkpoints are ours: --checkpoint.*"),
        "stage3_gather_fp16_weights_on_model_save": _refused("checkpoints are ours: --checkpoint.*"),
        "zenflow": _refused("ZenFlow's delayed updates are not exact, and resuming has to be"),
        "zero_hpz_partition_size": _refused("ZeRO++ is not supported", 0, 1),
        "zero_quantized_weights": _QUANTIZED,
        "zero_quantized_nontrainable_weights": _QUANTIZED,
        "zero_quantized_gradients": _QUANTIZED,
        "cpu_offload": _refused("an old name; write offload_optimizer"),
        "cpu_offload_param": _refused("an old name; write offload_param"),
        "cpu_offload_use_pin_memory": _refused("an old name; write offload_optimizer.pin_memory"),
        "legacy_stage1": _refused(_REMOVED),
        "save_muon_momentum_buffer_in_memory": _refused("the optimizer is AdamW"),
        "mics_shard_size": _refused(_REMOVED, -1),
        "mics_hierarchical_params_gather": _refused(_REMOVED),
        "zeropp_loco_param": _refused(_REMOVED),
    },
    "zero_optimization.offload_optimizer": {
        "device": _honoured("text", "none, cpu, or nvme (stage 3)"),
        "pin_memory": _honoured("bool", "page-locked memory, faster to copy from a GPU"),
        "ratio": _refused("a part of the state on the GPU (ZeRO-Offload++) is not supported", 1, 1.0),
        "cpuadam_cores_perc": _refused("belongs to SuperOffload, which is not supported", 0.8),
        "super_offload": _refused("SuperOffload is not supported"),
        "nvme_path": _NVME_PATH,
        "buffer_count": _honoured("int", "nvme: tensors of a sub-group in memory; auto: the least, 4 to 12", auto=True),
        "pipeline_read": _honoured("bool", "nvme: read the next sub-group while one is updated"),
        "pipeline_write": _honoured("bool", "nvme: write the former sub-group while one is updated"),
        "fast_init": _refused("weights are read once more at the start instead"),
    },
    "zero_optimization.offload_param": {
        "device": _honoured("text", "none, cpu or nvme"),
        "pin_memory": _honoured("bool", "page-locked memory, faster to copy from a GPU"),
        "nvme_path": _NVME_PATH,
        "buffer_count": _refused("buffers are made as weights are fetched, as many as there have to be"),
        "buffer_size": _refused("buffers are made as weights are fetched, each as large as its weights"),
        "max_in_cpu": _honoured("int", "nvme: elements of weights that stay in the host's memory; auto: 0", auto=True),
    },
    "aio": {
        "block_size": _honoured("int", "bytes per request; also the least that is swapped (1 MiB or more)"),
        "queue_depth": _honoured("int", "requests under way at one time"),
        "intra_op_parallelism": _honoured("int", "threads that divide a tensor"),
        "single_submit": _honoured("bool", "hand requests over one by one"),
        "overlap_events": _honoured("bool", "hand over further requests before earlier ones are done"),
        "use_gds": _refused("GPUDirect Storage is not supported"),
    },
    "bf16": {
        "enabled": _translated("bool", "train.precision"),
        "check_grad_overflow": _refused("non-finite gradients are always found, and the step skipped", True),
        "immediate_grad_update": _refused("belongs to the optimizer of DeepSpeed's pipeline engine", True),
        "bf16_master_weights_and_grads": _refused("master weights are fp32"),
        "bf16_optimizer_states": _refused("optimizer state is fp32"),
    },
    "fp16": {
        "enabled": _translated("bool", "train.precision"),
        "loss_scale": _honoured("number", "fixed loss scale; 0: dynamic"),
        "initial_scale_power": _honoured("int", "first dynamic loss scale, as a power of two"),
        "loss_scale_window": _honoured("int", "good steps before the scale doubles"),
        "hysteresis": _honoured("int", "overflows before the scale halves"),
        "consecutive_hysteresis": _honoured("bool", "refill the hysteresis after a good step"),
        "min_loss_scale": _honoured("number", "smallest dynamic loss scale"),
        "auto_cast": _refused("inputs are token ids, nothing is there to cast"),
        "fp16_master_weights_and_grads": _refused("master weights are fp32"),
    },
    "data_types": {
        "grad_accum_dtype": _honoured("text", "fp32, bf16 or fp16; left out: fp32"),
        "param_dtype": _refused("weights follow the blocks bf16 and fp16"),
        "buffer_dtype": _refused("buffers follow the blocks bf16 and fp16"),
        "keep_in_fp32_modules": _refused("weights follow the blocks bf16 and fp16", "auto"),
    },
    "fp8": {
        "enabled": _translated("bool", "use_fp8"),
        "format": _translated("text", "fp8.format: hybrid or e4m3"),
        "recipe": _translated("text", "fp8.recipe: delayed"),
        "margin": _translated("int", "fp8.margin: scales are divided by 2^margin"),
        "amax_history_len": _translated("int", "fp8.amax_history_len: updates that are remembered"),
        "amax_compute_algo": _translated("text", "fp8.amax_compute_algo: max or most_recent"),
        "backend": _translated("text", "fp8.backend: auto, te or emulated"),
        "keep_bf16": _translated("any", "fp8.keep_bf16: a list of layers that stay out of FP8"),
    },
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {
        "enabled": _honoured("bool", "switches the monitor on"),
        "project": _honoured("text", "project; auto: gptoughts", auto=True),
        "group": _honoured("text", "group"),
        "team": _honoured("text", "team"),
    },
    "comet": {
        "enabled": _honoured("bool", "switches the monitor on"),
        "samples_log_interval": _honoured("int", "samples between two events"),
        **{name: _honoured("text", "passed to Comet") for name in
           ("project", "workspace", "api_key", "experiment_name", "experiment_key", "mode")},
        "online": _honoured("bool", "passed to Comet"),
    },
    "comms_logger": {
        "enabled": _honoured("bool", "log collectives"),
        "prof_all": _honoured("bool", "all of them"),
        "prof_ops": _honoured("any", "or a list of names"),
        "verbose": _honoured("bool", "print each call"),
        "debug": _honoured("bool", "name the caller"),
    },
    "timers": {"throughput": _honoured("block", "DeepSpeed's samples per second")},
    "timers.throughput": {
        "enabled": _honoured("bool", "measure"),
        "synchronized": _honoured("bool", "wait for the device before reading the clock"),
    },
}  # fmt: skip
"""Every key inside an honoured block."""
