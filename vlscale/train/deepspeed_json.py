"""DeepSpeed's JSON, derived from the config and never written by hand.

Buckets: stages 1 to 3 allocate `reduce_bucket_size` numbers, by default 500 million whatever the model. Here it is a
quarter of what learns, so that reducing overlaps the backward pass at least a little, and at most 50 million numbers
(100 MB in bf16), where links are long past their full bandwidth. `engine.deepspeed` overrides it.
"""

from typing import Any

from vlscale.sections import Config

LEAST_BUCKET, LARGEST_BUCKET = 1 << 20, 50_000_000  # numbers
OPEN = {"reduce_bucket_size", "allgather_bucket_size"}  # of `zero_optimization`: ours are only defaults


def json_for_deepspeed(config: Config, world_size: int, learned: int | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration for this run; `learned`: how many numbers learn, where that is known already."""
    losses, engine = config.train.accumulate_losses, config.engine
    derived = {
        "train_batch_size": config.train.global_batch_size * losses,
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // world_size,
        "gradient_accumulation_steps": losses,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": engine.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if engine.dtype == "bf16" and losses > 1:  # a sum of bf16 gradients in bf16 loses the small ones
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.offload_optimizer != "none":  # torch's own AdamW runs on the host, with nothing to compile
        derived["zero_force_ds_cpu_optimizer"] = False
    extra = dict(engine.deepspeed)
    if taken := sorted(derived.keys() & extra.keys()):
        raise ValueError(f"engine.deepspeed.{taken[0]} is derived from other keys of the config; set those instead")
    own = extra.pop("zero_optimization", {})
    if own.get("stage", engine.zero_stage) != engine.zero_stage:
        raise ValueError("engine.deepspeed.zero_optimization.stage contradicts engine.zero_stage; set only the latter")
    zero = _zero(config, learned)
    if taken := sorted((zero.keys() - OPEN - {"stage"}) & own.keys()):
        raise ValueError(
            f"engine.deepspeed.zero_optimization.{taken[0]} is derived from other keys of the config; set only those"
        )
    return derived | {"zero_optimization": zero | own | {"stage": zero["stage"]}} | extra


def _zero(config: Config, learned: int | None) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.dtype == "bf16":
        # Without ZeRO, DeepSpeed has no float32 master weights; at stage 1 it adds float32 gradients up in another
        # optimizer, which cannot be taken over at another stage. One stage further is the same sum.
        zero["stage"] = max(2 if config.train.accumulate_losses > 1 else 1, engine.zero_stage)
    if learned is not None and zero["stage"] > 0:
        bucket = min(max(learned // 4, LEAST_BUCKET), LARGEST_BUCKET)
        zero |= {"reduce_bucket_size": bucket}
        if zero["stage"] < 3:
            zero |= {"allgather_bucket_size": bucket}
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": engine.offload_optimizer}
    if engine.offload_parameters != "none":
        zero["offload_param"] = {"device": engine.offload_parameters}
    return zero
