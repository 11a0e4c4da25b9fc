"""Saved models are opened in one way, whole or as an adapter, and never as the wrong kind."""

import json
import shutil

import pytest
from conftest import with_adapter
from transformers import AutoConfig

from alpaca_rlhf.evaluation import saved
from alpaca_rlhf.utils.configs import LoadingConfig, SamplingConfig
from alpaca_rlhf.utils.data.samples import user_turn
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.run import export

LOADING = LoadingConfig()
QUESTIONS = [[user_turn(text)] for text in ("What is ice?", "Hi.", "Who wrote Faust?")]


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The folders of `actor` and `critic`, each exported with an adapter."""
    folder = tmp_path_factory.mktemp("run") / "out"
    for role, model in (("actor", small.causal_lm()), ("critic", small.reward_model())):
        export.export(with_adapter(model), small.tokenizer, folder / role, "card", {})
    return folder


def ids(model):
    return [model.chat.prompt_ids(messages) for messages in QUESTIONS]


def texts(policy):
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
    return [response.text for response, in policy.respond(QUESTIONS, sampling, seed=3)]


def test_an_adapter_and_its_merged_model_generate_and_score_alike(exported, small):
    whole, adapter = (saved.open_policy(str(exported / path), LOADING)
                      for path in ("actor", "actor/adapter"))
    assert texts(whole) == texts(adapter)
    assert texts(whole) != texts(saved.open_policy(small.actor, LOADING))
    scorers = [saved.open_scorer(str(exported / path), LOADING)
               for path in ("critic", "critic/adapter")]
    first, second = (scorer.score(ids(whole)) for scorer in scorers)
    assert first == pytest.approx(second, abs=1e-4)
    base = saved.open_scorer(small.critic, LOADING).score(ids(whole))
    assert max(abs(a - b) for a, b in zip(first, base, strict=True)) > 0.1


def test_an_adapters_tokenizer_and_template_come_from_the_folder_around_it(exported, small):
    policy = saved.open_policy(str(exported / "actor" / "adapter"), LOADING)
    assert policy.chat.tokenizer.name_or_path == str(exported / "actor")
    assert policy.chat.tokenizer.chat_template == small.tokenizer.chat_template


def test_a_relative_base_is_found_around_the_adapter(exported, small, tmp_path):
    shutil.copytree(exported / "actor" / "adapter", tmp_path / "runs" / "one" / "adapter")
    shutil.copytree(small.actor, tmp_path / "models" / "base")
    file = tmp_path / "runs" / "one" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "models/base"}))
    assert texts(saved.open_policy(str(file.parent), LOADING)) == texts(
        saved.open_policy(str(exported / "actor"), LOADING))


@pytest.mark.parametrize(("open_it", "path", "line"), [
    (saved.open_policy, "critic", "is a reward model, which scores and does not generate"),
    (saved.open_scorer, "actor", "is no reward model"),
    (saved.open_scorer, "actor/adapter", "is no reward model"),
    (saved.open_policy, "nothing", "no such folder"),
])
def test_the_wrong_kind_of_model_is_refused(exported, open_it, path, line):
    with pytest.raises(UserError, match=line):
        open_it(str(exported / path), LOADING)


@pytest.mark.parametrize(("open_it", "kind", "line"), [
    (saved.open_policy, "t5", "t5 is an encoder, not a causal decoder"),
    (saved.open_scorer, "bert", "bert is an encoder, not a causal decoder"),
    (saved.open_policy, "mamba", "mamba has recurrent layers"),
    (saved.open_policy, "qwen2_5_vl", "qwen2_5_vl is a multimodal model"),
])
def test_architectures_are_checked_as_the_steps_check_them(tmp_path, open_it, kind, line):
    architectures = ["BertForSequenceClassification"] * (kind == "bert")
    config = AutoConfig.for_model(kind, architectures=architectures, num_labels=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: {line}"):
        open_it(str(tmp_path), LOADING)


def test_pointers_of_weights_are_refused(small, tmp_path):
    shutil.copytree(small.actor, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="its model.safetensors is a pointer of git LFS"):
        saved.open_policy(str(tmp_path), LOADING)


def test_an_adapter_without_its_base_model_names_it(exported, tmp_path):
    shutil.copytree(exported / "actor" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "/gone/llama"}))
    with pytest.raises(UserError, match="base model is /gone/llama, and there is no such folder"):
        saved.open_policy(str(tmp_path / "adapter"), LOADING)


def test_responses_are_fixed_by_the_seed_and_not_by_the_batch(small):
    policy = saved.open_policy(small.actor, LOADING)
    sampling = SamplingConfig(max_new_tokens=6, num_generations=2)
    together = policy.respond(QUESTIONS, sampling, seed=3)
    assert [len(some) for some in together] == [2, 2, 2]
    assert together == policy.respond(QUESTIONS, sampling, seed=3, slots=2)
    assert together != policy.respond(QUESTIONS, sampling, seed=4)
    for response in (response for some in together for response in some):
        assert response.ended == (response.ids[-1] == policy.chat.eos_id)
        assert response.ended or len(response.ids) == 6


def test_a_long_prompt_is_cut_to_its_last_tokens_or_refused(small):
    policy = saved.open_policy(small.actor, LOADING)
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
    end = " What is ice?" * 80
    first, second = ([user_turn(start + end)] for start in ("Hi.", "Who wrote Faust?"))
    for most in (20, 1000):
        responses = policy.respond([first, second], sampling, seed=0, max_prompt_tokens=most)
        assert responses[0] == responses[1]
    with pytest.raises(UserError, match="actor, prompt 2: the message has .* shorten it"):
        policy.respond([QUESTIONS[0], first], sampling, seed=0)


@pytest.mark.parametrize(("context", "given", "resolved"), [
    (1000, None, 256), (128, None, 64), (128, 127, 127)])
def test_the_default_length_of_a_response_leaves_room_for_a_prompt(context, given, resolved):
    policy = saved.Policy("p", None, None, context, [2])
    sampling = SamplingConfig(max_new_tokens=given)
    assert policy.resolve(sampling).max_new_tokens == resolved
    with pytest.raises(UserError, match="--max_new_tokens 1000: p reads"):
        policy.resolve(SamplingConfig(max_new_tokens=1000))


def test_scores_do_not_depend_on_the_batch_and_a_cut_response_has_no_eos(small, monkeypatch):
    scorer = saved.open_scorer(small.critic, LOADING)
    rows = ids(scorer)
    together = scorer.score(rows)
    monkeypatch.setattr(saved, "_TOKENS_PER_BATCH", 1)
    assert together == pytest.approx(scorer.score(rows), abs=1e-4)
    whole = rows[0] + scorer.chat.response_ids("ice")
    both = [saved.Response("ice", [], ended) for ended in (True, False)]
    assert scorer.rate([QUESTIONS[0]], [both]) == [
        pytest.approx(scorer.score([whole, whole[:-1]]))]


def test_the_end_of_a_dialogue_that_is_too_long_is_scored(small):
    scorer = saved.open_scorer(small.critic, LOADING)
    long = [user_turn("What is ice? " * 80)]
    response = scorer.chat.response_ids("ice")
    expected = scorer.chat.prompt_ids(long)[-(scorer.context - len(response)) :] + response
    assert len(expected) == scorer.context == 128
    assert scorer.rate([long], [[saved.Response("ice", [], True)]]) == [scorer.score([expected])]


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
    opened = saved.open_policy(f"somebody/{name}", LOADING)
    place = {"whole": "somebody/whole", "adapter": str(place / "snapshots" / "abc")}[name]
    assert opened.chat.tokenizer.name_or_path == place
    assert texts(opened) == texts(saved.open_policy(str(exported / "actor"), LOADING))
