"""The command-line contract: what parses to what, and the one line that each mistake ends in."""

import gzip
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import yaml

from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.arguments import notices, to_config
from alpaca_rlhf.utils.configs import (
    FILE_TRACKERS,
    SamplingConfig,
    Step1Config,
    Step2Config,
    Step3Config,
    TrackerName,
    group,
    option,
)
from alpaca_rlhf.utils.errors import UserError

RECORDS = {1: Step1Config, 2: Step2Config, 3: Step3Config}
OPTIONS = {option.flag: option for step in RECORDS.values() for option in arguments.options(step)}
NO_EFFECT = {flag for flag, option in OPTIONS.items() if option.metadata["no_effect"]}
UNAVAILABLE = {flag for flag, option in OPTIONS.items() if option.metadata["unavailable"]}
MODELS = ["--actor_model_name_or_path", "out/actor", "--critic_model_name_or_path", "out/critic"]
NEEDED = {1: [], 2: [], 3: MODELS}

# The flags of DeepSpeed-Chat's and alpaca-rlhf's scripts, with values that are not the defaults.
LINES = {(1, 2, 3): """
--data_path Dahoas/rm-static local/jsonfile --data_split 6,2,2 --data_output_path cache
--tokenizer_name_or_path tok --chat_template alpaca_short --lang en zh_cn --overlong drop
--deepspeed --num_padding_at_beginning 1 --print_loss --add_eot_token --eot_token </s>
--compute_fp32_loss false --local_rank 0 --seed 7 --output_dir out --overwrite_output_dir
--gradient_accumulation_steps 2 --lr_scheduler_type linear --num_warmup_steps 100
--num_train_epochs 2 --max_steps 5 --max_skipped_steps 3 --preprocessing_num_workers 2
--dtype bf16 --trust_remote_code --attn_implementation eager --deepspeed_config DEEPSPEED_JSON
--max_tokens_per_micro_batch 4096
--enable_tensorboard --tensorboard_path tb
--tracker tensorboard mlflow --logging_dir tb
--save_steps 10 --save_total_limit 3 --output_dir out
--resume_from_checkpoint latest --allow_changed_args --output_dir out --collective_timeout 60
--resume_from_checkpoint out.partial/checkpoints/step-00000010
""", (1, 2): """
--disable_dropout
--model_name_or_path meta-llama/Llama-2-7b-hf --gradient_checkpointing --dropout 0.1
--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_seq_len 128
--learning_rate 9.65e-6 --weight_decay 0.1 --eval_interval 10 --eval_iters 3
--offload --zero_stage 2
--lora_dim 128 --lora_learning_rate 5e-4 --lora_alpha 16 --lora_dropout 0.1 --only_optimize_lora
--lora_dim 8 --lora_module_name layers.
""", (1,): """
--sft_only_data_path extra.json --train_on last --train_on_prompt
""", (3,): """
--per_device_generation_batch_size 32 --per_device_training_batch_size 64 --generation_batches 2
--ppo_epochs 2 --max_prompt_seq_len 64 --max_answer_seq_len 64
--actor_learning_rate 5e-4 --actor_lora_learning_rate 4e-4 --actor_lora_dim 8
--critic_learning_rate 5e-4 --critic_lora_learning_rate 4e-4 --critic_lora_dim 8
--actor_weight_decay 0.1 --actor_zero_stage 3 --actor_gradient_checkpointing --actor_dropout 0.1
--critic_weight_decay 0.1 --critic_zero_stage 3 --critic_gradient_checkpointing
--critic_dropout 0.1 --disable_actor_dropout
--offload --actor_zero_stage 2 --critic_zero_stage 2 --disable_critic_dropout
--actor_lora_dim 128 --actor_lora_module_name layers.
--critic_lora_dim 128 --critic_lora_module_name layers. --only_optimize_lora
--offload_reference_model --actor_zero_stage 3
--offload_reward_model --critic_zero_stage 3
--enable_hybrid_engine --enable_cuda_graph --release_inference_cache
--unpin_actor_parameters --tp_gather_partition_size 4
--inference_tp_size 2
--enable_ema --ema_decay 0.9
--enable_mixed_precision_lora
--align_overflow
--unsupervised_dataset_name wikitext --unsupervised_dataset_config_name v1 --unsup_coef 27.8
--print_answers --print_answers_interval 20 --log_samples_steps 5 --stop_on_alarm
--enable_test_mode --test_stop_step 3 --eval_prompts 0
--temperature 0.7 --top_p 0.9 --top_k 50 --repetition_penalty 1.1 --num_generations 4
--kl_coef 0.1 --kl_controller adaptive --kl_target 3 --kl_horizon 500
--gamma 0.9 --lam 1 --cliprange 0.1 --cliprange_value 0.1 --entropy_coef 0.01
--clip_reward_value 10 --missing_eos_penalty 0 --reward_normalization none
--rollout_engine vllm --vllm_url http://a:1,http://b:2 http://c:3 --vllm_timeout 5
--vllm_sync_dir weights --rollout_is_clip 2
--reward_function rewards.simple:length --whiten_advantages false --critic_warmup_steps 5
"""}
DEFAULTS = {1: {
    "data_path": [], "data_split": "2,4,4", "model_name_or_path": None, "seed": 1234,
    "local_rank": -1, "output_dir": None, "per_device_train_batch_size": 16, "max_seq_len": 512,
    "num_train_epochs": 1, "gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine",
    "dropout": 0.0, "zero_stage": 0, "dtype": "auto", "attn_implementation": "sdpa",
    "train_on": "all", "train_on_prompt": False, "max_skipped_steps": 10, "overlong": "truncate",
}, 3: {
    "per_device_generation_batch_size": 16, "per_device_training_batch_size": 16,
    "generation_batches": 1, "ppo_epochs": 1, "max_prompt_seq_len": 256, "max_answer_seq_len": 256,
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "kl_coef": 0.05, "kl_controller": "fixed",
    "kl_target": 6.0, "kl_horizon": 10000, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2,
    "cliprange_value": 0.2, "clip_reward_value": 5.0, "entropy_coef": 0.0,
    "missing_eos_penalty": 1.0, "reward_normalization": "checkpoint", "whiten_advantages": True,
    "critic_warmup_steps": 0, "enable_ema": False, "ema_decay": 0.992, "unsup_coef": 1.0,
}}


def parse(step: int, words: str | list[str] = "") -> Any:
    """The arguments of a step; those that it must have are added."""
    words = words.split() if isinstance(words, str) else words
    return arguments.parse(RECORDS[step], [*NEEDED[step], *words])


def given(args: Any) -> dict[str, Any]:
    """{flag: value} of all options."""
    return {option.flag: value for option, value in arguments.values(args)}


def refusal(step: int, words: str | list[str]) -> str:
    """The one line that these arguments end in."""
    with pytest.raises(UserError) as caught:
        parse(step, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what parses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "line"), [
    (step, line) for steps, block in LINES.items() for line in block.strip().splitlines()
    for step in steps])
def test_every_flag_of_the_contract_sets_its_option_or_is_not_available(step, line, tmp_path):
    ds_config = tmp_path / "ds.json"
    ds_config.write_text("{}")
    words = line.replace("DEEPSPEED_JSON", str(ds_config)).split()
    flags = {word[2:] for word in words if word.startswith("--")}
    if flags & UNAVAILABLE:
        assert ": not available in this version: " in refusal(step, words)
        return
    flags = {"logging_dir" if flag == "tensorboard_path" else flag for flag in flags}
    args, defaults = parse(step, words), given(parse(step))
    assert args.given - {"actor_model_name_or_path", "critic_model_name_or_path"} == flags
    changed = {flag for flag, value in given(args).items() if value != defaults[flag]}
    assert flags <= changed


@pytest.mark.parametrize("step", DEFAULTS)
def test_defaults(step):
    assert DEFAULTS[step].items() <= given(parse(step)).items()


@pytest.mark.parametrize(("flag", "alias", "value"), [
    ("per_device_generation_batch_size", "per_device_train_batch_size", 32),
    ("per_device_training_batch_size", "per_device_mini_train_batch_size", 4),
    ("generation_batches", "generation_batch_numbers", 3),
    ("max_answer_seq_len", "max_new_tokens", 64),
])
def test_a_flag_has_its_old_name_too_with_underscores_or_hyphens(flag, alias, value, tmp_path):
    path = recipe(tmp_path, f"{alias}: {value}\n")
    for words in (f"--{flag} {value}", f"--{alias.replace('_', '-')}={value}", f"--config {path}"):
        assert given(parse(3, words))[flag] == value


def test_actor_and_critic_have_options_of_their_own():
    args = parse(3, "--actor_lora_dim 8 --critic_dropout 0.1 --critic_zero_stage 3")
    assert (args.actor.model_name_or_path, args.critic.model_name_or_path) == (
        "out/actor", "out/critic")
    assert (args.actor.lora_dim, args.actor.dropout, args.actor.zero_stage) == (8, 0.0, 0)
    assert (args.critic.lora_dim, args.critic.dropout, args.critic.zero_stage) == (0, 0.1, 3)
    assert (args.actor.flag("dropout"), args.critic.flag("dropout")) == (
        "--actor_dropout", "--critic_dropout")


def test_the_process_s_command_line_is_read_and_no_file_beside_the_script(monkeypatch, tmp_path):
    (tmp_path / "main.args").write_text("--seed 99")
    for words, seed in (["--seed", "5"], 5), ([], 1234):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "main.py"), *words])
        assert arguments.parse(Step1Config).run.seed == seed


@pytest.mark.parametrize(("words", "value"), [
    ("--offload", True), ("--offload true", True), ("--offload=false", False), ("", False)])
def test_booleans_are_bare_or_valued(words, value):
    assert parse(1, f"--zero_stage 2 {words}").engine.offload is value


# --- learning rates and other dependent defaults -------------------------------------------------


@pytest.mark.parametrize(("step", "role", "words", "rates"), [
    (1, "model", "", (2e-5, None)),
    (2, "model", "", (1e-5, None)),
    (1, "model", "--lora_dim 8", (3e-4, 3e-4)),
    (2, "model", "--lora_dim 8", (1e-4, 1e-4)),
    (1, "model", "--learning_rate 1e-3", (1e-3, None)),
    (1, "model", "--lora_dim 8 --learning_rate 1e-3", (1e-3, 1e-3)),
    (1, "model", "--lora_dim 8 --lora_learning_rate 1e-3", (3e-4, 1e-3)),
    (2, "model", "--lora_dim 8 --learning_rate 0 --lora_learning_rate 1e-3", (0.0, 1e-3)),
    (3, "actor", "--critic_lora_dim 8 --critic_learning_rate 1", (9.65e-6, None)),
    (3, "critic", "--actor_lora_dim 8 --actor_learning_rate 1", (5e-6, None)),
    (3, "actor", "--actor_lora_dim 8", (9.65e-6, 1e-4)),
    (3, "critic", "--critic_lora_dim 8", (5e-6, 5e-5)),
    (3, "actor", "--actor_lora_dim 8 --actor_learning_rate 2e-4", (2e-4, 2e-4)),
    (3, "critic", "--critic_lora_dim 8 --critic_lora_learning_rate 2e-4", (5e-6, 2e-4)),
])
def test_learning_rates_of_a_role(step, role, words, rates):
    role = getattr(parse(step, words), role)
    assert (role.learning_rate, role.lora_learning_rate) == rates


@pytest.mark.parametrize(("step", "words", "value"), [
    (1, "", False), (1, "--lora_dim 8", True), (3, "--critic_lora_dim 8 --lora_alpha 4", True),
    (1, "--lora_dim 8 --only_optimize_lora false", False)])
def test_only_optimize_lora_is_on_with_lora_of_any_role(step, words, value):
    assert parse(step, words).lora.only_optimize_lora is value


# --- the line of each mistake --------------------------------------------------------------------


@pytest.mark.parametrize(("step", "words", "message"), [
    (1, "--learnin_rate 1e-4", "unknown flag --learnin_rate (did you mean "
        "--learning_rate?); see --help"),
    (1, "--learnin_rate=1e-4", "unknown flag --learnin_rate (did you mean "
        "--learning_rate?); see --help"),
    (1, "--xyzzy 3 --max_seq_le 4", "unknown flags --xyzzy, --max_seq_le (did you mean "
        "--max_seq_len?); see --help"),
    (1, "--max_seq 4", "unknown flag --max_seq (did you mean --max_seq_len?); see --help"),
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
    (2, "--max_seq_len -1", "--max_seq_len -1: must be 1 or more"),
    (2, "--learning_rate=-1e-5", "--learning_rate -1e-05: must be 0 or more"),
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
    (3, "--inference_tp_size 2", "--inference_tp_size 2: not available in this version: every rank "
        "generates with the whole model; remove the flag"),
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
    (2, "--disable_dropout --dropout 0.1", "--dropout 0.1: contradicts --disable_dropout; remove "
        "one of the two"),
    (3, "--hybrid_engine_backend deepspeed", "--hybrid_engine_backend deepspeed: DeepSpeed's own "
        "kernels leave LoRA adapters out and do not follow today's LLaMA; take native, or remove "
        "the flag"),
    (3, "--share_backbone --actor_lora_dim 8", "--share_backbone: needs --critic_lora_dim, the "
        "rank that the adapter of the earlier step has, and --only_optimize_lora"),
    (3, "--share_backbone --actor_lora_dim 8 --critic_lora_dim 8 --critic_zero_stage 3",
        "--critic_zero_stage 3: does not go with --share_backbone: the engines of actor and critic "
        "would each gather and release the shared weights; take 2"),
    (3, "--share_backbone --actor_lora_dim 8 --critic_lora_dim 8 --actor_lora_module_name q_proj",
        "--actor_lora_module_name q_proj: has no use with --share_backbone: the adapters of steps "
        "1 and 2 are taken; leave it out"),
    (3, "--unsupervised_dataset_config_name v1", "--unsupervised_dataset_config_name v1: needs "
        "--unsupervised_dataset_name; give it or remove the flag"),
    (2, "--train_on_prompt", "unknown flag --train_on_prompt; see --help"),
    (1, ["--output_dir", ""], "--output_dir '': is empty; give a value or remove the flag"),
    (1, ["--dtype", "a\nb"], "--dtype 'a b': must be one of auto, fp32, bf16, fp16"),
    (1, "--tracker wandb tensorbord", "--tracker tensorbord: must be one of tensorboard, wandb, "
        "mlflow, trackio, comet_ml, aim, clearml, dvclive, swanlab"),
])
def test_a_mistake_is_one_line(step, words, message):
    assert refusal(step, words) == message


@pytest.mark.parametrize(("words", "message"), [
    ("--critic_model_name_or_path c",
     "--actor_model_name_or_path is required: the folder step 1 wrote, or a hub id"),
    ("--actor_model_name_or_path a --reward_function r:f",
     "--critic_model_name_or_path is required: the folder step 2 wrote, or a hub id"),
])
def test_step_3_requires_both_models(words, message):
    with pytest.raises(UserError) as caught:
        arguments.parse(Step3Config, words.split())
    assert str(caught.value) == message


def test_a_deepspeed_config_that_is_not_json_is_refused(tmp_path):
    path = recipe(tmp_path, '{\n"a": }', "ds.json")
    assert refusal(1, f"--deepspeed_config {path}") == (
        f"--deepspeed_config {path}: line 2: not valid JSON: Expecting value")


@pytest.mark.parametrize("text", ["1,2", "1,2,x", "1,2,-3", "0,0,0", "1,2,inf", "1,2,3,4"])
def test_shares_that_are_not_three_numbers_are_refused(text):
    with pytest.raises(UserError, match="must be three numbers"):
        parse(1, ["--data_split", text])


# --- the config file -----------------------------------------------------------------------------


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("name", "text"), [
    ("recipe.yaml", "lora_dim: 8\nlearning_rate: 1e-3\ndata_path: [a, b]\ntrain_on_prompt: true\n"
                    "output_dir: null\n"),
    ("recipe.json", '{\n\t"lora_dim": 8, "learning_rate": 1e-3, "data_path": ["a", "b"],\n'
                    '"train_on_prompt": true, "output_dir": null}'),
])
def test_a_config_file_sets_flags(tmp_path, name, text):
    args = parse(1, f"--config {recipe(tmp_path, text, name)}")
    assert (args.model.lora_dim, args.model.learning_rate) == (8, 1e-3)
    assert (args.data.data_path, args.sft.train_on_prompt) == (["a", "b"], True)
    assert args.run.output_dir is None


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = recipe(tmp_path, "seed: 9\nzero_stage: 2\noffload: true\ndata_path: [a, b]\n")
    args = parse(1, f"--seed 3 --data_path c --config {path} --offload false")
    assert (args.run.seed, args.engine.offload, args.data.data_path) == (3, False, ["c"])
    assert args.model.zero_stage == 2


@pytest.mark.parametrize("text", ["# nothing\n", ""])
def test_an_empty_config_file_sets_nothing(tmp_path, text):
    path = recipe(tmp_path, text)
    assert given(parse(1, f"--config {path}")) == given(parse(1)) | {"config": path}


@pytest.mark.parametrize(("text", "message"), [
    ("learnin_rate: 1", "unknown key learnin_rate (did you mean learning_rate?); see --help"),
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
    assert refusal(1, f"--config {path}") == f"--config {path}: {message}"


def test_broken_json_names_its_line_and_a_missing_file_is_refused(tmp_path):
    path = recipe(tmp_path, '{"seed": 1,\n "max_seq_len"}', "recipe.json")
    assert refusal(1, f"--config {path}") == (
        f"--config {path}: line 2: not valid JSON: Expecting ':' delimiter")
    assert refusal(1, "--config no.yaml") == "--config no.yaml: no such file"


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
    args = parse(step, words)
    dump = yaml.safe_dump if suffix == "yaml" else json.dumps
    path = recipe(tmp_path, dump(to_config(args)), f"saved.{suffix}")
    again = arguments.parse(
        RECORDS[step], ["--config", path, "--local_rank", str(args.run.local_rank)])
    assert given(again) == given(args) | {"config": path}


def test_saved_arguments_hold_resolved_values_and_nothing_of_the_launch():
    config = to_config(parse(1, "--lora_dim 8 --local_rank 0"))
    assert (config["learning_rate"], config["only_optimize_lora"]) == (3e-4, True)
    assert not config.keys() & {"local_rank", "config", "deepspeed"}


# --- notices and help ----------------------------------------------------------------------------

HYBRID = "--enable_hybrid_engine --actor_zero_stage 3 --unpin_actor_parameters"


@pytest.mark.parametrize(("step", "words", "lines"), [
    (1, "--seed 1", []),
    (3, "--num_padding_at_beginning 0 --deepspeed",
     ["--deepspeed has no effect: the trainers are always DeepSpeed's",
      "--num_padding_at_beginning has no effect: the score is read at the last real token"]),
    (3, "--actor_lora_module_name layers.",
     ["--actor_lora_module_name has no effect: --actor_lora_dim is 0"]),
    (3, "--offload_reference_model --actor_zero_stage 3 --actor_lora_dim 8 --only_optimize_lora "
        "--offload_reward_model --critic_zero_stage 3",
     ["--offload_reference_model has no effect: with LoRA there is no second model"]),
    (3, "--offload_reference_model --critic_zero_stage 3 --offload_reward_model",
     ["--offload_reference_model has no effect: --actor_zero_stage is not 3"]),
    (1, "--allow_changed_args", ["--allow_changed_args has no effect: nothing is resumed"]),
    (1, "--tensorboard_path tb --tracker wandb",
     ["--logging_dir has no effect: no tracker that writes files is asked for"]),
    (1, "--tensorboard_path tb --enable_tensorboard", []),
    (3, f"{HYBRID} --hybrid_engine_backend native", []),
    (3, "--unpin_actor_parameters --enable_hybrid_engine",
     ["--unpin_actor_parameters has no effect: below ZeRO-3 nothing is gathered"]),
    (3, "--unpin_actor_parameters --actor_zero_stage 3",
     ["--unpin_actor_parameters has no effect: without --enable_hybrid_engine layers are "
      "gathered one by one anyway"]),
    (3, "--enable_cuda_graph",
     ["--enable_cuda_graph has no effect: without --enable_hybrid_engine the model's forward "
      "pass decodes"]),
    (3, f"--enable_cuda_graph {HYBRID}",
     ["--enable_cuda_graph has no effect: with --unpin_actor_parameters weights come and go"]),
    (3, "--rollout_engine vllm --vllm_url http://a:1 --enable_hybrid_engine --enable_cuda_graph",
     ["--enable_hybrid_engine has no effect: --rollout_engine is vllm",
      "--enable_cuda_graph has no effect: --rollout_engine is vllm"]),
    (3, "--vllm_timeout 3 --rollout_engine native",
     ["--vllm_timeout has no effect: --rollout_engine is native"]),
])
def test_flags_that_change_nothing_are_noticed(step, words, lines):
    assert notices(parse(step, words)) == lines


def test_a_flag_of_the_config_file_is_noticed(tmp_path):
    args = parse(1, f"--config {recipe(tmp_path, 'print_loss: true')}")
    assert notices(args) == ["--print_loss has no effect: the console always shows the loss"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_help_has_a_default_for_every_flag_and_says_which_change_nothing(
    step, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse(step, "--help")
    entries = capsys.readouterr().out.split("\n  --")[1:]
    texts = {entry.split()[0].rstrip(","): entry for entry in entries}
    assert caught.value.code == 0
    assert texts.keys() == {option.flag for option in arguments.options(RECORDS[step])}
    assert [flag for flag, text in texts.items() if "(default" not in text] == []
    for flags, words in ((NO_EFFECT, "has no effect: "),
                         (UNAVAILABLE, "not available in this version: ")):
        assert {flag for flag, text in texts.items() if words in text} == flags & texts.keys()


def test_arguments_import_no_torch():
    code = "import sys, alpaca_rlhf.utils.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- trackers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [
    ("", []), ("--enable_tensorboard", ["tensorboard"]),
    ("--tracker wandb tensorboard --enable_tensorboard", ["wandb", "tensorboard"])])
def test_trackers_are_named_by_either_flag_each_once(words, expected):
    assert parse(1, words).tracking.trackers == expected


def test_the_trackers_are_all_of_accelerates():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(get_args(TrackerName)) == set(LOGGER_TYPE_TO_CLASS)
    assert set(FILE_TRACKERS) == {
        name for name, made in LOGGER_TYPE_TO_CLASS.items() if made.requires_logging_directory}


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


# --- files and home folders ----------------------------------------------------------------------


@pytest.mark.parametrize("data", [
    "\ufeffmax_steps: 3\n".encode(), "max_steps: 3\n".encode("utf-16"),
    gzip.compress(b"max_steps: 3\n", mtime=0)])
@pytest.mark.parametrize("name", ["run.yaml", "RUN.YML", "run.yaml.gz"])
def test_a_config_file_is_read_in_any_encoding(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert arguments.parse(Step1Config, ["--config", str(tmp_path / name)]).schedule.max_steps == 3


def test_a_json_config_with_a_mark_and_a_suffix_in_capitals_is_read(tmp_path):
    (tmp_path / "RUN.JSON").write_text('{\n\t"max_steps": 3\n}', encoding="utf-8-sig")
    args = arguments.parse(Step1Config, ["--config", str(tmp_path / "RUN.JSON")])
    assert args.schedule.max_steps == 3


def test_a_pointer_in_place_of_a_config_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="--config .*: a pointer of git LFS, not the data itself"):
        arguments.parse(Step1Config, ["--config", str(path)])


def test_a_tilde_is_the_home_folder_in_flags_and_config_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "output_dir: ~/out\ndata_path: [~/a.jsonl, b.jsonl]\nmodel_name_or_path: ~/m\n")
    args = arguments.parse(Step1Config, ["--config=~/run.yaml", "--data_output_path=~/cache"])
    assert (args.run.output_dir, args.data.data_path, args.model.model_name_or_path) == (
        f"{tmp_path}/out", [f"{tmp_path}/a.jsonl", "b.jsonl"], f"{tmp_path}/m")
    assert args.data.data_output_path == f"{tmp_path}/cache"
