"""The checks of `check_gpu.py`: one function for each kind of row.

Each gets the folder that all rows share, where the first makes small random models and data, and
returns the line for the table and its measurements. It raises `Skip` with the reason if this
machine cannot do it, and `Wrong` with the line to report if the result is not what it must be. Most
call the steps' own main(), with flags as a user gives them, in this process.

    python benchmarks/gpu_checks.py RUNS.json     # a rank, or a run that is killed: `_run_here`
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
from check_gpu import OF_RANKS, PRECISIONS, Skip, Wrong
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from alpaca_rlhf import doctor
from alpaca_rlhf.demo import assistant_world, tiny_llama
from alpaca_rlhf.training_model import launching
from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.training_model.step3_rlhf_finetuning import main as step3
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.utils import console, distributed, optimizer, preflight
from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    EngineConfig,
    HybridEngineConfig,
    LoadingConfig,
    RoleConfig,
    SamplingConfig,
    ScheduleConfig,
)
from alpaca_rlhf.utils.console import TrainingStopped
from alpaca_rlhf.utils.data.batches import (
    PromptBatch,
    Rollout,
    TokenBatch,
    collate_prompts,
    pad,
)
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, load_tokenizer
from alpaca_rlhf.utils.engine import Engine, build_trained
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.cuda_graph import GraphStep
from alpaca_rlhf.utils.generation.steps import ForwardStep
from alpaca_rlhf.utils.logging import records
from alpaca_rlhf.utils.logging.alarms import CLOSE, EXACT, HALF, Alarms
from alpaca_rlhf.utils.logging.tracker import Tracker
from alpaca_rlhf.utils.memory import memory_plan
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
from alpaca_rlhf.utils.model.reward_model import save_statistics
from alpaca_rlhf.utils.training_loop import accumulate, global_weight

Found = tuple[str, dict[str, Any]]
STEPS = {1: step1, 2: step2, 3: step3}
STAGES, LORA_DIM = (0, 1, 2, 3), 8
STEP_NAMES = {"eager": ForwardStep.name, "compiled": LlamaStep.name, "graph": GraphStep.name}
BOOTSTRAP = Path(step1.__file__).parents[1] / "my_deepspeed.py"
# Sixteen rows of each step, in batches of eight.
DATA_FLAGS = ["--data_split", "1,1,1", "--preprocessing_num_workers", "1"]
SUPERVISED = ["--max_seq_len", "64", "--per_device_train_batch_size", "8", "--learning_rate",
              "3e-3", "--lr_scheduler_type", "constant"]
PPO = ["--per_device_generation_batch_size", "8", "--per_device_training_batch_size", "4",
       "--max_answer_seq_len", "8", "--eval_prompts", "0", "--enable_hybrid_engine"]


# ------------------------------------------------------------------- models, data and runs


def _made(folder: Path) -> Path:
    """Return the folder of `actor`, `critic` and rows.json, which the first call makes.

    Joins the process group of this process alone, too: each worker may start at any row.
    """
    distributed.initialize(0)
    made = folder / "made"
    if made.exists():
        return made
    new = folder / "new"
    shutil.rmtree(new, ignore_errors=True)
    small = tiny_llama.Recipe(
        vocab_size=420, hidden_size=32, intermediate_size=32, layers=1, heads=2,
        tokenizer_dialogues=150, dialogues=16)
    tokenizer = load_tokenizer(str(tiny_llama.ensure_tiny_llama(new, small)))
    # Wide weights: where two tokens are nearly as likely, rounding decides between them.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, num_labels=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_position_embeddings=256)
    torch.manual_seed(0)
    for name, kind in (("actor", LlamaForCausalLM), ("critic", LlamaForSequenceClassification)):
        kind(config).save_pretrained(new / name)
        tokenizer.save_pretrained(new / name)
    save_statistics(new / "critic", 0.0, 1.0, 16)
    rows = islice((row for row in assistant_world.rows("train") if len(row["prompt"]) == 1), 54)
    plain = [{**row, "prompt": row["prompt"][0]["content"]} for row in rows]
    (new / "rows.json").write_text(json.dumps(plain))
    new.rename(made)
    return made


def _flags(folder: Path, step: int, name: str, dtype: str, stage: int, lora: int) -> list[str]:
    """Return the flags of a run that writes `folder / name`."""
    made = _made(folder)
    words = ["--data_path", str(made / "rows.json"), *DATA_FLAGS, "--dtype", dtype,
             "--data_output_path", str(folder / "cache"), "--output_dir", str(folder / name)]
    if step < 3:
        roles = {"": "actor"}
        words += [*SUPERVISED, *(["--lora_learning_rate", "1e-2"] if lora else [])]
    else:
        roles = {"actor_": "actor", "critic_": "critic"}
        words += PPO
    for prefix, model in roles.items():
        words += [f"--{prefix}model_name_or_path", str(made / model),
                  f"--{prefix}zero_stage", str(stage), f"--{prefix}lora_dim", str(lora)]
    return words


def _run_here(step: int, words: list[str], kill_at: int = 0) -> None:
    """Run main() of a step in this process; with `kill_at` end it by SIGKILL after that step."""
    sys.argv = ["main.py", *words]
    if kill_at:
        torch.use_deterministic_algorithms(not distributed.on_cpu(), warn_only=True)
    with _signal_after(kill_at, signal.SIGKILL):
        STEPS[step].main()


@contextlib.contextmanager
def _signal_after(step: int, number: signal.Signals) -> Iterator[None]:
    """Send this process a signal when a step (step 3: a PPO iteration) has been logged."""
    log = Tracker.log

    def log_and_send(self: Tracker, metrics: Any, now: int) -> None:
        log(self, metrics, now)
        if now == step:
            os.kill(os.getpid(), number)

    with mock.patch.object(Tracker, "log", log_and_send):
        yield


def _trained(
    folder: Path, step: int, name: str, *more: str, dtype: str, stage: int = 0, lora: int = 0,
) -> list[dict[str, Any]]:
    """Run a step, check that all metrics are finite, and return them."""
    shutil.rmtree(folder / name, ignore_errors=True)
    _run_here(step, [*_flags(folder, step, name, dtype, stage, lora), *more])
    return _metrics(folder / name)


def _metrics(output: Path) -> list[dict[str, Any]]:
    rows = records.read_rows(output / records.METRICS_FILE)
    if not rows:
        raise Wrong(f"no metrics in {output.name}")
    for row in rows:
        for name, value in row.items():
            # In fp16 a step whose gradient overflows has no finite norm, and lowers the loss scale.
            finite = not isinstance(value, float) or math.isfinite(value)
            if not finite and not name.startswith("grad_norm"):
                raise Wrong(f"{output.name}: {name} is {value} at step {row['step']}")
    return rows


def _require(dtype: str) -> None:
    """Skip a precision that this device does not have."""
    try:
        distributed.resolve_dtype(dtype)
    except UserError as error:
        raise Skip(str(error).removeprefix(f"--dtype {dtype}: ")) from error


def _loads(path: Path, scores: bool = False) -> None:
    """Check that transformers loads an export and that its outputs are finite."""
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = kind.from_pretrained(path).to(distributed.device()).eval()
    ids = torch.arange(10, 18, device=distributed.device()).unsqueeze(0)
    with torch.no_grad():
        if not model(input_ids=ids).logits.isfinite().all():
            raise Wrong(f"the exported model {path.name} gives non-finite outputs")


# ------------------------------------------------------------------- machine and doctor


def machine(folder: Path) -> Found:
    """Describe versions and devices for the JSON file; make the models and data of the rows."""
    libraries = {}
    for name in (*records.LIBRARIES, "flash-attn", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    _made(folder)
    accelerator, devices = get_accelerator(), []
    driver = None
    if not distributed.on_cpu():
        for index in range(accelerator.device_count()):
            devices.append({"name": torch.cuda.get_device_name(index)
                            if accelerator.device_name() == "cuda" else accelerator.device_name(),
                            "gb": accelerator.total_memory(index) / 1e9})
        with contextlib.suppress(OSError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0]
    precisions = []
    for dtype in PRECISIONS:
        with contextlib.suppress(Skip):
            _require(dtype)
            precisions.append(dtype)
    return distributed.describe_devices(), {
        "python": sys.version.split()[0], "libraries": libraries, "cuda": torch.version.cuda,
        "driver": driver, "devices": devices, "precisions": precisions,
        "cores": distributed.usable_cores(), "free_host_gb": distributed.free_memory()[1] / 1e9,
    }


def run_doctor(folder: Path) -> Found:
    """Run the doctor's checks."""
    rows = doctor.examine({"temporary folder": folder})
    failed = [f"{row.name}: {row.found}" for row in rows if row.status == doctor.FAIL]
    if failed:
        raise Wrong("; ".join(failed))
    warnings = [f"{row.name}: {row.found}" for row in rows if row.status == doctor.WARN]
    return (f"{len(rows)} checks; warnings: {'; '.join(warnings) or 'none'}",
            {row.name: row.found for row in rows})


# ------------------------------------------------------------------- training


def steps(folder: Path, step: int, dtype: str) -> Found:
    """Train at ZeRO 0 to 3, full and with LoRA; losses fall, exports load."""
    _require(dtype)
    figures: dict[str, Any] = {}
    for stage in STAGES:
        for lora in (0, LORA_DIM):
            case, name = f"ZeRO {stage}, LoRA {lora}", f"step{step}"
            check = _learns if step < 3 else _starts_right
            more = ["--num_train_epochs", "4"]
            if step == 3:  # the actor changes so much that stale weights would show in decoding
                rate = "--actor_lora_learning_rate" if lora else "--actor_learning_rate"
                more += ["--max_steps", "6", rate, "1e-2" if lora else "1e-3"]
            rows = _trained(folder, step, name, *more, dtype=dtype, stage=stage, lora=lora)
            figures[case] = check(rows, case, dtype)
            for export in ("",) if step < 3 else ("actor", "critic"):
                _loads(folder / name / export, scores=step == 2 or export == "critic")
    if step == 3:
        largest = max(figures.values(), key=lambda seen: seen["decoding_difference_mean"])
        return f"{len(figures)} runs; decoding differs by at most " \
               f"{largest['decoding_difference_mean']:.1e} nats on average", figures
    ends = min(figures.values(), key=lambda seen: seen["first"] - seen["last"])
    return (f"{len(figures)} runs; the smallest fall of the loss: {ends['first']:.2f} to "
            f"{ends['last']:.2f}"), figures


def _learns(rows: list[dict[str, Any]], case: str, dtype: str) -> dict[str, float]:
    """Check that the mean loss of the last two steps is below that of the first two."""
    first, last = (sum(row["loss"] for row in part) / 2 for part in (rows[:2], rows[-2:]))
    if not last < first:
        raise Wrong(f"{case}: the loss does not fall ({first:.3f} to {last:.3f})")
    return {"first": first, "last": last}


def _starts_right(rows: list[dict[str, Any]], case: str, dtype: str) -> dict[str, float]:
    """Check PPO iterations by the limits of the alarms; return what the first one measured."""
    exact = EXACT if distributed.world_size() == 1 else CLOSE
    alarms = Alarms(exact if dtype == "fp32" else HALF)
    for row in rows:
        for message in alarms.check(row).values():
            raise Wrong(f"{case}, iteration {row['step']}: {message}")
    names = ("rollout/decoding_difference_mean", "rollout/decoding_difference_max",
             "policy/first_log_ratio_mean", "policy/first_log_ratio_max")
    return {name.partition("/")[2]: rows[0][name] for name in names}


def offload(folder: Path) -> Found:
    """Train with --offload at ZeRO 2 and 3; DeepSpeed compiles its optimizer at first use."""
    try:
        optimizer.require_offloading()
    except UserError as error:
        raise Skip(str(error)) from error
    dtype, figures = _half(), {}
    more = ("--num_train_epochs", "4", "--offload")
    for stage in (2, 3):
        rows = _trained(folder, 1, "offload", *more, dtype=dtype, stage=stage)
        figures[f"step 1, ZeRO {stage}"] = _learns(rows, f"ZeRO {stage}", dtype)
    rows = _trained(folder, 3, "offload", "--max_steps", "4", "--offload", dtype=dtype, stage=3,
                    lora=LORA_DIM)
    figures["step 3, ZeRO 3, LoRA"] = _starts_right(rows, "step 3", dtype)
    return f"step 1 at ZeRO 2 and 3, step 3 at ZeRO 3 with LoRA, {dtype}", figures


def _half() -> Any:
    """Return bf16, or fp16 on a device without it."""
    return "bf16" if distributed.has_bf16() or distributed.on_cpu() else "fp16"


def curve(folder: Path, dtype: str) -> Found:
    """Compare the losses of 20 optimizer steps with those in fp32 on the same rows."""
    _require(dtype)
    losses = {}
    for kind in ("fp32", dtype):
        name = f"curve-{kind}"
        if kind != "fp32" or not (folder / name).exists():
            _trained(folder, 1, name, "--num_train_epochs", "10", dtype=kind)
        losses[kind] = [row["loss"] for row in _metrics(folder / name)]
    first, expected, found = (sum(part) / 2 for part in (
        losses["fp32"][:2], losses["fp32"][-2:], losses[dtype][-2:]))
    said = f"{first:.3f} at the start; after {len(losses[dtype])} steps {found:.3f}, in fp32 " \
           f"{expected:.3f}"
    if not expected < first - 0.5:
        raise Wrong(f"fp32 does not learn: {said}")
    if not abs(found - expected) <= 0.05 * (first - expected):
        raise Wrong(f"more than 5 % of the fall apart: {said}")
    return said, losses


# ------------------------------------------------------------------- generation


def _actor(folder: Path, stage: Any, lora: int) -> tuple[Engine, ChatFormat]:
    """Build the actor in fp32 as step 3 does, with an adapter that changes it."""
    path = str(_made(folder) / "actor")
    tokenizer = load_tokenizer(path)
    engine, _ = build_trained(
        partial(load_causal_lm, tokenizer=tokenizer),
        RoleConfig(model_name_or_path=path, learning_rate=1e-5, lora_learning_rate=1e-4,
                   zero_stage=stage, lora_dim=lora),
        loading=LoadingConfig(dtype="fp32"), adapters=AdapterConfig(only_optimize_lora=lora > 0),
        engine=EngineConfig(), schedule=ScheduleConfig(), micro_batch_size=1, total_steps=1)
    torch.manual_seed(1)
    for name, parameter in engine.module.named_parameters():
        if "lora_B" in name:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                nn.init.normal_(parameter, std=0.1)
    return engine, ChatFormat(tokenizer)


def _prompts(chat: ChatFormat, count: int) -> PromptBatch:
    texts = islice(assistant_world.pretraining_texts(3), count)
    rows = [{"prompt_ids": chat.prompt_ids(messages)} for messages, _ in texts]
    return collate_prompts(rows, chat.pad_id).to(distributed.device())


@torch.no_grad()
def _greedy(model: nn.Module, rollout: Rollout) -> list[bool]:
    """Return for each response whether the plain forward pass would have generated it greedily.

    Each row alone, without padding and cache: the logits before each token must be largest there.
    """
    model.eval()
    right, count = [], rollout.response_length
    for row, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True):
        ids = row[mask.bool()].unsqueeze(0)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        right.append(bool(logits[-count - 1 : -1].argmax(-1).equal(ids[0, -count:])))
    return right


def _require_step(hybrid: HybridEngine, name: str, case: str) -> None:
    """Check that the hybrid engine has decoded with this step, and has not fallen back."""
    used = getattr(hybrid._fast_step, "name", "none")
    if used != name:
        raise Wrong(f"{case}: decoded with {used} instead of {name}; the log says why")


def decoding(folder: Path, step: str) -> Found:
    """Compare the greedy tokens of the hybrid engine with those of the plain forward pass."""
    on_cpu = distributed.on_cpu()
    if step == "graph" and on_cpu:
        raise Skip("a CUDA graph needs a GPU")
    if step == "compiled" and not on_cpu:
        raise Skip("the compiled decoding step is for a CPU")
    if step == "compiled" and optimizer.missing_build_tools():
        raise Skip(f"no {' and no '.join(optimizer.missing_build_tools())}")
    count, tokens, cases = 8, 16, []
    never = torch.tensor([-1], device=distributed.device())
    for stage, lora in ((0, 0), (0, LORA_DIM), (3, 0), (3, LORA_DIM)):
        engine, chat = _actor(folder, stage, lora)
        prompts = _prompts(chat, count)
        for enabled in {"eager": (False,) if on_cpu else (False, True)}.get(step, (True,)):
            case = f"ZeRO {stage}, LoRA {lora}, hybrid engine {'on' if enabled else 'off'}"
            config = HybridEngineConfig(
                enable_hybrid_engine=enabled, enable_cuda_graph=step == "graph")
            hybrid = HybridEngine(engine, config, slots=4)
            rollout = hybrid.generate(
                prompts, SamplingConfig(tokens, temperature=0), never, chat.pad_id)
            if enabled:
                _require_step(hybrid, STEP_NAMES[step], case)
            wrong = _greedy(engine.module, rollout).count(False)
            if wrong:
                raise Wrong(f"{case}: other tokens in {wrong} of {count} responses")
            cases.append(case)
    return (f"{len(cases)} cases: {count} responses of {tokens} tokens as by the plain forward "
            "pass"), {"cases": cases}


def logprobs(folder: Path, dtype: str, attention: str = "sdpa") -> Found:
    """Compare log-probabilities of decoding with the training's, and the first update's ratios."""
    _require(dtype)
    if attention.startswith("flash"):
        if distributed.on_cpu():
            raise Skip("flash attention needs a GPU")
        if importlib.util.find_spec("flash_attn") is None:
            raise Skip("flash attention is not installed: pip install flash-attn")
    rows = _trained(
        folder, 3, "logprobs", "--max_steps", "8", "--generation_batches", "2",
        "--max_answer_seq_len", "32", "--attn_implementation", attention, dtype=dtype)
    seen = _starts_right(rows, attention, dtype)
    return (f"decoding: mean {seen['decoding_difference_mean']:.1e}, max "
            f"{seen['decoding_difference_max']:.1e}; first log-ratio: mean "
            f"{seen['first_log_ratio_mean']:.1e}, max {seen['first_log_ratio_max']:.1e} (nats)"
            ), seen


# ------------------------------------------------------------------- processes and checkpoints


def _environment(**changes: str) -> dict[str, str]:
    """Return the environment for a process that is no rank of this one's group."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    return {**kept, **changes}


def _start(folder: Path, runs: list[Any], *before: str, **changes: str) -> subprocess.Popen:
    """Start a process that runs steps in turn; `before` are words before this script."""
    file = folder / f"runs-{uuid.uuid4().hex}.json"
    file.write_text(json.dumps(runs))
    return subprocess.Popen([sys.executable, *before, __file__, str(file)],
                            env=_environment(**changes))


def _difference(one: Path, other: Path, start: Path) -> float:
    """Return the distance of two exports, relative to how far the first is from its start."""
    def norm(a: Path, b: Path) -> float:
        weights = [load_file(path / "model.safetensors") for path in (a, b)]
        return math.sqrt(sum((weights[0][name].double() - weights[1][name].double())
                             .square().sum().item() for name in weights[0]))

    return norm(other, one) / norm(one, start)


def two_ranks(folder: Path) -> Found:
    """Compare two ranks, started by the launcher, with one rank of twice the batch size."""
    if not distributed.on_cpu() and get_accelerator().device_count() < 2:
        raise Skip("there is one GPU; two ranks need two")
    # Small weights would otherwise stay whole under ZeRO-3.
    overrides = folder / "sharded.json"
    overrides.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = ["--deepspeed_config", str(overrides)]
    runs = [(1, [*_flags(folder, 1, f"two-{stage}", "fp32", stage, 0), *more,
                 "--per_device_train_batch_size", "4"]) for stage in (2, 3)]
    ranks = _start(folder, runs, str(BOOTSTRAP), "--num_gpus", "2")
    figures = {}
    _trained(folder, 1, "one", *more, dtype="fp32", stage=2)
    expected = _metrics(folder / "one")
    if ranks.wait():
        raise Wrong(f"the launcher ended with exit code {ranks.returncode}; see the log")
    for stage in (2, 3):
        found = _metrics(folder / f"two-{stage}")
        for name in ("loss", "grad_norm"):
            figures[f"ZeRO {stage}, {name}"] = worst = max(
                abs(a[name] / b[name] - 1) for a, b in zip(found, expected, strict=True))
            if not worst < 1e-3:
                raise Wrong(f"ZeRO {stage}: {name} differs from one rank's by {worst:.1e}")
        apart = _difference(folder / "one", folder / f"two-{stage}", _made(folder) / "actor")
        figures[f"ZeRO {stage}, weights"] = apart
        if not apart < 1e-2:
            raise Wrong(f"ZeRO {stage}: the weights differ from one rank's by {apart:.1e} of "
                        "the update")
    return f"as one rank; the largest relative difference is {max(figures.values()):.1e}", figures


def one_visible_device(folder: Path) -> Found:
    """Run tasks that see one device each, as srun starts them: LOCAL_RANK exceeds their number."""
    if distributed.on_cpu():
        raise Skip("needs a GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible == [""]:
        visible = [str(i) for i in range(get_accelerator().device_count())]
    two = len(visible) > 1
    port = str(launching.choose_port(0))
    runs = [(step, [*_flags(folder, step, f"visible-{step}", _half(), stage, 0), *more])
            for step, stage, more in ((1, 2, ()), (3, 3, ("--max_steps", "2")))]
    # NCCL refuses two ranks on one device: with one, a single task has local rank 1.
    tasks = [
        _start(folder, runs, CUDA_VISIBLE_DEVICES=visible[rank], RANK=str(rank),
               LOCAL_RANK=str(rank if two else 1), WORLD_SIZE=str(1 + two),
               LOCAL_SIZE=str(1 + two), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(1 + two)
    ]
    if any([task.wait() for task in tasks]):
        raise Wrong(f"the tasks ended with exit codes {[task.returncode for task in tasks]}; "
                    "see the log")
    for step in (1, 3):
        _metrics(folder / f"visible-{step}")
    said = "two tasks" if two else "one task with LOCAL_RANK 1 (two need two GPUs)"
    return f"{said}: step 1 at ZeRO 2, step 3 at ZeRO 3", {"tasks": len(tasks)}


RESUME = ("--num_train_epochs", "4", "--save_steps", "2", "--attn_implementation", "eager")


def _deterministic(check: Callable[[Path], Found]) -> Callable[[Path], Found]:
    """Run a check that compares two runs with PyTorch's deterministic algorithms.

    On a GPU the backward passes of other attention implementations have none, hence eager.
    """
    def run(folder: Path) -> Found:
        # A CPU adds in one order anyway, and faster.
        torch.use_deterministic_algorithms(not distributed.on_cpu(), warn_only=True)
        try:
            return check(folder)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


@_deterministic
def killed(folder: Path) -> Found:
    """End step 1 by SIGKILL, resume it, and compare with a run that was not killed."""
    words = [*_flags(folder, 1, "killed", _half(), 3, 0), *RESUME]
    process = _start(folder, [(1, words, 5)])
    whole = _trained(folder, 1, "whole", *RESUME, dtype=_half(), stage=3)
    if process.wait() != -signal.SIGKILL:
        raise Wrong(f"the run ended with exit code {process.returncode} instead of SIGKILL")
    _run_here(1, [*words, "--resume_from_checkpoint", "latest"])
    return _same_end(folder, "killed", "whole", whole, "step 1, ZeRO 3, killed after step 5")


def _same_end(folder: Path, name: str, other: str, whole: list[dict], case: str) -> Found:
    """Compare a resumed run with a whole one; on a CPU both must be the same, bit for bit."""
    role = "actor" if (folder / name / "actor").exists() else ""
    apart = _difference(folder / other / role, folder / name / role, _made(folder) / "actor")
    if len(_metrics(folder / name)) != len(whole):
        raise Wrong(f"{case}: the metrics do not hold every step once")
    limit = 0.0 if distributed.on_cpu() else 0.2  # not all of a GPU's kernels can be made so
    if not apart <= limit:
        raise Wrong(f"{case}: the result differs by {apart:.1e} of the update (allowed: {limit})")
    return f"{case}: differs by {apart:.1e} of the update", {"difference": apart}


@_deterministic
def stopped(folder: Path) -> Found:
    """End step 3 by SIGTERM, resume it, and compare with a run that was not stopped."""
    dtype, more = _half(), ["--max_steps", "8", *RESUME]
    whole = _trained(folder, 3, "unstopped", *more, dtype=dtype, lora=LORA_DIM)
    words = [*_flags(folder, 3, "stopped", dtype, 0, LORA_DIM), *more]
    _stop_after(2, 3, words)
    _run_here(3, [*words, "--resume_from_checkpoint", "latest"])
    return _same_end(folder, "stopped", "unstopped", whole,
                     "step 3, LoRA, stopped after iteration 2")


def _stop_after(number: int, step: int, words: list[str]) -> None:
    """Run a step that a SIGTERM stops after an optimizer step (step 3: an iteration)."""
    try:
        with _signal_after(number, signal.SIGTERM):
            _run_here(step, words)
    except TrainingStopped:
        return
    raise Wrong("SIGTERM has not stopped the run")


@_deterministic
def moved(folder: Path) -> Found:
    """Resume checkpoints at another ZeRO stage, from 0 to 3 and back; losses go on from there."""
    dtype = _half()
    whole = _trained(folder, 1, "unmoved", *RESUME, dtype=dtype)
    again: list[str] = []
    for end, stage in ((3, 0), (6, 3), (0, 0)):
        words = [*_flags(folder, 1, "moved", dtype, stage, 0), *RESUME, *again]
        if end:
            _stop_after(end, 1, words)
        else:
            _run_here(1, words)
        again = ["--resume_from_checkpoint", "latest"]
    losses = [[row["loss"] for row in rows] for rows in (_metrics(folder / "moved"), whole)]
    worst = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    if not worst < 0.03:
        raise Wrong(f"ZeRO 0, 3, 0 in {dtype}: losses {losses[0]}, unmoved {losses[1]}")
    return (f"ZeRO 0, 3, 0 in {dtype}: losses differ from those of a run that was not moved by "
            f"{worst:.1e} at most"), {"moved": losses[0], "unmoved": losses[1]}


# ------------------------------------------------------------------- memory and speed


def memory(folder: Path) -> Found:
    """Compare the memory of two sizes of a model with the plan that is made before a run."""
    on_cpu = distributed.on_cpu()
    _require_memory(16e9)
    width, layers = (256, (2, 8)) if on_cpu else (2048, (2, 6))
    figures: dict[str, Any] = {}
    said = []
    for stage in (2, 3):
        small, large = (_bytes(folder, width, count, stage) for count in layers)
        # The difference of two sizes: DeepSpeed's buffers have a fixed size.
        plan = large["planned"] - small["planned"]
        ratios = {name: (large[name] - small[name]) / plan for name in small}
        figures[f"ZeRO {stage}"] = {"small": small, "large": large, "of plan": ratios}
        said.append(f"ZeRO {stage}: {ratios['held']:.2f} of the plan"
                    + ("" if on_cpu else f", peak {ratios['peak']:.2f}"))
        if not ratios["held"] <= 1.25:
            raise Wrong(f"{said[-1]} (allowed: 1.25)")
    return "; ".join(said) + " (peak: needs a GPU)" * on_cpu, figures


def _require_memory(need: float) -> None:
    """Skip a check for which a GPU has too few free bytes."""
    free = distributed.free_memory()[0]
    if not distributed.on_cpu() and free < need:
        raise Skip(f"needs {need / 1e9:.0f} GB of free GPU memory, and {free / 1e9:.1f} are free")


def _held() -> int:
    """Return the bytes of all tensors on the device; on a CPU those that Python knows."""
    gc.collect()
    if not distributed.on_cpu():
        return get_accelerator().memory_allocated()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, nn.Parameter)}
    return sum(storages.values())


def _bytes(folder: Path, width: int, layers: int, stage: Any) -> dict[str, float]:
    """Return planned bytes of a training, those held before an optimizer step, and their peak."""
    path = folder / f"width-{width}-{layers}"
    if not path.exists():
        heads = width // 64
        config = LlamaConfig(
            vocab_size=1024, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            tie_word_embeddings=False)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    role = RoleConfig(model_name_or_path=str(path), learning_rate=1e-5, zero_stage=stage)
    loading, adapters = LoadingConfig(dtype=_half()), AdapterConfig(only_optimize_lora=False)
    plan = preflight.Planned(role, loading, adapters, EngineConfig())
    accelerator, before = get_accelerator(), _held()
    accelerator.empty_cache()
    accelerator.reset_peak_memory_stats()
    tokenizer = load_tokenizer(str(_made(folder) / "actor"))
    engine, _ = build_trained(
        partial(load_causal_lm, tokenizer=tokenizer), role, loading=loading, adapters=adapters,
        engine=EngineConfig(), schedule=ScheduleConfig(), micro_batch_size=1, total_steps=2)
    ids = torch.arange(10, 18, device=distributed.device()).unsqueeze(0)
    batch = TokenBatch(ids, torch.ones_like(ids), ids)
    for _ in range(2):  # the optimizer's states are made by the first step
        accumulate(engine, [batch], partial(step1.loss, engine), global_weight([batch]))
        held = _held() - before
        engine.step()
    found = {"planned": memory_plan.held(plan), "held": held}
    if not distributed.on_cpu():
        found["peak"] = accelerator.max_memory_allocated() - before
    engine.destroy()
    return found


def speed(folder: Path, rows: int) -> Found:
    """Measure tokens per second of generation against transformers' `generate`."""
    _made(folder)
    _require_memory(10e9)
    on_cpu, device = distributed.on_cpu(), distributed.device()
    sizes = (64, 128, 2, 4, 2, 512) if on_cpu else (2048, 8192, 16, 32, 8, 32000)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")
    torch.manual_seed(0)
    dtype = distributed.resolve_dtype("fp32" if on_cpu else _half())
    with device:
        model = LlamaForCausalLM(LlamaConfig(**dict(zip(names, sizes, strict=True)))).to(dtype)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 33, (rows,), generator=generator).tolist()
    prompts = PromptBatch(*pad([list(range(10, 10 + n)) for n in lengths], 0, left=True))
    prompts, tokens = prompts.to(device), 32 if on_cpu else 128
    # What the hybrid engine needs of an engine without ZeRO; no optimizer takes memory.
    engine: Any = SimpleNamespace(module=model, zero_optimization_stage=lambda: 0)
    never = torch.tensor([-1], device=device)

    def theirs() -> None:
        model.generate(
            input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, eos_token_id=None,
            pad_token_id=0)

    sampler = torch.Generator(device=device).manual_seed(0)
    runs: dict[str, Callable[[], object]] = {"generate": theirs}
    hybrids = {}
    for name in ["compiled" if on_cpu else "eager"] + ["graph"] * (not on_cpu):
        config = HybridEngineConfig(enable_hybrid_engine=True, enable_cuda_graph=name == "graph")
        hybrids[name] = HybridEngine(engine, config, slots=rows)
        runs[name] = partial(
            hybrids[name].generate, prompts, SamplingConfig(tokens), never, 0, sampler)
    figures = {name: rows * tokens / _seconds(run) for name, run in runs.items()}
    for name, hybrid in hybrids.items():
        _require_step(hybrid, STEP_NAMES[name], f"{rows} rows")
    return "; ".join(f"{name} {figure:.0f} tokens/s" for name, figure in figures.items()), figures


def _seconds(run: Callable[[], object]) -> float:
    """Return the shorter time of two runs, after one that does not count."""
    times = []
    for _ in range(3):
        get_accelerator().synchronize()
        start = time.perf_counter()
        run()
        get_accelerator().synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _run_all() -> None:
    """Run the steps of the file that is the last argument, in turn."""
    for run in json.loads(Path(sys.argv[-1]).read_text()):
        _run_here(*run)


if __name__ == "__main__":
    console.run_main(_run_all)
