"""What the policy writes on held-out prompts: measured alike before and after PPO."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import RolloutMaker
from alpaca_rlhf.utils import distributed, rl_math
from alpaca_rlhf.utils.data.batches import collate_prompts, covering_batches

Gold = Callable[[dict[str, Any], str], float]
Record = dict[str, Any]


def evaluate(
    maker: RolloutMaker,
    rows: Sequence[dict[str, Any]],
    seed: int,
    gold: Gold | None = None,
) -> list[Record]:
    """A sampled reply to each held-out prompt, and what is thought of it.

    Args:
        maker: draws and scores.
        rows: held-out prompts; all ranks hold the same.
        seed: the same before and after, so that only the policy differs.
        gold: the data set's own rule, row and reply -> [0, 1], where there is one.

    Returns:
        For each prompt `prompt`, `reply`, `score`, `k1`, `k3` (nats), `length` (tokens), `eos`
        and, with a rule, `gold`; the same list on every rank, in the order of the prompts.
    """
    maker.reseed(seed)
    records: list[tuple[int, Record]] = []
    # As many rows on every rank; what only fills up does not count.
    mine = [
        (i, counts)
        for indices, counts in covering_batches(
            len(rows), 1, distributed.rank(), distributed.world_size()
        )
        for i in indices
    ]
    if not mine:
        return []
    chosen = [rows[i] for i, _ in mine]
    prompts = collate_prompts(chosen, maker.form.pad_id).to(distributed.device())
    scored = maker.score(maker.generate(prompts))
    k1, k3 = rl_math.kl_estimates(scored.logprobs, scored.ref_logprobs, scored.response_mask)
    columns = zip(
        mine, chosen, *maker.texts(scored), scored.score.tolist(), k1.tolist(), k3.tolist(),
        scored.response_mask.sum(-1).tolist(), scored.has_eos.tolist(), strict=True,
    )
    for (i, counts), row, prompt, reply, score, one, three, length, eos in columns:
        record = {
            "prompt": prompt, "reply": reply, "score": score, "k1": one, "k3": three,
            "length": length, "eos": eos,
        }
        if gold is not None:
            record["gold"] = gold(row, reply)
        if counts:
            records.append((i, record))
    ordered = sorted(distributed.gather_rows(records), key=lambda pair: pair[0])
    return [record for _, record in ordered]


def summarize(records: Sequence[Record]) -> dict[str, float]:
    """Means over the records, and the standard deviation of the score."""
    if not records:
        return {}
    means = {
        name: sum(float(record[name]) for record in records) / len(records)
        for name in ("score", "k1", "k3", "length", "eos", "gold") if name in records[0]
    }
    scores = torch.tensor([record["score"] for record in records], dtype=torch.float64)
    return means | {"score_std": scores.std(correction=0).item(), "prompts": len(records)}


def describe(summary: dict[str, float]) -> str:
    """A summary for people."""
    if not summary:
        return "nothing held out to measure on"
    gold = f", gold {summary['gold']:.3f}" if "gold" in summary else ""
    return (
        f"score {summary['score']:.3f} ± {summary['score_std']:.3f}{gold}, length "
        f"{summary['length']:.1f}, eos rate {summary['eos']:.3f}, KL {summary['k3']:.3f} nats "
        f"on {summary['prompts']} held-out prompts"
    )
