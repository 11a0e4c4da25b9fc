"""Kill runs at random moments, resume them, and compare the end with a run that was never killed.

    python tests/soak.py --steps 1 2 3 --ranks 1 2 --zero 0 2 3 --lora 0 4 --kills 20

The models are random ones of a few thousand weights, so that what takes time is starting; a start
is a fork of this process, which has imported everything but computed nothing. Half of the kills
come at any moment after the start, half while a checkpoint is being written. Of two ranks both are
killed, or one, and then the other must end, told to by SIGTERM as DeepSpeed's launcher does. Every
case says what it has done, and the exit code is 1 if a weight differs, a checkpoint was found
broken, or a rank outlived its fellow.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from conftest import save_models
from safetensors import safe_open

STEPS = {
    1: "step1_supervised_finetuning", 2: "step2_reward_model_finetuning",
    3: "step3_rlhf_finetuning",
}
LONGEST_END = 30.0  # seconds that a rank may outlive another one


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
    """All cases; 0 if all went well."""
    args = parser().parse_args()
    folder = Path(args.folder).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    prepare(folder)
    draw = random.Random(args.seed)
    failures = 0
    if args.move:
        for step, lora in product(args.steps, args.lora):
            places = [(ranks, stage) for ranks in args.ranks for stage in args.zero]
            for origin, goal in product(places, places):
                if origin != goal:
                    failures += not move(
                        Case(step, *origin, lora), Case(step, *goal, lora), folder, args
                    )
        return 1 if failures else 0
    for case in map(Case, *zip(*product(args.steps, args.ranks, args.zero, args.lora),
                               strict=True)):
        if case.ranks == 1 and case.stage and not args.all:
            continue
        failures += not soak(case, folder, args, draw)
    return 1 if failures else 0


def prepare(folder: Path) -> None:
    """Make the inputs, and import what the forks need."""
    folder.mkdir(parents=True, exist_ok=True)
    in_a_fork(lambda: make_inputs(folder), folder / "inputs.log")
    for name in ("datasets", "peft", "deepspeed", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    for step in STEPS:
        importlib.import_module(f"alpaca_rlhf.training_model.{STEPS[step]}.main")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--folder", default="output/soak", help="is emptied first")
    made.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    made.add_argument("--zero", type=int, nargs="+", default=[0, 2, 3])
    made.add_argument("--lora", type=int, nargs="+", default=[0, 4], help="0: all weights train")
    made.add_argument("--all", action="store_true", help="one rank with ZeRO above 0, too")
    made.add_argument("--move", action="store_true",
                      help="do not kill: go on with other ranks and another ZeRO stage")
    made.add_argument("--kills", type=int, default=20)
    made.add_argument("--updates", type=int, default=24, help="optimizer steps of a run")
    made.add_argument("--save_steps", type=int, default=3)
    made.add_argument("--seed", type=int, default=0)
    return made


def make_inputs(folder: Path) -> None:
    """Models and data."""
    save_models(folder)
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}." + " Yes." * (i % 7),
             "rejected": "No." * (1 + i % 5)} for i in range(240)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------- one case


def soak(case: Case, folder: Path, args: argparse.Namespace, draw: random.Random) -> bool:
    """A run that is never killed, and one that is; whether they end alike."""
    whole, broken = folder / "whole", folder / "killed"
    for path in folder.glob("whole*"), folder.glob("killed*"), folder.glob(".*lock"):
        for old in path:
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
    start = time.perf_counter()
    if any(Run(case, folder, whole, args).wait()):
        return say(False, case, f"the run failed: see {folder / 'whole.log'}")
    length = time.perf_counter() - start
    log = folder / "killed.log"
    kills = saving = found_broken = 0
    slowest, problem = 0.0, ""
    while not problem:
        run = Run(case, folder, broken, args, resume=True)
        if kills < args.kills:
            in_saving = draw.random() < 0.5
            killed = run.await_moment(length, in_saving, broken.with_name("killed.partial"), draw)
            if killed:
                kills, saving = kills + 1, saving + in_saving
                one = case.ranks > 1 and draw.random() < 0.2
                slowest = max(slowest, run.kill([draw.randrange(case.ranks)] if one else None))
                if slowest > LONGEST_END:
                    problem = f"a rank outlived the other by {slowest:.0f} s"
                found_broken += log.read_text().count("is broken")
                continue
        if any(run.wait()):
            problem = f"a resumed run failed: see {log}"
        elif different := differences(whole, broken):
            problem = f"not the same, bit for bit: {', '.join(different[:3])}"
        elif kills >= args.kills:
            break
        else:
            shutil.rmtree(broken)
    if found_broken:
        problem = f"{found_broken} checkpoints were found broken"
    return say(not problem, case, problem or (
        f"{kills} kills, {saving} of them while saving; the weights are the same, bit for bit; "
        f"0 broken checkpoints; {time.perf_counter() - start:.0f} s"
    ))


def move(case: Case, goal: Case, folder: Path, args: argparse.Namespace) -> bool:
    """A run that goes on elsewhere from its first half; whether it ends alike, but for rounding."""
    whole, moved = folder / "whole", folder / "moved"
    for path in (whole, moved):
        shutil.rmtree(path, ignore_errors=True)
    half = args.updates // 2 // args.save_steps * args.save_steps
    if any(Run(case, folder, whole, args, more=["--save_total_limit", 99]).wait()):
        return say(False, case, f"the run failed: see {folder / 'whole.log'}")
    origin = whole / "checkpoints" / f"step-{half:08d}"
    if any(Run(goal, folder, moved, args, more=["--resume_from_checkpoint", origin]).wait()):
        return say(False, goal, f"the run failed: see {folder / 'moved.log'}")
    far = furthest(whole, moved)
    return say(far < 1e-4, case, f"to {goal}: weights differ by at most {far:.1e}")


def furthest(whole: Path, moved: Path) -> float:
    """The largest difference of a weight between two exports."""
    far = 0.0
    for path in whole.rglob("*.safetensors"):
        with safe_open(path, "pt") as a, safe_open(moved / path.relative_to(whole), "pt") as b:
            for key in a.keys():  # noqa: SIM118
                far = max(far, (a.get_tensor(key) - b.get_tensor(key)).abs().max().item())
    return far


def differences(whole: Path, killed: Path) -> list[str]:
    """Weights of exports that are not alike, bit for bit."""
    files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.safetensors")
                   if "checkpoints" not in path.parts)
    different = [] if files else ["no exports"]
    for name in files:
        with safe_open(whole / name, "pt") as a, safe_open(killed / name, "pt") as b:
            different += [f"{name}: {key}" for key in sorted({*a.keys(), *b.keys()})
                          if not a.get_tensor(key).equal(b.get_tensor(key))]
    return different


class Run:
    """A step on one or two ranks, each a fork of this process."""

    def __init__(
        self, case: Case, folder: Path, output: Path, args: argparse.Namespace,
        resume: bool = False, more: Sequence[Any] = (),
    ) -> None:
        words = [*flags(case, folder, args), "--output_dir", output, *more]
        if resume:
            words += ["--resume_from_checkpoint", "latest"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = folder / f"{output.name}.log"
        log.write_text("")
        self._ranks = [
            self._fork(case, list(map(str, words)), rank, port, log) for rank in range(case.ranks)
        ]

    @staticmethod
    def _fork(case: Case, words: list[str], rank: int, port: int, log: Path) -> int:
        child = os.fork()
        if child:
            return child
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(case.ranks), LOCAL_RANK=str(rank),
            LOCAL_SIZE=str(case.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        sys.argv = ["main.py", *words]
        write_to(log)
        from alpaca_rlhf.utils import console

        step = sys.modules[f"alpaca_rlhf.training_model.{STEPS[case.step]}.main"]
        console.run_main(step.main)
        os._exit(0)

    def await_moment(
        self, length: float, in_saving: bool, partial: Path, draw: random.Random
    ) -> bool:
        """Wait for the moment to kill; whether it has come before the run had ended."""
        moment = time.perf_counter() + draw.random() * length
        while not (time.perf_counter() > moment and not in_saving):
            if os.waitid(os.P_PID, self._ranks[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            if in_saving and time.perf_counter() > moment and any(
                (partial / "checkpoints").glob(".step-*.partial")
            ):
                time.sleep(draw.random() * 0.03)
                return True
            time.sleep(0.001)
        return True

    def kill(self, victims: list[int] | None) -> float:
        """SIGKILL; seconds until the last rank had ended, told to by SIGTERM as launchers do."""
        start = time.perf_counter()
        for rank in range(len(self._ranks)) if victims is None else victims:
            os.kill(self._ranks[rank], signal.SIGKILL)
        told = False
        while self._alive():
            if not told and time.perf_counter() - start > 1.0:
                told = True
                for process in self._ranks:
                    os.kill(process, signal.SIGTERM)
            if time.perf_counter() - start > LONGEST_END:
                for process in self._ranks:
                    os.kill(process, signal.SIGKILL)
                break
            time.sleep(0.01)
        self.wait()
        return time.perf_counter() - start

    def _alive(self) -> bool:
        return any(
            os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            for process in self._ranks
        )

    def wait(self) -> list[int]:
        """Exit codes of the ranks."""
        return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in self._ranks]


def flags(case: Case, folder: Path, args: argparse.Namespace) -> list[Any]:
    """The command line of a step."""
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


# ------------------------------------------------------------------------- processes


def in_a_fork(work: Any, log: Path) -> None:
    """Do something that would start threads in another process."""
    child = os.fork()
    if not child:
        write_to(log)
        work()
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"failed: see {log}")


def write_to(log: Path) -> None:
    """Both outputs of this process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def say(well: bool, case: Case, text: str) -> bool:
    """A line of the report."""
    sys.stdout.write(f"{'ok    ' if well else 'FAILED'}  {case}: {text}\n")
    sys.stdout.flush()
    return well


if __name__ == "__main__":
    sys.exit(main())
