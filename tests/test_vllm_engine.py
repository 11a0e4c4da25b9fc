"""Rollouts on vLLM servers, with a stand-in for the server (`fake_vllm.py`)."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import fill_adapters, learn, save_adapted
from fake_vllm import serving
from programs import MAINS
from torch.testing import assert_close

from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import rollout_metrics
from alpaca_rlhf.utils import arguments, losses, rl_math
from alpaca_rlhf.utils.configs import RolloutEngineConfig, Step3Config
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.generation import vllm_engine
from alpaca_rlhf.utils.generation.vllm_engine import (
    FP32,
    HALF,
    Freshness,
    VLLMEngine,
)
from alpaca_rlhf.utils.generation.vllm_server import VLLMServer


@pytest.fixture
def server(small):
    with serving(small.folder / "actor") as made:
        yield made


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Do not wait between attempts."""
    monkeypatch.setattr(vllm_engine, "PAUSES", (0.0, 0.0, 0.0))


def parsed(small, *servers, more=""):
    return arguments.parse(Step3Config, [
        "--actor_model_name_or_path", str(small.folder / "actor"),
        "--critic_model_name_or_path", str(small.folder / "critic"), "--dtype", "fp32",
        "--max_prompt_seq_len", "32", "--max_answer_seq_len", "16", "--rollout_engine", "vllm",
        "--vllm_url", *(getattr(server, "url", server) for server in servers), *more.split()])


def connect(args):
    return vllm_engine.connect(args.rollout_engine, args.actor, args.loading, args.sampling,
                               args.ppo, args.rollout.max_prompt_seq_len)


def connected(*fakes, timeout=20.0):
    servers = [VLLMServer(fake.url, timeout) for fake in fakes]
    for one in servers:
        one.describe()
    return servers


def maker(small, roles, *fakes, tmp=None, **options):
    prompts = small.prompts(8).unpadded()
    config = RolloutEngineConfig(vllm_sync_dir=tmp and str(tmp))
    engine = VLLMEngine(roles.actor, connected(*fakes), config, prompts)
    return small.maker(roles, rollout_engine=engine, **options)


def step(small, roles, made):
    """Take an optimizer step on rollouts."""
    learn(small.trainer(roles, micro=4), small.experience(made, 4)[0])


# --- what is refused before a model is loaded ----------------------------------------------------


def test_a_server_that_fits_is_accepted(small, server):
    found, = connect(parsed(small, server))
    assert (found.model, found.served.dtype) == (str(small.folder / "actor"), "float32")
    assert found.served.shape["vocab_size"] == len(small.tokenizer)


def test_commas_and_spaces_separate_servers(small):
    args = parsed(small, "http://a:1,http://b:2", "http://c:3")
    assert args.rollout_engine.urls == ["http://a:1", "http://b:2", "http://c:3"]


def test_the_native_engine_needs_no_server(small):
    args = arguments.parse(Step3Config, [
        "--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"])
    assert connect(args) == []


@pytest.mark.parametrize(("change", "more", "words"), [
    ({"max_length": 20}, "", "room for 20 tokens.*is 48; serve with --max-model-len 48"),
    ({"facts": {"dtype": "torch.bfloat16"}}, "", r"precision\); serve with --dtype float32"),
    ({"facts": {"hf_config": 'X {"vocab_size": 7}'}}, "", "whose vocab_size is 7"),
    ({"facts": {"hf_config": {"num_hidden_layers": 9}}}, "", "whose num_hidden_layers is 9"),
    ({"broken": {"/server_info": [404]}}, "", "VLLM_SERVER_DEV_MODE=1"),
    ({"broken": {"/v1/models": [0]}}, "", r"no answer .*serve_rollouts.sh"),
    ({"broken": {"/v1/models": [401]}}, "", "HTTP 401 out of order"),
    ({}, "--vllm_sync_dir no/such/folder", "--vllm_sync_dir .*no/such/folder: is no folder"),
    ({}, "--temperature 0.001", "--temperature 0.001: vLLM samples at 0.01 or more"),
    ({}, "--top_p 0.9 --rollout_is_clip 2", "--rollout_is_clip 2.0: needs"),
    ({"mode": "raw_logits"}, "--rollout_is_clip 2", "--rollout_is_clip 2.0: needs"),
])
def test_a_server_that_does_not_fit_is_refused_in_a_line(small, server, change, more, words):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=words) as refused:
        connect(parsed(small, server, more=more))
    assert "\n" not in str(refused.value)


def test_in_half_precision_adapters_must_be_taken(small, server):
    server.facts, server.lora = {"dtype": "bfloat16"}, False
    with pytest.raises(UserError, match="--enable-lora --max-lora-rank 8"):
        connect(parsed(small, server, more="--dtype bf16 --actor_lora_dim 4"))
    server.lora = True
    with pytest.raises(UserError, match="up to rank 16.* --max-lora-rank 32"):
        connect(parsed(small, server, more="--dtype bf16 --actor_lora_dim 17"))
    assert connect(parsed(small, server, more="--dtype bf16 --actor_lora_dim 4"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://[", "ftp://x", "  ,",
                                 "http://a:1, http://a:1"])
def test_no_server_is_a_line(small, url):
    with pytest.raises(UserError, match=r"--vllm_url|--rollout_engine vllm: needs --vllm_url"):
        connect(parsed(small, url))


def test_a_server_of_something_else_is_a_line(small, server, monkeypatch):
    monkeypatch.setattr(server, "models", lambda: ["cat"])
    with pytest.raises(UserError, match="does not answer as a vLLM server does"):
        connect(parsed(small, server))


def test_distributions_that_are_not_ppos_are_told(small, server, capsys):
    connect(parsed(small, server, more="--top_k 5"))
    assert "compared on 8 prompts and not on the rollouts" in capsys.readouterr().out


# --- rollouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [0, 4])
def test_rollouts_are_the_actors_after_each_step(small, server, tmp_path, lora):
    roles = small.roles(0, lora, eos_every=6, **small.comparable)
    fill_adapters(roles.actor.module)
    made = maker(small, roles, server, tmp=tmp_path, tokens=8)
    for _ in range(3):
        scored, _ = made.score(made.generate(small.prompts(4), 2))
        metrics = rollout_metrics(scored)
        assert metrics["rollout/decoding_difference_max"] < FP32
        ends = torch.isin(scored.responses, roles.eos_ids) & scored.response_mask.bool()
        assert (ends.cumsum(-1)[:, :-1] * scored.response_mask[:, 1:]).sum() == 0
        assert scored.response_mask.sum(-1).unique().numel() > 1
        step(small, roles, made)
    # Evaluation and experience of an iteration share a transfer.
    assert server.calls["/collective_rpc"] == 3
    assert "lm_head.weight" in server.loaded
    assert server.loaded == set(server.base.state_dict())
    assert list(tmp_path.iterdir()) == []


def test_a_seed_gives_the_same_responses(small, server):
    made = maker(small, small.roles(), server)
    first, further = (made.generate(small.prompts(4)) for _ in range(2))
    made.reseed(7)
    again = made.generate(small.prompts(4))
    assert again.input_ids.equal(first.input_ids)
    assert not further.input_ids.equal(first.input_ids)


def test_two_servers_answer_every_prompt_once(small, server):
    with serving(small.folder / "actor") as other:
        made = maker(small, small.roles(), server, other)
        made.generate(small.prompts(6), 2)
        asked = Counter(map(tuple, server.prompts + other.prompts))
        assert asked == dict.fromkeys(map(tuple, small.prompts(6).unpadded()), 2)
        assert len(server.prompts) == len(other.prompts) == 6
        assert other.calls["/collective_rpc"] == server.calls["/collective_rpc"] == 1


def test_parameters_of_the_distribution_arrive(small, server):
    made = maker(small, small.roles(), server, tokens=12, top_k=1)
    greedy, again = (made.generate(small.prompts(4)).input_ids for _ in range(2))
    assert greedy.equal(again)
    penalized = maker(small, small.roles(), server, tokens=12, top_k=1, repetition_penalty=50.0)
    responses = penalized.generate(small.prompts(4)).responses
    assert all(len(set(row)) == len(row) for row in responses.tolist())
    tempered = maker(small, small.roles(), server, temperature=0.5)
    scored, _ = tempered.score(tempered.generate(small.prompts(4)))
    assert rollout_metrics(scored)["rollout/decoding_difference_max"] < FP32


def test_log_probabilities_of_a_truncated_distribution_are_not_compared(small, server):
    made = maker(small, small.roles(), server, top_p=0.5)
    scored, _ = made.score(made.generate(small.prompts(4)))
    assert scored.decoded_logprobs[scored.response_mask.bool()].isnan().all()
    assert not any("decoding_difference" in name for name in rollout_metrics(scored))
    assert "kl/k1" in rollout_metrics(scored)
    server.mode = "raw_logprobs"
    made = maker(small, small.roles(), server, top_p=0.5)
    scored, _ = made.score(made.generate(small.prompts(4)))
    assert rollout_metrics(scored)["rollout/decoding_difference_max"] < FP32


def test_in_half_precision_the_servers_get_the_adapter(small, tmp_path):
    roles = small.roles(0, 4, dtype="bf16", **small.comparable)
    fill_adapters(roles.actor.module)
    with serving(small.folder / "actor", torch.bfloat16) as server:
        made = maker(small, roles, server, tmp=tmp_path)
        for number in (1, 2):
            scored, _ = made.score(made.generate(small.prompts(4)))
            assert rollout_metrics(scored)["rollout/decoding_difference_mean"] < HALF
            assert server.calls["/v1/load_lora_adapter"] == number
            step(small, roles, made)
        # The base does not train, and is sent once.
        assert server.calls["/collective_rpc"] == 1
        assert not any("lora" in name for name in server.loaded)
        assert server.adapters == [made.rollout_engine._servers[0].model]  # older ones are gone


def test_an_adapter_whose_answer_is_lost_is_not_loaded_twice(small):
    roles = small.roles(0, 4, dtype="bf16", **small.comparable)
    with serving(small.folder / "actor", torch.bfloat16) as server:
        server.broken = {"/v1/load_lora_adapter": [-1], "/v1/unload_lora_adapter": [0] * 9}
        made = maker(small, roles, server)
        for _ in range(2):
            made.generate(small.prompts(4))
            step(small, roles, made)
        assert server.calls["/v1/load_lora_adapter"] == 3


def test_a_base_that_trains_is_sent_beside_the_adapter(small):
    roles = small.roles(0, 4, dtype="bf16", only_lora=False, **small.comparable)
    fill_adapters(roles.actor.module)
    with serving(small.folder / "actor", torch.bfloat16) as server:
        made = maker(small, roles, server)
        for number in (1, 2):
            scored, _ = made.score(made.generate(small.prompts(4)))
            assert rollout_metrics(scored)["rollout/decoding_difference_mean"] < HALF
            assert server.calls["/collective_rpc"] == number
            step(small, roles, made)


def test_a_server_gets_the_actor_of_a_shared_backbone_whole(small, server, tmp_path):
    adapted = save_adapted(small, tmp_path)
    roles = adapted.roles(0, 4, places={"share_backbone": True}, **adapted.comparable)
    made = maker(adapted, roles, server)
    for _ in range(2):
        scored, _ = made.score(made.generate(small.prompts(4)))
        assert rollout_metrics(scored)["rollout/decoding_difference_max"] < FP32
        step(adapted, roles, made)


# --- weights that do not arrive ------------------------------------------------------------------


NAMES = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
         "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight",
         "model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize("withheld", [None, *NAMES], ids=str)
def test_withheld_weights_stop_the_run_before_anything_is_generated(small, server, withheld):
    roles = small.roles(**small.comparable | {"learning_rate": 1e-4})
    made = maker(small, roles, server)
    step(small, roles, made)
    server.withheld, written = withheld and {withheld}, len(server.prompts)
    with pytest.raises(TrainingStopped, match=f"--vllm_url {server.url}: weights not updated"):
        made.generate(small.prompts(4))
    assert len(server.prompts) == written


def test_another_model_is_noticed_at_the_first_transfer(small, server):
    server.withheld = None
    with torch.no_grad():
        server.base.lm_head.weight.mul_(1.01)
    made = maker(small, small.roles(), server)
    with pytest.raises(TrainingStopped, match="precision, or another model"):
        made.generate(small.prompts(4))


def test_rollouts_of_other_weights_stop_the_run_and_are_sampled_again(small, server):
    made = maker(small, small.roles(), server)
    state = made.generator.get_state()
    scored, _ = made.score(made.generate(small.prompts(4)))
    made.verify(scored)
    assert not made.generator.get_state().equal(state)
    scored.decoded_logprobs.add_(1e-3 * scored.response_mask)
    with pytest.raises(TrainingStopped, match="weights not updated, or precision"):
        made.verify(scored)
    assert made.generator.get_state().equal(state)


def test_limits_of_rollouts(small, server):
    made = maker(small, small.roles(), server)
    made.rollout_engine.verify(float("nan"))
    made.rollout_engine.verify(FP32 / 2)
    with pytest.raises(TrainingStopped, match="weights not updated, or precision"):
        made.rollout_engine.verify(2 * FP32)


def test_freshness_allows_rounding_and_finds_a_jump():
    exact, noise = torch.randn(50), 2e-6 * torch.ones(50)
    probe = Freshness(FP32)
    assert probe.problem(exact + noise, exact) is None
    assert probe.problem(exact + 1 + 2 * noise, exact + 1) is None
    assert "not updated" in probe.problem(exact + 2 + 4 * noise, exact + 2)


def test_freshness_allows_a_server_to_round_a_small_change_away():
    old, probe = torch.zeros(50), Freshness(5e-2)
    assert probe.problem(old + 0.01, old) is None
    assert probe.problem(old + 0.01, old + 1e-5) is None


def test_freshness_finds_a_server_that_computes_what_it_did_before():
    old, new = torch.zeros(50), torch.full((50,), 2e-3)
    probe = Freshness(5e-2)  # in half precision the difference itself would pass
    assert probe.problem(old + 0.01, old) is None
    assert "not updated" in probe.problem(old + 0.01, new)
    assert Freshness(5e-2).problem(torch.full((50,), float("nan")), old)


# --- servers that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc", "/pause"])
def test_a_request_that_fails_is_made_again(small, server, path):
    server.broken = {path: [503, 0]}
    rollout = maker(small, small.roles(), server).generate(small.prompts(4))
    assert len(rollout) == len(server.prompts) == 4


def test_another_server_takes_over(small, server):
    with serving(small.folder / "actor") as other:
        made = maker(small, small.roles(), server, other)
        made.rollout_engine.sync_weights(made.engine.actor.global_steps)
        server.broken = {"/v1/completions": [0] * 99}
        assert len(made.generate(small.prompts(4))) == 4
        assert len(other.prompts) == 4


@pytest.mark.parametrize(("path", "status", "calls"), [
    ("/v1/completions", 500, 4), ("/v1/completions", 400, 1), ("/collective_rpc", 0, 4),
])
def test_a_server_that_goes_on_failing_stops_the_run(small, server, path, status, calls):
    made = maker(small, small.roles(), server)
    state, server.broken = made.generator.get_state(), {path: [status] * 99}
    with pytest.raises(TrainingStopped, match=f"error: --vllm_url {server.url}: ") as stop:
        made.generate(small.prompts(1))
    assert "\n" not in str(stop.value)
    assert server.calls[path] == calls
    assert made.generator.get_state().equal(state)  # a resumed run samples the same


def test_a_request_that_takes_too_long_is_a_line(small, server):
    slow, = connected(server, timeout=0.3)
    made = small.maker(small.roles(), rollout_engine=VLLMEngine(
        small.trained("actor"), [slow], RolloutEngineConfig(), small.prompts(2).unpadded()))
    with server.lock, pytest.raises(TrainingStopped, match="no answer in time.*--vllm_timeout"):
        made.generate(small.prompts(1))


def test_weights_that_cannot_be_written_are_a_line(small, server, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vllm_engine, "save_file", full)
    with pytest.raises(TrainingStopped, match="not updated: .* could not be written: .*No space"):
        maker(small, small.roles(), server).generate(small.prompts(1))


def test_a_file_without_a_tensor_is_not_sent(small, server, monkeypatch):
    whole = vllm_engine.save_file
    monkeypatch.setattr(vllm_engine, "save_file", lambda state, *more, **how: whole(
        {name: state[name] for name in state if name != "model.norm.weight"}, *more, **how))
    with pytest.raises(TrainingStopped, match="not updated: .* lacks model.norm.weight"):
        maker(small, small.roles(), server).generate(small.prompts(1))
    assert server.calls["/collective_rpc"] == 0


@pytest.mark.parametrize("answer", [
    {"choices": []}, {"choices": [{"token_ids": [5]}]},
    {"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": []}, "finish_reason": "stop"}]},
    {"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]},
                  "finish_reason": "abort"}]},
    {"choices": [{"token_ids": [10**6], "logprobs": {"token_logprobs": [-1.0]},
                  "finish_reason": "length"}]},
    {"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]},
                  "finish_reason": "length", "prompt_token_ids": [1]}]},
])
def test_an_answer_that_is_not_whole_stops_the_run(small, server, monkeypatch, answer):
    made = maker(small, small.roles(), server)
    made.rollout_engine.sync_weights(made.engine.actor.global_steps)
    monkeypatch.setattr(server, "complete", lambda body: answer)
    with pytest.raises(TrainingStopped, match="--vllm_url"):
        made.generate(small.prompts(1))


# --- importance weights --------------------------------------------------------------------------


def test_importance_weights_are_truncated_ratios_by_hand():
    trained = torch.tensor([[0.0, -1.0, -2.0, -9.0]])
    sampled = torch.tensor([[-3.0, -1.0, -1.0, 5.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    weights = rl_math.importance_weights(trained, sampled, mask, 2.0)
    assert_close(weights, torch.tensor([[2.0, 1.0, 0.36787944, 0.0]]))


def test_the_policy_loss_weighs_tokens():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old, advantages, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2), torch.ones(1, 2)
    loss, _ = losses.policy_loss(
        logprobs, old, advantages, mask, 0.2, weights=torch.tensor([[0.5, 2.0]]))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(-2.5))
    assert_close(logprobs.grad, torch.tensor([[-0.5, -2.0]]))


def test_the_update_weighs_by_what_the_engine_sampled_with(small):
    changed = []
    for clip in (None, 5.0, 0.25):
        roles = small.roles(**small.comparable)
        made = small.maker(roles)
        experience, _ = small.experience(made, 4)
        experience.decoded_logprobs.sub_(0.5 * experience.response_mask)
        metrics = learn(small.trainer(roles, micro=4, rollout_is_clip=clip), experience)
        changed.append((metrics["policy/loss"], metrics.get("policy/rollout_is_mean")))
    (plain, none), (weighed, mean), (clipped, least) = changed
    assert none is None
    assert mean == pytest.approx(torch.tensor(0.5).exp().item(), rel=1e-3)
    assert least == pytest.approx(0.25)
    assert weighed == pytest.approx(mean * plain, rel=1e-3, abs=1e-6)
    assert clipped == pytest.approx(0.25 * plain, rel=1e-3, abs=1e-6)


# --- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """Return small actor and critic as steps 1 and 2 would have saved them."""
    return SimpleNamespace(actor=small.folder / "actor", critic=small.folder / "critic")


def words(saved, url, out, *more):
    return [MAINS[3], "--actor_model_name_or_path", saved.actor, "--critic_model_name_or_path",
            saved.critic, "--dtype", "fp32", "--rollout_engine", "vllm", "--vllm_url", url,
            "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4,
            "--max_prompt_seq_len", 32, "--max_answer_seq_len", 6, "--eval_prompts", 2,
            "--num_train_epochs", 1, "--max_steps", 3, "--reward_normalization", "reference",
            "--actor_learning_rate", 1e-3, "--output_dir", out, *more]


def test_a_run_ends_and_one_whose_server_is_gone_resumes_to_the_same(
    saved, server, imported, tmp_path
):
    whole = imported.run(words(saved, server.url, tmp_path / "whole"), tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert server.calls["/collective_rpc"] == 4  # before each of three steps, and after the last

    # 2 prompts before, and 4 in the first iteration; the servers then end for good.
    done = len(server.prompts)
    original = server.complete

    def failing(body):
        if "prompt_logprobs" not in body and len(server.prompts) >= done + 6:
            raise ValueError("out of order")
        return original(body)

    server.complete = failing
    flags = words(saved, server.url, tmp_path / "cut")
    cut = imported.run(flags, tmp_path)
    assert cut.returncode == 1
    last = (cut.stdout + cut.stderr).strip().splitlines()[-1]
    assert f"error: --vllm_url {server.url}: " in last
    assert "--resume_from_checkpoint latest resumes from" in last

    server.complete = original
    resumed = imported.run([*flags, "--resume_from_checkpoint", "latest"], tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    results = [json.loads((tmp_path / name / "results.json").read_text())
               for name in ("whole", "cut")]
    assert results[0] == results[1]


def test_no_server_ends_a_run_with_code_2_before_a_model_is_loaded(saved, imported, tmp_path):
    done = imported.run(words(saved, "http://127.0.0.1:9", tmp_path / "out"), tmp_path)
    assert done.returncode == 2
    assert "error: --vllm_url http://127.0.0.1:9: no answer" in done.stdout + done.stderr
    assert "actor:" not in done.stdout
