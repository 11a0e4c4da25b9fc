"""Time and memory to prepare 100,000 preference rows, at the first start and from the cache.

    python benchmarks/preprocessing.py [--rows 100000] [--like PAIRS.jsonl.gz] [--tokenizer FOLDER]

The rows of `--like` (default: the embedded data set) are repeated, each with a number that makes
its prompt unique. Each start is a process of its own, as a step would be: "start" is the time until
data is read (imports, the tokenizer), "preparation" is the rest. Memory is the peak of all
processes together, shared pages counted once, sampled ten times per second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import psutil

from alpaca_rlhf.utils import distributed


def main() -> None:
    """Write the rows, prepare them twice, print a table."""
    args = parse()
    if args.child:
        prepare(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, args.rows, args.like)
        size = data.stat().st_size / 1e6
        print(f"{args.rows:,} rows, {size:,.0f} MB, on {distributed.usable_cores()} cores")
        print("| | start | preparation | rows per second | peak memory |\n"
              "| --- | --- | --- | --- | --- |")
        for name in ("first start", "second start"):
            found, peak = run_child(args, data, Path(folder) / "cache")
            speed = args.rows / found["preparation"]
            print(f"| {name} | {found['start']:.1f} s | {found['preparation']:.1f} s | "
                  f"{speed:,.0f} | {peak / 1e9:.2f} GB |", flush=True)
        print(found["report"])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--like", type=Path, help="a file of preference rows to repeat")
    parser.add_argument("--tokenizer", help="folder (default: the embedded tiny LLaMA's)")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, count: int, like: Path | None) -> None:
    """Write `count` preference rows, one JSON object per line."""
    from alpaca_rlhf.utils.data.sources import Tally, open_sources

    def samples() -> Iterator:
        sources = open_sources([str(like)] if like else [])
        return sources[0].samples("train", Tally())

    with path.open("w") as file:
        for number, sample in enumerate(islice(cycle(samples()), count)):
            first, *more = sample.messages
            first = {**first, "content": f"{number}. {first['content']}"}
            row = {"prompt": [first, *more], "chosen": sample.chosen, "rejected": sample.rejected}
            file.write(json.dumps(row) + "\n")


def run_child(args: argparse.Namespace, data: Path, cache: Path) -> tuple[dict, float]:
    """Run `prepare` in a process; return what it measured, and the peak memory in bytes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", str(data), str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    assert process.stdout is not None, "it is a pipe"
    return json.loads(process.stdout.read().splitlines()[-1]), peak


def memory(pid: int) -> float:
    """Return the bytes of a process and its children, shared pages divided among them."""
    total = 0.0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # one of them has just ended
        pass
    return total


def prepare(args: argparse.Namespace) -> None:
    """Prepare all rows for step 2 and print the times, in a process of its own."""
    from alpaca_rlhf.demo import tiny_llama
    from alpaca_rlhf.utils.configs import DataConfig
    from alpaca_rlhf.utils.data import prepare as preparing
    from alpaca_rlhf.utils.data import tokenizer

    path = args.tokenizer or str(tiny_llama.ensure_tiny_llama(preparing.cache_home(None)))
    chat = tokenizer.ChatFormat(tokenizer.load_tokenizer(path))
    started = time.time()
    data, cache = args.child
    prepared = preparing.prepare_pairs(
        DataConfig(data_path=[data], data_split="0,1,0", data_output_path=cache,
                   preprocessing_num_workers=args.workers),
        seed=1234, max_seq_len=args.max_seq_len, chat=chat,
    )
    found = {
        "start": started - psutil.Process().create_time(),
        "preparation": time.time() - started, "report": prepared.describe(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
