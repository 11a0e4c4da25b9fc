"""Speed of the compiled products of few rows over torch's and oneDNN's, as ratios in one run.

    python benchmarks/products.py [--dtype bf16] [--rows 1 4 8 16 64]
                                  [--hidden 576 --mlp 1536 --layers 30]

The weights are those of the linear layers of a LLaMA (by default SmolLM2-135M's, without its head):
more than the processor's caches hold, as in a decoding step. All three go through all of them in
turn, and the median of the ratios counts. With --dtype bf16 torch's linear layer, and oneDNN's, are
in bf16, and the compiled product with bf16 weights is also compared with the one with fp32 weights.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from alpaca_rlhf.utils.generation.cpu.kernels import Product


def main() -> None:
    """Measure and print a Markdown table."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    hidden, mlp = args.hidden, args.mlp
    shapes = [(2 * hidden, hidden), (hidden, hidden), (2 * mlp, hidden), (hidden, mlp)]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    weights = [torch.randn(shape, dtype=dtype) for _ in range(args.layers) for shape in shapes]
    compiled, fp32 = filled(weights), filled([w.float() for w in weights])
    size = sum(w.numel() for w in weights)
    say(f"{size / 1e6:.0f} M weights, {args.threads} threads, median of {args.repeats}\n")
    say("| rows | `linear`, ms | oneDNN, ms | compiled, ms | gain over `linear` | over oneDNN "
        "| over compiled, fp32 | weights read |\n" + "| --- " * 8 + "|")
    for rows in args.rows:
        given = {size: torch.randn(rows, size) for size in (hidden, mlp)}
        inputs = [given[w.shape[1]] for w in weights]
        given_half = [x.to(dtype) for x in inputs]
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
        ways = [(F.linear, given_half, weights), (onednn, given_half, packed),
                (own, inputs, fp32), (own, inputs, compiled)]
        turns = [[took(*way) for way in ways] for _ in range(args.repeats + 1)]
        report(rows, size * dtype.itemsize, turns[1:])


def filled(weights: Sequence[Tensor]) -> list[Product]:
    """The compiled products of some weights."""
    made = [Product(SimpleNamespace(weight=w, bias=None)) for w in weights]
    for product in made:
        product.fill()
    return made


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    made.add_argument("--hidden", type=int, default=576)
    made.add_argument("--mlp", type=int, default=1536)
    made.add_argument("--layers", type=int, default=30)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repeats", type=int, default=9)
    return made


def onednn(x: Tensor, packed: Tensor) -> Tensor:
    """x W^T with oneDNN's own packing."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def own(x: Tensor, product: Product) -> Tensor:
    """x W^T by ours."""
    return product(x)


def took(multiply: Callable, inputs: Sequence[Tensor], weights: Sequence) -> float:
    """Seconds for all layers."""
    start = time.perf_counter()
    for x, weight in zip(inputs, weights, strict=True):
        multiply(x, weight)
    return time.perf_counter() - start


def report(rows: int, size: int, turns: list[list[float]]) -> None:
    """One line of the table; `size` in bytes."""
    linear, packed, _, compiled = (
        statistics.median(column) for column in zip(*turns, strict=True))
    gains = [statistics.median(turn[i] / turn[3] for turn in turns) for i in (0, 1, 2)]
    say(f"| {rows} | {linear * 1e3:.0f} | {packed * 1e3:.0f} | {compiled * 1e3:.0f} "
        f"| **{gains[0]:.2f}** | **{gains[1]:.2f}** | {gains[2]:.2f} "
        f"| {size / compiled / 1e9:.1f} GB/s |")


def say(text: str) -> None:
    """A line of the report."""
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
