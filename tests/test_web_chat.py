"""The web chat in a real browser, with no network: two turns, and a vote that step 2 trains on."""

import importlib
import json
import os
import shutil
import socket
import sys
from dataclasses import replace

import pytest
from loading import load

from alpaca_rlhf.evaluation import saved
from alpaca_rlhf.inference import web_chat
from alpaca_rlhf.inference.chat_model import ChatModel
from alpaca_rlhf.inference.votes import VoteBook
from alpaca_rlhf.inference.web_chat import Site, launch
from alpaca_rlhf.utils.configs import LoadingConfig, SamplingConfig

CHROMIUM = shutil.which("chromium")
SAMPLING = SamplingConfig(12, temperature=0.0)  # what is drawn could be empty, or alike
STEP_2 = "alpaca_rlhf.training_model.step2_reward_model_finetuning.main"
WAIT = 60_000  # milliseconds, for what takes one or two


@pytest.fixture(scope="module")
def models(small, tmp_path_factory):
    """Two policies that do not answer alike."""
    import torch
    from conftest import small_config
    from transformers import LlamaForCausalLM

    other = tmp_path_factory.mktemp("other") / "sft"
    torch.manual_seed(11)
    LlamaForCausalLM(small_config(small.tokenizer)).save_pretrained(other)
    small.tokenizer.save_pretrained(other)
    paths = str(small.actor), str(other)
    made = [ChatModel(saved.open_policy(path, LoadingConfig())) for path in paths]
    yield made
    for model in made:
        model.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, capsys):
    """Serves a site and opens it; at the end it is checked that the page was content."""
    pages = []

    def open_site(site):
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        served = launch(site, "127.0.0.1", port, wait=False)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT)
        errors, strangers = [], []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        home = f"http://127.0.0.1:{port}"
        page.on("request", lambda request: None if request.url.startswith(
            (home, "data:", "blob:")) else strangers.append(request.url))
        page.goto(home)
        pages.append((served, page, errors, strangers))
        return page

    yield open_site
    for served, page, errors, strangers in pages:
        page.close()
        served.close()
        assert (errors, strangers) == ([], [])


def say(page, text):
    box = page.locator("#message textarea")
    box.fill(text)
    box.press("Enter")


def turns(page, side=0):
    """What stands in a chat: user and reply in turn."""
    said = page.locator(f"#chat-{side} :is([data-testid=user], [data-testid=bot])")
    return [part.strip() for part in said.all_inner_texts()]


def wait_for(page, condition):
    """Until a function of the page holds."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("waited in vain")


def test_two_turns_with_one_model_on_a_screen_and_on_a_phone(models, opened):
    page = opened(Site(["actor"], models[:1], SAMPLING))
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


def test_two_models_side_by_side_each_under_its_name(models, opened):
    page = opened(Site(["rlhf", "sft"], models, SAMPLING))
    assert page.locator("#vote-left").count() == 0
    say(page, "What is ice?")
    wait_for(page, lambda: all(len(turns(page, i)) == 2 for i in (0, 1))
             and page.locator("#notice").inner_text() == "")
    assert "rlhf" in page.locator("#chat-0").inner_text()
    assert "sft" in page.locator("#chat-1").inner_text()


def test_a_vote_in_the_arena_is_a_pair_that_step_2_trains_on(
    models, opened, small, tmp_path, monkeypatch, group
):
    path = tmp_path / "votes.jsonl"
    monkeypatch.setattr(web_chat.random, "shuffle", list.reverse)
    site = Site(["rlhf", "sft"], models, SAMPLING, "Be kind.", VoteBook(path))
    page = opened(site)
    notice = page.locator("#notice")
    for number, (text, side) in enumerate((("What is ice?", "right"), ("And fire?", "left")), 1):
        say(page, text)
        page.locator("#notice", has_text="Which is better?").wait_for()
        shown = turns(page, 0)[-1], turns(page, 1)[-1]
        assert "rlhf" not in page.inner_text("body").replace(notice.inner_text(), "")
        say(page, "Not before the vote")
        page.locator("#notice", has_text="Vote on these replies first").wait_for()
        page.locator(f"#vote-{side}").click()
        page.locator("#notice", has_text=f"of {number} votes").wait_for()
        row = json.loads(path.read_text().splitlines()[-1])
        better = shown[0] if side == "left" else shown[1]
        assert " ".join(row["chosen"].split()) == " ".join(better.split())
        who = "rlhf" if row["models"][0] == small.actor else "sft"
        assert f"{side.title()}: {who}" in notice.inner_text()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    # Both sides went on with the reply that was better.
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
    assert (results["data"]["train"], results["data"]["counted_out"]) == (2, {})
    metrics = (tmp_path / "critic" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2


def test_a_tie_and_what_is_said_before_any_message(models, tmp_path):
    site = Site(["rlhf", "sft"], models, SAMPLING, "", VoteBook(tmp_path / "votes.jsonl"))
    assert site.vote(0, None)[1] == "Write something first."
    settings = (0.0, 1.0, 6)
    *_, (_, room, notice, *_) = site.answer("Hi.", None, *settings)
    assert notice == "Which is better?"
    assert next(site.answer("Again.", room, *settings))[2].startswith("Vote on these")
    assert "0 won, 1 tied, 0 lost" in site.vote(None, room)[1]
    assert site.vote(None, room)[1] == "Write something first."


def test_what_one_model_cannot_answer_is_said_to_neither(models, tmp_path):
    narrow = ChatModel(replace(models[1].policy, context=20))
    site = Site(["rlhf", "sft"], [models[0], narrow], SAMPLING, "",
                VoteBook(tmp_path / "votes.jsonl"))
    *_, (text, room, notice, *_) = site.answer("What is ice? " * 4, None, 0.0, 1.0, 6)
    narrow.close()
    assert "shorten it" in notice and text.startswith("What is ice?")
    assert [talk.turns for talk in room.talks] == [[], []]
    assert site.vote(0, room)[1] == "Write something first."


def test_stopping_keeps_what_was_said_and_clearing_begins_anew(models):
    site = Site(["actor"], models[:1], SamplingConfig(100, temperature=0.0))
    replies = site.answer("Hi.", None, 0.0, 1.0, 100)
    room = next(replies)[1]
    while not room.talks[0].turns[-1]["content"]:
        next(replies)
    assert next(site.answer("Too soon.", room, 0.0, 1.0, 100))[2] == "Still answering."
    site.stop(room)
    list(replies)
    assert room.jobs == [] and len(room.talks[0].turns) == 2 and room.talks[0].turns[-1]["content"]
    assert site.clear(room)[0].talks[0].turns == []


def test_nothing_is_told_to_gradios_servers():
    os.environ.pop("GRADIO_ANALYTICS_ENABLED", None)
    web_chat.parse(["--path", "x"])
    from gradio import analytics

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not analytics.analytics_enabled()
