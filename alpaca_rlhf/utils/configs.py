"""Every option of every program, declared once: name, type, default and help text.

An option is a field of a frozen group, and a group belongs to the code that uses it: it is passed
there whole. A program is a record of groups (`Step1Config`, …), which `arguments.parse` fills from
the command line and the file of `--config`. Flags are the fields' names, with the prefix that the
record gives to a group: actor and critic are two `RoleConfig`s. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_type_hints


class Bound(NamedTuple):
    """Range of a number, and the message when it is left; part of a field's `Annotated` type."""

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

# Meaning of a change when a run is resumed: another result (refused), none ("free"), another
# rounding ("place": where the weights are kept), or rows of one rank ("per_rank": n ranks with
# batch size b equal one rank with batch size n * b).
OnResume = Literal["result", "free", "place", "per_rank"]


def option(
    default: Any, text: str, *aliases: str, on_resume: OnResume = "result", flag: str = "",
    required: bool = False, unavailable: str = "", no_effect: str = "",
) -> Any:
    """Declare an option; `Any`, so that a field may have the type that it has once resolved.

    Args:
        default, aliases, required: as in argparse.
        text: for --help. One that ends in "(default: …)" says itself what None stands for.
        on_resume: what a change means for a resumed run.
        flag: name of the flag where it is not the field's.
        unavailable: reason why anything but the default is refused.
        no_effect: reason why the flag is accepted for old scripts and ignored.
    """
    metadata = {
        "help": text, "aliases": aliases, "on_resume": on_resume, "flag": flag,
        "required": required, "unavailable": unavailable, "no_effect": no_effect,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _unavailable(default: Any, reason: str) -> Any:
    return option(default, f"not available in this version: {reason}", unavailable=reason)


def _no_effect(default: Any, reason: str) -> Any:
    text = f"for old scripts; has no effect: {reason}"
    return option(default, text, on_resume="free", no_effect=reason)


class Group:
    """Options of one part of the code; `title` heads them in --help."""

    title: ClassVar[str]

    def __init_subclass__(cls, title: str | None = None) -> None:
        cls.title = title or cls.title


def group(prefix: str = "", without: tuple[str, ...] = (), **defaults: Any) -> Any:
    """Declare a group of a program's record: its flags' prefix, and the program's own defaults.

    Options named in `without` are no flags of the program and keep the group's defaults.
    """
    return field(metadata={"prefix": prefix, "without": without, "defaults": defaults})


# --- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourcesConfig(Group, title="data"):
    """Data sets, and the share of each step."""

    data_path: list[str] = option(
        [], "data sets, each a hub name, a folder or a .json/.jsonl/.parquet file, also .gz; "
        "NAME=PATH names its format, PATH:0.3 takes that share of it; local/jsonfile reads "
        "data/train.json and data/eval.json (default: the embedded data set)")
    data_split: str = option("2,4,4", "disjoint shares of the three steps, fixed by the seed")
    lang: list[str] = option(
        [], "languages to keep, such as en zh; samples stated to be in another are filtered out")

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of the three steps, not normalized: "2,4,4" is (2.0, 4.0, 4.0).

        Raises:
            ValueError: `data_split` is not three numbers.
        """
        first, second, third = (float(part) for part in self.data_split.split(","))
        return first, second, third


@dataclass(frozen=True)
class DataConfig(SourcesConfig):
    """Data sets, chat template, and how samples are turned into token ids."""

    data_output_path: str | None = option(
        None, "folder for preprocessed data (default: a folder under the user's cache home)",
        on_resume="free")
    chat_template: ChatTemplate | None = option(
        None, "format of a dialogue; tokenizer: the tokenizer's own template (default: the one an "
        "earlier step saved with the model, else human_assistant)")
    overlong: Literal["truncate", "drop", "error"] = option(
        "truncate", "treatment of samples that are too long")
    preprocessing_num_workers: Count | None = option(
        None, "processes for preprocessing (default: one for each core, up to eight)",
        on_resume="free")


@dataclass(frozen=True)
class SFTConfig(Group, title="supervised fine-tuning"):
    """Data and loss that only supervised fine-tuning has."""

    sft_only_data_path: list[str] = option([], "more data sets, added whole to this step")
    train_on: Literal["all", "last"] = option(
        "all", "assistant turns that are trained: all, or only the last of each dialogue")
    train_on_prompt: bool = option(False, "compute the loss on the prompt too")


# --- models --------------------------------------------------------------------------------------


class LearningRates(NamedTuple):
    """Default learning rates of a role."""

    full: float
    with_lora: float
    adapters: float


@dataclass(frozen=True)
class RoleConfig(Group, title="model"):
    """A trained model: the single one of steps 1 and 2, the actor or the critic."""

    model_name_or_path: str = option(
        None, "hub id or folder; in step 3 the folders that steps 1 and 2 wrote (default in steps "
        "1 and 2: the embedded tiny LLaMA)")
    learning_rate: NonNegative = option(
        None, "learning rate, also of the adapters unless --{prefix}lora_learning_rate is given "
        "(default: {rates})")
    weight_decay: NonNegative = option(0.0, "AdamW's weight decay of matrices")
    zero_stage: ZeroStage = option(0, "ZeRO stage", on_resume="place")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", on_resume="free")
    dropout: Dropout = option(0.0, "dropout during training")
    lora_dim: Whole = option(0, "rank of the LoRA adapters; 0: no LoRA")
    lora_module_name: str | None = option(
        None, "comma list of module names or parts of them (default: the family's attention and "
        "MLP projections)")
    lora_learning_rate: NonNegative | None = option(
        None, "learning rate of the adapters (default: --{prefix}learning_rate if given, else "
        "{adapter_rate:g})")
    prefix: str = ""  # of its flags: "", "actor_" or "critic_"
    rates: LearningRates = LearningRates(2e-5, 3e-4, 3e-4)

    def flag(self, name: str) -> str:
        """Return the flag of a field, as the user types it."""
        return f"--{self.prefix}{name}"


@dataclass(frozen=True)
class LoadingConfig(Group, title="loading"):
    """Tokenizer, precision and attention of every model of a program."""

    tokenizer_name_or_path: str | None = option(
        None, "hub id or folder (default: the model's own; in step 3 the actor's)")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "precision of the weights; auto: bf16 where the device has it, or a product on the "
        "CPU, measured at the start, is clearly faster in it; else fp32")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = option(
        "sdpa", "attention implementation")
    trust_remote_code: bool = option(False, "run code that comes with a hub model")
    bits: int | None = None  # of the linear layers' weights, see AdapterConfig; None: as in dtype


@dataclass(frozen=True)
class AdapterConfig(Group, title="LoRA"):
    """Options that all adapters of a run share; rank and modules belong to the role."""

    lora_alpha: Positive | None = option(None, "scale of the adapters (default: 2 x rank)")
    lora_dropout: Dropout = option(0.0, "dropout before the adapters")
    only_optimize_lora: bool = option(
        None, "freeze all but adapters and heads (default: on with LoRA, else off)")
    load_in_4bit: bool = option(
        False, "keep frozen weights in 4 bits (NF4, twice quantized); needs LoRA, bitsandbytes and "
        "ZeRO 0 to 2")
    load_in_8bit: bool = option(
        False, "keep frozen weights in 8 bits (LLM.int8); needs the same")

    @property
    def bits(self) -> int | None:
        """Bits of frozen weights; None: those of --dtype."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScheduleConfig(Group, title="schedule"):
    """Length of the training and learning-rate schedule, in optimizer steps."""

    num_train_epochs: Count = option(1, "epochs over the data")
    max_steps: Count | None = option(None, "optimizer steps after which training stops")
    gradient_accumulation_steps: Count = option(1, "micro-batches of one optimizer step")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup"] = option("cosine", "learning-rate schedule")
    num_warmup_steps: Whole = option(0, "optimizer steps from 0 to the full learning rate")
    max_tokens_per_micro_batch: Count | None = option(
        None, "fill micro-batches up to this many tokens, padding included, in place of a number "
        "of rows; an optimizer step keeps its rows")
    max_skipped_steps: Count = option(
        10, "abort after this many consecutive non-finite optimizer steps", on_resume="free")


@dataclass(frozen=True)
class EngineConfig(Group, title="DeepSpeed"):
    """Options of DeepSpeed beyond ZeRO stage, precision and batch sizes."""

    offload: bool = option(
        False, "keep optimizer states (ZeRO-3: and parameters) in host memory; needs ZeRO >= 1")
    deepspeed_config: str | None = option(
        None, "JSON file merged over the generated DeepSpeed configuration")


@dataclass(frozen=True)
class BatchConfig(Group, title="batches"):
    """Batches of steps 1 and 2, and evaluation during training."""

    per_device_train_batch_size: Count = option(
        16, "rows of a micro-batch on each rank", on_resume="per_rank")
    per_device_eval_batch_size: Count = option(
        16, "rows of an evaluation batch on each rank", on_resume="free")
    max_seq_len: Count = option(512, "maximum length of a sequence in tokens")
    eval_interval: Whole = option(
        0, "optimizer steps between evaluations; 0: only before and after training",
        on_resume="free")
    eval_iters: Count | None = option(
        None, "batches of one evaluation (default: all)", on_resume="free")
    disable_dropout: bool = _no_effect(False, "dropout is 0 unless --dropout is given")


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedConfig(Group, title="run"):
    """The seed."""

    seed: int = option(1234, "seed of data order, initial weights and sampling")


@dataclass(frozen=True)
class RunConfig(SeedConfig):
    """Output folder and processes of a run."""

    config: str | None = option(
        None, "YAML or JSON file of these flags; the command line wins over it")
    output_dir: str | None = option(
        None, "folder of the trained model (default: none, nothing is saved)", on_resume="free")
    dry_run: bool = option(
        False, "check everything, print what memory and time the run will need in each phase, and "
        "stop before any weights are loaded", on_resume="free")
    fit: str | None = option(
        None, "with --dry_run: search for the cheapest flags that fit into this memory of an "
        "accelerator, such as 24GB", on_resume="free")
    speed: str | None = option(
        None, "with --dry_run: TFLOP/s and GB/s of the device, such as 71,936, for the time of an "
        "iteration (default: measured here)", on_resume="free")
    overwrite_output_dir: bool = option(
        False, "allow an --output_dir that holds another run", on_resume="free")
    local_rank: int = option(-1, "set by the launcher; -1: a single process")
    collective_timeout: Count = option(
        1800, "seconds after which a rank that waits for another one's tensors ends the run",
        on_resume="free")

    @property
    def fit_bytes(self) -> float | None:
        """Bytes of `fit`: "24GB" is 24e9.

        Raises:
            ValueError: it is no size.
        """
        if self.fit is None:
            return None
        match = re.fullmatch(r"\s*([\d.]+)\s*([mgt]?)i?b?\s*", self.fit.lower())
        if match is None or not (number := float(match[1])):
            raise ValueError(self.fit)
        return number * {"m": 1e6, "g": 1e9, "": 1e9, "t": 1e12}[match[2]]

    @property
    def speeds(self) -> tuple[float, float] | None:
        """FLOP/s and bytes/s of `speed`.

        Raises:
            ValueError: it is not two numbers.
        """
        if self.speed is None:
            return None
        flops, bandwidth = (float(part) for part in self.speed.split(","))
        if not (0 < flops < math.inf and 0 < bandwidth < math.inf):
            raise ValueError(self.speed)
        return flops * 1e12, bandwidth * 1e9


@dataclass(frozen=True)
class CheckpointConfig(Group, title="checkpoints"):
    """Checkpoints to resume from."""

    save_steps: Whole = option(
        0, "optimizer steps between checkpoints in --output_dir; 0: only at the end of an epoch "
        "and on SIGTERM and SIGINT, which always save one", on_resume="free")
    save_total_limit: Count = option(
        2, "number of checkpoints to keep, the latest ones", on_resume="free")
    resume_from_checkpoint: str | None = option(
        None, "latest: resume from the last complete checkpoint of --output_dir, or start if "
        "there is none; or the folder of a checkpoint", on_resume="free")
    allow_changed_args: bool = option(
        False, "resume even if arguments that change the result have changed", on_resume="free")


# Accelerate's trackers, each the name of its package too, and those that write files.
TrackerName = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
FILE_TRACKERS = ("tensorboard", "aim")


@dataclass(frozen=True)
class TrackingConfig(Group, title="tracking"):
    """Where metrics go besides the files of the run."""

    tracker: list[TrackerName] = option([], "trackers that receive the metrics", on_resume="free")
    enable_tensorboard: bool = option(False, "the same as --tracker tensorboard", on_resume="free")
    logging_dir: str | None = option(
        None, f"folder for the files of {' and '.join(FILE_TRACKERS)} (default: logs, in "
        "--output_dir if there is one)", "tensorboard_path", on_resume="free")

    @property
    def trackers(self) -> list[str]:
        """Trackers asked for by either flag, each once."""
        also = ["tensorboard"] if self.enable_tensorboard else []
        return list(dict.fromkeys([*self.tracker, *also]))


_EOT = "every response ends with the tokenizer's eos id"


@dataclass(frozen=True)
class LegacyConfig(Group, title="flags of old scripts"):
    """Flags of old scripts, in all steps."""

    deepspeed: bool = _no_effect(False, "the trainers are always DeepSpeed's")
    num_padding_at_beginning: int = _no_effect(0, "the score is read at the last real token")
    compute_fp32_loss: bool = _no_effect(True, "losses are always computed in fp32")
    print_loss: bool = _no_effect(False, "the console always shows the loss")
    add_eot_token: bool = _no_effect(False, _EOT)
    eot_token: str | None = _no_effect(None, _EOT)


# --- generation and PPO --------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingConfig(Group, title="sampling"):
    """Sampling parameters of generation."""

    max_new_tokens: Count = option(
        256, "maximum length of a response in tokens, eos included (default: 256; in evaluations "
        "and chats at most half of the model's context)", "max_new_tokens",
        flag="max_answer_seq_len")
    temperature: NonNegative = option(
        1.0, "divides the logits, also those of the log-probabilities; 0: greedy")
    top_p: Share = option(1.0, "sample from the most likely tokens of this total probability")
    top_k: Whole = option(0, "sample from this many most likely tokens; 0: from all")
    repetition_penalty: Positive = option(
        1.0, "above 1: tokens of prompt and response become less likely to be sampled again; like "
        "top_p and top_k it applies to sampling only, not to the log-probabilities")
    num_generations: Count = option(1, "responses to each prompt")


@dataclass(frozen=True)
class HybridEngineConfig(Group, title="hybrid engine"):
    """Generation by the actor."""

    enable_hybrid_engine: bool = option(
        False, "generate faster: with gathered weights and, in fp32, merged adapters and a CPU's "
        "compiled decoding step")
    hybrid_engine_backend: Literal["native", "deepspeed"] = option(
        "native", "native: the only one; DeepSpeed's own kernels are no longer offered")
    enable_cuda_graph: bool = option(
        False, "on CUDA, launch each decoding step as one graph, if at the first rollout it gives "
        "the logits of the forward pass")
    unpin_actor_parameters: bool = option(
        False, "ZeRO-3: gather layer by layer in each forward pass instead of all weights for the "
        "whole rollout; slow, for models that do not fit", on_resume="free")
    release_inference_cache: bool = option(
        False, "free the KV cache and, on a CPU, the weights laid out for decoding between "
        "rollouts", on_resume="free")
    inference_tp_size: Count = _unavailable(1, "every rank generates with the whole model")
    tp_gather_partition_size: Count = _no_effect(8, "every rank generates with the whole model")


@dataclass(frozen=True)
class RolloutEngineConfig(Group, title="rollout engine"):
    """Who generates the responses of step 3."""

    rollout_engine: Literal["native", "vllm"] = option(
        "native", "native: the ranks that train, with the actor's own weights; vllm: the servers "
        "of --vllm_url, which get the weights before each rollout")
    vllm_url: list[str] = option(
        [], "vLLM servers, each http://HOST:PORT (scripts/serve_rollouts.sh starts one); each "
        "gets its share of the prompts", on_resume="free")
    vllm_sync_dir: str | None = option(
        None, "folder that this machine and the servers' see, for weights on their way (default: "
        "/dev/shm, for servers on this machine)", on_resume="free")
    vllm_timeout: Positive = option(
        600.0, "seconds that a request to a server may take", on_resume="free")

    @property
    def urls(self) -> list[str]:
        """The servers; commas separate them as well as spaces."""
        return [url.strip() for given in self.vllm_url for url in given.split(",") if url.strip()]


@dataclass(frozen=True)
class RolloutConfig(Group, title="rollout"):
    """Batches and lengths of the rollout phase."""

    per_device_generation_batch_size: Count = option(
        16, "rollouts generated at once on each rank", "per_device_train_batch_size",
        on_resume="per_rank")
    generation_batches: Count = option(
        1, "generation batches of one PPO iteration", "generation_batch_numbers")
    max_prompt_seq_len: Count = option(256, "maximum length of a prompt in tokens")


@dataclass(frozen=True)
class RewardConfig(Group, title="reward"):
    """Reward of a response."""

    reward_function: str | None = option(
        None, "module:name of a Python function, texts in, floats out, that scores the responses "
        "(default: the reward model)")
    reward_normalization: Literal["checkpoint", "reference", "none"] = option(
        "checkpoint", "source of the scores' mean and standard deviation: saved with the reward "
        "model, or measured on the first rollouts")
    clip_reward_value: Positive = option(5.0, "clip the normalized score to plus or minus this")
    missing_eos_penalty: NonNegative = option(
        1.0, "subtracted from the score of a response without eos")
    kl_coef: NonNegative = option(0.05, "weight of the KL penalty against the reference model")
    kl_controller: Literal["fixed", "adaptive"] = option(
        "fixed", "adaptive: move --kl_coef toward --kl_target")
    kl_target: Positive = option(
        6.0, "target KL per sequence in nats for --kl_controller adaptive")
    kl_horizon: Count = option(10000, "horizon in episodes of --kl_controller adaptive")


@dataclass(frozen=True)
class RolesConfig(Group, title="the four roles"):
    """Where actor, critic, reference and reward model keep their weights."""

    share_backbone: bool = option(
        False, "one frozen base for all roles, which differ in their adapters: those that steps 1 "
        "and 2 wrote with LoRA from the same base; needs ZeRO 0 to 2", on_resume="place")
    offload_reference_model: bool = option(
        False, "keep the reference model in host memory, as --offload does; needs "
        "--actor_zero_stage 3", on_resume="place")
    offload_reward_model: bool = option(
        False, "keep the reward model in host memory, as --offload does; needs "
        "--critic_zero_stage 3", on_resume="place")


@dataclass(frozen=True)
class PPOConfig(Group, title="PPO"):
    """Hyperparameters of the PPO update."""

    per_device_training_batch_size: Count = option(
        16, "rows of a micro-batch on each rank; divides the rollouts of a PPO iteration",
        "per_device_mini_train_batch_size", on_resume="per_rank")
    ppo_epochs: Count = option(1, "epochs over the rollouts of a PPO iteration")
    gamma: UnitInterval = option(1.0, "discount factor of the rewards")
    lam: UnitInterval = option(0.95, "lambda of GAE")
    whiten_advantages: bool = option(
        True, "normalize advantages to mean 0 and standard deviation 1 over all ranks")
    cliprange: Positive = option(0.2, "clip range of the policy ratio around 1")
    cliprange_value: Positive = option(0.2, "clip range of the values around the old values")
    entropy_coef: NonNegative = option(0.0, "weight of the entropy bonus")
    rollout_is_clip: Positive | None = option(
        None, "weigh each token's policy loss by its probability before the update over the one "
        "it was sampled with, at most this (truncated importance sampling; default: off)")
    critic_warmup_steps: Whole = option(
        0, "optimizer steps at the start that train the critic alone")
    enable_ema: bool = option(False, "keep and export an average of the actor's weights")
    ema_decay: Decay = option(0.992, "decay of that average per optimizer step")
    unsupervised_dataset_name: str | None = option(
        None, "hub name or local text file for the language-model (ptx) loss")
    unsupervised_dataset_config_name: str | None = option(
        None, "configuration of that data set")
    unsup_coef: NonNegative = option(1.0, "weight of the language-model (ptx) loss")
    enable_mixed_precision_lora: bool = _no_effect(
        False, "--load_in_4bit and --load_in_8bit quantize frozen weights")
    align_overflow: bool = option(
        False, "in fp16, skip the step of both models when the gradient of one overflows")
    disable_actor_dropout: bool = _no_effect(
        False, "dropout is 0 unless --actor_dropout is given")
    disable_critic_dropout: bool = _no_effect(
        False, "dropout is 0 unless --critic_dropout is given")


@dataclass(frozen=True)
class ReportConfig(Group, title="report"):
    """Evaluation of the policy, sample tables, alarms, and the short test run."""

    eval_prompts: Whole = option(
        128, "held-out prompts on which the policy is evaluated before and after; 0: none",
        on_resume="free")
    print_answers: bool = option(
        False, "print responses and their scores on the console", on_resume="free")
    print_answers_interval: Count = option(
        1, "PPO iterations between `--print_answers` tables", on_resume="free")
    log_samples_steps: Whole = option(
        10, "PPO iterations between samples kept in samples.jsonl, for the report and for trackers "
        "that have tables; 0: none", on_resume="free")
    stop_on_alarm: bool = option(
        False, "end the run when an alarm goes off: KL running away, reward hacking, entropy "
        "collapsing, a critic that explains nothing, ratios other than 1 at the first update",
        on_resume="free")
    enable_test_mode: bool = option(False, "stop early, after iteration --test_stop_step")
    test_stop_step: Whole = option(
        0, "last PPO iteration of --enable_test_mode, counted from 0")


# --- the steps -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Groups that all steps share; `given` names the flags that were set."""

    step: ClassVar[int]
    purpose: ClassVar[str]

    data: DataConfig = group()
    loading: LoadingConfig = group()
    lora: AdapterConfig = group()
    schedule: ScheduleConfig = group()
    engine: EngineConfig = group()
    run: RunConfig = group()
    checkpoint: CheckpointConfig = group()
    tracking: TrackingConfig = group()
    legacy: LegacyConfig = group()
    given: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(StepConfig):
    """Groups that steps 1 and 2 share."""

    model: RoleConfig = group()
    batches: BatchConfig = group()


@dataclass(frozen=True, kw_only=True)
class Step1Config(SupervisedConfig):
    """Supervised fine-tuning."""

    step = 1
    purpose = "Step 1: supervised fine-tuning of a causal language model."

    sft: SFTConfig = group()


@dataclass(frozen=True, kw_only=True)
class Step2Config(SupervisedConfig):
    """The reward model."""

    step = 2
    purpose = "Step 2: a reward model from pairs of responses."

    model: RoleConfig = group(rates=LearningRates(1e-5, 1e-4, 1e-4))


@dataclass(frozen=True, kw_only=True)
class Step3Config(StepConfig):
    """PPO."""

    step = 3
    purpose = "Step 3: PPO of the model of step 1 against the reward model of step 2."

    actor: RoleConfig = group("actor_", rates=LearningRates(9.65e-6, 9.65e-6, 1e-4))
    critic: RoleConfig = group("critic_", rates=LearningRates(5e-6, 5e-6, 5e-5))
    rollout: RolloutConfig = group()
    sampling: SamplingConfig = group()
    rollout_engine: RolloutEngineConfig = group()
    hybrid: HybridEngineConfig = group()
    reward: RewardConfig = group()
    roles: RolesConfig = group()
    ppo: PPOConfig = group()
    report: ReportConfig = group()


# --- evaluations, chats and the endpoint ---------------------------------------------------------

_MODEL = "folder of a model or an adapter, or hub id"
_MODELS = "folders of models or adapters, or hub ids"
_RECORDED = "(default: as recorded with the model, else {})"


@dataclass(frozen=True)
class HeldOutConfig(SourcesConfig, SeedConfig, title="data"):
    """Prompts or pairs that an evaluation measures on; None: as recorded with the model."""

    data_path: list[str] = option(
        [], "data sets, as in training " + _RECORDED.format("the embedded data set"))
    data_split: str = option(None, "shares of the three steps " + _RECORDED.format("2,4,4"))
    seed: Whole = option(
        None, "seed of the split, of sampling and of the bootstrap " + _RECORDED.format("1234"))
    part: Literal["held_out", "all"] = option(
        "held_out", "held_out: what no step was trained on; all: everything, for a test set")
    limit: Whole = option(0, "maximum number of prompts or pairs; 0: all")


@dataclass(frozen=True)
class PromptEvalConfig(SeedConfig, title="prompts"):
    """Models whose responses are shown side by side, and the prompts."""

    path: list[str] = option([], _MODELS, required=True)
    prompts: str | None = option(
        None, "file of prompts: .txt (one per line), .jsonl, .json or .parquet")
    prompt: list[str] = option([], "prompts, after those of the file")
    limit: Whole = option(0, "maximum number of prompts; 0: all")
    system: str = option("", "system message before every prompt")
    replies: Count = option(1, "responses of each model to each prompt")
    reward_model: str | None = option(None, f"scores the responses: {_MODEL}")
    output: str | None = option(None, "file for the responses: .jsonl, or .md for people")


@dataclass(frozen=True)
class RewardEvalConfig(Group, title="reward model"):
    """The reward model that is evaluated, and its best-of-n curve."""

    path: str = option("", "folder of a reward model or an adapter, or hub id", required=True)
    max_seq_len: Annotated[int, Bound(lambda n: n >= 2, "must be 2 or more")] = option(
        512, "maximum length of prompt and response in tokens, cut as in training")
    policy: str | None = option(None, "a model whose responses give the best-of-n curve")
    best_of: Count = option(
        16, "responses to each prompt for that curve, which has the powers of two up to it")
    best_of_prompts: Whole = option(64, "prompts for that curve; 0: all")
    output: str | None = option(None, "file for the results: .json")


@dataclass(frozen=True)
class WinRateConfig(Group, title="models"):
    """Two policies that are compared, and the judges."""

    run: str | None = option(
        None, "folder of a whole run: its final/actor against its actor, judged by its critic")
    path: str | None = option(None, f"the policy: {_MODEL}")
    baseline: str | None = option(
        None, "the policy it is compared with, such as that of step 1")
    reward_model: str | None = option(None, f"a judge: {_MODEL}")
    reward_function: str | None = option(
        None, "a judge: module:name of a Python function, as in step 3")
    max_prompt_seq_len: Count = option(
        256, "maximum length of a prompt in tokens, cut as in step 3")
    output: str | None = option(None, "file for the results and all responses: .json")


@dataclass(frozen=True)
class ChatConfig(Group, title="chat"):
    """The model of the terminal chat."""

    path: str = option("", _MODEL, required=True)
    system: str = option("", "system message before the dialogue")
    seed: Whole | None = option(
        None, "seed of every response (default: another one for each response)")


@dataclass(frozen=True)
class WebChatConfig(Group, title="chat"):
    """The page of the web chat, and the arena."""

    arena: bool = option(False, "hide which of two models is which, and vote")
    votes: str = option("votes.jsonl", "file to which the arena's votes are appended")
    system: str = option("", "system message before every dialogue")
    share: bool = option(False, "make a public link through Gradio's servers")


@dataclass(frozen=True)
class ServerConfig(Group, title="server"):
    """Models that a server serves, where it listens, and its batch."""

    path: list[str] = option([], _MODELS, required=True)
    host: str = option("127.0.0.1", "address to listen on")
    port: Annotated[int, Bound(lambda n: 0 <= n <= 65535, "must be from 0 to 65535")] = option(
        8000, "port to listen on; 0: any free one")
    at_once: Count = option(
        8, "responses of a model that are generated together; others wait for a free place")


def _loading() -> Any:
    return group(without=("tokenizer_name_or_path",))


def _sampling(**defaults: Any) -> Any:
    return group(without=("num_generations",), max_new_tokens=None, **defaults)


@dataclass(frozen=True, kw_only=True)
class PromptEvalProgram:
    """Options of `prompt_eval`."""

    prompts: PromptEvalConfig = group()
    sampling: SamplingConfig = _sampling()
    loading: LoadingConfig = _loading()


@dataclass(frozen=True, kw_only=True)
class RewardEvalProgram:
    """Options of `rw_eval`."""

    scoring: RewardEvalConfig = group()
    data: HeldOutConfig = group()
    sampling: SamplingConfig = _sampling()
    loading: LoadingConfig = _loading()


@dataclass(frozen=True, kw_only=True)
class WinRateProgram:
    """Options of `win_rate`."""

    models: WinRateConfig = group()
    data: HeldOutConfig = group(limit=256)
    sampling: SamplingConfig = _sampling()
    loading: LoadingConfig = _loading()


@dataclass(frozen=True, kw_only=True)
class ChatProgram:
    """Options of the terminal chat."""

    chat: ChatConfig = group()
    sampling: SamplingConfig = _sampling(temperature=0.7, top_p=0.95)
    loading: LoadingConfig = _loading()


@dataclass(frozen=True, kw_only=True)
class WebChatProgram:
    """Options of the web chat."""

    server: ServerConfig = group(port=7860)
    chat: WebChatConfig = group()
    sampling: SamplingConfig = _sampling(temperature=0.7, top_p=0.95)
    loading: LoadingConfig = _loading()


@dataclass(frozen=True, kw_only=True)
class ServeProgram:
    """Options of the endpoint."""

    server: ServerConfig = group()
    sampling: SamplingConfig = _sampling()
    loading: LoadingConfig = _loading()


# --- the inspector -------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectConfig(Group, title="inspector"):
    """Output of `inspect_data`."""

    step: Literal[1, 2, 3] = option(
        1, "step whose data is inspected, 1, 2 or 3; all other flags are those of the step",
        required=True)
    rows: Whole = option(3, "rows to show")
    histogram: str | None = option(
        None, "file for a picture of the lengths (default: lengths_stepN.png)")


@dataclass(frozen=True, kw_only=True)
class InspectStep1(Step1Config):
    """Options of `inspect_data --step 1`."""

    inspect: InspectConfig = group()


@dataclass(frozen=True, kw_only=True)
class InspectStep2(Step2Config):
    """Options of `inspect_data --step 2`."""

    inspect: InspectConfig = group()


@dataclass(frozen=True, kw_only=True)
class InspectStep3(Step3Config):
    """Options of `inspect_data --step 3`."""

    inspect: InspectConfig = group()


# --- all options of a program --------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of a program."""

    group: str  # field of the program's record
    name: str  # field of the group
    flag: str  # without dashes, prefix included
    hint: Any  # the field's type, bounds included
    default: Any
    metadata: Any  # what `option` declares


def groups(record: type) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """Yield name, class and declaration (see `group`) of each group of a record."""
    hints = get_type_hints(record)
    for entry in fields(record):
        if "prefix" in entry.metadata:
            yield entry.name, hints[entry.name], dict(entry.metadata)


def _options(record: type) -> tuple[Option, ...]:
    """Return the options of a program's record, in the order of --help."""
    found = []
    for name, group, declared in groups(record):
        hints = get_type_hints(group, include_extras=True)
        for entry in fields(group):
            if "help" not in entry.metadata or entry.name in declared["without"]:
                continue
            default = entry.default
            if entry.default_factory is not MISSING:
                default = entry.default_factory()
            found.append(Option(
                group=name, name=entry.name,
                flag=declared["prefix"] + (entry.metadata["flag"] or entry.name),
                hint=hints[entry.name],
                default=declared["defaults"].get(entry.name, default),
                metadata=entry.metadata,
            ))
    return tuple(found)


# Cached: reading the types of all options takes longer than parsing a command line.
options: Callable[[type], tuple[Option, ...]] = cache(_options)


@cache
def on_resume() -> dict[str, OnResume]:
    """Return for each flag of the steps what a change means when a run is resumed."""
    return {option.flag: option.metadata["on_resume"]
            for step in (Step1Config, Step2Config, Step3Config) for option in options(step)}
