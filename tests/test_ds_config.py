"""DeepSpeed's configuration: what a file of --deepspeed_config may say, and what is refused."""

import json

import pytest
import torch

from alpaca_rlhf.utils import ds_config
from alpaca_rlhf.utils.errors import UserError


def given(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


GOOD = {
    "gradient_clipping": 0.5, "wall_clock_breakdown": True, "train_batch_size": "auto",
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 1e6,
        "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": "auto",
        "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "sub_group_size": 1e9,
        "offload_optimizer": {"device": "none"}},
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": False, "initial_scale_power": 12},
    "flops_profiler": {"enabled": True}, "comms_logger": {"enabled": True},
    "elasticity": {"enabled": False},
}


def test_a_file_of_known_keys_is_merged_over_the_flags(tmp_path):
    path = given(tmp_path, GOOD)
    assert ds_config.check_overrides(path, offload=False) == []
    made = ds_config.make(zero_stage=3, dtype=torch.bfloat16, overrides=path)
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["sub_group_size"] == 1e9
    assert made["fp16"] == {"enabled": False, "loss_scale_window": 100, "initial_scale_power": 12}
    assert "stage3_prefetch_bucket_size" not in made["zero_optimization"]
    assert made["bf16"]["enabled"] is True


@pytest.mark.parametrize("key", sorted(ds_config._REFUSED))
def test_what_cannot_be_honoured_is_refused_by_name_and_may_be_off(tmp_path, key):
    section, _, name = key.rpartition(".")
    for value, on in ((True, True), ({"enabled": True}, True), (4, True), (False, False),
                      ({"enabled": False}, False), (None, False)):
        path = given(tmp_path, {section: {name: value}} if section else {key: value})
        if not on:
            assert ds_config.check_overrides(path, offload=False) == []
            continue
        with pytest.raises(UserError, match=f"^--deepspeed_config {path}: {key} is not supported: "
                           f".*; take {key} out of the file$"):
            ds_config.check_overrides(path, offload=False)


def test_optimizer_and_scheduler_are_the_flags_and_an_unknown_key_is_passed_with_a_warning(
    tmp_path
):
    path = given(tmp_path, {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, "novelty": 1,
                            "scheduler": {"type": "WarmupLR"}})
    where = f"--deepspeed_config {path}"
    assert ds_config.check_overrides(path, offload=False) == [
        f"{where}: optimizer has no effect: --learning_rate, --weight_decay and --offload decide",
        f"warning: {where}: novelty is passed to DeepSpeed untested",
        f"{where}: scheduler has no effect: --lr_scheduler_type and --num_warmup_steps decide",
    ]
    made = ds_config.make(zero_stage=0, dtype=torch.float32, overrides=path)
    assert made["novelty"] == 1
    assert not {"optimizer", "scheduler"} & made.keys()


@pytest.mark.parametrize(("content", "name", "theirs", "ours"), [
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", 1, 2),
    ({"bf16": {"enabled": True}}, "bf16.enabled", True, False),
    ({"train_batch_size": 7}, "train_batch_size", 7, 1),
])
def test_what_contradicts_a_flag_is_refused(tmp_path, content, name, theirs, ours):
    path = given(tmp_path, content)
    with pytest.raises(UserError) as refused:
        ds_config.make(zero_stage=2, dtype=torch.float32, overrides=path)
    assert str(refused.value) == (
        f"--deepspeed_config {path}: {name} is {theirs}, but the flags give {ours}; take {name} "
        "out of the file")


def test_offloading_needs_its_flag(tmp_path):
    path = given(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}})
    assert ds_config.check_overrides(path, offload=True) == []
    with pytest.raises(UserError, match="needs another optimizer; give --offload too$"):
        ds_config.check_overrides(path, offload=False)


@pytest.mark.parametrize(("dtype", "expected"), [
    (torch.float32, [0, 1, 2, 3]), (torch.bfloat16, [2, 2, 2, 3]), (torch.float16, [2, 2, 2, 3])])
def test_half_precision_trains_at_stage_2_or_3_and_sums_gradients_in_fp32(dtype, expected):
    made = [ds_config.make(zero_stage=stage, dtype=dtype) for stage in range(4)]
    assert [config["zero_optimization"]["stage"] for config in made] == expected
    assert {config["data_types"]["grad_accum_dtype"] for config in made} == {"fp32"}
    assert {config["communication_data_type"] for config in made} == {"fp32"}
