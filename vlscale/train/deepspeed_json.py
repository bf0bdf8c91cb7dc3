"""DeepSpeed's JSON, derived from the config and never written by hand.

Buckets: stages 1 to 3 allocate `reduce_bucket_size` numbers, by default 500 million whatever the model. Here it is a
quarter of what learns, so that reducing overlaps the backward pass at least a little, and at most 50 million numbers
(100 MB in bf16), where links are long past their full bandwidth. `engine.deepspeed` overrides it.

What else `engine.deepspeed` asks for is read by DeepSpeed's own code first. A key that it never looks up would be left
aside without a word, so it is refused, as are combinations that only its engine would stop at.
"""

import copy
import difflib
import logging
from collections.abc import Iterator, KeysView
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from vlscale.sections import Config

LEAST_BUCKET, LARGEST_BUCKET = 1 << 20, 50_000_000  # numbers
ZERO = "zero_optimization"
DERIVED = {  # keys of DeepSpeed, and those of the config that they follow from
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
    "gradient_accumulation_steps": "train.accumulate_losses",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name and the other keys of optim",
    "scheduler": "optim.schedule and optim.warmup_steps",
    **dict.fromkeys(
        ("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types.param_dtype"), "engine.dtype (fp32 or bf16)"
    ),
    "activation_checkpointing": "engine.activation_checkpointing",
    "zero_force_ds_cpu_optimizer": "engine.offload_optimizer (none or cpu)",
    f"{ZERO}.offload_optimizer": "engine.offload_optimizer (none or cpu)",
    f"{ZERO}.cpu_offload": "engine.offload_optimizer (none or cpu)",
    f"{ZERO}.cpu_offload_use_pin_memory": "engine.offload_optimizer (none or cpu)",
    f"{ZERO}.offload_param": "engine.offload_parameters (none or cpu)",
    f"{ZERO}.cpu_offload_param": "engine.offload_parameters (none or cpu)",
    "steps_per_print": "log.every",
    "checkpoint": "train.checkpoint_every",
    "datastates_ckpt": "train.checkpoint_async",
}
FIXED = {  # keys of DeepSpeed that have one possible value here, and why
    "zero_allow_untested_optimizer": "the optimizer is always torch's",
    "gradient_allreduce_op": "an update is the mean over ranks",
    "managed_gradient_accumulation": "vlscale says itself when an update is due",
    "dataloader_drop_last": "vlscale reads the data itself",
    "data_efficiency": "vlscale reads the data itself",
    **dict.fromkeys(
        ("sequence_parallel_size", "tensor_parallel", "expert_parallel", "pipeline"),
        "ranks divide the pairs, and by engine.zero_stage the states, and nothing else",
    ),
    "autotuning": "it ends the process after a few steps",
    f"{ZERO}.compute_grad_norm": "the norm clips the update and is written to metrics.jsonl",
    f"{ZERO}.zenflow": "the optimizer is always torch's",
    f"{ZERO}.legacy_stage1": "DeepSpeed no longer has it",
}
QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
STAGE_3 = (  # keys of ZeRO that other stages have no use for, though their names do not say so, as stage3_... do
    *QUANTIZED,
    "zero_hpz_partition_size",
    "sub_group_size",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "enable_sanity_checks",
    "log_trace_cache_warnings",
    "leaf_module",
)


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
    zero = _zero(config, learned)
    if not engine.deepspeed:
        return derived | {ZERO: zero}
    extra = dict(engine.deepspeed)
    own = extra.pop(ZERO, {})
    _refuse_taken(extra, own, derived)
    if own.get("stage", engine.zero_stage) != engine.zero_stage:
        raise ValueError(f"engine.deepspeed.{ZERO}.stage contradicts engine.zero_stage; set only the latter")
    made = derived | {ZERO: zero | own | {"stage": zero["stage"]}} | extra
    _refuse_combinations(_read_by_deepspeed(made, extra), world_size)
    return made


def _zero(config: Config, learned: int | None) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.dtype == "bf16":
        # Without ZeRO, DeepSpeed has no float32 master weights; at stage 1 it adds float32 gradients up in another
        # optimizer, which cannot be taken over at another stage. One stage further is the same sum.
        zero["stage"] = max(2 if config.train.accumulate_losses > 1 else 1, engine.zero_stage)
    if learned is not None and zero["stage"] > 0:
        bucket = min(max(learned // 8 * 2, LEAST_BUCKET), LARGEST_BUCKET)  # stages 1 and 2 gather by even numbers only
        zero |= {"reduce_bucket_size": bucket}
        if zero["stage"] < 3:
            zero |= {"allgather_bucket_size": bucket}
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": engine.offload_optimizer}
    if engine.offload_parameters != "none":
        zero["offload_param"] = {"device": engine.offload_parameters}
    return zero


def _refuse_taken(extra: dict[str, Any], own: Any, derived: dict[str, Any]) -> None:
    """Of `own`, the section of ZeRO, and the other keys, what is not the user's to set."""
    if not isinstance(own, dict):
        raise ValueError(f"engine.deepspeed.{ZERO} is {own!r}; expected a mapping, as {{reduce_bucket_size: NUMBERS}}")
    sections = {name: keys for name, keys in (extra | {ZERO: own}).items() if isinstance(keys, dict)}
    given = extra.keys() | {f"{name}.{key}" for name, keys in sections.items() for key in keys}
    sources = DERIVED | ({"data_types": "engine.dtype"} if "data_types" in derived else {})
    for key in sorted(given & sources.keys()):
        raise ValueError(f"engine.deepspeed.{key} is derived from other keys of the config; set {sources[key]} instead")
    for key in sorted(given & FIXED.keys()):
        raise ValueError(f"engine.deepspeed.{key} cannot be chosen: {FIXED[key]}; leave it out")
    for key in sorted(key for key, value in own.items() if value == "auto"):
        raise ValueError(
            f"engine.deepspeed.{ZERO}.{key} is auto, which only the Trainer of transformers replaces; leave it out"
        )


class _Asked(dict):
    """Keeps which keys it was asked for, in order; a copy adds to the same list."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.asked: list[str] = []

    def __contains__(self, key: object) -> bool:
        self.asked.append(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.append(key)
        return super().get(key, default)

    def keys(self) -> KeysView:
        return KeysView(self)


def _read_by_deepspeed(made: dict[str, Any], extra: dict[str, Any]) -> Any:
    """DeepSpeed's own config object of `made`. `extra`: what of it the user gave, but for the section of ZeRO."""
    from vlscale.train.engine import import_deepspeed  # no other file imports it, and only now is it needed

    deepspeed = import_deepspeed()
    sections = {key: _Asked(copy.deepcopy(value)) for key, value in extra.items() if isinstance(value, dict)}
    read = _Asked(made | sections)
    del read["train_batch_size"]  # DeepSpeed would compare it with the ranks that have started here
    logger = logging.getLogger("DeepSpeed")  # it writes to stdout, and says all of it again when it starts
    logger.disabled = True
    try:
        parsed = deepspeed.DeepSpeedConfig(read)
        for dtype in filter(None, (parsed.grad_accum_dtype, parsed.buffer_dtype)):
            deepspeed.runtime.config.DtypeEnum(dtype)
    except ValidationError as error:
        section = read.asked[-1]
        inner = sections[section].asked[-1:] if section in sections else []
        raise _invalid(error, made, [section, *inner], deepspeed.runtime.zero.config.DeepSpeedZeroConfig) from error
    except (AttributeError, TypeError) as error:
        key = read.asked[-1]
        said = f"engine.deepspeed.{key} is {made.get(key)!r}, which DeepSpeed cannot read: {error}"
        raise ValueError(said) from error
    except (AssertionError, ValueError, deepspeed.DeepSpeedConfigError) as error:
        raise _refusal(error) from error
    finally:
        logger.disabled = False
    unasked = [("", key, read.asked) for key in extra if key not in read.asked]
    for name, section in sections.items():
        if section.asked:  # else one of DeepSpeed's models has read it, and those refuse what they do not know
            unasked += [(name, key, section.asked) for key in section if key not in section.asked]
    if unasked:
        raise _unknown(*unasked[0])
    return parsed


def _invalid(error: ValidationError, made: dict[str, Any], section: list[str], of_zero: type[BaseModel]) -> ValueError:
    """Of one of DeepSpeed's models; `section`: the last keys that were asked for before it was made."""
    problem = error.errors()[0]
    loc = [str(part) for part in problem["loc"]]
    path = loc if loc and loc[0] in made else section + loc  # the model of all monitors names theirs itself
    if problem["type"] == "extra_forbidden":
        zero_keys = [field.alias or name for name, field in of_zero.model_fields.items()]
        return _unknown(".".join(path[:-1]), path[-1], zero_keys if path[:-1] == [ZERO] else [])
    got = f", got {problem['input']!r}" if loc else ""
    return ValueError(f"engine.deepspeed.{'.'.join(path)}: {problem['msg'].removeprefix('Value error, ')}{got}")


def _unknown(path: str, key: str, known: list[str]) -> ValueError:
    full, *close = [f"{path}.{each}".lstrip(".") for each in (key, *difflib.get_close_matches(str(key), known, n=1))]
    change = f"did you mean {close[0]!r}?" if close else "leave it out"
    return ValueError(f"engine.deepspeed: DeepSpeed has no key {full!r}; {change}")


def _refuse_combinations(parsed: Any, world_size: int) -> None:
    """What DeepSpeed's engine asserts against only when it is built."""
    zero, stage = parsed.zero_config, parsed.zero_config.stage
    scaled = {"prescale_gradients": parsed.prescale_gradients}
    scaled |= {"gradient_predivide_factor": parsed.gradient_predivide_factor != 1.0}
    for key in (key for key, on in scaled.items() if on and stage >= 2 and zero.reduce_scatter):
        raise ValueError(
            f"engine.deepspeed.{key} does not go with ZeRO-{stage} while gradients are scattered as they are reduced; "
            f"leave it out, or set engine.deepspeed.{ZERO}.reduce_scatter=false"
        )
    if stage in (1, 2) and zero.allgather_bucket_size % 2:
        raise ValueError(
            f"engine.deepspeed.{ZERO}.allgather_bucket_size={zero.allgather_bucket_size}; ZeRO-{stage} expects an even "
            "number"
        )
    if stage == 3 and zero.zero_hpz_partition_size > 1 and world_size % min(zero.zero_hpz_partition_size, world_size):
        raise ValueError(
            f"engine.deepspeed.{ZERO}.zero_hpz_partition_size={zero.zero_hpz_partition_size} does not divide the world "
            f"size {world_size}; set a number that does"
        )
    _refuse_of_stage_3(zero)
    if stage == 0 and parsed.grad_accum_dtype not in (None, "fp32", "float32"):
        raise ValueError(
            f"engine.deepspeed.data_types.grad_accum_dtype={parsed.grad_accum_dtype} needs ZeRO; leave it out, or set "
            "engine.zero_stage to 1, 2 or 3"
        )


def _refuse_of_stage_3(zero: Any) -> None:
    """What another stage would leave aside without a word, and what this machine has no kernels for."""
    default = type(zero)()
    changed = [key for key in STAGE_3 if getattr(zero, key) != getattr(default, key)]
    for key in changed if zero.stage < 3 else ():
        raise ValueError(
            f"engine.deepspeed.{ZERO}.{key} has an effect with ZeRO-3 alone, got ZeRO-{zero.stage}; leave it out, or "
            "set engine.zero_stage=3"
        )
    for key in (key for key in changed if key in QUANTIZED and not torch.cuda.is_available()):
        raise ValueError(
            f"engine.deepspeed.{ZERO}.{key} expects a CUDA device, whose kernels it needs, and this machine has none; "
            "leave it out"
        )


@contextmanager
def refusals_named(config: Config) -> Iterator[None]:
    """What DeepSpeed refuses inside is said to be of `engine.deepspeed`. Where that is empty the fault is ours."""
    try:
        yield
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
        if not config.engine.deepspeed:
            raise
        raise _refusal(error) from error


def _refusal(error: Exception) -> ValueError:
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ValueError(f"engine.deepspeed is refused by DeepSpeed: {said}; change or leave out what it names")
