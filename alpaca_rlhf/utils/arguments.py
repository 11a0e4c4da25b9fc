"""Every flag of every step, declared once: name, type, default, help.

Flags are fields of small frozen groups; a step's record is made of the groups it uses, so that
`--seed` is one declaration in all three steps. `parse_step1()` (and 2, 3) reads the command line,
and below it the file of `--config`, and returns a record in which everything has been checked and
every default that depends on another flag (the learning rates) is a real value. A mistake ends in
one `UserError` of one line: flag, value, remedy. Imports no torch, so `--help` is quick.

    args = parse_step1(["--lora_dim", "8", "--output_dir", "actor"])
    args.model.learning_rate                     # 0.0003: the default with LoRA
    yaml.safe_dump(to_config(args), file)        # --config file gives equal arguments
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import shlex
import sys
from argparse import Action, ArgumentError, ArgumentTypeError, HelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    get_args,
    get_type_hints,
)

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from alpaca_rlhf.utils.configs import CheckpointConfig, RunConfig
from alpaca_rlhf.utils.errors import UserError

# Flags that are known but not yet served: anything but their default is refused, with the reason.
UNAVAILABLE: dict[str, str] = {
    "max_tokens_per_micro_batch": "micro-batches are counted in rows, of like lengths",
    "inference_tp_size": "every rank generates with the whole model",
    "enable_mixed_precision_lora": "frozen weights are not quantised",
    "align_overflow": "an fp16 overflow skips the step of its own model only",
    "offload_reference_model": "the reference stays on the device",
    "offload_reward_model": "the reward model stays on the device",
}

# What `--tracker` knows: accelerate's trackers, each the name of its package too. Those that write
# files need a folder.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive",
            "swanlab")
TRACKERS_OF_FILES = ("tensorboard", "aim")

# Flags kept for old scripts: accepted, said once at the start, otherwise ignored.
NO_EFFECT: dict[str, str] = {
    "deepspeed": "the trainers are always DeepSpeed's",
    "num_padding_at_beginning": "the score is read at the last real token",
    "compute_fp32_loss": "losses are always computed in fp32",
    "print_loss": "the console always shows the loss",
    "add_eot_token": "every reply ends with the tokenizer's eos id",
    "eot_token": "every reply ends with the tokenizer's eos id",
    "tp_gather_partition_size": "every rank generates with the whole model",
    "disable_actor_dropout": "dropout is 0 unless --actor_dropout is given",
    "disable_critic_dropout": "dropout is 0 unless --critic_dropout is given",
}


class Bound(NamedTuple):
    """What a number must satisfy, and how to say so; stands in a field's `Annotated` type."""

    holds: Callable[[float], bool]
    text: str


Count = Annotated[int, Bound(lambda n: n >= 1, "must be 1 or more")]
Whole = Annotated[int, Bound(lambda n: n >= 0, "must be 0 or more")]
Positive = Annotated[float, Bound(lambda x: x > 0, "must be above 0")]
NonNegative = Annotated[float, Bound(lambda x: x >= 0, "must be 0 or more")]
UnitInterval = Annotated[float, Bound(lambda x: 0 <= x <= 1, "must be from 0 to 1")]
Share = Annotated[float, Bound(lambda x: 0 < x <= 1, "must be above 0 and at most 1")]
Decay = Annotated[float, Bound(lambda x: 0 < x < 1, "must be above 0 and below 1")]
Dropout = Annotated[float, Bound(lambda x: 0 <= x < 1, "must be 0 or more and below 1")]
ZeroStage = Literal[0, 1, 2, 3]
ChatTemplate = Literal[
    "human_assistant", "alpaca", "alpaca_short", "vicuna", "llama2", "chatml", "tokenizer"]

_MODULES = ("comma list of module names or parts of them "
            "(default: the family's attention and MLP projections)")


def _option(default: Any, text: str, *aliases: str) -> Any:
    """A flag; `Any`, so that a field may be typed as what it holds once resolved.

    A help text says itself, in brackets, what a default of None means, unless it means "none".
    """
    spellings = [f"--{form}" for name in aliases for form in (name, name.replace("_", "-"))]
    metadata = {"help": text, "aliases": spellings}
    if default == []:
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


def _unavailable(flag: str, default: Any) -> Any:
    return _option(default, f"not available in this version: {UNAVAILABLE[flag]}")


def _no_effect(flag: str, default: Any) -> Any:
    return _option(default, f"for old scripts; has no effect: {NO_EFFECT[flag]}")


# --- groups of all steps -------------------------------------------------------------------------


@dataclass(frozen=True)
class DataArguments:
    """Which texts a run reads and what a turn looks like to the model."""
    _argument_group_name = "data"

    data_path: list[str] = _option(
        [], "data sets, each a hub name, a folder or a .json/.jsonl/.parquet file, also .gz; "
        "NAME=PATH names its form, PATH:0.3 takes that share of it; local/jsonfile reads "
        "data/train.json and data/eval.json (default: the embedded data set)")
    data_split: str = _option("2,4,4", "disjoint shares of the three steps, fixed by the seed")
    data_output_path: str | None = _option(
        None, "folder for preprocessed data (default: a folder under the user's cache home)")
    chat_template: ChatTemplate | None = _option(
        None, "what a turn looks like; tokenizer: as the template of the tokenizer has it "
        "(default: as an earlier step saved it with the model, else human_assistant)")
    lang: list[str] = _option(
        [], "languages, such as en zh: leaves out what is stated to be in another")
    overlong: Literal["truncate", "drop", "error"] = _option(
        "truncate", "what becomes of a sample that is too long")
    preprocessing_num_workers: Count | None = _option(
        None, "processes for preprocessing (default: one for each core, up to eight)")


@dataclass(frozen=True)
class LoadingArguments:
    """How a model and its tokenizer are loaded."""
    _argument_group_name = "loading"

    tokenizer_name_or_path: str | None = _option(
        None, "hub id or folder (default: the model's own; in step 3 the actor's)")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = _option(
        "auto", "auto is bf16 where the device has it, fp32 on a CPU")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = _option(
        "sdpa", "the attention kernel")
    trust_remote_code: bool = _option(False, "run code that comes with a hub model")


@dataclass(frozen=True)
class LoraArguments:
    """What all adapters of a run share; the rank belongs to the model."""
    _argument_group_name = "LoRA"

    lora_alpha: Positive | None = _option(None, "scale of the adapters (default: 2 x rank)")
    lora_dropout: Dropout = _option(0.0, "dropout before the adapters")
    only_optimize_lora: bool = _option(
        None, "freeze all but adapters and heads (default: on with LoRA, else off)")


@dataclass(frozen=True)
class OptimizationArguments:
    """The optimizer's schedule, and where its state lives."""
    _argument_group_name = "optimization"

    num_train_epochs: Count = _option(1, "passes over the data")
    max_steps: Count | None = _option(None, "stop after so many optimizer steps")
    gradient_accumulation_steps: Count = _option(1, "micro-batches in one optimizer step")
    max_tokens_per_micro_batch: Count | None = _unavailable("max_tokens_per_micro_batch", None)
    max_skipped_steps: Count = _option(10, "steps in a row, not finite, that stop the run")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup"] = _option("cosine", "shape of the learning rate's schedule")
    num_warmup_steps: Whole = _option(0, "optimizer steps from 0 to the full learning rate")
    offload: bool = _option(False, "optimizer and parameters to host memory; needs ZeRO >= 1")
    deepspeed_config: str | None = _option(
        None, "a JSON file merged over the generated DeepSpeed config")


@dataclass(frozen=True)
class RunArguments:
    """Where a run's results go, and what makes it repeatable."""
    _argument_group_name = "run"

    config: str | None = _option(
        None, "a YAML or JSON file of these flags; the command line wins over it")
    output_dir: str | None = _option(
        None, "folder of the trained model (default: none, nothing is saved)")
    overwrite_output_dir: bool = _option(False, "allow an --output_dir that holds another run")
    seed: int = _option(1234, "seed of data order, initial weights and sampling")
    local_rank: int = _option(-1, "set by the launcher; -1 is a single process")
    save_steps: Whole = _option(
        0, "optimizer steps between checkpoints, in --output_dir; 0: at the end of an epoch and on "
        "SIGTERM and SIGINT only, which save in any case")
    save_total_limit: Count = _option(2, "checkpoints kept, the last ones")
    resume_from_checkpoint: str | None = _option(
        None, "latest: go on from the last whole checkpoint of --output_dir, or start if there is "
        "none; or the folder of a checkpoint")
    allow_changed_args: bool = _option(
        False, "resume although arguments that change the result are not what they were")
    collective_timeout: Count = _option(
        1800, "seconds after which a rank that waits for the others ends the run")
    tracker: list[str] = _option(
        [], f"where metrics go too, one or more of: {', '.join(TRACKERS)}")
    enable_tensorboard: bool = _option(False, "the same as --tracker tensorboard")
    logging_dir: str | None = _option(
        None, f"folder for the files of {' and '.join(TRACKERS_OF_FILES)} (default: logs, in "
        "--output_dir if there is one)", "tensorboard_path")


@dataclass(frozen=True)
class CompatibilityArguments:
    """Flags of old scripts, in all steps."""
    _argument_group_name = "flags of old scripts"

    deepspeed: bool = _no_effect("deepspeed", False)
    num_padding_at_beginning: int = _no_effect("num_padding_at_beginning", 0)
    compute_fp32_loss: bool = _no_effect("compute_fp32_loss", True)
    print_loss: bool = _no_effect("print_loss", False)
    add_eot_token: bool = _no_effect("add_eot_token", False)
    eot_token: str | None = _no_effect("eot_token", None)


# --- groups of steps 1 and 2 ---------------------------------------------------------------------


@dataclass(frozen=True)
class ModelArguments:
    """The one model of step 1 or 2, and how it is trained."""
    _argument_group_name = "model"

    model_name_or_path: str | None = _option(
        None, "hub id or folder (default: the embedded tiny LLaMA)")
    learning_rate: NonNegative = _option(
        None, "of the adapters too, if --lora_learning_rate is not given (default: step 1: 2e-5, "
        "with LoRA 3e-4; step 2: 1e-5, with LoRA 1e-4)")
    weight_decay: NonNegative = _option(0.0, "AdamW's decay of weight matrices")
    zero_stage: ZeroStage = _option(0, "ZeRO stage")
    gradient_checkpointing: bool = _option(False, "recompute activations to save memory")
    dropout: Dropout = _option(0.0, "dropout of the model")
    lora_dim: Whole = _option(0, "rank of the adapters; 0 is no LoRA")
    lora_module_name: str | None = _option(None, _MODULES)
    lora_learning_rate: NonNegative | None = _option(
        None, "of the adapters (default: --learning_rate if given; else 3e-4, in step 2 1e-4)")


@dataclass(frozen=True)
class BatchArguments:
    """Batches of steps 1 and 2, and how often the model is evaluated."""
    _argument_group_name = "batches"

    per_device_train_batch_size: Count = _option(16, "rows a rank trains on at once")
    per_device_eval_batch_size: Count = _option(16, "rows a rank evaluates at once")
    max_seq_len: Count = _option(512, "longest row, in tokens")
    eval_interval: Whole = _option(0, "steps between evaluations; 0: before and after only")
    eval_iters: Count | None = _option(None, "batches of one evaluation (default: all)")


@dataclass(frozen=True)
class SftArguments:
    """What only supervised finetuning has."""
    _argument_group_name = "supervised finetuning"

    sft_only_data_path: list[str] = _option([], "more data sets, added whole to this step")
    train_on: Literal["all", "last"] = _option(
        "all", "the assistant's turns that are trained: all, or the last of each dialogue")
    train_on_prompt: bool = _option(False, "the loss covers the prompt too")


# --- groups of step 3 ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ActorArguments:
    """The policy: starts from step 1's model, which also is its reference."""
    _argument_group_name = "actor"

    actor_model_name_or_path: str = _option("", "required: the folder step 1 wrote, or a hub id")
    actor_learning_rate: NonNegative = _option(
        None, "of the adapters too, if --actor_lora_learning_rate is not given (default: 9.65e-6)")
    actor_weight_decay: NonNegative = _option(0.0, "AdamW's decay of weight matrices")
    actor_zero_stage: ZeroStage = _option(0, "ZeRO stage; the reference follows when it is 3")
    actor_gradient_checkpointing: bool = _option(False, "recompute activations to save memory")
    actor_dropout: Dropout = _option(0.0, "dropout of the actor while it is trained")
    actor_lora_dim: Whole = _option(0, "rank of the actor's adapters; 0 is no LoRA")
    actor_lora_module_name: str | None = _option(None, _MODULES)
    actor_lora_learning_rate: NonNegative | None = _option(
        None, "of the adapters (default: --actor_learning_rate if given, else 1e-4)")
    enable_ema: bool = _option(False, "keep and save an average of the actor's weights")
    ema_decay: Decay = _option(0.992, "of the average, per optimizer step")


@dataclass(frozen=True)
class CriticArguments:
    """The value model: starts from step 2's reward model, which also scores the replies."""
    _argument_group_name = "critic"

    critic_model_name_or_path: str = _option("", "required: the folder step 2 wrote, or a hub id")
    critic_learning_rate: NonNegative = _option(
        None, "of the adapters too, if --critic_lora_learning_rate is not given (default: 5e-6)")
    critic_weight_decay: NonNegative = _option(0.0, "AdamW's decay of weight matrices")
    critic_zero_stage: ZeroStage = _option(0, "ZeRO stage; the reward model follows when it is 3")
    critic_gradient_checkpointing: bool = _option(False, "recompute activations to save memory")
    critic_dropout: Dropout = _option(0.0, "dropout of the critic while it is trained")
    critic_lora_dim: Whole = _option(0, "rank of the critic's adapters; 0 is no LoRA")
    critic_lora_module_name: str | None = _option(None, _MODULES)
    critic_lora_learning_rate: NonNegative | None = _option(
        None, "of the adapters (default: --critic_learning_rate if given, else 5e-5)")
    critic_warmup_steps: Whole = _option(0, "steps that train the critic alone, at the start")


@dataclass(frozen=True)
class RolloutArguments:
    """How replies are sampled."""
    _argument_group_name = "rollout"

    per_device_generation_batch_size: Count = _option(
        16, "rollouts a rank generates at once", "per_device_train_batch_size")
    generation_batches: Count = _option(
        1, "generated batches in one round of updates", "generation_batch_numbers")
    num_generations: Count = _option(1, "replies to each prompt; divides the generation batch")
    max_prompt_seq_len: Count = _option(256, "longest prompt, in tokens")
    max_answer_seq_len: Count = _option(256, "longest reply, in tokens")
    temperature: Positive = _option(1.0, "of the sampler, and of the log-probabilities")
    top_p: Share = _option(1.0, "sample from the likeliest tokens of this total probability")
    top_k: Whole = _option(0, "sample from so many likeliest tokens; 0: from all")
    repetition_penalty: Positive = _option(
        1.0, "makes tokens of prompt and reply less likely (above 1) to be sampled again; like "
        "top_p and top_k it is the sampler's alone, and no part of the log-probabilities")
    enable_hybrid_engine: bool = _option(
        False, "generate with gathered weights, folded adapters and, on a CPU, a compiled "
        "decoding step: faster")
    hybrid_engine_backend: Literal["native", "deepspeed"] = _option(
        "native", "deepspeed: its own kernels, on CUDA, while they give the same greedy tokens")
    enable_cuda_graph: bool = _option(
        False, "on CUDA, launch a decoding step as one graph, if at the first rollout it gives the "
        "logits of the forward pass")
    unpin_actor_parameters: bool = _option(
        False, "ZeRO-3: gather layer by layer in each forward pass, not all weights for the whole "
        "rollout; for what does not fit, and slow")
    release_inference_cache: bool = _option(
        False, "between rollouts free the KV cache and, on a CPU, the weights laid out to decode")
    inference_tp_size: Count = _unavailable("inference_tp_size", 1)
    tp_gather_partition_size: Count = _no_effect("tp_gather_partition_size", 8)


@dataclass(frozen=True)
class RewardArguments:
    """What a reply earns."""
    _argument_group_name = "reward"

    reward_function: str | None = _option(
        None, "module:name of a Python function, texts in, floats out, that scores the replies "
        "(default: the reward model)")
    reward_normalization: Literal["checkpoint", "reference", "none"] = _option(
        "checkpoint", "scores' mean and deviation: the reward model's own, or of first rollouts")
    clip_reward_value: Positive = _option(5.0, "the score is clipped to plus or minus this")
    missing_eos_penalty: NonNegative = _option(1.0, "taken off the score of a reply without eos")
    kl_coef: NonNegative = _option(0.05, "weight of the KL penalty against the reference")
    kl_controller: Literal["fixed", "adaptive"] = _option(
        "fixed", "adaptive moves --kl_coef toward --kl_target")
    kl_target: Positive = _option(6.0, "of the adaptive controller, in nats a sequence")
    kl_horizon: Count = _option(10000, "of the adaptive controller, in episodes")
    offload_reference_model: bool = _unavailable("offload_reference_model", False)
    offload_reward_model: bool = _unavailable("offload_reward_model", False)


@dataclass(frozen=True)
class PpoArguments:
    """How actor and critic learn from the rollouts of a round."""
    _argument_group_name = "PPO"

    per_device_training_batch_size: Count = _option(
        16, "rows a rank trains on at once; divides the rollouts of a round",
        "per_device_mini_train_batch_size")
    ppo_epochs: Count = _option(1, "passes over the rollouts of a round")
    gamma: UnitInterval = _option(1.0, "discount of rewards")
    lam: UnitInterval = _option(0.95, "GAE's lambda")
    whiten_advantages: bool = _option(True, "advantages to mean 0 and deviation 1 over all ranks")
    cliprange: Positive = _option(0.2, "of the policy's ratio around 1")
    cliprange_value: Positive = _option(0.2, "of the critic's values around the old ones")
    entropy_coef: NonNegative = _option(0.0, "weight of the entropy bonus")
    unsupervised_dataset_name: str | None = _option(
        None, "hub name or local text file for the language-model loss")
    unsupervised_dataset_config_name: str | None = _option(
        None, "configuration of that data set")
    unsup_coef: NonNegative = _option(1.0, "weight of the language-model loss")
    enable_mixed_precision_lora: bool = _unavailable("enable_mixed_precision_lora", False)
    align_overflow: bool = _unavailable("align_overflow", False)
    disable_actor_dropout: bool = _no_effect("disable_actor_dropout", False)
    disable_critic_dropout: bool = _no_effect("disable_critic_dropout", False)


@dataclass(frozen=True)
class ReportArguments:
    """What step 3 shows of itself, its alarms, and its short test run."""
    _argument_group_name = "report"

    eval_prompts: Whole = _option(
        128, "held-out prompts that measure the policy before and after; 0: none")
    print_answers: bool = _option(False, "show replies and their scores on the console")
    print_answers_interval: Count = _option(1, "steps between two such tables")
    log_samples_steps: Whole = _option(
        10, "steps between samples, kept in samples.jsonl, for the report, and shown by trackers "
        "that have tables; 0: none")
    stop_on_alarm: bool = _option(
        False, "end the run when an alarm goes off: KL running away, score bought by what nobody "
        "wants, entropy collapsing, critic explaining nothing, ratios not 1 at first")
    enable_test_mode: bool = _option(False, "stop early, after step --test_stop_step")
    test_stop_step: Whole = _option(0, "the last step of --enable_test_mode, counted from 0")


# --- one record per step -------------------------------------------------------------------------


class Role(NamedTuple):
    """A trained model: its group in the record, its flags' prefix, its default learning rates."""

    group: str
    prefix: str
    rate: float
    rate_with_lora: float
    adapter_rate: float


@dataclass(frozen=True, kw_only=True)
class StepArguments:
    """What all steps share; `given` names the flags set on the command line or in the config."""

    step: ClassVar[int]
    purpose: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]

    data: DataArguments
    loading: LoadingArguments
    lora: LoraArguments
    optimization: OptimizationArguments
    run: RunArguments
    compatibility: CompatibilityArguments
    given: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, kw_only=True)
class Step1Arguments(StepArguments):
    """Supervised finetuning."""

    step = 1
    purpose = "Step 1: supervised finetuning of a causal language model."
    roles = (Role("model", "", 2e-5, 3e-4, 3e-4),)

    model: ModelArguments
    batches: BatchArguments
    sft: SftArguments


@dataclass(frozen=True, kw_only=True)
class Step2Arguments(StepArguments):
    """The reward model."""

    step = 2
    purpose = "Step 2: a reward model from pairs of replies."
    roles = (Role("model", "", 1e-5, 1e-4, 1e-4),)

    model: ModelArguments
    batches: BatchArguments


@dataclass(frozen=True, kw_only=True)
class Step3Arguments(StepArguments):
    """PPO."""

    step = 3
    purpose = "Step 3: PPO of the model of step 1 against the reward model of step 2."
    roles = (Role("actor", "actor_", 9.65e-6, 9.65e-6, 1e-4),
             Role("critic", "critic_", 5e-6, 5e-6, 5e-5))

    actor: ActorArguments
    critic: CriticArguments
    rollout: RolloutArguments
    reward: RewardArguments
    ppo: PpoArguments
    report: ReportArguments


AnyStep = TypeVar("AnyStep", bound=StepArguments)


def parse_step1(argv: list[str] | None = None) -> Step1Arguments:
    """The arguments of step 1, checked and resolved; `argv` defaults to the command line's.

    Raises UserError (one line) on any mistake in a flag or in the file of `--config`.
    """
    return _parse(Step1Arguments, argv)


def parse_step2(argv: list[str] | None = None) -> Step2Arguments:
    """The arguments of step 2; otherwise as `parse_step1`."""
    return _parse(Step2Arguments, argv)


def parse_step3(argv: list[str] | None = None) -> Step3Arguments:
    """The arguments of step 3; otherwise as `parse_step1`."""
    args = _parse(Step3Arguments, argv)
    _check_rollout(args)
    _check_reward(args)
    _check_ppo(args)
    return args


def to_config(args: StepArguments) -> dict[str, Any]:
    """A flat {flag: resolved value} that, written to YAML or JSON, gives back equal arguments.

    Left out: `config`, `local_rank`, and unused flags of UNAVAILABLE and NO_EFFECT.
    """
    return {option.name: value for _, option, value in _options(args)
            if option.name not in {"config", "local_rank"}
            and not (option.name in UNAVAILABLE | NO_EFFECT and value == option.default)}


def run_config(args: StepArguments) -> tuple[RunConfig, CheckpointConfig]:
    """Return the groups of the output folder and of its checkpoints."""
    run = args.run
    return RunConfig(
        output_dir=run.output_dir, overwrite_output_dir=run.overwrite_output_dir
    ), CheckpointConfig(
        save_steps=run.save_steps, save_total_limit=run.save_total_limit,
        resume_from_checkpoint=run.resume_from_checkpoint,
        allow_changed_args=run.allow_changed_args,
    )


def notices(args: StepArguments) -> list[str]:
    """One line for each flag that was given and changes nothing."""
    lines = [f"--{flag} has no effect: {reason}"
             for flag, reason in NO_EFFECT.items() if flag in args.given]
    for role in args.roles:
        names, rank = f"{role.prefix}lora_module_name", f"{role.prefix}lora_dim"
        if names in args.given and _values(args)[rank] == 0:
            lines.append(f"--{names} has no effect: --{rank} is 0")
    if args.run.logging_dir and not set(trackers(args)) & set(TRACKERS_OF_FILES):
        lines.append("--logging_dir has no effect: no tracker that writes files is asked for")
    if args.run.allow_changed_args and not args.run.resume_from_checkpoint:
        lines.append("--allow_changed_args has no effect: nothing is resumed")
    if isinstance(args, Step3Arguments):
        lines += _hybrid_notices(args)
    return lines


def _hybrid_notices(args: Step3Arguments) -> Iterator[str]:
    rollout = args.rollout
    off = "without --enable_hybrid_engine "
    if rollout.unpin_actor_parameters and args.actor.actor_zero_stage < 3:
        yield "--unpin_actor_parameters has no effect: below ZeRO-3 nothing is gathered"
    elif rollout.unpin_actor_parameters and not rollout.enable_hybrid_engine:
        yield f"--unpin_actor_parameters has no effect: {off}layers are gathered one by one anyway"
    if rollout.enable_cuda_graph and not rollout.enable_hybrid_engine:
        yield f"--enable_cuda_graph has no effect: {off}the model's forward pass decodes"
    elif (rollout.enable_cuda_graph and rollout.unpin_actor_parameters
          and args.actor.actor_zero_stage == 3):
        yield "--enable_cuda_graph has no effect: with --unpin_actor_parameters weights come and go"
    if rollout.hybrid_engine_backend == "deepspeed" and not rollout.enable_hybrid_engine:
        yield f"--hybrid_engine_backend deepspeed has no effect: {off}no such engine is used"


def trackers(args: StepArguments) -> list[str]:
    """The trackers asked for, by either flag, each once."""
    also = ["tensorboard"] if args.run.enable_tensorboard else []
    return list(dict.fromkeys([*args.run.tracker, *also]))


def split_shares(data_split: str) -> tuple[float, float, float]:
    """The three steps' shares of the data, not normalised: "2,4,4" is (2.0, 4.0, 4.0).

    Raises UserError unless they are three finite numbers, none below 0 and not all 0.
    """
    try:
        first, second, third = (_finite(part) for part in data_split.split(","))
    except ValueError:
        first = second = third = -1.0
    if min(first, second, third) < 0 or first + second + third == 0:
        _refuse("data_split", data_split,
                "must be three numbers of 0 or more, not all 0, such as 2,4,4")
    return first, second, third


# --- reading -------------------------------------------------------------------------------------


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _reader(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, ArgumentTypeError):
            raise ArgumentTypeError(f"{shlex.quote(text)}: must be {expected}") from None
    return read


_READERS = {int: _reader(int, "a whole number"), float: _reader(_finite, "a number"),
            string_to_bool: _reader(string_to_bool, "true or false")}


class _HelpFormatter(HelpFormatter):
    """One line a flag: its underscore spellings, its kind, and the default after the text."""

    def add_argument(self, action: Action) -> None:
        """Leave out `--no_x`, the twin of each `--x` that is on by default."""
        if not action.option_strings[0].startswith("--no_"):
            super().add_argument(action)

    def _format_action_invocation(self, action: Action) -> str:
        names = ", ".join(name for name in action.option_strings if "-" not in name.lstrip("-"))
        if action.nargs == 0:
            return names
        kinds: dict[Any, str] = {int: "N", float: "X", string_to_bool: "[BOOL]"}
        kind = kinds.get(action.type, "TEXT")
        if action.choices is not None:
            kind = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{names} {kind}" + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or "(default" in text or action.default == "":
            return text
        names = {"True": "on", "False": "off", "None": "none", "[]": "none"}
        return f"{text} (default: {names.get(str(action.default), '%(default)s')})"


class _Parser(HfArgumentParser):
    """HfArgumentParser whose every complaint is a UserError of one line."""

    def __init__(self, groups: Sequence[Any], purpose: str) -> None:
        super().__init__(groups, description=purpose, allow_abbrev=False,
                         usage="%(prog)s [--config FILE] [--flag value ...]",
                         formatter_class=_HelpFormatter)
        for kind, read in _READERS.items():
            self.register("type", kind, read)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as `--flag value: what is expected`."""
        match = re.fullmatch(r"argument (--\w+)\S*: (.*)", message, re.DOTALL)
        if match is None:
            raise UserError(_one_line(message))
        flag, complaint = match.groups()
        if complaint.startswith("expected"):
            raise UserError(f"{flag}: needs a value")
        if complaint.startswith("ignored explicit argument"):
            raise UserError(f"{flag}: takes no value")
        raise UserError(_one_line(f"{flag} {complaint}"))

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise ArgumentError(action, f"{shlex.quote(str(value))}: must be one of {choices}")

    def valued_flags(self) -> dict[str, Action]:
        """Every spelling of every flag that takes a value, without its dashes."""
        return {name[2:]: action for name, action in self._option_string_actions.items()
                if name.startswith("--") and action.nargs != 0}

    def given(self, argv: Sequence[str]) -> frozenset[str]:
        """The flags set in `argv`; a word that starts with two dashes is never a value."""
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in argv)
        return frozenset(action.dest for action in actions if action is not None)

    def refuse_unknown(self, rest: Sequence[str]) -> None:
        """Raise on what parsing left over: unknown flags with near misses, or stray words."""
        unknown = [word.partition("=")[0] for word in rest if re.match(r"--?[A-Za-z]", word)]
        if unknown:
            raise UserError(self._unknown("flag", unknown, prefix="--"))
        if rest:
            raise UserError(_one_line(f"stray value {shlex.quote(rest[0])}: it follows no flag "
                                      "that takes it; remove it or name its flag"))

    def _unknown(self, kind: str, names: Sequence[str], prefix: str) -> str:
        spellings = [prefix + name for name in self.valued_flags() if "-" not in name]
        near = {name: difflib.get_close_matches(name, spellings, n=1) for name in names}
        if len(names) == 1:
            hint = f"did you mean {near[names[0]][0]}?" if near[names[0]] else "see --help"
            return _one_line(f"unknown {kind} {names[0]}; {hint}")
        listed = (f"{name} (did you mean {near[name][0]}?)" if near[name] else name
                  for name in names)
        return _one_line(f"unknown {kind}s {', '.join(listed)}; see --help")

    def config_argv(self, path: str) -> list[str]:
        """The file's flags as words of a command line, checked as such; names the file if wrong."""
        try:
            argv = self._words(_read_mapping("config", path))
            _, rest = self.parse_known_args(argv)
            self.refuse_unknown(rest)
        except UserError as error:
            raise UserError(f"--config {_one_line(path)}: {error}") from None
        return argv

    def _words(self, mapping: dict[Any, Any]) -> list[str]:
        flags, words = self.valued_flags(), list[str]()
        seen: dict[str, Any] = {}
        unknown = [str(key) for key in mapping if str(key) not in flags]
        if unknown:
            raise UserError(self._unknown("key", unknown, prefix=""))
        for key, value in mapping.items():
            action = flags[str(key)]
            if action.dest == "config":
                raise UserError("config: a config file can not name another; remove the key")
            if action.dest in seen:
                raise UserError(f"{seen[action.dest]} and {key} are one flag; keep one of them")
            seen[action.dest] = key
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, dict | list) for item in items):
                raise UserError(f"{key}: holds a nested mapping or list; a value or a plain list "
                                "of values is expected")
            if isinstance(value, list) and action.nargs != "+":
                raise UserError(f"{key}: takes one value, not a list")
            texts = [str(item).lower() if isinstance(item, bool) else str(item)
                     for item in items if item is not None]
            if len(texts) == 1:
                words.append(f"--{action.dest}={texts[0]}")
            elif texts:
                words += [f"--{action.dest}", *texts]
        return words


def _parse(step: type[AnyStep], argv: list[str] | None) -> AnyStep:
    """Read the command line, and below it the config file; check; fill in dependent defaults."""
    hints = get_type_hints(step)
    groups = {entry.name: hints[entry.name]
              for entry in dataclasses.fields(step) if entry.name != "given"}
    parser = _Parser(list(groups.values()), step.purpose)
    words = sys.argv[1:] if argv is None else argv
    namespace, rest = parser.parse_known_args(words)
    parser.refuse_unknown(rest)
    if namespace.config is not None:
        words = [*parser.config_argv(namespace.config), *words]
    parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    args = step(**dict(zip(groups, parsed, strict=True)), given=parser.given(words))
    _check_required(args)
    _check_values(args)
    _check_data_split(args)
    _check_lora(args)
    _check_deepspeed(args)
    _check_trackers(args)
    _check_run(args)
    return _resolve(args)


def _resolve(args: AnyStep) -> AnyStep:
    """Fill in the defaults that depend on other flags: learning rates, `only_optimize_lora`."""
    ranks = [getattr(getattr(args, role.group), f"{role.prefix}lora_dim") for role in args.roles]
    only_lora = args.lora.only_optimize_lora
    changes: dict[str, Any] = {"lora": replace(
        args.lora, only_optimize_lora=any(ranks) if only_lora is None else only_lora)}
    for role, rank in zip(args.roles, ranks, strict=True):
        group = getattr(args, role.group)
        names = f"{role.prefix}learning_rate", f"{role.prefix}lora_learning_rate"
        rates = _learning_rates(role, rank, *(getattr(group, name) for name in names))
        changes[role.group] = replace(group, **dict(zip(names, rates, strict=True)))
    return replace(args, **changes)


def _learning_rates(
    role: Role, rank: int, rate: float | None, adapter_rate: float | None
) -> tuple[float, float | None]:
    """(of the other trained weights, of the adapters); None stands for a flag not given."""
    if rank == 0:
        return (role.rate if rate is None else rate), None
    if adapter_rate is None:
        adapter_rate = role.adapter_rate if rate is None else rate
    return (role.rate_with_lora if rate is None else rate), adapter_rate


# --- checks --------------------------------------------------------------------------------------


def _check_required(args: StepArguments) -> None:
    for flag, text in (("actor_model_name_or_path", "the folder step 1 wrote, or a hub id"),
                       ("critic_model_name_or_path", "the folder step 2 wrote, or a hub id")):
        if _values(args).get(flag) == "":
            raise UserError(f"--{flag} is required: {text}")


def _check_values(args: StepArguments) -> None:
    """Each value on its own: texts not empty, numbers within bounds, flags available."""
    for hint, option, value in _options(args):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                _refuse(option.name, text, "is empty; give a value or remove the flag")
        for part in (hint, *get_args(hint)):
            for bound in getattr(part, "__metadata__", ()):
                if value is not None and not bound.holds(value):
                    _refuse(option.name, value, bound.text)
        if option.name in UNAVAILABLE and value != option.default:
            _refuse(option.name, value,
                    f"not available in this version: {UNAVAILABLE[option.name]}; remove the flag")


def _check_data_split(args: StepArguments) -> None:
    if split_shares(args.data.data_split)[args.step - 1] == 0:
        _refuse("data_split", args.data.data_split,
                f"leaves no data for step {args.step}; give its share, number {args.step} of the "
                "three, a value above 0")


def _check_lora(args: StepArguments) -> None:
    """Without LoRA, what only LoRA can use is a contradiction."""
    values = _values(args)
    ranks = [f"{role.prefix}lora_dim" for role in args.roles]
    for role, rank in zip(args.roles, ranks, strict=True):
        flag = f"{role.prefix}lora_learning_rate"
        if values[rank] == 0 and values[flag] is not None:
            _refuse(flag, values[flag], f"needs LoRA; give --{rank} or remove the flag")
    if any(values[rank] for rank in ranks):
        return
    for flag in ("only_optimize_lora", "lora_alpha", "lora_dropout"):
        if values[flag]:
            _refuse(flag, values[flag],
                    f"needs LoRA; give --{' or --'.join(ranks)}, or remove the flag")


def _check_deepspeed(args: StepArguments) -> None:
    path = args.optimization.deepspeed_config
    if path is not None:
        try:
            _read_mapping("deepspeed_config", path)
        except UserError as error:
            _refuse("deepspeed_config", path, str(error))
    stages = [f"{role.prefix}zero_stage" for role in args.roles]
    for stage in stages:
        if args.optimization.offload and _values(args)[stage] == 0:
            _refuse("offload", True, f"needs ZeRO; give --{stage} 1, 2 or 3, or remove the flag")


def _check_run(args: StepArguments) -> None:
    run = args.run
    if run.output_dir is None:
        if run.save_steps:
            _refuse("save_steps", run.save_steps, "needs --output_dir; give it or remove the flag")
        if run.resume_from_checkpoint == "latest":
            _refuse("resume_from_checkpoint", "latest", "needs --output_dir, whose checkpoints it "
                    "looks at; give it, or the folder of a checkpoint")


def _check_trackers(args: StepArguments) -> None:
    for name in args.run.tracker:
        if name not in TRACKERS:
            _refuse("tracker", name, f"must be of {', '.join(TRACKERS)}")


def _check_rollout(args: Step3Arguments) -> None:
    batch, replies = args.rollout.per_device_generation_batch_size, args.rollout.num_generations
    if batch % replies:
        _refuse("num_generations", replies,
                f"must divide --per_device_generation_batch_size {batch}, which counts rollouts; "
                f"try {_near_divisors(batch, replies)}")
    batches, micro = args.rollout.generation_batches, args.ppo.per_device_training_batch_size
    if batch * batches % micro:
        _refuse("per_device_training_batch_size", micro,
                f"must divide the {batch * batches} rollouts of a round "
                f"(--per_device_generation_batch_size {batch} x --generation_batches {batches}); "
                f"try {_near_divisors(batch * batches, micro)}")


def _check_reward(args: Step3Arguments) -> None:
    reward = args.reward
    function = reward.reward_function
    if function is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", function):
        _refuse("reward_function", function, "must be module:name, such as my_rewards:length")
    if reward.kl_controller == "adaptive" and reward.kl_coef == 0:
        _refuse("kl_coef", 0, "--kl_controller adaptive multiplies it, and 0 would stay 0; give "
                "a start above 0, such as 0.05")


def _check_ppo(args: Step3Arguments) -> None:
    ppo = args.ppo
    for role, dropout, disabled in (
            ("actor", args.actor.actor_dropout, ppo.disable_actor_dropout),
            ("critic", args.critic.critic_dropout, ppo.disable_critic_dropout)):
        if disabled and dropout:
            _refuse(f"{role}_dropout", dropout,
                    f"contradicts --disable_{role}_dropout; remove one of the two")
    if ppo.unsupervised_dataset_config_name is not None and ppo.unsupervised_dataset_name is None:
        _refuse("unsupervised_dataset_config_name", ppo.unsupervised_dataset_config_name,
                "needs --unsupervised_dataset_name; give it or remove the flag")


# --- small helpers -------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _refuse(flag: str, value: Any, why: str) -> NoReturn:
    shown = "" if value is True else " " + shlex.quote(str(value))
    raise UserError(_one_line(f"--{flag}{shown}: {why}"))


def _options(args: StepArguments) -> Iterator[tuple[Any, dataclasses.Field[Any], Any]]:
    """(type with its bounds, declaration, value) of each flag, in the order of --help."""
    for entry in dataclasses.fields(args):
        if entry.name != "given":
            group = getattr(args, entry.name)
            hints = get_type_hints(type(group), include_extras=True)
            for option in dataclasses.fields(group):
                yield hints[option.name], option, getattr(group, option.name)


def _values(args: StepArguments) -> dict[str, Any]:
    return {option.name: value for _, option, value in _options(args)}


def _near_divisors(total: int, wanted: int) -> str:
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    below, above = [n for n in divisors if n < wanted][-1:], [n for n in divisors if n > wanted][:1]
    return " or ".join(map(str, below + above))


def _read_mapping(flag: str, path: str) -> dict[Any, Any]:
    """The mapping in a JSON file, or for `--config` a YAML file too; an empty file is {}.

    Raises UserError that says what is wrong and in which line, but not in which file.
    """
    as_json = flag != "config" or path.endswith(".json")
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if as_json else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError("no such file") from None
    except OSError as error:
        raise UserError(f"can not be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"line {error.lineno}: not valid JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(_one_line(f"{line}not valid YAML: {error.problem}")) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(_one_line(f"not valid {'JSON' if as_json else 'YAML'}: {error}")) from None
    if content is None and not as_json:
        return {}
    if not isinstance(content, dict):
        raise UserError("must hold a mapping of names to values")
    return content
