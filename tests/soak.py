"""Kill runs at random moments, resume them, and compare the end with a run that was never killed.

    python tests/soak.py --steps 1 2 3 --ranks 1 2 --zero 0 2 3 --lora 0 4 --kills 20

The models are random ones of a few thousand weights, so that most of the time goes into starting. A
start is a fork of this process, which has imported everything but computed nothing. Half of the
kills come at any moment after the start, half while a checkpoint is being written. Of two ranks
both are killed, or one, and then the other must end, told to by SIGTERM as DeepSpeed's launcher
does. Every case prints a line, and the exit code is 1 if a weight differs, a checkpoint was found
broken, or a rank outlived the other.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

from conftest import save_models
from programs import STEPS, ended, exit_codes, fork, fork_ranks, import_libraries
from safetensors import safe_open

LONGEST_END = 30.0  # seconds that a rank may outlive another one
ROUNDING = 1e-4  # difference of a weight after a run on other ranks


@dataclass(frozen=True)
class Case:
    """One configuration."""

    step: int
    ranks: int
    stage: int
    lora: int

    def __str__(self) -> str:
        lora = f"LoRA {self.lora}" if self.lora else "all weights"
        return f"step {self.step}, {self.ranks} rank(s), ZeRO {self.stage}, {lora}"


def main() -> int:
    """Run all cases; 0 if all passed."""
    args = parser().parse_args()
    folder = Path(args.folder).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    prepare(folder)
    if args.move:
        passed = [
            move(Case(step, *origin, lora), Case(step, *goal, lora), folder, args)
            for step, lora in product(args.steps, args.lora)
            for origin, goal in permutations(product(args.ranks, args.zero), 2)
        ]
    else:
        draw = random.Random(args.seed)
        passed = [
            soak(Case(step, ranks, stage, lora), folder, args, draw)
            for step, ranks, stage, lora in product(args.steps, args.ranks, args.zero, args.lora)
            if ranks > 1 or stage == 0
        ]
    return 0 if all(passed) else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--folder", default="output/soak", help="is emptied first")
    made.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    made.add_argument("--zero", type=int, nargs="+", default=[0, 2, 3], help="on two ranks")
    made.add_argument("--lora", type=int, nargs="+", default=[0, 4], help="0: no LoRA")
    made.add_argument("--move", action="store_true",
                      help="do not kill: resume with other ranks and another ZeRO stage")
    made.add_argument("--kills", type=int, default=20)
    made.add_argument("--updates", type=int, default=24, help="optimizer steps of a run")
    made.add_argument("--save_steps", type=int, default=3)
    made.add_argument("--seed", type=int, default=0)
    return made


def prepare(folder: Path) -> None:
    """Make models and data, and import what the forks need."""
    folder.mkdir(parents=True, exist_ok=True)
    making = fork(lambda: make_inputs(folder), folder / "inputs.log")
    if os.waitpid(making, 0)[1]:
        raise SystemExit(f"failed: see {folder / 'inputs.log'}")
    import_libraries()


def make_inputs(folder: Path) -> None:
    """Save models and data. It starts threads, so it must not be done in the parent of forks."""
    save_models(folder)
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}." + " Yes." * (i % 7),
             "rejected": "No." * (1 + i % 5)} for i in range(240)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- one case ------------------------------------------------------------------------------------


def soak(case: Case, folder: Path, args: argparse.Namespace, draw: random.Random) -> bool:
    """Compare a run that is killed with one that is not."""
    length = run_whole(case, folder, args)
    return length is not None and kill_and_compare(case, folder, args, draw, length)


def run_whole(case: Case, folder: Path, args: argparse.Namespace) -> float | None:
    """Run a case to its end in an empty `whole`; its seconds, or None if it failed."""
    for old in [*folder.glob("whole*"), *folder.glob("killed*"), *folder.glob(".*lock")]:
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
    start = time.perf_counter()
    if any(Run(case, folder, folder / "whole", args).wait()):
        say(False, case, f"the run failed: see {folder / 'whole.log'}")
        return None
    return time.perf_counter() - start


def kill_and_compare(
    case: Case, folder: Path, args: argparse.Namespace, draw: random.Random, length: float
) -> bool:
    """Run a case in `killed`, kill and resume it, and compare it with `whole`.

    Args:
        length: seconds of a run that is not killed.
    """
    killed, log, start = folder / "killed", folder / "killed.log", time.perf_counter()
    kills = saving = found_broken = 0
    problem = ""
    while not problem:
        run = Run(case, folder, killed, args, ["--resume_from_checkpoint", "latest"])
        if kills < args.kills:
            in_saving = draw.random() < 0.5
            if run.await_moment(length, in_saving, folder / "killed.partial", draw):
                kills, saving = kills + 1, saving + in_saving
                one = case.ranks > 1 and draw.random() < 0.2
                seconds = run.kill([draw.randrange(case.ranks)] if one else range(case.ranks))
                if seconds > LONGEST_END:
                    problem = f"a rank outlived the other by {seconds:.0f} s"
                found_broken += log.read_text().count("is broken")
                continue
        if any(run.wait()):
            problem = f"a resumed run failed: see {log}"
        elif different := differences(folder / "whole", killed):
            problem = f"not the same, bit for bit: {', '.join(list(different)[:3])}"
        elif kills >= args.kills:
            break
        else:
            shutil.rmtree(killed)
    if found_broken:
        problem = f"{found_broken} checkpoints were found broken"
    return say(not problem, case, problem or (
        f"{kills} kills, {saving} of them while saving; the weights are the same, bit for bit; "
        f"0 broken checkpoints; {time.perf_counter() - start:.0f} s"
    ))


def move(case: Case, goal: Case, folder: Path, args: argparse.Namespace) -> bool:
    """Compare a run with one that is resumed from its first half with other ranks."""
    whole, moved = folder / "whole", folder / "moved"
    for path in (whole, moved):
        shutil.rmtree(path, ignore_errors=True)
    half = args.updates // 2 // args.save_steps * args.save_steps
    if any(Run(case, folder, whole, args, ["--save_total_limit", 99]).wait()):
        return say(False, case, f"the run failed: see {folder / 'whole.log'}")
    origin = whole / "checkpoints" / f"step-{half:08d}"
    if any(Run(goal, folder, moved, args, ["--resume_from_checkpoint", origin]).wait()):
        return say(False, goal, f"the run failed: see {folder / 'moved.log'}")
    largest = max(differences(whole, moved).values(), default=0.0)
    return say(largest < ROUNDING, case, f"to {goal}: weights differ by at most {largest:.1e}")


def differences(whole: Path, other: Path) -> dict[str, float]:
    """Return the largest difference in each exported weight that is not the same, bit for bit."""
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*.safetensors"))
             if "checkpoints" not in path.parts]
    found = {} if files else {"no exports": float("inf")}
    for name in files:
        with safe_open(whole / name, "pt") as a, safe_open(other / name, "pt") as b:
            assert set(a.keys()) == set(b.keys()), name
            for key in a.keys():  # noqa: SIM118
                one, two = a.get_tensor(key), b.get_tensor(key)
                if not one.equal(two):
                    found[f"{name}: {key}"] = (one - two).abs().max().item()
    return found


class Run:
    """A step on one or two ranks, each a fork of this process."""

    def __init__(
        self, case: Case, folder: Path, output: Path, args: argparse.Namespace,
        more: Sequence[Any] = (),
    ) -> None:
        words = [*flags(case, folder, args), "--output_dir", output, *more]

        def train() -> None:
            sys.argv = ["main.py", *map(str, words)]
            from alpaca_rlhf.utils import console

            console.run_main(
                sys.modules[f"alpaca_rlhf.training_model.{STEPS[case.step]}.main"].main)

        log = folder / f"{output.name}.log"
        log.write_text("")
        self._ranks = fork_ranks(train, case.ranks, log)

    def await_moment(
        self, length: float, in_saving: bool, partial: Path, draw: random.Random
    ) -> bool:
        """Wait for the moment to kill; False if the run has ended before."""
        moment = time.perf_counter() + draw.random() * length
        while in_saving or time.perf_counter() <= moment:
            if ended(self._ranks[0]):
                return False
            if in_saving and time.perf_counter() > moment and any(
                (partial / "checkpoints").glob(".step-*.partial")
            ):
                time.sleep(draw.random() * 0.03)
                return True
            time.sleep(0.001)
        return True

    def kill(self, victims: Sequence[int]) -> float:
        """Kill ranks, tell the others by SIGTERM, and return the seconds until all have ended."""
        start, told = time.perf_counter(), False
        for rank in victims:
            os.kill(self._ranks[rank], signal.SIGKILL)
        while not all(map(ended, self._ranks)):
            late = time.perf_counter() - start > LONGEST_END
            if late or (not told and time.perf_counter() - start > 1.0):
                told = True
                for process in self._ranks:
                    os.kill(process, signal.SIGKILL if late else signal.SIGTERM)
            time.sleep(0.01)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> list[int]:
        """Return the exit codes of the ranks."""
        return exit_codes(self._ranks)


def flags(case: Case, folder: Path, args: argparse.Namespace) -> list[Any]:
    """Return the command line of a step."""
    rows = 4 // case.ranks
    shared = ["--data_path", folder / "rows.jsonl", "--data_output_path", folder / "cache",
              "--max_steps", args.updates, "--save_steps", args.save_steps, "--seed", 3,
              "--num_train_epochs", 4, "--preprocessing_num_workers", 1]
    if case.step < 3:
        return [*shared, "--model_name_or_path", folder / "actor", "--zero_stage", case.stage,
                "--lora_dim", case.lora, "--max_seq_len", 64,
                "--dropout", 0.0 if args.move else 0.1,
                "--per_device_train_batch_size", rows, "--per_device_eval_batch_size", 8,
                "--eval_iters", 1]
    return [
        *shared, "--actor_model_name_or_path", folder / "actor",
        "--critic_model_name_or_path", folder / "critic", "--actor_zero_stage", case.stage,
        "--critic_zero_stage", case.stage, "--actor_lora_dim", case.lora,
        "--critic_lora_dim", case.lora, "--max_prompt_seq_len", 32, "--max_answer_seq_len", 6,
        "--per_device_generation_batch_size", 2 * rows, "--per_device_training_batch_size", rows,
        "--enable_ema", "--enable_hybrid_engine", "--kl_controller", "adaptive",
        "--reward_normalization", "reference", "--eval_prompts", 4, "--actor_dropout", 0.1,
    ]


def say(passed: bool, case: Case, text: str) -> bool:
    """Print a line of the report."""
    sys.stdout.write(f"{'ok    ' if passed else 'FAILED'}  {case}: {text}\n")
    sys.stdout.flush()
    return passed


if __name__ == "__main__":
    sys.exit(main())
