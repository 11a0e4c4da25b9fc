"""One contender of `benchmarks/steps.py`: a training that pauses between optimizer steps.

    python benchmarks/step_workers.py JOB.json

Ours is the program of the step itself, `main()` with its flags; TRL's is `trainer.train()` in an
environment of its own, which has nothing of this package. Both choose their batches as they always
do, of the same encoded rows; of an epoch's batches some are run, spread evenly over their sizes, so
that few steps stand for the epoch. After the warm-up (the largest batch first, for the peak memory)
and after each round a line of JSON tells what it took, and the next line of stdin starts a round.
"""

import contextlib
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

Job = dict[str, Any]  # what `steps.job` writes
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 16, 128, 64  # of a PPO iteration


def main() -> None:
    """Read the job, train until stdin ends."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    clock = Clock(job)
    run = run_ours if job["contender"] == "ours" else run_trl_ppo if job["step"] == 3 else run_trl
    run(job, clock)


class Clock:
    """Times rounds of optimizer steps and reports them; pauses the training between two rounds.

    Attributes:
        rows: the encoded rows of the step, the same for all contenders.
    """

    def __init__(self, job: Job) -> None:
        self.rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
        self._job, self._plan = job, list[list[int]]()
        self._reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no report
        self._left, self._done, self._counted, self._positions = job["warmup"], 0, 0, 0
        self._own, self._started = 0.0, time.perf_counter()
        self._phases: dict[str, float] = {}
        nn.modules.module.register_module_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count the positions, padding included, that go through a model in training."""
        if isinstance(module, nn.Embedding) and torch.is_grad_enabled():
            self._positions += inputs[0].numel()

    def imported(self) -> None:
        """Note the memory of the process before it holds a model."""
        self._own = memory_gb("VmRSS")

    def choose(self, epoch: list[list[int]]) -> list[list[int]]:
        """Choose the steps to run of an epoch's, each a list of rows; see the module."""
        job, count = self._job, self._job["steps"]
        order = sorted(epoch, key=lambda rows: len(rows) * max(map(self._length, rows)))
        for i in range(job["warmup"]):
            self._plan.append(order[-1 - i * len(order) // job["warmup"]])
        for number in range(job["rounds"]):
            shift = (0.5 + number * 0.618) % 1
            self._plan += [order[int((i + shift) / count * len(order))] for i in range(count)]
        return self._plan

    def choose_prompts(self) -> list[list[int]]:
        """Choose the prompts of each PPO iteration."""
        job, generator = self._job, random.Random(0)
        self._plan = [generator.sample(range(len(self.rows)), PROMPTS)
                      for _ in range(job["warmup"] + job["steps"] * job["rounds"])]
        return self._plan

    def _length(self, row: int) -> int:
        return max(lengths(self.rows[row]))

    def step(self, **phases: float) -> None:
        """Note the end of an optimizer step (and seconds of its phases); pause after a round."""
        for name, seconds in phases.items():
            self._phases[name] = self._phases.get(name, 0.0) + seconds
        self._done += 1
        self._left -= 1
        if self._left:
            return
        seconds = time.perf_counter() - self._started
        rows = [self.rows[row] for step in self._plan[self._counted : self._done] for row in step]
        sequences = [length for row in rows for length in lengths(row)]
        report = {
            "seconds": seconds, "rows": len(rows), "tokens": sum(sequences),
            "squares": sum(length**2 for length in sequences),
            "trained": sum(label != -100 for row in rows for label in row.get("labels", [])[1:]),
            "positions": self._positions, "peak_gb": memory_gb("VmHWM") - self._own,
            "phases": self._phases, "versions": versions(),
        }
        self._reports.write(json.dumps(report) + "\n")
        self._reports.flush()
        if not sys.stdin.readline():
            os._exit(0)
        self._counted, self._left = self._done, self._job["steps"]
        self._positions, self._phases = 0, {}
        self._started = time.perf_counter()


def memory_gb(name: str) -> float:
    """Return a figure of the kernel about this process: memory now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e9


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the speed."""
    found = {}
    for name in ("torch", "transformers", "deepspeed", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def lengths(row: dict[str, list[int]]) -> list[int]:
    """Return the length in tokens of each sequence that a row trains on."""
    if "prompt_ids" in row:  # by actor and critic
        return [len(row["prompt_ids"]) + NEW_TOKENS] * 2
    return [len(ids) for name, ids in row.items() if name.endswith("ids")]


# ---------------------------------------------------------------------------- ours


def run_ours(job: Job, clock: Clock) -> None:
    """Run the program of the step with its flags."""
    if job["step"] == 1:
        from alpaca_rlhf.training_model.step1_supervised_finetuning import main as program
    elif job["step"] == 2:
        from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as program
    else:
        from alpaca_rlhf.training_model.step3_rlhf_finetuning import main as program
    (prepare_ppo if job["step"] == 3 else prepare_supervised)(clock)
    sys.argv = [str(program.__file__), *job["flags"]]
    clock.imported()
    program.main()


def prepare_supervised(clock: Clock) -> None:
    """Choose among the batches that steps 1 and 2 plan, and pause where they log."""
    from alpaca_rlhf.utils import supervised

    class Plan(supervised.Plan):
        def micro_batches(self, first: int) -> Iterator[list[list[int]]]:
            steps = list(islice(super().micro_batches(first), self.steps_per_epoch))
            whole = [[row for rows in step for row in rows] for step in steps]
            for chosen in clock.choose(whole):
                yield steps[whole.index(chosen)]

    class Tracker(supervised.Tracker):
        def log(self, metrics: dict[str, Any], step: int) -> None:
            super().log(metrics, step)
            clock.step()

    supervised.Plan, supervised.Tracker = Plan, Tracker  # type: ignore[misc]


def prepare_ppo(clock: Clock) -> None:
    """Give step 3 its prompts, let no response end early, and pause where it logs."""
    from alpaca_rlhf.training_model.step3_rlhf_finetuning import main as program

    class Plan(program.Plan):
        def __iter__(self) -> Iterator[list[int]]:
            yield from clock.choose_prompts()

    class Tracker(program.Tracker):
        def log(self, metrics: dict[str, Any], step: int) -> None:
            super().log(metrics, step)
            clock.step(generation=metrics["time/rollout"], scoring=metrics["time/scoring"],
                       update=metrics["time/update"])

    class Engine(program.RLHFEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.eos_ids = torch.tensor([-1])

    program.Plan, program.Tracker, program.RLHFEngine = Plan, Tracker, Engine  # type: ignore


# ---------------------------------------------------------------------------- TRL


def common(job: Job) -> dict[str, Any]:
    """Return the settings of all its trainers; others are its defaults."""
    settings = {
        "output_dir": job["folder"], "use_cpu": True, "bf16": job["dtype"] == "bf16",
        "per_device_train_batch_size": job["batch"], "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }
    if job["setting"] == "best":
        settings["gradient_checkpointing"] = False
    return settings


def pausing(clock: Clock) -> Any:
    """Return a callback that pauses a trainer after a round."""
    from transformers import TrainerCallback

    class Pausing(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    return Pausing()


def run_trl(job: Job, clock: Clock) -> None:
    """Run SFTTrainer or RewardTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    clock.imported()
    rows = [{**row, "length": max(lengths(row))} for row in clock.rows]
    settings = common(job) | {"max_length": None, "max_steps": job["total"]}
    if job["setting"] != "default":
        settings["train_sampling_strategy"] = "group_by_length"
    model: Any
    if job["step"] == 1:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        kind, arguments = SFTTrainer, SFTConfig(**settings)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            job["model"], dtype=torch.float32, num_labels=1)
        # Without it, RewardTrainer drops the lengths that its sampler groups by.
        kind, arguments = RewardTrainer, RewardConfig(**settings, remove_unused_columns=False)
    trainer = kind(model, arguments, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer(job), callbacks=[pausing(clock)])
    order, size = list(trainer._get_train_sampler(trainer.train_dataset)), job["batch"]
    whole = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    chosen = [row for step in clock.choose(whole) for row in step]
    trainer._get_train_sampler = lambda *_: chosen
    trainer.train()


def tokenizer(job: Job) -> Any:
    """Load the tokenizer, which has a padding token afterwards."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(job["model"])
    loaded.pad_token = loaded.pad_token or loaded.eos_token
    return loaded


def run_trl_ppo(job: Job, clock: Clock) -> None:
    """Run PPOTrainer, on the prompts in the given order, with one epoch an iteration as ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    clock.imported()
    # Its own Accelerator does not look at `bf16`.
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"fp32": "no"}.get(job["dtype"], job["dtype"])
    arguments = PPOConfig(
        **common(job) | {"per_device_train_batch_size": PROMPTS}, num_ppo_epochs=1,
        total_episodes=PROMPTS * job["total"], response_length=NEW_TOKENS, temperature=1.0,
        num_sample_generations=0, local_rollout_forward_batch_size=PROMPTS,
    )
    load = {"dtype": torch.float32}
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"], **load)
                         if needed else None for needed in (True, not job["lora"]))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(
        job["reward_model"], num_labels=1, **load) for _ in range(2))
    rows = [{"input_ids": clock.rows[row]["prompt_ids"]}
            for step in clock.choose_prompts() for row in step]
    processing = tokenizer(job)
    processing.padding_side = "left"
    marks = [0.0] * 3  # generation begins, generation ends, update begins

    class Phases(type(pausing(clock))):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            begun, generated, scored = marks
            clock.step(generation=generated - begun, scoring=scored - generated,
                       update=time.perf_counter() - scored)

    trainer = PPOTrainer(
        arguments, processing, policy, reference, reward, Dataset.from_list(rows), value,
        callbacks=[Phases()],
        peft_config=LoraConfig(r=job["lora"], lora_alpha=2 * job["lora"], task_type="CAUSAL_LM",
                               target_modules="all-linear") if job["lora"] else None,
    )
    trainer.dataloader = DataLoader(trainer.train_dataset, PROMPTS, shuffle=False,
                                    collate_fn=trainer.data_collator)
    generate, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def generation(*args: Any) -> Any:
        marks[0] = time.perf_counter()
        result = generate(*args)
        marks[1] = time.perf_counter()
        return result

    def accumulation(*models: Any) -> Any:
        marks[2] = time.perf_counter()
        return accumulate(*models)

    ppo_trainer.batch_generation, trainer.accelerator.accumulate = generation, accumulation
    trainer.train()


if __name__ == "__main__":
    main()
