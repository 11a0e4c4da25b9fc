"""The web chat: in a real browser without a network, and what its buttons do."""

import contextlib
import importlib
import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
from loading import load

from alpaca_rlhf.evaluation import saved
from alpaca_rlhf.inference import web_chat, web_page
from alpaca_rlhf.inference.chat_model import ChatModel
from alpaca_rlhf.inference.votes import VoteFile
from alpaca_rlhf.inference.web_page import Site, launch
from alpaca_rlhf.training_model.launching import choose_port
from alpaca_rlhf.utils.configs import LoadingConfig, SamplingConfig
from alpaca_rlhf.utils.errors import UserError

CHROMIUM = shutil.which("chromium")
SAMPLING = SamplingConfig(max_new_tokens=12, temperature=0.0)  # sampled ones could be equal
STEP_2 = "alpaca_rlhf.training_model.step2_reward_model_finetuning.main"


@pytest.fixture(scope="module")
def models(small, tmp_path_factory):
    """Two policies whose responses differ."""
    import torch
    from conftest import small_config
    from transformers import LlamaForCausalLM

    other = tmp_path_factory.mktemp("other") / "sft"
    torch.manual_seed(11)
    LlamaForCausalLM(small_config(small.tokenizer)).save_pretrained(other)
    small.tokenizer.save_pretrained(other)
    made = [ChatModel(saved.open_policy(str(path), LoadingConfig()))
            for path in (small.actor, other)]
    yield made
    for model in made:
        model.close()


@pytest.fixture
def opened():
    """Serve a site and open it; afterwards check that the page had no errors and stayed local."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, contextlib.ExitStack() as closing:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        errors = []

        def open_site(site):
            port = choose_port(0)
            closing.callback(launch(site, "127.0.0.1", port).close)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(60_000)
            local = f"http://127.0.0.1:{port}", "data:", "blob:"
            page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: None if request.url.startswith(local)
                    else errors.append(request.url))
            page.goto(local[0])
            return page

        yield open_site
        browser.close()
        assert errors == []


def say(page, text):
    box = page.locator("#message textarea")
    box.fill(text)
    box.press("Enter")


def turns(page, side=0):
    """The turns that a chat shows, the user's and the model's."""
    shown = page.locator(f"#chat-{side} :is([data-testid=user], [data-testid=bot])")
    return [part.strip() for part in shown.all_inner_texts()]


def wait_for(page, condition):
    """Wait until a condition of the page holds."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("waited in vain")


def test_two_turns_with_one_model_on_a_screen_and_on_a_phone(models, opened):
    page = opened(Site(["actor"], models[:1], SAMPLING))
    assert page.locator("#vote-left").count() == 0
    for number, text in enumerate(("What is ice?", "Who wrote Faust?"), 1):
        say(page, text)
        wait_for(page, lambda n=number: len(turns(page)) == 2 * n
                 and page.locator("#notice").inner_text() == "")
        assert turns(page)[-2] == text and turns(page)[-1]
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    say(page, "What is ice? " * 60)
    page.locator("#notice", has_text="shorten it").wait_for()
    assert len(turns(page)) == 4
    page.locator("#clear").click()
    wait_for(page, lambda: turns(page) == [])


def test_the_arena_hides_the_names_until_the_vote(models, opened, tmp_path):
    page = opened(Site(["rlhf", "sft"], models, SAMPLING, "", VoteFile(tmp_path / "votes.jsonl")))
    notice = page.locator("#notice")
    say(page, "What is ice?")
    page.locator("#notice", has_text="Which is better?").wait_for()
    better = turns(page, 1)[-1]
    assert "rlhf" not in page.inner_text("body").replace(notice.inner_text(), "")
    page.locator("#vote-right").click()
    page.locator("#notice", has_text="of 1 votes").wait_for()
    assert "rlhf" in notice.inner_text()
    row = json.loads((tmp_path / "votes.jsonl").read_text())
    assert " ".join(row["chosen"].split()) == " ".join(better.split())


@pytest.mark.parametrize("arena", [False, True])
def test_two_models_are_under_their_names_but_in_the_arena(models, tmp_path, arena):
    votes = VoteFile(tmp_path / "votes.jsonl") if arena else None
    blocks = Site(["rlhf", "sft"], models, SAMPLING, "", votes).page().blocks.values()
    labels = [block.label for block in blocks if isinstance(block, web_page.gradio.Chatbot)]
    assert labels == (["Left", "Right"] if arena else ["rlhf", "sft"])


def test_votes_are_pairs_that_step_2_trains_on(models, small, tmp_path, monkeypatch, group):
    path = tmp_path / "votes.jsonl"
    monkeypatch.setattr(web_page.random, "shuffle", list.reverse)
    site, visit = Site(["rlhf", "sft"], models, SAMPLING, "Be kind.", VoteFile(path)), None
    for number, (text, side) in enumerate((("What is ice?", 1), ("And fire?", 0)), 1):
        *_, (_, visit, notice, *shown) = site.respond(text, visit, 0.0, 1.0, 12)
        assert notice == "Which is better?"
        notice = site.vote(side, visit)[1]
        row = json.loads(path.read_text().splitlines()[-1])
        assert row["chosen"] == shown[side][-1]["content"] != row["rejected"]
        who = "rlhf" if row["models"][0] == small.actor else "sft"
        assert f"{('Left', 'Right')[side]}: {who}" in notice and f"of {number} votes" in notice
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    # Both sides continue with the better response.
    assert [m["content"] for m in second["prompt"]] == [
        "Be kind.", "What is ice?", first["chosen"], "And fire?"]
    assert len(load([str(path)]).train) == 2

    monkeypatch.setattr(sys, "argv", [
        "main.py", "--data_path", str(path), "--model_name_or_path", small.actor,
        "--data_split", "0,1,0", "--seed", "1", "--output_dir", str(tmp_path / "critic"),
        "--data_output_path", str(tmp_path / "cache"), "--per_device_train_batch_size", "1",
    ])
    importlib.import_module(STEP_2).main()
    results = json.loads((tmp_path / "critic" / "results.json").read_text())
    assert (results["data"]["train"], results["data"]["filtered_out"]) == (2, {})
    assert len((tmp_path / "critic" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tie_and_votes_without_responses(models, tmp_path):
    site = Site(["rlhf", "sft"], models, SAMPLING, "", VoteFile(tmp_path / "votes.jsonl"))
    assert site.vote(0, None)[1] == "Write something first."
    settings = (0.0, 1.0, 6)
    *_, (_, visit, notice, *_) = site.respond("Hi.", None, *settings)
    assert notice == "Which is better?"
    assert next(site.respond("Again.", visit, *settings))[2].startswith("Vote on these")
    assert "0 won, 1 tied, 0 lost" in site.vote(None, visit)[1]
    assert site.vote(None, visit)[1] == "Write something first."


def test_a_message_that_one_model_cannot_take_is_kept_by_neither(models, tmp_path):
    narrow = ChatModel(replace(models[1].policy, context=20))
    site = Site(["rlhf", "sft"], [models[0], narrow], SAMPLING, "",
                VoteFile(tmp_path / "votes.jsonl"))
    *_, (text, visit, notice, *_) = site.respond("What is ice? " * 4, None, 0.0, 1.0, 6)
    narrow.close()
    assert "shorten it" in notice and text.startswith("What is ice?")
    assert [talk.turns for talk in visit.conversations] == [[], []]
    assert site.vote(0, visit)[1] == "Write something first."


def test_stopping_keeps_the_text_and_clearing_starts_anew(models):
    site = Site(["actor"], models[:1], SamplingConfig(max_new_tokens=100, temperature=0.0))
    responses = site.respond("Hi.", None, 0.0, 1.0, 100)
    visit = next(responses)[1]
    while not visit.conversations[0].turns[-1]["content"]:
        next(responses)
    assert next(site.respond("Too soon.", visit, 0.0, 1.0, 100))[2] == "Still generating."
    site.stop(visit)
    list(responses)
    _, last = visit.conversations[0].turns
    assert visit.jobs == [] and last["content"]
    assert site.clear(visit)[0].conversations[0].turns == []


def test_nothing_is_sent_to_gradios_servers():
    os.environ.pop("GRADIO_ANALYTICS_ENABLED", None)
    with pytest.raises(UserError, match="no such folder"):
        web_chat.main(["--path", "/no/such/folder", "--port", "0"])
    from gradio import analytics

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not analytics.analytics_enabled()
