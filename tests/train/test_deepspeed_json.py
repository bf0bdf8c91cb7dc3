"""DeepSpeed's JSON: what is derived from which key, and what is refused before a job starts."""

import copy
import json
import logging

import pytest
import torch

from vlscale.cli import main
from vlscale.config import load_plan, parse_overrides, validate
from vlscale.sections import Config
from vlscale.train.deepspeed_json import QUANTIZED, json_for_deepspeed, refusals_named
from vlscale.train.doctor_config import examine_config

ODD_QUARTER = 4 * (1 << 20) + 4  # DeepSpeed gathers by even numbers only


def config_of(*overrides: str) -> Config:
    return validate(parse_overrides(list(overrides)), "test")


@pytest.mark.parametrize(
    ("learned", "bucket"),
    [(1000, 1 << 20), (ODD_QUARTER, 1 << 20), (86_000_000, 21_500_000), (1_000_000_000, 50_000_000)],
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{fp16: {enabled: true}}", "fp16 is derived from other keys of the config; set engine.dtype"),
        ("{amp: {}}", "set engine.dtype"),
        ("{optimizer: {type: Adam}}", "set optim.name"),
        ("{data_types: {param_dtype: fp16}}", "data_types.param_dtype is derived"),
        ("{zero_optimization: {offload_param: {device: cpu}}}", "set engine.offload_parameters"),
        ("{zero_optimization: {offload_optimizer: {device: nvme}}}", "engine.offload_optimizer .none or cpu."),
        ("{tensor_parallel: {autotp_size: 2}}", "cannot be chosen: ranks divide the pairs"),
        ("{managed_gradient_accumulation: false}", "cannot be chosen"),
    ],
)
def test_what_vlscale_sets_itself_names_the_key_to_use(given, said):
    with pytest.raises(ValueError, match=said):
        json_for_deepspeed(config_of(f"engine.deepspeed={given}"), 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{zero_optimization: {reduce_bucket_sise: 5}}", "did you mean 'zero_optimization.reduce_bucket_size'?"),
        ("{wall_clock_brakedown: true}", "no key 'wall_clock_brakedown'; did you mean 'wall_clock_breakdown'?"),
        ("{flops_profiler: {enabld: true}}", "did you mean 'flops_profiler.enabled'?"),
        ("{csv_monitor: {enbled: true}}", "no key 'csv_monitor.enbled'"),
        ("{timers: {throughput: {enbled: true}}}", "no key 'timers.throughput.enbled'"),
        ("{zero_optimization: {reduce_bucket_size: -1}}", "reduce_bucket_size: Input should be greater than 0, got -1"),
        ("{zero_optimization: {reduce_bucket_size: auto}}", "reduce_bucket_size is auto"),
        ("{zero_optimization: true}", "zero_optimization is True; expected a mapping"),
        ("{flops_profiler: 3}", "flops_profiler is 3, which DeepSpeed cannot read"),
        ("{communication_data_type: fp8}", "Supported data types: ['fp16', 'bf16', 'fp32']. Got: fp8"),
        ("{data_types: {grad_accum_dtype: fp8}}", "'fp8' is not a valid"),
        ("{sparse_gradients: true}", "'sparse_gradients' flag would be ignored"),
    ],
)
def test_what_deepspeed_cannot_read_is_one_line(given, said):
    with pytest.raises(ValueError) as refused:
        json_for_deepspeed(config_of(f"engine.deepspeed={given}"), 2)
    line = str(refused.value)
    assert line.startswith("engine.deepspeed") and said in line and "\n" not in line


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        (2, {"prescale_gradients": True}, "prescale_gradients does not go with ZeRO-2"),
        (3, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor does not go with ZeRO-3"),
        (1, {"zero_optimization": {"allgather_bucket_size": 7}}, "allgather_bucket_size=7; ZeRO-1 expects an even"),
        (3, {"zero_optimization": {"zero_hpz_partition_size": 3}}, "3 does not divide the world size 4"),
        (0, {"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype=bf16 needs ZeRO"),
        (
            2,
            {"zero_optimization": {"zero_quantized_gradients": True}},
            "has an effect with ZeRO-3 alone, got ZeRO-2; leave it out, or",
        ),
        (
            1,
            {"zero_optimization": {"zero_hpz_partition_size": 2}},
            "zero_hpz_partition_size has an effect with ZeRO-3 alone",
        ),
        (
            0,
            {"zero_optimization": {"sub_group_size": 1000}},
            "sub_group_size has an effect with ZeRO-3 alone, got ZeRO-0",
        ),
        (2, {"zero_optimization": {"leaf_module": {"classes": ["A"]}}}, "leaf_module has an effect with ZeRO-3 alone"),
    ],
)
def test_what_only_the_engine_would_stop_at_is_refused(stage, given, said):
    with pytest.raises(ValueError, match=said):
        json_for_deepspeed(config_of(f"engine.zero_stage={stage}", f"engine.deepspeed={json.dumps(given)}"), 4)


@pytest.mark.parametrize("key", QUANTIZED)
def test_what_needs_cuda_kernels_is_refused_without_a_device(monkeypatch, key):
    config = config_of("engine.zero_stage=3", f"engine.deepspeed={{zero_optimization: {{{key}: true}}}}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"{key} expects a CUDA device, .*this machine has none; leave it out$"):
        json_for_deepspeed(config, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert json_for_deepspeed(config, 2)["zero_optimization"][key] is True


def test_keys_of_stage_3_that_change_nothing_pass():
    config = config_of(
        "engine.deepspeed={zero_optimization: {zero_hpz_partition_size: 1, zero_quantized_weights: false}}"
    )
    assert json_for_deepspeed(config, 2)["zero_optimization"]["zero_hpz_partition_size"] == 1


@pytest.mark.parametrize("stage", range(4))
def test_what_deepspeed_knows_passes_through_unchanged(stage):
    zero = {"reduce_bucket_size": 6, "allgather_bucket_size": 8, "overlap_comm": True, "round_robin_gradients": True}
    zero |= {"contiguous_gradients": False, "reduce_scatter": False, "stage3_prefetch_bucket_size": 0}
    given = {
        "communication_data_type": "fp32",
        "prescale_gradients": True,  # goes with reduce_scatter: false
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 2},
        "comms_logger": {"enabled": True},
        "timers": {"throughput": {"enabled": False}},
        "aio": {"block_size": 1048576},
        "compile": {"deepcompile": False},
    }
    config = config_of(
        f"engine.zero_stage={stage}", f"engine.deepspeed={json.dumps(given | {'zero_optimization': zero})}"
    )
    before = copy.deepcopy(config.engine.deepspeed)
    made = json_for_deepspeed(config, 2, 1000)
    assert made.items() >= given.items() and made["zero_optimization"] == zero | {"stage": stage}
    assert config.engine.deepspeed == before and type(made["flops_profiler"]) is dict


def test_deepspeed_says_nothing_while_it_reads():
    """It logs to stdout, where `vlscale doctor --json` writes."""
    said = logging.Handler()
    said.emit = lambda record: pytest.fail(record.getMessage())
    logging.getLogger("DeepSpeed").addHandler(said)
    try:
        old = "{zero_optimization: {stage3_gather_fp16_weights_on_model_save: true}}"
        json_for_deepspeed(config_of(f"engine.deepspeed={old}"), 2)
    finally:
        logging.getLogger("DeepSpeed").removeHandler(said)


def test_what_deepspeed_still_refuses_is_said_of_its_keys():
    given, said = (
        config_of("engine.deepspeed={dump_state: true}"),
        "is refused by DeepSpeed: no such thing here; change",
    )
    with pytest.raises(ValueError, match=said), refusals_named(given):
        raise AssertionError("no such\n  thing here.")
    with pytest.raises(AssertionError), refusals_named(config_of()):  # nothing was passed through: our own mistake
        raise AssertionError


def test_doctor_and_plan_show_the_line_and_a_run_ends_with_it(capsys, tiny_config, tmp_path):
    misspelt = "engine.deepspeed={zero_optimization: {overlap_com: true}}"
    bad = [finding for finding in examine_config(load_plan(tiny_config, [misspelt]), 1) if finding.level == "fail"]
    assert [finding.name for finding in bad] == ["DeepSpeed"]
    assert bad[0].value in refused(capsys, "train", str(tiny_config), "--plan", misspelt)
    early = "engine.deepspeed={zero_optimization: {zero_quantized_gradients: true}}"
    assert "zero_quantized_gradients has an effect with ZeRO-3" in refused(
        capsys, "train", str(tiny_config), "--plan", early
    )
    run, when_built = ["train", str(tiny_config), "--out", str(tmp_path / "run")], "engine.deepspeed={log_level: loud}"
    assert "engine.deepspeed is refused by DeepSpeed: loud is not one of" in refused(capsys, *run, when_built)
    assert not (tmp_path / "run").exists()


def refused(capsys, *arguments: str) -> str:
    """The one line that a command prints before it exits with 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]
