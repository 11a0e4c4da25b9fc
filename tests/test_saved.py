"""Any saved model is opened alike: whole, as an adapter, and in neither case as something else."""

import json
import shutil

import pytest
import torch
from conftest import with_adapter

from alpaca_rlhf.evaluation import saved
from alpaca_rlhf.utils.configs import LoadingConfig, SamplingConfig
from alpaca_rlhf.utils.data.samples import user_turn
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.run import export

OPTIONS = LoadingConfig()
QUESTIONS = [[user_turn(text)] for text in ("What is ice?", "Hi.", "Who wrote Faust?")]


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """`actor` and `critic`, exported with an adapter, and what stands around them in a run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    for role, model in (("actor", small.causal_lm()), ("critic", small.reward_model())):
        adapted = with_adapter(model)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.normal_(std=0.3)
        export.export(adapted, small.tokenizer, folder / role, "card")
    return folder


def ids(policy):
    return [policy.form.prompt_ids(messages) for messages in QUESTIONS]


def texts(policy, **changes):
    sampling = SamplingConfig(**{"max_new_tokens": 6, "temperature": 0.0, **changes})
    return [[r.text for r in some] for some in policy.replies(ids(policy), sampling, seed=3)]


def test_an_adapter_and_its_merged_model_write_and_score_alike(exported, small):
    whole, adapter = (saved.open_policy(str(exported / path), OPTIONS)
                      for path in ("actor", "actor/adapter"))
    assert texts(whole) == texts(adapter)
    assert texts(whole) != texts(saved.open_policy(small.actor, OPTIONS))
    scorers = [saved.open_scorer(str(exported / path), OPTIONS)
               for path in ("critic", "critic/adapter")]
    first, second = (scorer.score(ids(whole)) for scorer in scorers)
    assert first == pytest.approx(second, abs=1e-4)
    base = saved.open_scorer(small.critic, OPTIONS).score(ids(whole))
    assert max(abs(a - b) for a, b in zip(first, base, strict=True)) > 0.1


def test_an_adapters_tokenizer_and_template_come_from_the_folder_around_it(exported, small):
    policy = saved.open_policy(str(exported / "actor" / "adapter"), OPTIONS)
    assert policy.form.tokenizer.name_or_path == str(exported / "actor")
    assert policy.form.tokenizer.chat_template == small.tokenizer.chat_template


def test_a_relative_base_is_found_around_the_adapter(exported, small, tmp_path):
    shutil.copytree(exported / "actor" / "adapter", tmp_path / "runs" / "one" / "adapter")
    shutil.copytree(small.actor, tmp_path / "models" / "base")
    file = tmp_path / "runs" / "one" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "models/base"}))
    assert texts(saved.open_policy(str(file.parent), OPTIONS)) == texts(
        saved.open_policy(str(exported / "actor"), OPTIONS))


@pytest.mark.parametrize(("open_it", "path", "line"), [
    (saved.open_policy, "critic", "is a reward model, which scores and does not write"),
    (saved.open_scorer, "actor", "is no reward model"),
    (saved.open_scorer, "actor/adapter", "is no reward model"),
    (saved.open_policy, "nothing", "no such folder"),
])
def test_what_is_not_what_was_asked_for_is_refused(exported, open_it, path, line):
    with pytest.raises(UserError, match=line):
        open_it(str(exported / path), OPTIONS)


def test_an_adapter_without_its_base_says_which_one(exported, tmp_path):
    shutil.copytree(exported / "actor" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "/gone/llama"}))
    with pytest.raises(UserError, match="made for /gone/llama, and no such folder is there"):
        saved.open_policy(str(tmp_path / "adapter"), OPTIONS)


def test_replies_are_fixed_by_the_seed_and_not_by_what_they_are_drawn_with(small):
    policy = saved.open_policy(small.actor, OPTIONS)
    sampling = SamplingConfig(6, num_generations=2)
    together = policy.replies(ids(policy), sampling, seed=3)
    assert [len(some) for some in together] == [2, 2, 2]
    assert together == policy.replies(ids(policy), sampling, seed=3, slots=2)
    assert together != policy.replies(ids(policy), sampling, seed=4)
    for reply in (reply for some in together for reply in some):
        assert reply.ended == (reply.ids[-1] == policy.form.eos_id)
        assert reply.ended or len(reply.ids) == 6


def test_scores_do_not_depend_on_the_batch_and_a_cut_reply_has_no_end(small, monkeypatch):
    scorer = saved.open_scorer(small.critic, OPTIONS)
    rows = [scorer.form.prompt_ids(messages) for messages in QUESTIONS]
    together = scorer.score(rows)
    monkeypatch.setattr(saved, "_SCORED_AT_ONCE", 1)
    assert together == pytest.approx(scorer.score(rows), abs=1e-4)
    whole = rows[0] + scorer.form.response_ids("ice")
    for ended, expected in ((True, whole), (False, whole[:-1])):
        reply = saved.Reply("ice", [], ended)
        assert scorer.rate([QUESTIONS[0]], [reply]) == pytest.approx(scorer.score([expected]))


def test_of_a_dialogue_that_is_too_long_to_score_the_end_counts(small):
    scorer = saved.open_scorer(small.critic, OPTIONS)
    long = [user_turn("What is ice? " * 80)]
    answer = scorer.form.response_ids("ice")
    expected = scorer.form.prompt_ids(long)[-(scorer.context - len(answer)) :] + answer
    assert len(expected) == scorer.context == 128
    assert scorer.rate([long], [saved.Reply("ice", [], True)]) == scorer.score([expected])


@pytest.mark.parametrize(("paths", "names"), [
    (["out/actor"], ["actor"]),
    (["out/actor", "out/final/actor"], ["out/actor", "final/actor"]),
    (["a/x", "a/x"], ["x", "x"]),
    (["hub/llama", "llama"], ["hub/llama", "llama"]),
])
def test_short_names_tell_paths_apart(paths, names):
    assert saved.short_names(paths) == names


@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_a_hub_id_is_opened_from_the_cache_without_a_network(
    exported, tmp_path, monkeypatch, name
):
    from huggingface_hub import constants

    place = tmp_path / f"models--somebody--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(exported / "actor", place / "snapshots" / "abc")
    if name == "adapter":  # as people upload them: with their tokenizer, without the base
        for file in ("config.json", "model.safetensors", "generation_config.json"):
            (place / "snapshots" / "abc" / file).unlink()
        shutil.copytree(exported / "actor" / "adapter", place / "snapshots" / "abc",
                        dirs_exist_ok=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    opened = saved.open_policy(f"somebody/{name}", OPTIONS)
    place = {"whole": "somebody/whole", "adapter": str(place / "snapshots" / "abc")}[name]
    assert opened.form.tokenizer.name_or_path == place
    assert texts(opened) == texts(saved.open_policy(str(exported / "actor"), OPTIONS))
