"""Many chats with one model are decoded in one batch: each response is what it would be alone."""

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from alpaca_rlhf.evaluation import saved
from alpaca_rlhf.inference.chat_model import ChatModel, End
from alpaca_rlhf.utils.configs import LoadingConfig, SamplingConfig
from alpaca_rlhf.utils.data.samples import user_turn
from alpaca_rlhf.utils.errors import UserError

GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def policy(small):
    return saved.open_policy(small.actor, LoadingConfig())


@pytest.fixture
def chat(policy):
    model = ChatModel(policy, slots=3)
    yield model
    model.close()


class Ids:
    """A tokenizer whose text is the ids, so that texts are equal where all ids are."""

    def __init__(self, chat):
        self.prompt_ids = chat.prompt_ids

    def text(self, ids):
        return " ".join(map(str, ids))


def asked(number):
    return [user_turn(f"How many legs have {number} cats?")]


def streamed(chat, messages, sampling=GREEDY, seed=None):
    """The pieces and the End of a response."""
    *pieces, end = chat.stream(messages, sampling, seed)
    assert "".join(pieces) == end.text
    return pieces, end


def ends_of(chat, prompts, sampling=GREEDY):
    """Submit all prompts at once; the End of each."""
    arriving = [queue.SimpleQueue() for _ in prompts]
    for messages, pieces in zip(prompts, arriving, strict=True):
        chat.submit(messages, sampling, pieces.put)
    ends = []
    for pieces in arriving:
        text = ""
        while not isinstance(piece := pieces.get(timeout=120), End):
            text += piece
        assert text == piece.text
        ends.append(piece)
    return ends


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_200_chats_at_once_get_the_responses_of_a_rollout(policy, penalty):
    sampling = replace(GREEDY, repetition_penalty=penalty)
    chat = ChatModel(replace(policy, chat=Ids(policy.chat)), slots=3)
    prompts = [asked(i) for i in range(200)]
    expected = [some[0] for some in policy.respond(prompts, sampling, seed=0)]
    assert len({response.text for response in expected}) > 10
    ends = ends_of(chat, prompts, sampling)
    chat.close()
    assert [(end.text, end.reason) for end in ends] == [
        (" ".join(map(str, response.ids)), "stop" if response.ended else "length")
        for response in expected]
    assert ends[7].response_tokens == len(expected[7].ids)
    assert ends[7].prompt_tokens == len(policy.chat.prompt_ids(asked(7)))


def test_a_seed_fixes_a_response_whatever_it_is_batched_with(chat):
    sampling = SamplingConfig(max_new_tokens=8)
    alone = streamed(chat, asked(1), sampling, seed=5)[1].text
    with ThreadPoolExecutor(4) as clients:
        seeds = [5, 6, 5, 7]
        among = list(clients.map(
            lambda seed: streamed(chat, asked(1), sampling, seed)[1].text, seeds))
    assert among[0] == among[2] == alone
    assert len(set(among)) > 1


def test_chats_are_decoded_in_one_forward_pass(policy):
    rows = []

    class Counting(torch.nn.Module):
        def forward(self, input_ids, **rest):
            rows.append(input_ids.shape[0])
            return policy.model(input_ids=input_ids, **rest)

    chat = ChatModel(replace(policy, model=Counting()), slots=4)
    ends_of(chat, [asked(i) for i in range(4)], SamplingConfig(max_new_tokens=30))
    chat.close()
    assert max(rows) == 4 and len(rows) < 40


def test_closing_a_stream_frees_its_slot_for_the_next(policy):
    chat = ChatModel(policy, slots=1)
    endless = SamplingConfig(max_new_tokens=100)
    for _ in range(3):
        stream = chat.stream(asked(1), endless, seed=1)
        next(stream)
        stream.close()
    pieces = queue.SimpleQueue()
    chat.submit(asked(2), endless, pieces.put).cancel()
    assert streamed(chat, asked(3))[1].reason in ("stop", "length")
    end = pieces.get(timeout=60)
    assert isinstance(end, End) and end.reason == "cancelled"
    chat.close()


def test_a_chat_that_fails_does_not_fail_the_others(policy):
    class Failing(torch.nn.Module):
        def forward(self, input_ids, **rest):
            if input_ids.shape[1] > 80:
                raise RuntimeError("out of memory")
            return policy.model(input_ids=input_ids, **rest)

    chat = ChatModel(replace(policy, model=Failing()))
    texts = ["Hi.", "Is ice cold? " * 11, "Go on.", "Name a colour."]
    expected = [streamed(ChatModel(policy), [user_turn(text)])[1].text for text in texts]

    def outcome(text):
        try:
            return streamed(chat, [user_turn(text)])[1].text
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(4) as clients:
        outcomes = list(clients.map(outcome, texts))
    chat.close()
    assert outcomes == [expected[0], "out of memory", *expected[2:]]


def test_a_message_that_does_not_fit_is_refused_before_it_waits(chat):
    with pytest.raises(UserError, match="shorten it"):
        next(chat.stream([user_turn("Is ice cold? " * 200)], GREEDY))


def test_characters_and_spaces_come_out_whole(policy):
    text, eos = "a  🙂 b", 1999
    ids = iter([*text.encode(), eos])

    class Writing(torch.nn.Module):
        def forward(self, input_ids, **rest):
            logits = torch.zeros(1, 1, 2000)
            logits[0, 0, next(ids)] = 1.0
            return type("Output", (), {"logits": logits})()

    class Bytes:
        def text(self, ids):
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

        def prompt_ids(self, messages):
            return [1]

    chat = ChatModel(replace(policy, model=Writing(), chat=Bytes(), eos_ids=[eos]))
    pieces, end = streamed(chat, [user_turn("x")], replace(GREEDY, max_new_tokens=50))
    chat.close()
    assert pieces == ["a", "  🙂", " b"]
    assert (end.text, end.reason) == (text, "stop")
