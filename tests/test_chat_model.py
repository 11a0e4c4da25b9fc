"""Many talk to one model: each reply is what it would be alone, and none is lost."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from alpaca_rlhf.evaluation import saved
from alpaca_rlhf.inference.chat_model import ChatModel, End
from alpaca_rlhf.utils.configs import LoadingConfig, SamplingConfig
from alpaca_rlhf.utils.data.samples import user_turn
from alpaca_rlhf.utils.errors import UserError

GREEDY = SamplingConfig(8, temperature=0.0)


@pytest.fixture(scope="module")
def policy(small):
    return saved.open_policy(small.actor, LoadingConfig())


@pytest.fixture
def chat(policy):
    model = ChatModel(policy, at_once=3)
    yield model
    model.close()


def asked(number):
    return [user_turn(f"How many legs have {number} cats?")]


def told(chat, messages, sampling=GREEDY, seed=None):
    """The pieces and the End of a reply."""
    *pieces, end = chat.stream(messages, sampling, seed)
    assert "".join(pieces) == end.text
    return pieces, end


def drawn(chat, messages, sampling=GREEDY):
    """A queue for what is delivered of a reply, and its job."""
    delivered = queue.SimpleQueue()
    return delivered, chat.submit(messages, sampling, delivered.put)


def until_the_end(delivered):
    text = ""
    while not isinstance(piece := delivered.get(timeout=120), End):
        text += piece
    assert text == piece.text
    return piece


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_greedy_reply_is_the_one_that_step_3_would_draw(chat, policy, penalty):
    sampling = replace(GREEDY, repetition_penalty=penalty)
    prompts = [policy.form.prompt_ids(asked(i)) for i in range(4)]
    expected = [some[0] for some in policy.replies(prompts, sampling, seed=0)]
    for number, reply in enumerate(expected):
        delivered, job = drawn(chat, asked(number), sampling)
        end = until_the_end(delivered)
        assert job.ids == reply.ids
        assert (end.reply_tokens, end.prompt_tokens) == (len(reply.ids), len(prompts[number]))
        assert end.reason == ("stop" if reply.ended else "length")


def test_200_chats_at_once_by_8_clients_lose_nothing(chat, policy):
    prompts = [policy.form.prompt_ids(asked(i)) for i in range(200)]
    expected = [some[0].ids for some in policy.replies(prompts, GREEDY, seed=0)]
    assert len(set(map(tuple, expected))) > 10
    with ThreadPoolExecutor(8) as clients:
        waiting = list(clients.map(lambda i: drawn(chat, asked(i)), range(200)))
        ends = list(clients.map(until_the_end, [delivered for delivered, _ in waiting]))
    assert [job.ids for _, job in waiting] == expected
    assert [end.reply_tokens for end in ends] == [len(ids) for ids in expected]


def test_a_seed_fixes_a_reply_whoever_else_is_talking(chat):
    sampling = SamplingConfig(8)
    alone = told(chat, asked(1), sampling, seed=5)[1].text
    with ThreadPoolExecutor(4) as clients:
        seeds = [5, 6, 5, 7]
        among = list(clients.map(lambda seed: told(chat, asked(1), sampling, seed)[1].text, seeds))
    assert among[0] == among[2] == alone
    assert len(set(among)) > 1


def test_whoever_stops_listening_frees_the_place_for_the_next(policy):
    chat = ChatModel(policy, at_once=1)
    endless = SamplingConfig(100, temperature=1.0)
    ends = queue.SimpleQueue()
    for _ in range(3):
        stream = chat.stream(asked(1), endless, seed=1)
        next(stream)
        stream.close()
    job = chat.submit(asked(2), endless, ends.put)
    job.cancel()
    assert told(chat, asked(3))[1].reason in ("stop", "length")
    end = ends.get(timeout=60)
    assert isinstance(end, End) and end.reason == "cancelled"
    chat.close()


def test_a_chat_that_fails_does_not_take_the_others_with_it(policy, monkeypatch):
    class Failing(torch.nn.Module):
        def forward(self, input_ids, **rest):
            if input_ids.shape[1] > 80:
                raise RuntimeError("out of memory")
            return policy.model(input_ids=input_ids, **rest)

    chat = ChatModel(replace(policy, model=Failing()))
    results = {}

    def client(name, text):
        try:
            results[name] = told(chat, [user_turn(text)])[1].reason
        except RuntimeError as error:
            results[name] = str(error)

    threads = [threading.Thread(target=client, args=pair)
               for pair in (("good", "Hi."), ("bad", "Is ice cold? " * 11), ("late", "Go on."))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    chat.close()
    assert results["bad"] == "out of memory", results
    assert {results["good"], results["late"]} <= {"stop", "length"}


def test_a_message_that_does_not_fit_is_refused_before_it_waits(chat):
    with pytest.raises(UserError, match="shorten it"):
        next(chat.stream([user_turn("Is ice cold? " * 200)], GREEDY))


class Spelling:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def test_characters_and_spaces_come_out_whole(policy):
    text = "a  🙂 b"
    ids = iter([*text.encode(), policy.form.eos_id + 1000])

    class Writing(torch.nn.Module):
        def forward(self, input_ids, **rest):
            logits = torch.zeros(1, 1, 2000)
            logits[0, 0, next(ids)] = 1.0
            return type("Output", (), {"logits": logits})()

    form = type("Form", (), {"tokenizer": Spelling(), "prompt_ids": lambda self, messages: [1]})()
    chat = ChatModel(replace(policy, model=Writing(), form=form,
                             eos_ids=[policy.form.eos_id + 1000]))
    pieces, end = told(chat, [user_turn("x")], SamplingConfig(50, temperature=0.0))
    chat.close()
    assert pieces == ["a", "  🙂", " b"]
    assert (end.text, end.reason) == (text, "stop")
