"""Golden curves: what the three steps learn, and how fast, as a band for each figure.

    python tests/golden_curves.py                        record the bands of the short runs again
    python tests/golden_curves.py output/seed1 output/seed2 output/seed3   and of whole pipelines
    python -m pytest tests/test_golden_curves.py              short runs at ZeRO 0 and 3
    python -m pytest tests/test_golden_curves.py -m slow      and 2, and the embedded pipeline

Short runs train a small random model on the embedded data. A change of the libraries or of the code
that changes learning leaves a band; rounding, which differs between processors, does not.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.training_model.step3_rlhf_finetuning import main as step3

FILE = Path(__file__).with_suffix(".json")
SEEDS = (1, 2, 3)
STEPS = 40  # optimizer steps of steps 1 and 2
SUPERVISED = ["--max_steps", STEPS, "--per_device_train_batch_size", 8, "--max_seq_len", 96,
              "--eval_iters", 4, "--learning_rate", 1e-2, "--num_warmup_steps", 4]
PPO = ["--max_steps", 32, "--per_device_generation_batch_size", 32, "--ppo_epochs", 2,
       "--per_device_training_batch_size", 8, "--max_answer_seq_len", 12, "--eval_prompts", 0,
       "--lr_scheduler_type", "constant", "--actor_learning_rate", 3e-3, "--max_prompt_seq_len", 96,
       "--critic_learning_rate", 3e-3, "--missing_eos_penalty", 0]


def run(main: Any, output: Path, *words: Any) -> list[dict[str, float]]:
    """Run a step in this process, and return its metrics, a row for each step or iteration."""
    command = ["main.py", *map(str, words), "--output_dir", str(output)]
    with mock.patch.object(sys, "argv", command), mock.patch.dict(os.environ), \
            contextlib.redirect_stdout(io.StringIO()):
        main.main()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def mean(rows: list[dict[str, float]], name: str) -> float:
    """Return the mean of a metric over rows."""
    return sum(row[name] for row in rows) / len(rows)


def figures(models: Path, work: Path, seed: int, stage: int) -> dict[str, float]:
    """Return the figures of a short run of the three steps.

    Args:
        models: folder with random models, `actor` and `critic`.
        work: an empty folder.
        seed, stage: of the run; ZeRO stage.
    """
    # Longer rows are left out: how a prompt is cut is held elsewhere.
    shared = ["--seed", seed, "--data_output_path", models / "cache", "--overlong", "drop"]
    first = run(step1, work / "sft", "--model_name_or_path", models / "actor", *SUPERVISED,
                "--zero_stage", stage, *shared)
    second = run(step2, work / "reward", "--model_name_or_path", models / "actor", *SUPERVISED,
                 "--zero_stage", stage, *shared)
    third = run(step3, work / "ppo", "--actor_model_name_or_path", work / "sft",
                "--critic_model_name_or_path", work / "reward", *PPO, "--actor_zero_stage", stage,
                "--critic_zero_stage", stage, *shared)
    half = len(third) // 2
    return {
        "sft/loss_start": mean(first[:5], "loss"), "sft/loss_end": mean(first[-5:], "loss"),
        "sft/grad_norm": mean(first, "grad_norm"),
        "reward/loss_start": mean(second[:5], "loss"),
        "reward/loss_end": mean(second[-10:], "loss"),
        "reward/grad_norm": mean(second, "grad_norm"),
        "ppo/score_gain": mean(third[half:], "reward/normalized_mean") - mean(
            third[:1], "reward/normalized_mean"),
        "ppo/k1": mean(third[half:], "kl/k1"), "ppo/k3": mean(third[half:], "kl/k3"),
        "ppo/value_loss_fall": mean(third[half:], "value/loss") / mean(third[:1], "value/loss"),
        "ppo/clip_fraction": mean(third, "policy/clip_fraction"),
        "ppo/grad_norm_actor": mean(third, "grad_norm/actor"),
    }


def of_pipeline(output: Path) -> dict[str, float]:
    """Return the figures of a pipeline's output folder: README's, and the explained variance."""
    sft, reward, ppo = (json.loads((output / name / "results.json").read_text())
                        for name in ("actor", "critic", "final"))
    rows = [json.loads(line)
            for line in (output / "final" / "metrics.jsonl").read_text().splitlines()]
    before, after = ppo["before"], ppo["after"]
    tenth = len(rows) // 10
    return {
        "perplexity": sft["after"]["perplexity"], "accuracy": reward["after"]["accuracy"],
        "score_gain_in_std": (after["score"] - before["score"]) / before["score_std"],
        "gold_gain": after["gold"] - before["gold"], "eos": after["eos"], "k3": after["k3"],
        "gold_gain_in_training": mean(rows[-tenth:], "reward/gold_mean") - mean(
            rows[:tenth], "reward/gold_mean"),
        "explained_variance_min": min(row["value/explained_variance"] for row in rows[1:]),
        "clip_fraction": mean(rows, "policy/clip_fraction"),
    }


def band(name: str, values: list[float]) -> list[float]:
    """Return the range of the seeds' values, wider by half of it and 5 % on both sides.

    PPO has 15 %: a token that is sampled otherwise by a rounding changes all that follows.
    """
    low, high = min(values), max(values)
    slack = (high - low) / 2 + (0.15 if "ppo/" in name else 0.05) * max(abs(low), abs(high))
    return [round(low - slack, 4), round(high + slack, 4)]


def main() -> None:
    """Record the bands of the short runs, or of the pipelines in the folders that are given."""
    if sys.argv[1:]:
        record("embedded", [of_pipeline(Path(folder)) for folder in sys.argv[1:]])
        return
    from conftest import save_models

    from alpaca_rlhf.utils import distributed

    distributed.initialize(0)
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        record("short", [
            figures(Path(folder), Path(folder) / str(seed), seed, 0) for seed in SEEDS])


def record(kind: str, seeds: list[dict[str, float]]) -> None:
    """Write the bands of a kind of run, and print them beside the figures of each seed."""
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    recorded[kind] = {
        name: band(name, [one[name] for one in seeds]) for name in seeds[0]}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")
    for name, limits in recorded[kind].items():
        print(name, [round(one[name], 4) for one in seeds], limits)


if __name__ == "__main__":
    main()
