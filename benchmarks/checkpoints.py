"""Cost of saving a checkpoint, as a share of the training between two of them.

    PYTHONPATH=. python benchmarks/checkpoints.py                # the embedded tiny LLaMA
    PYTHONPATH=. python benchmarks/checkpoints.py --model output/smollm2-135m --lora_dim 16

Optimizer steps of step 1 on random tokens, a checkpoint after every `--save_steps` of them:
weights, optimizer and the rest, forced to the disk, read back for the SHA-256, renamed. Steps and
saves alternate in one run; their medians are compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch

from alpaca_rlhf.demo.tiny_llama import ensure_tiny_llama
from alpaca_rlhf.training_model.step1_supervised_finetuning.main import loss
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    CheckpointConfig,
    EngineConfig,
    LoadingConfig,
    RoleConfig,
    ScheduleConfig,
)
from alpaca_rlhf.utils.data.batches import TokenBatch
from alpaca_rlhf.utils.data.prepare import cache_home
from alpaca_rlhf.utils.data.tokenizer import load_tokenizer
from alpaca_rlhf.utils.engine import Engine, build_trained
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
from alpaca_rlhf.utils.run.checkpoints import Checkpoints
from alpaca_rlhf.utils.run.run_folder import RunFolder
from alpaca_rlhf.utils.training_loop import global_weight, optimizer_step


def main() -> None:
    """Measure, and print one line."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    distributed.initialize(0)
    role = RoleConfig(
        model_name_or_path=args.model or str(ensure_tiny_llama(cache_home(None))),
        learning_rate=1e-5, lora_learning_rate=1e-4, lora_dim=args.lora_dim,
        zero_stage=args.zero_stage,
    )
    tokenizer = load_tokenizer(role.model_name_or_path)
    engine, _ = build_trained(
        partial(load_causal_lm, tokenizer=tokenizer), role, loading=LoadingConfig(dtype="fp32"),
        adapters=AdapterConfig(only_optimize_lora=True), engine=EngineConfig(),
        schedule=ScheduleConfig(lr_scheduler_type="constant"), micro_batch_size=args.rows,
        total_steps=1,
    )
    steps: list[list[float]] = []
    saves: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(
            RunFolder(f"{folder}/run"), {"model": engine},
            config=CheckpointConfig(save_steps=args.save_steps), step=1, arguments={}, found=None,
        )
        for _ in range(args.saves + 1):
            steps.append([took(lambda: step(engine, args)) for _ in range(args.save_steps)])
            checkpoints.progress.step += args.save_steps
            saves.append(took(checkpoints.save))
    del steps[0], saves[0]  # warm-up
    one, save = statistics.median(sum(steps, [])), statistics.median(saves)
    sys.stdout.write(
        f"step {one * 1e3:.0f} ms, save {save * 1e3:.0f} ms ({min(saves) * 1e3:.0f} to "
        f"{max(saves) * 1e3:.0f}): {save / (one * args.save_steps):.1%} of {args.save_steps} "
        "steps\n"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="a Hugging Face folder (default: the embedded tiny LLaMA)")
    made.add_argument("--folder", help="where to save (default: the system's temporary folder)")
    made.add_argument("--save_steps", type=int, default=50)
    made.add_argument("--saves", type=int, default=5)
    made.add_argument("--rows", type=int, default=16, help="of a batch")
    made.add_argument("--tokens", type=int, default=64, help="of a row")
    made.add_argument("--lora_dim", type=int, default=0)
    made.add_argument("--zero_stage", type=int, default=0)
    made.add_argument("--threads", type=int, default=2)
    return made


def step(engine: Engine, args: argparse.Namespace) -> None:
    """Take an optimizer step on random tokens."""
    ids = torch.randint(10, 1000, (args.rows, args.tokens), device=distributed.device())
    batch = TokenBatch(ids, torch.ones_like(ids), ids)
    optimizer_step(engine, [batch], partial(loss, engine), global_weight([batch]))


def took(run: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
