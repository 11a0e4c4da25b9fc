"""The plan of `--dry_run` beside the memory that runs have taken, for settings of all steps.

    python benchmarks/memory.py --model output/smollm2-135m            # a Markdown table

Each setting is planned by a process with `--dry_run`, and then run for a few optimizer steps (PPO
iterations); measured is the peak resident memory of its largest rank. All sequences are as long as
the limits. glibc gives tensors back at once (MALLOC_MMAP_THRESHOLD_), as the plan assumes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alpaca_rlhf.demo.tiny_llama import ensure_tiny_llama
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.model.reward_model import save_statistics

ROOT = Path(__file__).resolve().parents[1]
STEPS = {1: "step1_supervised_finetuning", 2: "step2_reward_model_finetuning",
         3: "step3_rlhf_finetuning"}
LORA1, LORA3 = "--lora_dim 16", "--actor_lora_dim 16 --critic_lora_dim 16"
PPO = ("--per_device_generation_batch_size 8 --per_device_training_batch_size 8 --eval_prompts 0 "
       "--enable_hybrid_engine")
LEAN = ("--per_device_generation_batch_size 4 --per_device_training_batch_size 2 --eval_prompts 0 "
        "--gradient_accumulation_steps 2 --enable_hybrid_engine --actor_gradient_checkpointing "
        "--critic_gradient_checkpointing")


class Setting(NamedTuple):
    """A step, a model ("tiny" or "given"), ranks, and flags."""

    step: int
    model: str
    ranks: int
    flags: str
    shares: bool = False


def _stage(stage: int) -> str:
    return f"--actor_zero_stage {stage} --critic_zero_stage {stage}"


SETTINGS = {
    "tiny-full": Setting(1, "tiny", 1, ""),
    "tiny-lora-z2-2": Setting(1, "tiny", 2, f"{LORA1} --zero_stage 2"),
    "tiny-ppo-z3-2": Setting(3, "tiny", 2, f"{PPO} {_stage(3)}"),
    "sft-full": Setting(1, "given", 1, ""),
    "sft-full-z2-2": Setting(1, "given", 2, "--zero_stage 2"),
    "sft-full-z3-2": Setting(1, "given", 2, "--zero_stage 3"),
    "sft-lora-checkpointing": Setting(1, "given", 1, f"{LORA1} --gradient_checkpointing"),
    "reward-lora-z2": Setting(2, "given", 1, f"{LORA1} --zero_stage 2"),
    "ppo-full": Setting(3, "given", 1, PPO),
    "ppo-lora": Setting(3, "given", 1, f"{PPO} {LORA3}"),
    "ppo-lora-z2-2": Setting(3, "given", 2, f"{PPO} {LORA3} {_stage(2)}"),
    "ppo-shared": Setting(3, "given", 1, f"{PPO} {LORA3} --share_backbone", shares=True),
    "lean-full": Setting(3, "given", 1, LEAN),
    "lean-shared": Setting(3, "given", 1, f"{LEAN} {LORA3} --share_backbone", shares=True),
}
LENGTHS = {1: "--max_seq_len 256 --per_device_train_batch_size 4 --eval_iters 1",
           2: "--max_seq_len 256 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 "
              "--eval_iters 1",
           3: "--max_prompt_seq_len 256 --max_answer_seq_len 64"}


def main() -> None:
    """Plan and run every setting, and print the table."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a Hugging Face folder of a causal LM")
    made.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    made.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    args = made.parse_args()
    print("| setting | ranks | plan GB | phase | measured GB | plan / measured |\n"
          "| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bases = {"tiny": str(ensure_tiny_llama(prepare.cache_home(None))),
                 "given": str(Path(args.model).resolve())}
        for name in args.settings:
            print(row(name, SETTINGS[name], bases, args.dtype, Path(folder)), flush=True)


def row(name: str, setting: Setting, bases: dict[str, str], dtype: str, folder: Path) -> str:
    """Plan and run a setting; return its row of the table."""
    base = bases[setting.model]
    words = [*setting.flags.split(), *LENGTHS[setting.step].split(), "--data_path",
             str(_data(folder)), "--dtype", dtype, "--max_steps", "2", "--data_output_path",
             str(folder / "cache"), "--output_dir", str(folder / name)]
    if setting.step == 3:
        actor, critic = (_policy(setting, base, folder), _critic(setting, base, folder))
        words += ["--actor_model_name_or_path", actor, "--critic_model_name_or_path", critic]
    else:
        words += ["--model_name_or_path", base]
    planned, text = _run(setting, [*words, "--dry_run"])
    found = re.search(r"^(\w+) decides: ([\d.]+) GB", text, re.MULTILINE)
    if planned is None or found is None:
        return f"| {name} | {setting.ranks} | skipped: {text.strip().splitlines()[-1]} | | | |"
    measured, text = _run(setting, words)
    if measured is None:
        return f"| {name} | {setting.ranks} | {found[2]} | {found[1]} | failed: {text[-200:]!r} | |"
    ratio = float(found[2]) / measured
    return (f"| {name}: step {setting.step} {setting.flags} | {setting.ranks} | {found[2]} "
            f"| {found[1]} | {measured:.2f} | {ratio:.2f} |")


def _data(folder: Path) -> Path:
    """Write pairs that are longer than all limits."""
    path = folder / "long.jsonl"
    if not path.exists():
        rows = [{"prompt": f"Count from {i}: " + " ".join(map(str, range(i, i + 30))),
                 "chosen": " ".join(map(str, range(i, i + 300))),
                 "rejected": " ".join(map(str, range(i + 1, i + 301)))} for i in range(400)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _policy(setting: Setting, base: str, folder: Path) -> str:
    """Return the actor's folder: the base, or a model with an adapter that step 1 has written."""
    return _adapted(1, setting, base, folder) if setting.shares else base


def _critic(setting: Setting, base: str, folder: Path) -> str:
    """Return the folder of a reward model made of the base."""
    if setting.shares:
        return _adapted(2, setting, base, folder)
    path = folder / f"critic-{setting.model}"
    if not path.exists():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(base).save_pretrained(path)
        save_statistics(path, 0.0, 1.0, 10)
    return str(path)


def _adapted(step: int, setting: Setting, base: str, folder: Path) -> str:
    """Train an adapter with a step, and return the folder that it has written."""
    path = folder / f"adapted-{step}"
    if not path.exists():
        words = [*LORA1.split(), *LENGTHS[step].split(), "--data_path", str(_data(folder)),
                 "--max_steps", "1", "--model_name_or_path", base, "--output_dir", str(path),
                 "--data_output_path", str(folder / "cache"), "--dtype", "fp32"]
        _run(Setting(step, setting.model, 1, ""), words)
    return str(path)


def _run(setting: Setting, words: list[str]) -> tuple[float | None, str]:
    """Run a step; return the peak GB of its largest process, or None, and what it printed."""
    main_file = ROOT / "alpaca_rlhf/training_model" / STEPS[setting.step] / "main.py"
    command = [sys.executable, str(main_file), *words]
    if setting.ranks > 1:
        launcher = ROOT / "alpaca_rlhf/training_model/my_deepspeed.py"
        command = [sys.executable, str(launcher), "--num_gpus", str(setting.ranks), *command[1:]]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "PYTHONPATH": str(ROOT),
                                "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        peak = 0
        while process.poll() is None:
            for one in [process.pid, *_children(process.pid)]:
                peak = max(peak, _peak(one))
            time.sleep(0.1)
        output.seek(0)
        return (peak / 1e9 if process.returncode == 0 else None), output.read()


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _peak(pid: int) -> int:
    """Return the peak resident bytes of a process so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
