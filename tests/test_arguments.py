"""The command-line contract: what parses, what each mistake says, and that nothing else is said."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.arguments import notices, split_shares, to_config
from alpaca_rlhf.utils.configs import (
    FILE_TRACKERS,
    TRACKERS,
    SamplingConfig,
    Step1Config,
    Step2Config,
    Step3Config,
    group,
    option,
)
from alpaca_rlhf.utils.errors import UserError

RECORDS = {1: Step1Config, 2: Step2Config, 3: Step3Config}
OPTIONS = {option.flag: option for option in arguments.options(Step3Config)}
NO_EFFECT = {flag for flag, option in OPTIONS.items() if option.metadata["no_effect"]}
UNAVAILABLE = {flag for flag, option in OPTIONS.items() if option.metadata["unavailable"]}
MODELS = ["--actor_model_name_or_path", "out/actor", "--critic_model_name_or_path", "out/critic"]
NEEDED = {1: [], 2: [], 3: MODELS}

# The flags of DeepSpeed-Chat's and alpaca-rlhf's scripts, with a value that is not the default.
ALL_STEPS = """
--data_path Dahoas/rm-static local/jsonfile
--data_split 6,2,2
--data_output_path cache
--tokenizer_name_or_path tok
--num_padding_at_beginning 1
--gradient_accumulation_steps 2
--lr_scheduler_type linear
--num_warmup_steps 100
--num_train_epochs 2
--output_dir out
--seed 7
--local_rank 0
--deepspeed
--dtype bf16
--compute_fp32_loss
--print_loss
--add_eot_token
--eot_token </s>
--preprocessing_num_workers 2
--max_steps 5
--max_tokens_per_micro_batch 4096
--overwrite_output_dir
--chat_template tokenizer
--chat_template alpaca_short
--lang en zh_cn
--overlong drop
--trust_remote_code
--attn_implementation eager
--enable_tensorboard
--tensorboard_path tb
--tracker wandb
--tracker tensorboard mlflow
--logging_dir tb
--save_steps 10 --output_dir out
--save_total_limit 3
--resume_from_checkpoint latest --output_dir out
--resume_from_checkpoint out.partial/checkpoints/step-00000010
--allow_changed_args --resume_from_checkpoint latest --output_dir out
--collective_timeout 60
--max_skipped_steps 3
"""
STEPS_1_AND_2 = """
--model_name_or_path meta-llama/Llama-2-7b-hf
--per_device_train_batch_size 4
--per_device_eval_batch_size 4
--max_seq_len 128
--learning_rate 9.65e-6
--lora_learning_rate 5e-4 --lora_dim 8
--weight_decay 0.1
--deepspeed_config DEEPSPEED_JSON
--gradient_checkpointing
--dropout 0.1
--offload --zero_stage 2
--zero_stage 3
--lora_dim 128
--lora_alpha 16 --lora_dim 8
--lora_dropout 0.1 --lora_dim 8
--lora_module_name layers. --lora_dim 8
--only_optimize_lora --lora_dim 8
--eval_interval 10
--eval_iters 3
"""
STEP_1 = """
--sft_only_data_path extra.json
--train_on last
--train_on_prompt
"""
STEP_3 = """
--per_device_generation_batch_size 32
--per_device_train_batch_size 32
--per_device_training_batch_size 8
--per_device_mini_train_batch_size 8
--generation_batches 2
--generation_batch_numbers 2
--ppo_epochs 2
--max_prompt_seq_len 64
--max_answer_seq_len 64
--actor_learning_rate 5e-4
--critic_learning_rate 5e-4
--actor_lora_learning_rate 5e-4 --actor_lora_dim 8
--critic_lora_learning_rate 5e-4 --critic_lora_dim 8
--actor_weight_decay 0.1
--critic_weight_decay 0.1
--actor_zero_stage 3
--critic_zero_stage 3
--actor_gradient_checkpointing
--critic_gradient_checkpointing
--actor_dropout 0.1
--critic_dropout 0.1
--disable_actor_dropout
--disable_critic_dropout
--actor_lora_dim 128
--critic_lora_dim 128
--actor_lora_module_name layers. --actor_lora_dim 8
--critic_lora_module_name layers. --critic_lora_dim 8
--only_optimize_lora --critic_lora_dim 8
--offload --actor_zero_stage 2 --critic_zero_stage 2
--offload_reference_model
--offload_reward_model
--enable_hybrid_engine
--enable_cuda_graph
--unpin_actor_parameters
--release_inference_cache
--inference_tp_size 2
--tp_gather_partition_size 4
--enable_ema
--ema_decay 0.9
--enable_mixed_precision_lora
--align_overflow
--unsupervised_dataset_name wikitext
--unsupervised_dataset_config_name v1 --unsupervised_dataset_name wikitext
--unsup_coef 27.8
--print_answers
--print_answers_interval 20
--log_samples_steps 5
--stop_on_alarm
--enable_test_mode
--test_stop_step 3
--temperature 0.7
--top_p 0.9
--top_k 50
--kl_coef 0.1
--kl_controller adaptive
--kl_target 3
--kl_horizon 500
--gamma 0.9
--lam 1
--cliprange 0.1
--cliprange_value 0.1
--clip_reward_value 10
--entropy_coef 0.01
--missing_eos_penalty 0
--reward_normalization none
--reward_function rewards.simple:length
--whiten_advantages false
--critic_warmup_steps 5
--num_generations 4
--eval_prompts 0
"""
LINES = [(step, line) for block, steps in (
    (ALL_STEPS, (1, 2, 3)), (STEPS_1_AND_2, (1, 2)), (STEP_1, (1,)), (STEP_3, (3,)))
    for line in block.strip().splitlines() for step in steps]


def parse(step: int, argv: list[str] | None = None):
    return arguments.parse(RECORDS[step], argv)


def refusal(step: int, *argv: str) -> str:
    """The one line that these arguments end in."""
    with pytest.raises(UserError) as caught:
        parse(step, [*NEEDED[step], *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what parses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "line"), LINES)
def test_every_flag_of_the_contract_parses_or_is_not_available(step, line, tmp_path):
    ds_config = tmp_path / "ds.json"
    ds_config.write_text("{}")
    argv = line.replace("DEEPSPEED_JSON", str(ds_config)).split()
    if argv[0][2:] in UNAVAILABLE:
        assert ": not available in this version: " in refusal(step, *argv)
    else:
        given = parse(step, [*NEEDED[step], *argv]).given
        assert given - {"actor_model_name_or_path", "critic_model_name_or_path"}


def test_first_old_command_line_parses():
    args = parse(1, "--gradient_accumulation_steps 2 --lora_dim 128 --zero_stage 0 --deepspeed "
                       "--output_dir OUT/actor --local_rank=0".split())
    assert (args.model.lora_dim, args.run.output_dir, args.run.local_rank) == (128, "OUT/actor", 0)


def test_second_old_command_line_parses():
    args = parse(2, "--num_padding_at_beginning 0 --gradient_accumulation_steps 2 --zero_stage 0"
                       " --deepspeed --output_dir OUT/critic --local_rank=0".split())
    assert args.schedule.gradient_accumulation_steps == 2


def test_third_old_command_line_parses():
    args = parse(3,
        "--actor_model_name_or_path OUT/actor --critic_model_name_or_path OUT/critic "
        "--actor_zero_stage 0 --critic_zero_stage 0 --num_padding_at_beginning 0 "
        "--gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128 --enable_hybrid_engine "
        "--actor_gradient_checkpointing --output_dir OUT/final --local_rank=0".split())
    assert args.actor.lora_dim == 128
    assert args.critic.lora_dim == 0
    assert args.hybrid.enable_hybrid_engine is True


def test_no_arguments_are_enough_for_step_1():
    args = parse(1, [])
    assert (args.data.data_path, args.model.model_name_or_path) == ([], None)
    assert (args.run.seed, args.run.local_rank, args.data.data_split) == (1234, -1, "2,4,4")


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--seed", "5"])
    assert parse(1).run.seed == 5


def test_no_other_file_beside_the_script_is_read(monkeypatch, tmp_path):
    (tmp_path / "main.args").write_text("--seed 99")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "main.py")])
    assert parse(1).run.seed == 1234


def test_a_mini_batch_may_span_generated_batches():
    args = parse(3, [*MODELS, "--generation_batches", "2",
                        "--per_device_training_batch_size", "32"])
    assert args.ppo.per_device_training_batch_size == 32


@pytest.mark.parametrize(("words", "value"), [
    (["--offload"], True), (["--offload", "true"], True), (["--offload=false"], False), ([], False)
])
def test_booleans_are_bare_or_valued(words, value):
    assert parse(1, ["--zero_stage", "2", *words]).engine.offload is value


def test_a_flag_may_be_spelt_with_hyphens():
    assert parse(1, ["--max-seq-len", "64"]).batches.max_seq_len == 64


@pytest.mark.parametrize("flag", [
    "--per_device_generation_batch_size", "--per_device_train_batch_size",
    "--per-device-train-batch-size"])
def test_generation_batch_size_has_the_old_name_too(flag):
    assert parse(3, [*MODELS, flag, "32"]).rollout.per_device_generation_batch_size == 32


@pytest.mark.parametrize("flag", [
    "--per_device_training_batch_size", "--per_device_mini_train_batch_size"])
def test_training_batch_size_has_the_old_name_too(flag):
    assert parse(3, [*MODELS, flag, "4"]).ppo.per_device_training_batch_size == 4


@pytest.mark.parametrize("flag", ["--generation_batches", "--generation_batch_numbers"])
def test_generation_batches_has_the_old_name_too(flag):
    assert parse(3, [*MODELS, flag, "3"]).rollout.generation_batches == 3


# --- learning rates and other dependent defaults -------------------------------------------------


@pytest.mark.parametrize(("step", "words", "rates"), [
    (1, "", (2e-5, None)),
    (2, "", (1e-5, None)),
    (1, "--lora_dim 8", (3e-4, 3e-4)),
    (2, "--lora_dim 8", (1e-4, 1e-4)),
    (1, "--learning_rate 1e-3", (1e-3, None)),
    (1, "--lora_dim 8 --learning_rate 1e-3", (1e-3, 1e-3)),
    (1, "--lora_dim 8 --lora_learning_rate 1e-3", (3e-4, 1e-3)),
    (2, "--lora_dim 8 --learning_rate 0 --lora_learning_rate 1e-3", (0.0, 1e-3)),
])
def test_learning_rates_of_steps_1_and_2(step, words, rates):
    model = parse(step, words.split()).model
    assert (model.learning_rate, model.lora_learning_rate) == rates


@pytest.mark.parametrize(("words", "rates"), [
    ("", (9.65e-6, None, 5e-6, None)),
    ("--actor_lora_dim 8", (9.65e-6, 1e-4, 5e-6, None)),
    ("--critic_lora_dim 8", (9.65e-6, None, 5e-6, 5e-5)),
    ("--actor_lora_dim 8 --actor_learning_rate 2e-4", (2e-4, 2e-4, 5e-6, None)),
    ("--critic_lora_dim 8 --critic_lora_learning_rate 2e-4", (9.65e-6, None, 5e-6, 2e-4)),
])
def test_learning_rates_of_step_3(words, rates):
    args = parse(3, [*MODELS, *words.split()])
    assert rates == (args.actor.learning_rate, args.actor.lora_learning_rate,
                     args.critic.learning_rate, args.critic.lora_learning_rate)


@pytest.mark.parametrize(("words", "value"), [
    ("", False), ("--lora_dim 8", True), ("--lora_dim 8 --only_optimize_lora false", False)])
def test_only_optimize_lora_is_on_with_lora(words, value):
    assert parse(1, words.split()).lora.only_optimize_lora is value


def test_lora_of_one_role_is_lora():
    args = parse(3, [*MODELS, "--critic_lora_dim", "8", "--lora_alpha", "4"])
    assert (args.lora.only_optimize_lora, args.lora.lora_alpha) == (True, 4.0)


def test_ppo_defaults():
    args = parse(3, MODELS)
    assert (args.reward.kl_coef, args.ppo.gamma, args.ppo.lam, args.ppo.cliprange) == (
        0.05, 1.0, 0.95, 0.2)
    assert (args.reward.clip_reward_value, args.reward.missing_eos_penalty) == (5.0, 1.0)
    assert (args.sampling.temperature, args.sampling.top_p, args.sampling.top_k) == (1.0, 1.0, 0)


# --- what each mistake says ----------------------------------------------------------------------


@pytest.mark.parametrize(("step", "words", "message"), [
    (1, "--learnin_rate 1e-4", "unknown flag --learnin_rate; did you mean --learning_rate?"),
    (1, "--learnin_rate=1e-4", "unknown flag --learnin_rate; did you mean --learning_rate?"),
    (1, "--xyzzy", "unknown flag --xyzzy; see --help"),
    (1, "--xyzzy 3 --max_seq_le 4", "unknown flags --xyzzy, --max_seq_le (did you mean "
        "--max_seq_len?); see --help"),
    (1, "--max_seq 4", "unknown flag --max_seq; did you mean --max_seq_len?"),
    (1, "--seed 1 2", "stray value 2: it follows no flag that takes it; remove it or name its "
        "flag"),
    (1, "--seed", "--seed: needs a value"),
    (1, "--data_path --seed 1", "--data_path: needs a value"),
    (1, "--zero_stage 4", "--zero_stage 4: must be one of 0, 1, 2, 3"),
    (1, "--dtype int8", "--dtype int8: must be one of auto, fp32, bf16, fp16"),
    (1, "--num_train_epochs abc", "--num_train_epochs abc: must be a whole number"),
    (1, "--num_train_epochs 1.5", "--num_train_epochs 1.5: must be a whole number"),
    (1, "--learning_rate high", "--learning_rate high: must be a number"),
    (1, "--learning_rate nan", "--learning_rate nan: must be a number"),
    (1, "--offload maybe", "--offload maybe: must be true or false"),
    (1, "--num_train_epochs 0", "--num_train_epochs 0: must be 1 or more"),
    (2, "--per_device_train_batch_size 0", "--per_device_train_batch_size 0: must be 1 or more"),
    (2, "--max_seq_len -1", "--max_seq_len -1: must be 1 or more"),
    (2, "--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: must be 1 or more"),
    (2, "--learning_rate=-1e-5", "--learning_rate -1e-05: must be 0 or more"),
    (2, "--max_steps 0", "--max_steps 0: must be 1 or more"),
    (2, "--dropout 1", "--dropout 1.0: must be 0 or more and below 1"),
    (3, "--top_p 0", "--top_p 0.0: must be above 0 and at most 1"),
    (3, "--temperature 0", "--temperature 0.0: must be above 0"),
    (3, "--gamma 1.1", "--gamma 1.1: must be from 0 to 1"),
    (3, "--lam -0.1", "--lam -0.1: must be from 0 to 1"),
    (3, "--ema_decay 1", "--ema_decay 1.0: must be above 0 and below 1"),
    (3, "--critic_learning_rate=-1", "--critic_learning_rate -1.0: must be 0 or more"),
    (1, "--save_steps 10", "--save_steps 10: needs --output_dir; give it or remove the flag"),
    (2, "--resume_from_checkpoint latest", "--resume_from_checkpoint latest: needs --output_dir, "
        "whose checkpoints it looks at; give it, or the folder of a checkpoint"),
    (3, "--save_total_limit 0", "--save_total_limit 0: must be 1 or more"),
    (1, "--collective_timeout 0", "--collective_timeout 0: must be 1 or more"),
    (3, "--offload_reference_model", "--offload_reference_model: not available in this version: "
        "the reference model stays on the device; remove the flag"),
    (1, "--data_split 2,4", "--data_split 2,4: must be three numbers of 0 or more, not all 0, "
        "such as 2,4,4"),
    (2, "--data_split 10,0,0", "--data_split 10,0,0: leaves no data for step 2; give its share, "
        "number 2 of the three, a value above 0"),
    (1, "--lora_learning_rate 1e-3", "--lora_learning_rate 0.001: needs LoRA; give --lora_dim or "
        "remove the flag"),
    (3, "--actor_lora_dim 8 --critic_lora_learning_rate 1e-3", "--critic_lora_learning_rate 0.001:"
        " needs LoRA; give --critic_lora_dim or remove the flag"),
    (1, "--only_optimize_lora", "--only_optimize_lora: needs LoRA; give --lora_dim, or remove the "
        "flag"),
    (3, "--lora_alpha 8", "--lora_alpha 8.0: needs LoRA; give --actor_lora_dim or "
        "--critic_lora_dim, or remove the flag"),
    (1, "--offload", "--offload: needs ZeRO; give --zero_stage 1, 2 or 3, or remove the flag"),
    (3, "--offload --actor_zero_stage 3", "--offload: needs ZeRO; give --critic_zero_stage 1, 2 or "
        "3, or remove the flag"),
    (1, "--deepspeed_config no.json", "--deepspeed_config no.json: no such file"),
    (3, "--per_device_training_batch_size 5", "--per_device_training_batch_size 5: must divide the "
        "16 rollouts of a PPO iteration (--per_device_generation_batch_size 16 x "
        "--generation_batches 1); try 4 or 8"),
    (3, "--num_generations 3", "--num_generations 3: must divide --per_device_generation_batch_size"
        " 16, which counts rollouts; try 2 or 4"),
    (3, "--reward_function length", "--reward_function length: must be module:name, such as "
        "my_rewards:length"),
    (3, "--kl_controller adaptive --kl_coef 0", "--kl_coef 0: --kl_controller adaptive multiplies "
        "it, and 0 would stay 0; give a start above 0, such as 0.05"),
    (3, "--disable_actor_dropout --actor_dropout 0.1", "--actor_dropout 0.1: contradicts "
        "--disable_actor_dropout; remove one of the two"),
    (3, "--hybrid_engine_backend deepspeed", "--hybrid_engine_backend deepspeed: DeepSpeed's own "
        "kernels leave LoRA adapters out and do not follow today's LLaMA; take native, or remove "
        "the flag"),
    (3, "--unsupervised_dataset_config_name v1", "--unsupervised_dataset_config_name v1: needs "
        "--unsupervised_dataset_name; give it or remove the flag"),
])
def test_a_mistake_is_one_line(step, words, message):
    assert refusal(step, *words.split()) == message


def test_an_empty_value_is_refused():
    assert refusal(1, "--output_dir", "") == (
        "--output_dir '': is empty; give a value or remove the flag")


def test_a_value_with_a_line_break_still_ends_in_one_line():
    assert refusal(1, "--dtype", "a\nb") == (
        "--dtype 'a b': must be one of auto, fp32, bf16, fp16")


@pytest.mark.parametrize(("words", "message"), [
    ("--critic_model_name_or_path c",
     "--actor_model_name_or_path is required: the folder step 1 wrote, or a hub id"),
    ("--actor_model_name_or_path a --reward_function r:f",
     "--critic_model_name_or_path is required: the folder step 2 wrote, or a hub id"),
])
def test_step_3_requires_both_models(words, message):
    with pytest.raises(UserError) as caught:
        parse(3, words.split())
    assert str(caught.value) == message


def test_a_flag_of_another_step_is_unknown():
    assert refusal(2, "--train_on_prompt").startswith("unknown flag --train_on_prompt;")


def test_a_deepspeed_config_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{\n"a": }')
    assert refusal(1, "--deepspeed_config", str(path)) == (
        f"--deepspeed_config {path}: line 2: not valid JSON: Expecting value")


@pytest.mark.parametrize("text", ["1,2", "1,2,x", "1,2,-3", "0,0,0", "1,2,inf", "1,2,3,4", ""])
def test_split_shares_refuses_what_is_not_three_shares(text):
    with pytest.raises(UserError, match="must be three numbers"):
        split_shares(text)


def test_split_shares_reads_three_numbers():
    assert split_shares("2,4,4") == (2.0, 4.0, 4.0)


# --- the config file -----------------------------------------------------------------------------


def recipe(tmp_path: Path, text: str, name: str = "recipe.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_config_file_sets_flags(tmp_path):
    path = recipe(tmp_path, "lora_dim: 8\nlearning_rate: 1e-3\ndata_path: [a, b]\n"
                            "train_on_prompt: true\noutput_dir: null\n")
    args = parse(1, ["--config", path])
    assert (args.model.lora_dim, args.model.learning_rate) == (8, 1e-3)
    assert (args.data.data_path, args.sft.train_on_prompt) == (["a", "b"], True)
    assert args.run.output_dir is None


def test_a_config_file_may_be_json(tmp_path):
    path = recipe(tmp_path, '{\n\t"seed": 9,\n\t"data_path": ["a"]}', "recipe.json")
    args = parse(1, ["--config", path])
    assert (args.run.seed, args.data.data_path) == (9, ["a"])


def test_the_command_line_wins_over_the_file(tmp_path):
    path = recipe(tmp_path, "seed: 9\nzero_stage: 2\noffload: true\n")
    args = parse(1, ["--seed", "3", "--config", path, "--offload", "false"])
    assert (args.run.seed, args.model.zero_stage, args.engine.offload) == (3, 2, False)


def test_a_key_may_be_an_alias(tmp_path):
    path = recipe(tmp_path, "generation_batch_numbers: 4\n")
    assert parse(3, [*MODELS, "--config", path]).rollout.generation_batches == 4


def test_an_empty_config_file_sets_nothing(tmp_path):
    assert parse(1, ["--config", recipe(tmp_path, "# nothing\n")]) == parse(1,
        ["--config", recipe(tmp_path, "")])


@pytest.mark.parametrize(("text", "message"), [
    ("learnin_rate: 1", "unknown key learnin_rate; did you mean learning_rate?"),
    ("xyzzy: 1", "unknown key xyzzy; see --help"),
    ("zero_stage: 4", "--zero_stage 4: must be one of 0, 1, 2, 3"),
    ("seed: 1\nmax_seq_len: [1", "line 2: not valid YAML: expected ',' or ']', but got "
     "'<stream end>'"),
    ("model:\n  lora_dim: 8", "unknown key model; see --help"),
    ("seed:\n  value: 8", "seed: holds a nested mapping or list; a value or a plain list of "
     "values is expected"),
    ("seed: [1, 2]", "seed: takes one value, not a list"),
    ("config: other.yaml", "config: a config file can not name another; remove the key"),
    ("max_seq_len: 8\nmax-seq-len: 9", "max_seq_len and max-seq-len are one flag; keep one of "
     "them"),
    ("- seed", "must hold a mapping of names to values"),
])
def test_a_mistake_in_a_config_file_is_one_line_that_names_it(text, message, tmp_path):
    path = recipe(tmp_path, text)
    assert refusal(1, "--config", path) == f"--config {path}: {message}"


def test_broken_json_names_its_line(tmp_path):
    path = recipe(tmp_path, '{"seed": 1,\n "max_seq_len"}', "recipe.json")
    assert refusal(1, "--config", path) == (
        f"--config {path}: line 2: not valid JSON: Expecting ':' delimiter")


def test_a_missing_config_file_is_refused():
    assert refusal(1, "--config", "no.yaml") == "--config no.yaml: no such file"


# --- the saved arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize(("step", "words"), [
    (1, ""),
    (1, "--lora_dim 8 --learning_rate 1e-3 --data_path a b --sft_only_data_path=-x --lora_alpha 3"),
    (1, "--deepspeed --num_padding_at_beginning 1 --local_rank 3 --no_compute_fp32_loss"),
    (2, "--lora_dim 8"),
    (2, "--data_split 0,1,0 --zero_stage 3 --offload --output_dir 001"),
    (3, ""),
    (3, "--actor_lora_dim 8 --whiten_advantages false --disable_actor_dropout --kl_coef 1e-7"),
    (3, "--critic_lora_dim 8 --critic_lora_learning_rate 0 --reward_function a:b --num_generations "
        "2 --generation_batch_numbers 3 --reward_normalization none"),
])
def test_saved_arguments_give_back_equal_arguments(step, words, suffix, tmp_path):
    args = parse(step, [*NEEDED[step], *words.split()])
    dump = yaml.safe_dump if suffix == "yaml" else json.dumps
    path = recipe(tmp_path, dump(to_config(args)), f"saved.{suffix}")
    again = parse(step, ["--config", path, "--local_rank", str(args.run.local_rank)])
    saved_run = {**vars(args.run), "config": path}
    assert saved_run == vars(again.run)
    for name in vars(args).keys() - {"run", "given"}:
        assert getattr(args, name) == getattr(again, name)


def test_saved_arguments_hold_resolved_values_and_no_launch():
    config = to_config(parse(1, ["--lora_dim", "8", "--local_rank", "0"]))
    assert (config["learning_rate"], config["only_optimize_lora"]) == (3e-4, True)
    assert not config.keys() & {"local_rank", "config", "max_tokens_per_micro_batch", "deepspeed"}


# --- notices and help ----------------------------------------------------------------------------


def test_flags_of_old_scripts_are_noticed():
    args = parse(3, [*MODELS, "--num_padding_at_beginning", "0", "--deepspeed"])
    assert notices(args) == [
        "--deepspeed has no effect: the trainers are always DeepSpeed's",
        "--num_padding_at_beginning has no effect: the score is read at the last real token"]


def test_a_flag_of_the_config_file_is_noticed(tmp_path):
    args = parse(1, ["--config", recipe(tmp_path, "print_loss: true\n")])
    assert notices(args) == ["--print_loss has no effect: the console always shows the loss"]


def test_module_names_without_lora_are_noticed():
    args = parse(3, [*MODELS, "--actor_lora_module_name", "layers."])
    assert notices(args) == ["--actor_lora_module_name has no effect: --actor_lora_dim is 0"]


def test_allowing_changes_without_resuming_is_noticed():
    assert notices(parse(1, ["--allow_changed_args"])) == [
        "--allow_changed_args has no effect: nothing is resumed"]


def test_nothing_given_is_nothing_noticed():
    assert notices(parse(1, ["--seed", "1"])) == []


@pytest.mark.parametrize("step", [1, 2, 3])
def test_help_says_a_default_for_every_flag(step, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse(step, ["--help"])
    flags = capsys.readouterr().out.split("\n  --")[1:]
    assert caught.value.code == 0
    assert len(flags) > 40
    assert [flag for flag in flags if "(default" not in flag] == []


@pytest.mark.parametrize("flag", sorted(NO_EFFECT | UNAVAILABLE))
def test_help_says_what_has_no_effect_or_is_not_available(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse(3, ["--help"])
    text = capsys.readouterr().out.split(f"  --{flag} ")[1].split("  --")[0]
    assert ("has no effect: " if flag in NO_EFFECT else "not available in this version: ") in text


def test_arguments_import_no_torch():
    code = "import sys, alpaca_rlhf.utils.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--unpin_actor_parameters", "--enable_hybrid_engine"],
         "--unpin_actor_parameters has no effect: below ZeRO-3 nothing is gathered"),
        (["--unpin_actor_parameters", "--actor_zero_stage", "3"],
         "--unpin_actor_parameters has no effect: without --enable_hybrid_engine layers are "
         "gathered one by one anyway"),
        (["--enable_cuda_graph"],
         "--enable_cuda_graph has no effect: without --enable_hybrid_engine the model's forward "
         "pass decodes"),
        (["--enable_cuda_graph", "--enable_hybrid_engine", "--unpin_actor_parameters",
          "--actor_zero_stage", "3"],
         "--enable_cuda_graph has no effect: with --unpin_actor_parameters weights come and go"),
    ],
)
def test_a_flag_of_the_hybrid_engine_that_changes_nothing_is_noticed(flags, line):
    assert line in notices(parse(3, [*MODELS, *flags]))


def test_the_flags_of_the_hybrid_engine_go_together_without_a_notice():
    given = ["--enable_hybrid_engine", "--unpin_actor_parameters", "--actor_zero_stage", "3",
             "--hybrid_engine_backend", "native", "--repetition_penalty", "1.1"]
    args = parse(3, [*MODELS, *given])
    assert notices(args) == []
    assert args.sampling.repetition_penalty == 1.1


# --- trackers ------------------------------------------------------------------------------------


def test_trackers_are_named_by_either_flag_each_once():
    both = ["--tracker", "wandb", "tensorboard", "--enable_tensorboard"]
    for words, expected in ([], []), (["--enable_tensorboard"], ["tensorboard"]), (
            both, ["wandb", "tensorboard"]):
        assert parse(1, words).tracking.trackers == expected


def test_an_unknown_tracker_is_refused():
    assert refusal(1, "--tracker", "wandb", "tensorbord").startswith(
        "--tracker tensorbord: must be of tensorboard, wandb, ")


def test_the_trackers_are_all_of_accelerates():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    assert set(FILE_TRACKERS) == {
        name for name, made in LOGGER_TYPE_TO_CLASS.items() if made.requires_logging_directory}


def test_a_folder_for_logs_without_a_tracker_that_writes_there_is_noticed():
    line = "--logging_dir has no effect: no tracker that writes files is asked for"
    assert line in notices(parse(1, ["--tensorboard_path", "tb", "--tracker", "wandb"]))
    assert notices(parse(1, ["--tensorboard_path", "tb", "--enable_tensorboard"])) == []


# --- other programs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """The options of a program."""

    title: ClassVar[str] = "own"

    path: str = option("", "folder of a model", required=True)
    limit: int = option(0, "most prompts; 0: all")


@dataclass(frozen=True, kw_only=True)
class Program:
    """Groups of a program that is no step."""

    own: Own = group(limit=256)
    sampling: SamplingConfig = group(temperature=0.7, max_new_tokens=None)


def test_a_program_has_its_own_groups_and_defaults():
    args = arguments.parse(Program, ["--path", "p", "--top_k", "5"])
    assert (args.own.path, args.own.limit) == ("p", 256)
    assert (args.sampling.temperature, args.sampling.max_new_tokens) == (0.7, None)
    assert arguments.parse(Program, ["--path", "p", "--max_new_tokens", "9"]).sampling == (
        SamplingConfig(temperature=0.7, max_new_tokens=9))


def test_a_required_option_must_be_given():
    with pytest.raises(UserError, match="^--path is required: folder of a model$"):
        arguments.parse(Program, [])
