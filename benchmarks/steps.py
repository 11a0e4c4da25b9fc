"""Speed and memory of the three steps beside TRL's trainers, in one run on a CPU.

    python benchmarks/steps.py --data_path PAIRS.jsonl.gz                     # the embedded model
    python benchmarks/steps.py --data_path PAIRS.jsonl.gz --model output/smollm2-135m --steps 3
    python benchmarks/steps.py --grow growth.png                              # ours alone

Every contender is a process that has loaded its model and waits (`step_workers.py`); in each round
one after the other takes the same number of optimizer steps, so that other load on the machine
meets all of them. All get the same encoded rows, batch size, limits, precision and threads. TRL is
installed into environments of its own, at the first start. docs/speed.md explains the columns.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step_workers import NEW_TOKENS, PROMPT_LENGTH, PROMPTS

from alpaca_rlhf.demo.tiny_llama import ensure_tiny_llama
from alpaca_rlhf.utils import arguments, console, distributed
from alpaca_rlhf.utils.configs import Step1Config, Step2Config, Step3Config
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.tokenizer import load_chat, load_tokenizer
from alpaca_rlhf.utils.model.reward_model import save_statistics

WORKERS = Path(__file__).with_name("step_workers.py")
TRL = {1: "1.16.0", 2: "1.16.0", 3: "1.12.0"}  # the last release with PPO is 1.12
LORA = 8
CHECKPOINTING = "--gradient_checkpointing"
Report = dict[str, Any]


class Work(NamedTuple):
    """A measured work: a step, flags of ours, rank of LoRA, unit of the speed."""

    step: int
    title: str
    unit: str
    flags: tuple[str, ...] = ()
    lora: int = 0


WORKS = {
    "sft": Work(1, "step 1, loss on all tokens", "tokens", ("--train_on_prompt",)),
    "sft_responses": Work(1, "step 1, loss on responses", "tokens"),
    "reward": Work(2, "step 2", "pairs"),
    "ppo": Work(3, "step 3", "episodes"),
    "ppo_lora": Work(3, f"step 3, LoRA {LORA}", "episodes", (
        "--actor_lora_dim", str(LORA), "--critic_lora_dim", str(LORA)), LORA),
}
SETTINGS = {
    "default": "TRL",
    "grouped": "TRL, grouped by length",
    "best": "TRL, grouped, no checkpointing",
}


def main() -> None:
    """Measure, print a Markdown table."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    console.quiet_libraries()
    model = args.model or str(ensure_tiny_llama(prepare.cache_home(None)))
    with tempfile.TemporaryDirectory() as folder:
        if args.grow:
            import step_growth

            step_growth.plot(partial(measure, folder=Path(folder)), model, args, Path(folder))
            return
        results = []
        for name in args.work:
            results.append(measure(name, model, args, Path(folder)))
            heading, table = render(results, model, args)
            if args.json:  # after each work, for a long run may be ended early
                figures = {"heading": heading, "table": table, "results": results}
                Path(args.json).write_text(json.dumps(figures, indent=1))
    print(f"{heading}\n\n{table}", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="a Hugging Face folder (default: the embedded tiny LLaMA)")
    made.add_argument("--data_path", help="file of chosen and rejected (default: embedded data)")
    made.add_argument("--work", nargs="+", default=list(WORKS), choices=WORKS)
    made.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS,
                      help="of TRL; none measures ours alone")
    made.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"],
                      help="bf16: TRL's is autocast, its default")
    made.add_argument("--batch", type=int, default=8, help="rows or pairs, steps 1 and 2")
    made.add_argument("--max_seq_len", type=int, default=512, help="tokens, steps 1 and 2")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=8, help="optimizer steps of a round")
    made.add_argument("--warmup", type=int, default=2, help="optimizer steps before the first")
    made.add_argument("--apart", action="store_true", help="one contender after the other instead "
                      "of round by round, where they do not fit into memory together")
    made.add_argument("--threads", type=int, default=distributed.usable_cores())
    made.add_argument("--environments", type=Path, help="folder of TRL's environments (default: "
                      "benchmarks, in this package's folder under the user's cache home)")
    made.add_argument("--json", help="file for every figure of every round")
    made.add_argument("--grow", help="file for a plot of cost against length, vocabulary and batch "
                      "(.png), instead of the table")
    return made


# ------------------------------------------------------------------- the contenders


class Worker:
    """A contender's process, which waits between two rounds."""

    def __init__(self, python: str, job: dict[str, Any], folder: Path) -> None:
        self.job, self.reports = job, list[Report]()
        file = folder / f"{job['contender']}_{job['setting']}.json"
        self._log = file.with_suffix(".log")
        file.write_text(json.dumps(job))
        kept = {name: value for name, value in os.environ.items()
                if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        threads = str(job["threads"])
        changes = {
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(WORKERS.parents[1]) if job["contender"] == "ours" else "",
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(WORKERS), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=kept | changes, cwd=folder,
            )

    def read(self) -> Report:
        """Wait for the report of the warm-up or of a round."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = self._log.read_text()[-3000:]
            raise SystemExit(f"{self.job['contender']} has ended early:\n{log}")
        return json.loads(line)

    def run_round(self) -> None:
        """Let it take a round's steps, and keep its report."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.reports.append(self.read())

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def environment(home: Path, version: str) -> str:
    """Return the Python of an environment with this release of TRL; make it if it is not there."""
    folder = home / f"trl-{version}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        print(f"installing TRL {version} into {folder}", file=sys.stderr, flush=True)
        torch_here = f"torch=={torch.__version__.split('+')[0]}"
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # First and exactly: a range may fetch another torch, with gigabytes of CUDA.
        subprocess.run([*install, torch_here], check=True)
        subprocess.run([*install, torch_here, f"trl=={version}", "peft"], check=True)
        complete.touch()
    return str(python)


def flags(work: Work, model: str, reward_model: str, args: argparse.Namespace) -> list[str]:
    """Return the flags of our program."""
    data = ["--data_path", str(Path(args.data_path).resolve())] if args.data_path else []
    shares = ["0", "0", "0"]
    shares[work.step - 1] = "1"
    shared = [*data, "--data_split", ",".join(shares), "--dtype", args.dtype, *work.flags,
              "--num_train_epochs", "1000", "--max_steps", str(total(args))]
    if work.step == 3:
        return [*shared, "--actor_model_name_or_path", model,
                "--critic_model_name_or_path", reward_model, "--enable_hybrid_engine",
                "--per_device_generation_batch_size", str(PROMPTS),
                "--per_device_training_batch_size", str(PROMPTS),
                "--max_prompt_seq_len", str(PROMPT_LENGTH), "--max_answer_seq_len",
                str(NEW_TOKENS), "--eval_prompts", "0", "--log_samples_steps", "0"]
    return [*shared, "--model_name_or_path", model, "--max_seq_len", str(args.max_seq_len),
            "--per_device_train_batch_size", str(args.batch), "--per_device_eval_batch_size", "1",
            "--eval_iters", "1"]


def total(args: argparse.Namespace) -> int:
    """Return the optimizer steps of a contender."""
    return args.warmup + args.steps * args.rounds


def encoded(work: Work, model: str, given: list[str]) -> list[dict[str, Any]]:
    """Return the rows that our program makes of these flags."""
    config: Any = arguments.parse((Step1Config, Step2Config, Step3Config)[work.step - 1], given)
    chat = load_chat(model, config.loading, config.data.chat_template)
    shared = {"seed": config.run.seed, "chat": chat}
    if work.step == 1:
        data = prepare.prepare_sft(
            config.data, config.sft, max_seq_len=config.batches.max_seq_len, **shared)
    elif work.step == 2:
        data = prepare.prepare_pairs(
            config.data, max_seq_len=config.batches.max_seq_len, **shared)
    else:
        data = prepare.prepare_prompts(
            config.data, max_prompt_seq_len=config.rollout.max_prompt_seq_len, **shared)
    names = {1: ["input_ids", "labels"], 2: ["chosen_ids", "rejected_ids"], 3: ["prompt_ids"]}
    return data.train.select_columns(names[work.step]).to_list()


def save_reward_model(model: str, folder: Path) -> str:
    """Save a reward model with a new head, as step 3 needs one, and return its folder."""
    from transformers import AutoModelForSequenceClassification

    if not folder.exists():
        torch.manual_seed(0)
        made = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32)
        made.save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)
        save_statistics(folder, 0.0, 1.0, 1)
    return str(folder)


# ------------------------------------------------------------------- how it is measured


def measure(name: str, model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the reports of all contenders at one work, and the GEMM rate of each round."""
    work = WORKS[name]
    model = str(Path(model).resolve())
    reward_model = save_reward_model(model, folder / "reward") if work.step == 3 else ""
    given = flags(work, model, reward_model, args)
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in encoded(work, model, given)))
    job = {
        "step": work.step, "flags": given, "rows": str(rows), "model": model, "lora": work.lora,
        "reward_model": reward_model, "dtype": args.dtype, "batch": args.batch,
        "threads": args.threads, "rounds": args.rounds, "steps": args.steps,
        "warmup": args.warmup, "total": total(args), "folder": str(folder / "trl"),
    }
    contenders = {"ours": (sys.executable, {"contender": "ours", "setting": ""})}
    if work.step < 3 and args.settings:  # as TRL does by default
        contenders["ours, " + CHECKPOINTING] = (sys.executable, {
            "contender": "ours", "setting": "checkpointing", "flags": [*given, CHECKPOINTING]})
    home = args.environments or prepare.cache_home(None) / "benchmarks"
    # PPOTrainer pays heed to neither setting: its batches are what it generates.
    for setting in args.settings if work.step < 3 else args.settings[:1] and ["default"]:
        contenders[SETTINGS[setting]] = (environment(home, TRL[work.step]),
                                         {"contender": "trl", "setting": setting})
    gemm, reports, sizes = list[float](), dict[str, list[Report]](), shape(model)
    for together in [[title] for title in contenders] if args.apart else [list(contenders)]:
        with ExitStack() as stack:
            workers = []
            for title in together:
                python, who = contenders[title]
                workers.append(stack.enter_context(Worker(python, job | who, folder)))
                workers[-1].read()
                reports[title] = workers[-1].reports
            for number in range(args.rounds):
                gemm.append(gemm_rate(args.dtype))
                for worker in workers[:: -1 if number % 2 else 1]:
                    worker.run_round()
                print(f"{work.title}: round {number + 1} of {args.rounds}", file=sys.stderr,
                      flush=True)
    for report in sum(reports.values(), start=[]):
        report["flops"] = sizes.arithmetic(report)
    return {"work": name, "gemm": gemm[: args.rounds], "reports": reports}


def gemm_rate(dtype: str, size: int = 1024, repeats: int = 20) -> float:
    """Return the FLOP/s of products of square matrices."""
    a, b = (torch.randn(size, size).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
            for _ in range(2))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


class Shape(NamedTuple):
    """Sizes of a LLaMA that decide its arithmetic: weights of its layers and of its head."""

    layers: int
    width: int  # of the queries of a layer
    body: int
    head: int

    def arithmetic(self, report: Report) -> float:
        """Return the FLOPs that training on a round's real tokens needs, nothing recomputed.

        A weight takes 6 for each token, the head only where a label is; causal attention 6 for each
        pair of places of a sequence, of which it needs half, and each number of a query.
        """
        attention = 6 * self.layers * self.width * report["squares"]
        return 6 * (self.body * report["tokens"] + self.head * report["trained"]) + attention


def shape(model: str) -> Shape:
    """Return the sizes of a model, which is not loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    head = made.get_output_embeddings()
    body = sum(module.weight.numel() for module in made.modules()
               if isinstance(module, torch.nn.Linear) and module is not head)
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None)
    width = heads * (size or config.hidden_size // heads)
    return Shape(config.num_hidden_layers, width, body, head.weight.numel())


# ------------------------------------------------------------------- the table


COLUMNS = ("work", "contender", "speed, median (lowest to highest)", "ours / this", "padding",
           "peak memory", "share of GEMM rate", "generation / scoring / update, s")


def render(
    results: Sequence[dict[str, Any]], model: str, args: argparse.Namespace
) -> tuple[str, str]:
    """Return what was measured where, and the table."""
    sizes, lines = shape(model), []
    versions = set()
    for result in results:
        for title, reports in result["reports"].items():
            lines.append([WORKS[result["work"]].title, *cells(result, title)])
            versions |= {f"{name} {number}" for name, number in reports[0]["versions"].items()}
    gemm = statistics.median(rate for result in results for rate in result["gemm"])
    heading = (
        f"{Path(model).name}, {(sizes.body + sizes.head) / 1e6:.1f} M weights in products, "
        f"{args.dtype}; {processor()}, {args.threads} threads, "
        f"{gemm / 1e9:.0f} GFLOP/s; batch {args.batch}, at most {args.max_seq_len} tokens; step 3: "
        f"{PROMPTS} prompts of at most {PROMPT_LENGTH} tokens and {NEW_TOKENS} new ones; "
        f"{args.rounds} rounds of {args.steps} steps; {', '.join(sorted(versions))}; "
        f"{datetime.date.today()}"
    )
    rows = [f"| {' | '.join(line)} |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines]]
    return heading, "\n".join(rows)


def cells(result: dict[str, Any], title: str) -> list[str]:
    """Return a contender's line of the table, without the work."""
    work, reports = WORKS[result["work"]], result["reports"][title]
    ratios = [speed(work, mine) / speed(work, its)
              for mine, its in zip(result["reports"]["ours"], reports, strict=True)]
    padding = 1 - sum(r["tokens"] for r in reports) / sum(r["positions"] for r in reports)
    share, phases = "–", "–"
    if work.step < 3:
        shares = [report["flops"] / report["seconds"] / rate
                  for report, rate in zip(reports, result["gemm"], strict=True)]
        share = f"{statistics.median(shares):.0%}"
    else:
        steps = reports[0]["rows"] / PROMPTS
        phases = " / ".join(f"{statistics.median(r['phases'][name] for r in reports) / steps:.2f}"
                            for name in ("generation", "scoring", "update"))
    return [
        title, f"{spread([speed(work, report) for report in reports])} {work.unit}/s",
        "1" if title == "ours" else f"**{spread(ratios)}**", f"{padding:.1%}",
        f"{max(report['peak_gb'] for report in reports):.2f} GB", share, phases,
    ]


def speed(work: Work, report: Report) -> float:
    """Return real tokens, pairs or episodes per second."""
    return report["tokens" if work.step == 1 else "rows"] / report["seconds"]


def spread(values: Sequence[float]) -> str:
    """Return median, lowest and highest, with three digits."""
    def shown(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return f"{shown(statistics.median(values))} ({shown(min(values))} to {shown(max(values))})"


def processor() -> str:
    """Return the name of the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
