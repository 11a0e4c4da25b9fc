"""Time of the same optimizer steps of step 1 on a CPU: one rank against several.

    python benchmarks/launch.py [--steps 20] [--rows 64] [--ranks 2] [--repeats 3]

Each case is launched as users launch it and timed from the first optimizer step to the last,
without start-up: one rank with all cores; several ranks with the share of the cores that
my_deepspeed.py gives each; and several that use all cores each, which is torch's default. The model
is the embedded one, hardly pretrained (its weights do not matter here), and a step has the same
number of rows of the embedded data in each case. The fastest of the repeats counts, because other
work on the machine only adds to a time. A ratio below 1 means that several ranks are faster than
one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.utils.distributed import usable_cores

TRAINING = Path(__file__).resolve().parents[1] / "alpaca_rlhf" / "training_model"


def seconds(
    folder: Path, model: Path, ranks: int, options: argparse.Namespace, threads: int | None
) -> float:
    """Return the time from the first line of an optimizer step on the console to the last."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, TRAINING / "my_deepspeed.py", "--num_gpus", str(ranks),
         TRAINING / "step1_supervised_finetuning" / "main.py", "--model_name_or_path", model,
         "--data_output_path", folder, "--max_steps", str(options.steps), "--eval_iters", "1",
         "--per_device_train_batch_size", str(options.rows // ranks)],
        env=environment, stdout=subprocess.PIPE, text=True,
    )
    assert process.stdout is not None
    times = [time.perf_counter() for line in process.stdout if line.startswith("step ")]
    if process.wait():
        sys.exit(f"step 1 failed with exit code {process.returncode}")
    return times[-1] - times[0]


def main() -> None:
    """Run the three cases and print their times and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64, help="rows of a step, of all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = tiny_llama.Recipe(tokenizer_dialogues=1000, dialogues=16)
        model = tiny_llama.ensure_tiny_llama(folder / "model", recipe=recipe)
        cores = usable_cores()
        cases: dict[str, tuple[int, int | None]] = {
            "1 rank, all cores": (1, None),
            f"{options.ranks} ranks, cores shared out": (options.ranks, None),
            f"{options.ranks} ranks, all cores each": (options.ranks, cores),
        }
        times: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for case, (ranks, threads) in cases.items():
                times[case].append(seconds(folder, model, ranks, options, threads))
    print(f"{options.steps - 1} optimizer steps of {options.rows} rows on {cores} cores")
    best = {case: min(taken) for case, taken in times.items()}
    one_rank = next(iter(best.values()))
    for case, taken in best.items():
        print(f"{case:<28} {taken:6.1f} s   ratio {taken / one_rank:.2f}")


if __name__ == "__main__":
    main()
