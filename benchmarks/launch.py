"""Two ranks on a CPU against one: the same optimizer steps of step 1, each launched as users do.

    python benchmarks/launch.py [--steps 12] [--ranks 2]

Timed is the road from the first optimizer step to the last, start-up left out: of one rank with
all cores, of several with the share of the cores that my_deepspeed.py gives each, and of several
that each take all cores, as torch would have it without the bootstrap. The model is the embedded
one, hardly pretrained (its weights do not matter here), and a step is 16 rows of the embedded data
in each case. A ratio below 1 means that the ranks are together faster than the one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alpaca_rlhf.training_model.my_deepspeed import usable_cores
from alpaca_rlhf.utils.model import tiny_llama

TRAINING = Path(__file__).resolve().parents[1] / "alpaca_rlhf" / "training_model"
ROWS = 16


def seconds(folder: Path, model: Path, ranks: int, steps: int, threads: int | None) -> float:
    """From the first line of an optimizer step on the console to the last."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, TRAINING / "my_deepspeed.py", "--num_gpus", str(ranks),
         TRAINING / "step1_supervised_finetuning" / "main.py", "--model_name_or_path", model,
         "--data_output_path", folder, "--max_steps", str(steps), "--eval_iters", "1",
         "--per_device_train_batch_size", str(ROWS // ranks)],
        env=environment, stdout=subprocess.PIPE, text=True,
    )
    assert process.stdout is not None
    times = [time.perf_counter() for line in process.stdout if line.startswith("step ")]
    if process.wait():
        sys.exit(f"step 1 failed with exit code {process.returncode}")
    return times[-1] - times[0]


def main() -> None:
    """Run the three and print their times and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = tiny_llama.Recipe(tokenizer_dialogues=1000, dialogues=16)
        model = tiny_llama.ensure_tiny_llama(folder / "model", progress=False, recipe=recipe)
        cores = usable_cores()
        alone = seconds(folder, model, 1, options.steps, None)
        shared = seconds(folder, model, options.ranks, options.steps, None)
        crowded = seconds(folder, model, options.ranks, options.steps, cores)
    print(f"{options.steps - 1} optimizer steps of {ROWS} rows on {cores} cores")
    for what, taken in (("1 rank, all cores", alone),
                        (f"{options.ranks} ranks, cores shared out", shared),
                        (f"{options.ranks} ranks, all cores each", crowded)):
        print(f"{what:<28} {taken:6.1f} s   ratio {taken / alone:.2f}")


if __name__ == "__main__":
    main()
