"""The evaluation of the policy: each held-out prompt once, whatever the ranks, in its order."""

import pytest
import torch
from conftest import PROMPTS

from alpaca_rlhf.training_model.step3_rlhf_finetuning import evaluate_policy
from alpaca_rlhf.utils import distributed


@pytest.fixture(scope="module")
def rows(small):
    return [{"prompt_ids": small.chat.prompt_ids([{"role": "user", "content": text}])}
            for text in PROMPTS[:5]]


@pytest.fixture(scope="module")
def maker(small):
    return small.maker(small.roles(lora=4, eos_every=6))


def test_each_prompt_has_one_record_in_its_order_and_the_seed_decides_the_responses(maker, rows):
    records = evaluate_policy.evaluate(maker, rows, seed=3, gold=lambda row, response: 0.5)
    assert [record["prompt"] for record in records] == [
        f"Human: {text}\n\nAssistant:" for text in PROMPTS[:5]]
    assert all(record.keys() == {"prompt", "reply", "score", "k1", "k3", "length", "eos", "gold"}
               for record in records)
    again = evaluate_policy.evaluate(maker, rows, seed=3, gold=lambda row, response: 0.5)
    assert again == records
    assert evaluate_policy.evaluate(maker, rows, seed=4) != records
    assert evaluate_policy.evaluate(maker, [], seed=3) == []


def test_two_ranks_record_each_prompt_once(maker, rows, monkeypatch):
    gathered, records = [], []

    def gather(found):
        gathered.extend(found)
        return gathered

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_rows", gather)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        records = evaluate_policy.evaluate(maker, rows, seed=3)
    assert [record["prompt"].split("\n")[0] for record in records] == [
        f"Human: {text}" for text in PROMPTS[:5]]


def test_the_summary_is_of_means_and_the_std_of_the_score():
    records = [{"score": score, "k1": 1.0, "k3": 2.0, "length": 3, "eos": eos}
               for score, eos in ((1.0, True), (3.0, False))]
    assert evaluate_policy.summarize(records) == {
        "score": 2.0, "k1": 1.0, "k3": 2.0, "length": 3.0, "eos": 0.5, "score_std": 1.0,
        "prompts": 2}
    assert evaluate_policy.summarize([]) == {}


def test_samples_tell_each_response_token_by_token(small, maker):
    experience, _ = small.experience(maker)
    rewards = torch.arange(4.0).unsqueeze(-1) + torch.zeros(4, experience.response_length)
    records = evaluate_policy.token_records(experience, rewards, small.chat)
    assert [record["prompt"].split("\n")[0] for record in records] == [
        f"Human: {text}" for text in PROMPTS[:4]]
    for row, record in enumerate(records):
        tokens, kept = record["tokens"], int(experience.response_mask[row].sum())
        assert record["padding"] == experience.response_length - kept
        assert tokens["mask"] == [0] * (len(tokens["text"]) - kept) + [1] * kept
        assert tokens["reward"] == [row] * kept
        assert tokens["value"] == pytest.approx(experience.values[row, :kept].tolist(), abs=1e-4)
        assert tokens["kl"] == pytest.approx([0.0] * kept, abs=1e-4)
