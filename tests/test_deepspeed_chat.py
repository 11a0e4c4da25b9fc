"""Flags of DeepSpeed-Chat's training scripts and of alpaca-rlhf's README go on working.

And docs/from_deepspeed_chat.md says of each what it is here.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES, save
from programs import BOOTSTRAP, REPOSITORY, TRAINING, environment

from alpaca_rlhf.training_model import launching
from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.arguments import notices
from alpaca_rlhf.utils.configs import Step1Config, Step2Config, Step3Config
from alpaca_rlhf.utils.errors import UserError

RECORDS = {1: Step1Config, 2: Step2Config, 3: Step3Config}
FOLDERS = {1: "step1_supervised_finetuning", 2: "step2_reward_model_finetuning",
           3: "step3_rlhf_finetuning"}
PAIRS = ("Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise "
         "yitingxie/rlhf-reward-datasets")
MORE = f"{PAIRS} openai/webgpt_comparisons stanfordnlp/SHP"
BOARD = "--enable_tensorboard --tensorboard_path OUT"
OPT_LORA = "--lora_dim 128 --lora_module_name decoder.layers."
LLAMA_LORA = "--lora_dim 128 --lora_module_name layers."
ACTOR_LORA = "--actor_lora_dim 128 --actor_lora_module_name decoder.layers."
BOTH_LORA = ("--actor_lora_dim 64 --critic_lora_dim 64 --critic_lora_module_name layers. "
             "--actor_lora_module_name layers.")


def supervised(model, data, batch, rate, decay, epochs, *more, accumulation=1):
    return (f"--data_path {data} --data_split 2,4,4 --model_name_or_path {model} "
            f"--per_device_train_batch_size {batch} --per_device_eval_batch_size {batch} "
            f"--max_seq_len 512 --learning_rate {rate} --weight_decay {decay} "
            f"--num_train_epochs {epochs} --gradient_accumulation_steps {accumulation} "
            f"--lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --deepspeed "
            f"--output_dir OUT {' '.join(more)}")


def reward(batch, *more, data=PAIRS, rate="5e-5", accumulation=1):
    return supervised("facebook/opt-350m", data, batch, rate, 0.1, 1,
                      "--num_padding_at_beginning 1", *more, accumulation=accumulation)


def ppo(batch, rate, stage, *more, accumulation=1, old=False):
    names = ("per_device_train_batch_size", "per_device_mini_train_batch_size",
             "generation_batch_numbers") if old else (
        "per_device_generation_batch_size", "per_device_training_batch_size", "generation_batches")
    return (f"--data_path Dahoas/rm-static --data_split 2,4,4 --actor_model_name_or_path ACTOR "
            f"--critic_model_name_or_path CRITIC --num_padding_at_beginning 1 --{names[0]} {batch} "
            f"--{names[1]} {batch} --{names[2]} 1 --ppo_epochs 1 --max_answer_seq_len 256 "
            f"--max_prompt_seq_len 256 --actor_learning_rate {rate} --critic_learning_rate 5e-6 "
            f"--num_train_epochs 1 --lr_scheduler_type cosine "
            f"--gradient_accumulation_steps {accumulation} --num_warmup_steps 100 --deepspeed "
            f"--seed 1234 --actor_zero_stage {stage} --critic_zero_stage {stage} --output_dir OUT "
            f"{' '.join(more)}")


HYBRID, DECAYS = "--enable_hybrid_engine", "--actor_weight_decay 0.1 --critic_weight_decay 0.1"
CHECKPOINTING = "--actor_gradient_checkpointing --critic_gradient_checkpointing"
ONE_GPU = ("--actor_model_name_or_path ACTOR --critic_model_name_or_path CRITIC --actor_zero_stage "
           "0 --critic_zero_stage 0 --num_padding_at_beginning 1 --gradient_accumulation_steps 2 "
           "--deepspeed --actor_lora_dim 128 --enable_hybrid_engine --actor_gradient_checkpointing "
           "--output_dir OUT")
LISTS = {
    # DeepSpeed-Chat, step 1
    "1 opt single_gpu 1.3b": "--model_name_or_path facebook/opt-1.3b --gradient_accumulation_steps "
    f"8 --lora_dim 128 --zero_stage 0 {BOARD} --deepspeed --output_dir OUT",
    "1 opt single_gpu 6.7b_lora": supervised(
        "facebook/opt-6.7b", PAIRS, 8, "1e-3", "0.", 16, "--gradient_checkpointing --zero_stage 0",
        OPT_LORA, accumulation=16),
    "1 opt single_node 1.3b": supervised(
        "facebook/opt-1.3b", PAIRS, 8, "9.65e-6", "0.", 16, "--zero_stage 2", BOARD),
    "1 opt single_node 1.3b_lora": supervised(
        "facebook/opt-1.3b", PAIRS, 8, "1e-3", 0.1, 16, "--zero_stage 0 --only_optimize_lora",
        OPT_LORA),
    "1 opt single_node 6.7b": supervised(
        "facebook/opt-6.7b", PAIRS, 6, "9.65e-6", "0.", 16,
        "--gradient_checkpointing --zero_stage 3"),
    "1 opt single_node 13b": supervised(
        "facebook/opt-13b", MORE, 4, "1e-4", 0.1, 2, "--gradient_checkpointing --zero_stage 3",
        OPT_LORA),
    "1 opt single_node 30b_lora": supervised(
        "facebook/opt-30b", PAIRS, 4, "9.65e-6", "0.", 16,
        "--lora_dim 128 --gradient_checkpointing --zero_stage 3"),
    "1 opt multi_node 66b": supervised(
        "facebook/opt-66b", MORE, 4, "1e-4", 0.1, 2, "--gradient_checkpointing --zero_stage 3",
        OPT_LORA),
    **{f"1 opt sweep stage {stage} {offload} lora": supervised(
        "facebook/opt-1.3b", PAIRS, 8, "1e-3", 0.1, 16, f"--zero_stage {stage}", offload, OPT_LORA,
        "--only_optimize_lora") for stage in (2, 3) for offload in ("", "--offload")},
    **{f"1 opt sweep stage {stage} {offload}": supervised(
        "facebook/opt-1.3b", PAIRS, 8, "9.65e-6", "0.", 16, f"--zero_stage {stage}", offload,
        "--lora_dim 0") for stage in (2, 3) for offload in ("", "--offload")},
    "1 llama2 7b": supervised("meta-llama/Llama-2-7b-hf", PAIRS, 4, "9.65e-6", "0.", 4,
                              "--gradient_checkpointing --zero_stage 3"),
    "1 llama2 7b_lora": supervised("meta-llama/Llama-2-7b-hf", PAIRS, 4, "9.65e-6", "0.", 4,
                                   "--gradient_checkpointing --zero_stage 3", LLAMA_LORA),
    "1 other_language chinese": supervised(
        "bigscience/bloom-1b1", "wangrui6/Zhihu-KOL Cohere/miracl-zh-queries-22-12 "
        "Hello-SimpleAI/HC3-Chinese mkqa-Chinese", 8, "9.65e-6", "0.", 16, "--zero_stage 2",
        "--data_split 10,0,0"),
    "1 other_language japanese": "--data_path mkqa-Japanese Cohere/miracl-ja-queries-22-12 "
    "lmqg/qg_jaquad lmqg/qag_jaquad --data_split 10,0,0 --model_name_or_path sberbank-ai/mGPT "
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --learning_rate 9.65e-6 "
    "--num_train_epochs 16 --deepspeed_config DS_CONFIG --deepspeed --seed 1234 "
    "--num_warmup_steps 0 --lr_scheduler_type cosine --output_dir OUT",
    # step 2
    "2 opt single_gpu 350m": "--model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 "
    "--weight_decay 0.1 --disable_dropout --gradient_accumulation_steps 4 --zero_stage 0 "
    f"{BOARD} --deepspeed --output_dir OUT",
    "2 opt single_gpu 350m_lora": reward(8, "--zero_stage 0", OPT_LORA, data=MORE, rate="1e-4",
                                         accumulation=4),
    "2 opt single_node 350m": reward(8, "--zero_stage 0", data=MORE),
    "2 opt single_node 350m, dropout": reward(4, "--dropout 0.0 --zero_stage 0", BOARD),
    "2 opt multi_node 350m": reward(2, "--disable_dropout --zero_stage 0"),
    **{f"2 opt sweep stage {stage} {offload}": reward(
        4, f"--disable_dropout --zero_stage {stage}", offload)
        for stage in (2, 3) for offload in ("", "--offload")},
    **{f"2 llama2 7b {lora}": supervised(
        "meta-llama/Llama-2-7b-hf", "Dahoas/rm-static", 8, "9.65e-6", 0.1, 1,
        "--num_padding_at_beginning 0 --gradient_checkpointing --zero_stage 3 --offload", lora)
        for lora in ("", LLAMA_LORA)},
    # step 3
    "3 opt single_gpu 1.3b": f"{ONE_GPU} --actor_dropout 0.0",
    "3 opt single_gpu 1.3b, old": f"{ONE_GPU} --disable_actor_dropout",
    "3 opt single_gpu 6.7b_lora": ppo(
        8, "5e-4", 0, "--actor_lora_dim 128 --disable_actor_dropout", CHECKPOINTING, HYBRID,
        accumulation=16),
    "3 opt single_gpu 6.7b_lora, old": ppo(
        8, "5e-4", 0, "--actor_lora_dim 128 --disable_actor_dropout --disable_critic_dropout",
        CHECKPOINTING, HYBRID, accumulation=16, old=True),
    "3 opt single_node 1.3b": ppo(4, "9.65e-6", 2, "--actor_dropout 0.0 --enable_ema", HYBRID,
                                  BOARD),
    "3 opt single_node 1.3b_lora": ppo(4, "9.65e-6", 2, "--disable_actor_dropout", ACTOR_LORA,
                                       HYBRID),
    "3 opt single_node 1.3b_lora, old": ppo(
        4, "5e-4", 2, "--disable_actor_dropout --disable_critic_dropout", ACTOR_LORA, HYBRID,
        old=True),
    "3 opt single_node 6.7b": ppo(
        4, "9.65e-6", 3, DECAYS, "--actor_gradient_checkpointing --actor_dropout 0.0", HYBRID),
    "3 opt single_node 30b_lora": ppo(
        4, "5e-4", 3, "--actor_gradient_checkpointing --disable_actor_dropout", ACTOR_LORA, HYBRID),
    **{f"3 opt sweep stage {stage} {' '.join(more)}": ppo(
        4, "9.65e-6", stage, "--actor_weight_decay 0 --critic_weight_decay 0 --actor_dropout 0.0 "
        "--print_answers --enable_test_mode --test_stop_step 5", *more)
        for stage in (2, 3) for hybrid in ("", HYBRID) for offload in ("", "--offload")
        for more in ((hybrid, offload, "--actor_lora_dim 0"), (hybrid, offload, ACTOR_LORA))},
    **{f"3 opt sweep mixed precision {hybrid}": ppo(
        4, "9.65e-6", 3, "--actor_weight_decay 0 --critic_weight_decay 0 --disable_actor_dropout "
        "--print_answers --enable_mixed_precision_lora", hybrid, ACTOR_LORA, old=True)
        for hybrid in ("", HYBRID)},
    "3 opt sweep, reference on the host": ppo(
        4, "9.65e-6", 3, "--offload --offload_reference_model --print_answers", CHECKPOINTING,
        HYBRID, "--unpin_actor_parameters --actor_lora_dim 0", old=True),
    "3 llama2 7b": ppo(1, "9.65e-6", 3, DECAYS, CHECKPOINTING, HYBRID,
                       "--offload_reference_model --disable_actor_dropout"),
    "3 llama2 7b_lora": ppo(1, "9.65e-6", 3, DECAYS, CHECKPOINTING, HYBRID, BOTH_LORA,
                            "--offload_reference_model --actor_dropout 0.0"),
    "3 llama2 7b_mixz": ppo(1, "9.65e-6", 3, DECAYS, CHECKPOINTING, BOTH_LORA,
                            "--offload_reference_model --actor_dropout 0.0 "
                            "--enable_mixed_precision_lora"),
    # alpaca-rlhf
    "1 alpaca-rlhf": "--sft_only_data_path MultiTurnAlpaca --data_output_path OUT/tmp/ "
    "--model_name_or_path decapoda-research/llama-7b-hf --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 2 --max_seq_len 512 --learning_rate 3e-4 "
    "--gradient_accumulation_steps 32 --num_warmup_steps 100 --output_dir OUT/actor --lora_dim 8 "
    "--lora_module_name q_proj,k_proj --only_optimize_lora --deepspeed --zero_stage 0",
    "2 alpaca-rlhf": "--data_output_path OUT/tmp/ --model_name_or_path "
    "decapoda-research/llama-7b-hf --num_padding_at_beginning 0 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 2 --gradient_accumulation_steps 32 --num_warmup_steps 100 "
    "--zero_stage 0 --deepspeed --output_dir OUT/critic --lora_dim 8 --lora_module_name "
    "q_proj,k_proj --only_optimize_lora",
    **{f"3 alpaca-rlhf {more}": "--data_output_path OUT/tmp/ --actor_model_name_or_path OUT/actor/ "
       "--critic_model_name_or_path OUT/critic --actor_zero_stage 2 --critic_zero_stage 2 "
       "--num_padding_at_beginning 0 --per_device_train_batch_size 4 "
       "--per_device_mini_train_batch_size 4 --gradient_accumulation_steps 16 --deepspeed "
       f"--actor_lora_dim 4 --actor_lora_module_name q_proj --critic_lora_dim 4 "
       f"--critic_lora_module_name q_proj,k_proj --only_optimize_lora --output_dir OUT/final {more}"
       for more in ("--enable_hybrid_engine",
                    "--tokenizer_name_or_path decapoda-research/llama-7b-hf")},
}
# Every flag of their programs, those that no script gives included.
_ALL = """data_path data_split data_output_path num_train_epochs gradient_accumulation_steps
lr_scheduler_type num_warmup_steps output_dir seed local_rank offload dtype only_optimize_lora
compute_fp32_loss enable_tensorboard tensorboard_path add_eot_token deepspeed deepspeed_config
tokenizer_name_or_path"""
_SUPERVISED = f"""{_ALL} model_name_or_path per_device_train_batch_size per_device_eval_batch_size
max_seq_len learning_rate weight_decay gradient_checkpointing dropout disable_dropout zero_stage
lora_dim lora_module_name lora_learning_rate"""
_ROLE = """model_name_or_path learning_rate weight_decay zero_stage gradient_checkpointing dropout
lora_dim lora_module_name lora_learning_rate"""
THEIRS = {step: set(flags.split()) for step, flags in {
    1: f"{_SUPERVISED} sft_only_data_path eot_token print_loss",
    2: f"{_SUPERVISED} num_padding_at_beginning eval_interval eval_iters",
    3: f"""{_ALL} {' '.join(f"{role}_{flag}" for role in ("actor", "critic")
                            for flag in _ROLE.split())}
    disable_actor_dropout disable_critic_dropout num_padding_at_beginning
    per_device_generation_batch_size per_device_training_batch_size generation_batches
    per_device_train_batch_size per_device_mini_train_batch_size generation_batch_numbers
    ppo_epochs max_prompt_seq_len max_answer_seq_len preprocessing_num_workers
    unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef
    enable_hybrid_engine unpin_actor_parameters release_inference_cache inference_tp_size
    tp_gather_partition_size offload_reference_model enable_ema enable_mixed_precision_lora
    align_overflow print_answers print_answers_interval enable_test_mode test_stop_step""",
}.items()}
LAUNCHER = ["", "--num_gpus 1", "--num_gpus=1", "--num_nodes=1", "--master_port 12346",
            "--num_nodes=1 --num_gpus=16"]


@pytest.fixture
def words(tmp_path):
    """Makes the words of a list, with a DeepSpeed configuration that is there."""
    (tmp_path / "ds.json").write_text("{}")
    return lambda text: text.replace("DS_CONFIG", str(tmp_path / "ds.json")).split()


@pytest.mark.parametrize("name", list(LISTS))
def test_every_list_parses_and_no_flag_is_lost(name, words):
    given = words(LISTS[name])
    args = arguments.parse(RECORDS[int(name[0])], given)
    assert len(args.given) == len({word for word in given if word.startswith("--")})
    assert all("has no effect" in line for line in notices(args))


@pytest.mark.parametrize(("batch", "old", "size"), [
    (16, False, "--inference_tp_size 2"),
    (4, True, f"--inference_tp_size 8 --tp_gather_partition_size 4 {DECAYS}"),
], ids=["13b", "66b"])
def test_tensor_parallel_generation_is_refused_in_one_line(batch, old, size):
    text = ppo(batch, "5e-4", 3, "--actor_gradient_checkpointing --disable_actor_dropout", HYBRID,
               ACTOR_LORA, size, old=old)
    with pytest.raises(UserError) as refused:
        arguments.parse(Step3Config, text.split())
    assert str(refused.value) == (
        f"{' '.join(size.split()[:2])}: not available in this version: every rank generates with "
        "the whole model; remove the flag")


@pytest.mark.parametrize("flags", LAUNCHER)
def test_the_launchers_flags_parse(flags):
    options = launching.runner_for_hosts().parse_args([*flags.split(), "main.py", "--deepspeed"])
    assert (options.user_script, options.user_args) == ("main.py", ["--deepspeed"])


def test_a_flag_that_only_saves_memory_says_that_it_has_no_effect():
    args = arguments.parse(Step3Config, LISTS["3 llama2 7b_mixz"].split())
    assert notices(args)[1:] == [
        "--num_padding_at_beginning has no effect: the score is read at the last real token",
        "--enable_mixed_precision_lora has no effect: --load_in_4bit and --load_in_8bit quantize "
        "frozen weights",
        "--offload_reference_model has no effect: with LoRA there is no second model"]


# --- the page ------------------------------------------------------------------------------------

PAGE = (REPOSITORY / "docs" / "from_deepspeed_chat.md").read_text()
SECTIONS = {"All steps": (1, 2, 3), "Steps 1 and 2": (1, 2), "Step 3": (3,)}


def mapped() -> dict[int, dict[str, str]]:
    """Return the status of each flag in the page's tables, by step."""
    found: dict[int, dict[str, str]] = {step: {} for step in RECORDS}
    for title, steps in SECTIONS.items():
        section = PAGE.partition(f"\n### {title}\n")[2].partition("\n#")[0]
        for names, status in re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|", section, re.MULTILINE):
            for name in re.findall(r"--(\w+)", names):
                for step in steps:
                    assert name not in found[step], name
                    found[step][name] = status
    return found


def declared(step: int) -> dict[str, str]:
    """The same of each flag and each other name that the program has."""
    found = {}
    for option in arguments.options(RECORDS[step]):
        status = ("no effect" if option.metadata["no_effect"] else
                  "refused" if option.metadata["unavailable"] else "same")
        found |= {option.flag: status, **dict.fromkeys(option.metadata["aliases"], "renamed")}
    return found


@pytest.mark.parametrize("step", RECORDS)
def test_the_page_says_of_each_of_their_flags_what_the_program_does(step):
    said, ours = mapped()[step], declared(step)
    given = {flag for name, text in LISTS.items() if int(name[0]) == step
             for flag in re.findall(r"--(\w+)", text)}
    assert said.keys() >= THEIRS[step] | given
    only_step_1 = {"sft_only_data_path"} if step == 2 else set()
    assert {flag: ours[flag] for flag in said.keys() - only_step_1} == {
        flag: status for flag, status in said.items() if flag not in only_step_1}


def test_the_page_has_every_flag_that_is_there_for_old_scripts():
    for step in RECORDS:
        old = {flag for flag, status in declared(step).items() if status != "same"}
        assert old <= set(re.findall(r"--(\w+)", PAGE))


def test_every_flag_of_the_page_is_one_of_a_step_s_or_the_launcher_s():
    known = {flag for step in RECORDS for flag in declared(step)}
    pipeline = {"config-dir", "output-dir"}
    launchers = set(re.findall(r"--(\w+)", " ".join(LAUNCHER)))
    assert set(re.findall(r"--(\w[\w-]*)", PAGE)) <= known | launchers | pipeline


def test_every_link_of_the_page_leads_to_a_file():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (REPOSITORY / "docs" / link).exists()


# --- one list of each step, run ------------------------------------------------------------------

SMALLER = {"--max_seq_len": 96, "--max_prompt_seq_len": 64, "--max_answer_seq_len": 6,
           "--num_train_epochs": 1, "--num_warmup_steps": 1}


def run(name: str, launcher: str, folder: Path, **places: Path | str) -> str:
    """Run a list through the launcher as the scripts do, with a log in the output folder."""
    text = LISTS[name]
    for place, path in places.items():
        text = text.replace(place, str(path))
    given = [word for word in text.split() if word not in ("--data_split", "2,4,4")]
    for flag, value in SMALLER.items():
        if flag in given:
            given[given.index(flag) + 1] = str(value)
    first = given.index("--data_path") + 1
    last = next(i for i in range(first, len(given)) if given[i].startswith("--"))
    given[first:last] = [str(folder / "pairs.jsonl")]
    output = Path(places["OUT"])
    output.mkdir()
    with (output / "training.log").open("w") as log:
        code = subprocess.run(
            [sys.executable, str(BOOTSTRAP), *launcher.split(),
             str(TRAINING / FOLDERS[int(name[0])] / "main.py"), *given, "--data_split", "1,1,1",
             "--data_output_path", str(folder / "cache"), "--max_steps", "2"],
            stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=folder).returncode
    said = (output / "training.log").read_text()
    assert code == 0, said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_one_list_of_each_step_runs_with_opt_and_a_critic_shaped_as_the_350m(tmp_path):
    large = save(FAMILIES["opt"], tmp_path / "opt-1.3b")
    small = save(FAMILIES["opt350m"], tmp_path / "opt-350m")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({
        "prompt": f"\n\nHuman: What is {i}?\n\nAssistant:", "chosen": f" It is {i}.",
        "rejected": " No."}) + "\n" for i in range(60)))
    actor, critic, final = tmp_path / "actor", tmp_path / "critic", tmp_path / "final"
    run("1 opt single_node 1.3b", "", tmp_path, OUT=actor, **{"facebook/opt-1.3b": large})
    run("2 opt multi_node 350m", "--num_gpus 1", tmp_path, OUT=critic,
        **{"facebook/opt-350m": small})
    said = run("3 opt single_node 1.3b", "--master_port 12346", tmp_path, OUT=final, ACTOR=actor,
               CRITIC=critic)
    assert "--deepspeed has no effect" in said
    config = json.loads((critic / "config.json").read_text())
    assert (config["do_layer_norm_before"], config["word_embed_proj_dim"]) == (False, 16)
    for folder in (actor, critic, final):
        assert (folder / "training.log").read_text()
    for name in ("actor", "critic", "actor_ema"):
        assert (final / name / "model.safetensors").exists()
    assert list(final.rglob("events.out.tfevents*"))
