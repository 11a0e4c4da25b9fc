"""Evaluation of the policy on held-out prompts, before and after PPO, and samples for people."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience, ScoredRollout
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import RolloutMaker
from alpaca_rlhf.utils import console, distributed, rl_math
from alpaca_rlhf.utils.data.batches import collate_prompts, covering_batches
from alpaca_rlhf.utils.data.tokenizer import ChatFormat

Gold = Callable[[dict[str, Any], str], float]
Record = dict[str, Any]
SAMPLES = 4  # rollouts in a table, and in samples.jsonl for each iteration
DIGITS = 4
PROMPT_TOKENS = 64  # of a sample's prompt, the last ones


def gold_rule(data_path: Sequence[str]) -> Gold | None:
    """Return the embedded data's own rule for the quality of a response, if that data is used.

    It maps an encoded row and a response to [0, 1]; it is measured and never trained on.
    """
    def gold(row: dict[str, Any], response: str) -> float:
        return assistant_world.gold_score(json.loads(row["messages"]), response)

    return None if data_path else gold


def evaluate(
    maker: RolloutMaker, rows: Sequence[dict[str, Any]], seed: int, gold: Gold | None = None
) -> list[Record]:
    """Sample and score a response to each of the held-out prompts, which are the same on all ranks.

    The seed should be the same before and after PPO, so that only the policy differs.

    Returns:
        For each prompt `prompt`, `reply`, `score`, `k1`, `k3` (nats), `length` (tokens), `eos`
        and, with a rule, `gold`; the same list on every rank, in the order of the prompts.
    """
    maker.reseed(seed)
    # The same number of rows on every rank; rows that only fill up are not counted.
    batches = covering_batches(len(rows), 1, distributed.rank(), distributed.world_size())
    mine = [(i, counts) for indices, counts in batches for i in indices]
    if not mine:
        return []
    prompts = collate_prompts([rows[i] for i, _ in mine], maker.chat.pad_id)
    scored, _ = maker.score(maker.generate(prompts.to(distributed.device())))
    k1, k3 = rl_math.kl_estimates(scored.logprobs, scored.ref_logprobs, scored.response_mask)
    columns = {
        "score": scored.score, "k1": k1, "k3": k3, "length": scored.response_mask.sum(-1),
        "eos": scored.has_eos,
    }
    numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
    found = []
    for (i, counts), prompt, response, values in zip(
        mine, *maker.texts(scored), numbers, strict=True
    ):
        record = {"prompt": prompt, "reply": response, **dict(zip(columns, values, strict=True))}
        if gold is not None:
            record["gold"] = gold(rows[i], response)
        if counts:
            found.append((i, record))
    found = sorted(distributed.gather_rows(found), key=lambda pair: pair[0])
    records = [record for _, record in found]
    console.say(f"policy: {describe(summarize(records))}")
    return records


def summarize(records: Sequence[Record]) -> dict[str, float]:
    """Return means over the records, and the standard deviation of the score."""
    if not records:
        return {}
    means = {
        name: sum(float(record[name]) for record in records) / len(records)
        for name in ("score", "k1", "k3", "length", "eos", "gold") if name in records[0]
    }
    scores = torch.tensor([record["score"] for record in records], dtype=torch.float64)
    return means | {"score_std": scores.std(correction=0).item(), "prompts": len(records)}


def describe(summary: dict[str, float]) -> str:
    """Return the summary as one line for the console."""
    if not summary:
        return "no held-out prompts to evaluate on"
    gold = f", gold {summary['gold']:.3f}" if "gold" in summary else ""
    return (
        f"score {summary['score']:.3f} ± {summary['score_std']:.3f}{gold}, length "
        f"{summary['length']:.1f}, eos rate {summary['eos']:.3f}, KL {summary['k3']:.3f} nats "
        f"on {summary['prompts']} held-out prompts"
    )


def results(data: dict[str, Any], before: list[Record], after: list[Record]) -> dict[str, Any]:
    """Return what results.json holds: summaries, and the dialogues before and after."""
    return {
        "step": 3, "before": summarize(before), "after": summarize(after), "data": data,
        "dialogues": [
            {"prompt": old["prompt"], "before": old, "after": new}
            for old, new in zip(before, after, strict=True)
        ],
    }


# --- samples -------------------------------------------------------------------------------------


def table(maker: RolloutMaker, scored: ScoredRollout) -> str:
    """Return some rollouts as a table for the console."""
    prompts, responses = maker.texts(scored.rows(range(min(SAMPLES, len(scored)))))
    scores = [f"{score:.2f}" for score in scored.score[:SAMPLES].tolist()]
    rows = [list(row) for row in zip(prompts, responses, scores, strict=True)]
    return console.table(["prompt", "response", "score"], rows)


def token_records(experience: Experience, rewards: Tensor, chat: ChatFormat) -> list[Record]:
    """Return the first rollouts of an iteration, token by token, as samples.jsonl holds them.

    `rewards` are [B, R].

    Returns:
        For each rollout `prompt`, `reply`, `score`, `eos`, `padding` (columns of the batch after
        the response) and `tokens`: the texts of the prompt's last tokens and the response's, with,
        for those of the response, where `mask` is 1, `logprob`, `kl` (estimate k1 against the
        reference model, nats), `value`, `advantage` and `reward`.
    """
    records = []
    start = experience.input_ids.shape[1] - experience.response_length
    columns = {
        "logprob": experience.logprobs,
        "kl": experience.logprobs - experience.ref_logprobs,
        "value": experience.values,
        "advantage": experience.advantages,
        "reward": rewards,
    }
    for i in range(min(SAMPLES, len(experience))):
        ids, real = experience.input_ids[i], experience.attention_mask[i].bool()
        prompt = ids[:start][real[:start]].tolist()
        kept = int(experience.response_mask[i].sum())
        response = experience.responses[i, :kept].tolist()
        shown = prompt[-PROMPT_TOKENS:]
        records.append({
            "prompt": chat.decode(prompt),
            "reply": chat.decode(response),
            "score": round(experience.score[i].item(), DIGITS),
            "eos": bool(experience.has_eos[i]),
            "padding": experience.response_length - kept,
            "tokens": {
                "text": [*_pieces(shown, chat), *_pieces(response, chat)],
                "mask": [0] * len(shown) + [1] * kept,
                **{name: [round(x, DIGITS) for x in column[i, :kept].tolist()]
                   for name, column in columns.items()},
            },
        })
    return records


def _pieces(ids: list[int], chat: ChatFormat) -> list[str]:
    """Return the text that each token adds to the text before it."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = chat.tokenizer.decode(ids[:end])
        pieces.append(text[len(before) :])
        before = text
    return pieces
