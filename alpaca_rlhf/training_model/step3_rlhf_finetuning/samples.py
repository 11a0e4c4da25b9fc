"""A few rollouts written out token by token, for people: what samples.jsonl and the report hold."""

from typing import Any

from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience
from alpaca_rlhf.utils.data.tokenizer import ChatFormat

DIGITS = 4
PROMPT_TOKENS = 64  # of the prompt, the last ones


def token_records(
    experience: Experience, rewards: Tensor, form: ChatFormat, rows: int
) -> list[dict[str, Any]]:
    """The first rollouts of a round.

    Args:
        experience: of the round.
        rewards: [B, R].
        form: for the texts.
        rows: how many.

    Returns:
        For each rollout `prompt`, `reply`, `score`, `eos`, `padding` (columns of the batch that
        the mask leaves out after the reply) and `tokens`: the texts of the prompt's last tokens
        and the reply's, with, for those of the reply, where `mask` is 1, `logprob`, `kl` (its
        estimate k1 against the reference), `value`, `advantage` and `reward`.
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
    for i in range(min(rows, len(experience))):
        ids, real = experience.input_ids[i], experience.attention_mask[i].bool()
        prompt = ids[:start][real[:start]].tolist()
        kept = int(experience.response_mask[i].sum())
        reply = experience.responses[i, :kept].tolist()
        shown = prompt[-PROMPT_TOKENS:]
        records.append({
            "prompt": form.decode(prompt),
            "reply": form.decode(reply),
            "score": round(experience.score[i].item(), DIGITS),
            "eos": bool(experience.has_eos[i]),
            "padding": experience.response_length - kept,
            "tokens": {
                "text": [*_pieces(shown, form), *_pieces(reply, form)],
                "mask": [0] * len(shown) + [1] * kept,
                **{name: [round(x, DIGITS) for x in column[i, :kept].tolist()]
                   for name, column in columns.items()},
            },
        })
    return records


def _pieces(ids: list[int], form: ChatFormat) -> list[str]:
    """The text of each token, with what it adds to the text before it."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = form.tokenizer.decode(ids[:end])
        pieces.append(text[len(before) :])
        before = text
    return pieces
