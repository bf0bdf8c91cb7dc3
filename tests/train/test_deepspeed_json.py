"""DeepSpeed's JSON: what is derived from which key, and what is refused before a job starts."""

import pytest

from vlscale.config import parse_overrides, validate
from vlscale.sections import Config
from vlscale.train.deepspeed_json import json_for_deepspeed


def config_of(*overrides: str) -> Config:
    return validate(parse_overrides(list(overrides)), "test")


@pytest.mark.parametrize(
    ("learned", "bucket"), [(1000, 1 << 20), (86_000_000, 21_500_000), (1_000_000_000, 50_000_000)]
)
def test_buckets_follow_the_model(learned, bucket):
    zero = json_for_deepspeed(config_of(), 2, learned)["zero_optimization"]
    assert zero == {"stage": 2, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    set_by_hand = config_of("engine.deepspeed={zero_optimization: {reduce_bucket_size: 7}}")
    assert json_for_deepspeed(set_by_hand, 2, learned)["zero_optimization"]["reduce_bucket_size"] == 7
    assert json_for_deepspeed(config_of("engine.zero_stage=0"), 2, learned)["zero_optimization"] == {"stage": 0}


def test_losses_are_added_up_in_float32():
    made = json_for_deepspeed(config_of("train.accumulate_losses=4", "train.global_batch_size=64"), 2)
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (256, 32)
    assert made["gradient_accumulation_steps"] == 4 and "data_types" not in made
    made = json_for_deepspeed(config_of("train.accumulate_losses=4", "engine.zero_stage=0", "engine.dtype=bf16"), 2)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["zero_optimization"]["stage"] == 2


def test_offload_goes_to_the_host_with_the_optimizer_of_torch():
    keys = "engine.zero_stage=3", "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"
    made, host = json_for_deepspeed(config_of(*keys), 2), {"device": "cpu"}
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": host, "offload_param": host}
    assert made["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.offload_optimizer=cpu", "engine.zero_stage=0"], "engine.zero_stage to 1, 2 or 3"),
        (["engine.offload_parameters=cpu"], "got engine.zero_stage=2; set engine.zero_stage=3"),
        (["engine.offload_optimizer=nvme"], "'none' or 'cpu'"),
        (["train.accumulate_losses=0"], "greater than 0"),
        (
            ["train.accumulate_losses=2", "engine.offload_optimizer=cpu", "engine.dtype=bf16"],
            "adds the gradients up in bf16.*set engine.zero_stage=3",
        ),
        (
            [
                "engine.offload_optimizer=cpu",
                "engine.deepspeed={zero_optimization: {offload_optimizer: {device: nvme}}}",
            ],
            "zero_optimization.offload_optimizer is derived",
        ),
        (["engine.deepspeed={gradient_accumulation_steps: 2}"], "gradient_accumulation_steps is derived"),
    ],
)
def test_what_cannot_be_is_refused(overrides, said):
    with pytest.raises(ValueError, match=said):
        json_for_deepspeed(config_of(*overrides), 2)
