"""Growth of the cost of step 1 with sequence length, vocabulary and batch: `steps.py --grow`.

Models have the embedded one's layers, random weights and one of several vocabularies; every row is
as long as the limit. The expected line is a constant and a multiple of the arithmetic, which is
linear in batch and vocabulary and has a quadratic term (attention) in the length; memory is
expected to be linear in all three.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca_rlhf.utils.data.tokenizer import load_tokenizer

Measure = Callable[[str, str, argparse.Namespace], dict[str, Any]]  # `steps.measure`
Point = tuple[int, float, float, float]  # place on the axis, seconds, peak GB, FLOPs
GROWTH: dict[str, tuple[int, ...]] = {
    "sequence length, tokens": (128, 256, 512, 1024, 2048),
    "vocabulary, tokens": (4096, 8192, 32768, 65536, 131072),
    "batch, rows": (2, 4, 8, 16, 32),
}
BASE = (512, 8192, 8)


def plot(measure: Measure, model: str, args: argparse.Namespace, folder: Path) -> None:
    """Measure every point and draw them into the file of `--grow`."""
    text = folder / "long.jsonl"
    rows = ({"prompt": f"Count from {i}.", "response": " ".join(map(str, range(i, i + 999)))}
            for i in range(200))
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data_path": str(text), "rounds": 3, "steps": 1, "settings": []}
    curves: dict[str, list[Point]] = {}
    for axis, (title, values) in enumerate(GROWTH.items()):
        for value in values:
            length, vocabulary, batch = (*BASE[:axis], value, *BASE[axis + 1 :])
            made = random_model(model, vocabulary, folder)
            changed = argparse.Namespace(
                **vars(args) | changes | {"max_seq_len": length, "batch": batch})
            reports = measure("sft", made, changed)["reports"]["ours"]
            point = (value, statistics.median(report["seconds"] for report in reports),
                     max(report["peak_gb"] for report in reports), reports[0]["flops"])
            print(f"{title}: {value:,}: {point[1]:.3f} s, {point[2]:.2f} GB", file=sys.stderr,
                  flush=True)
            curves.setdefault(title, []).append(point)
    draw(curves, args)


def random_model(model: str, vocabulary: int, folder: Path) -> str:
    """Save a model with the layers of another one, and return its folder."""
    made = folder / f"model-{vocabulary}"
    if not made.exists():
        config = AutoConfig.from_pretrained(model)
        config.vocab_size, config.max_position_embeddings = vocabulary, 4096
        AutoModelForCausalLM.from_config(config).save_pretrained(made)
        load_tokenizer(model).save_pretrained(made)
    return str(made)


def draw(curves: dict[str, list[Point]], args: argparse.Namespace) -> None:
    """Draw the measured points and the expected lines."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for i, (title, points) in enumerate(curves.items()):
        at, seconds, memory, flops = (np.array(column) for column in zip(*points, strict=True))
        panels: list[tuple[str, Any, Any, str]] = [
            ("seconds per step", seconds, flops, "a + b × arithmetic"),
            ("peak memory, GB", memory, at, "a + b x"),
        ]
        for row, (label, measured, driver, expected) in enumerate(panels):
            terms = np.stack([np.ones(len(at)), driver / driver.max()], axis=1)
            # Weighed so that relative errors count.
            fitted, *_ = np.linalg.lstsq(terms / measured[:, None], np.ones(len(at)), rcond=None)
            axes = figure.add_subplot(2, 3, 3 * row + i + 1)
            axes.plot(at, terms @ fitted, color="#94a3b8", label=f"expected: {expected}")
            axes.plot(at, measured, "o", color="#0f766e", label="measured")
            axes.set_xlim(0)
            axes.set_ylim(0)
            axes.locator_params(nbins=5)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel(title)
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize="small")
    length, vocabulary, batch = BASE
    figure.suptitle(f"step 1, {args.dtype}, {args.threads} threads; elsewhere {length} tokens, "
                    f"vocabulary {vocabulary:,}, batch {batch}", fontsize="medium")
    figure.savefig(args.grow, dpi=110)
