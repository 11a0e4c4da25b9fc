"""Two ranks take the same steps as one, on every ZeRO stage, and run through step 3.

Both are started once and run all cases (`distributed_worker.py`).
"""

import dataclasses
import json
import math
from itertools import islice

import distributed_worker as worker
import pytest
import torch
from conftest import Small, fill_adapters, save_adapted
from programs import REPOSITORY
from safetensors.torch import load_file
from torch.testing import assert_close

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.utils import rl_math
from alpaca_rlhf.utils.data.batches import collate_prompts
from alpaca_rlhf.utils.model.weights.whole import gathered_state_dict

pytestmark = pytest.mark.timeout(600)
STAGES = worker.STAGES
# With an adapter two stages are enough: the others treat only the base model differently.
STEPS = [(stage, 0) for stage in STAGES] + [(0, 4), (3, 4)]


@pytest.fixture(scope="module")
def alone(small):
    """Return the same small models in this process, the only rank."""
    return Small(small.folder, small.unclipped)


@pytest.fixture(scope="module")
def experience(alone):
    """Return eight rollouts of different lengths."""
    return alone.experience(alone.maker(alone.roles(eos_every=6), tokens=8), count=8)[0]


@pytest.fixture(scope="module")
def folder(alone, experience):
    """Return the folder with the input of both ranks."""
    # The small weights of a small model would otherwise stay whole under ZeRO-3.
    # Clipping would hide a wrong factor.
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0},
                 "gradient_clipping": 1e6}
    (alone.folder / "overrides.json").write_text(json.dumps(overrides))
    save_adapted(alone, alone.folder / "adapted")
    record = {f.name: getattr(experience, f.name) for f in dataclasses.fields(experience)}
    torch.save(record, alone.folder / "experience.pt")
    return alone.folder


@pytest.fixture(scope="module")
def results(folder, imported):
    """Return the results of all cases on rank 0."""
    done = imported.run([worker.__file__, folder], REPOSITORY)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    given = [json.loads((folder / f"results_{rank}.json").read_text()) for rank in (0, 1)]
    assert [result.get("failed") for result in given] == [None, None]
    return given[0]


# ------------------------------------------------------------------- one rank and two ranks


def same_weights(folder, name, engine, start):
    """Compare the weights with those of one rank, which have moved."""
    given, expected = torch.load(folder / f"weights_{name}.pt"), worker.weights(engine)
    assert given.keys() == expected.keys()
    for key, weight in expected.items():
        assert_close(given[key], weight, rtol=1e-4, atol=3e-6, msg=lambda m, k=key: f"{k}: {m}")
    before = gathered_state_dict(start, on_this_rank=True)
    assert max((expected[key] - before[key]).abs().max() for key in expected) > 1e-3


@pytest.fixture(scope="module")
def references(alone):
    """Return engine and metrics of two steps on one rank with twice the batch size, at ZeRO 0."""
    return {
        (role, rank): worker.two_steps(alone, role, 0, rank)
        for role in ("actor", "critic") for rank in (0, 4)
    }


@pytest.mark.parametrize(("stage", "rank"), STEPS)
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_one_rank_and_two_ranks_take_the_same_step_in_steps_1_and_2(
    results, folder, alone, references, role, stage, rank
):
    engine, expected = references[role, rank]
    start = alone.causal_lm() if role == "actor" else alone.reward_model()
    same_weights(folder, f"{role}_{stage}_{rank}", engine, start)
    record = results[f"step_{role}_{stage}_{rank}"]
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert record["norm"] == pytest.approx(expected["norm"], rel=1e-4)


@pytest.fixture(scope="module")
def ppo_reference(alone, experience):
    return worker.ppo_step(alone, 0, 0, experience)


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_and_two_ranks_take_the_same_step_of_ppo(
    results, folder, alone, ppo_reference, stage
):
    same_weights(folder, f"ppo_actor_{stage}", ppo_reference.actor, alone.causal_lm())
    same_weights(folder, f"ppo_critic_{stage}", ppo_reference.critic, alone.reward_model())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_rank_and_two_ranks_take_the_same_step_with_a_shared_backbone(
    results, folder, alone, experience, stage
):
    adapted = dataclasses.replace(alone, folder=folder / "adapted")
    reference = worker.ppo_step(adapted, 0, 4, experience, share=True)
    same_weights(folder, f"shared_actor_{stage}", reference.actor, adapted.causal_lm())
    same_weights(folder, f"shared_critic_{stage}", reference.critic, adapted.reward_model())


@pytest.mark.parametrize(("role", "stage", "dtype"), worker.HALF)
def test_one_rank_and_two_ranks_take_the_same_step_in_half_precision(
    results, folder, alone, role, stage, dtype
):
    engine, expected = worker.two_steps(alone, role, stage, 0, dtype)
    given = torch.load(folder / f"weights_half_{role}_{stage}_0_{dtype}.pt")
    for key, weight in worker.weights(engine).items():
        assert_close(given[key], weight, rtol=0.02, atol=2e-3, msg=lambda m, k=key: f"{k}: {m}")
    record = results[f"half_{role}_{stage}_{dtype}"]
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert record["norm"] == pytest.approx(expected["norm"], rel=1e-2)


@pytest.mark.skipif(not worker.QUANTIZED, reason="bitsandbytes is not installed")
def test_one_rank_and_two_ranks_take_the_same_step_on_quantized_weights(results, folder, alone):
    for role, stage, rank, dtype, bits in worker.QUANTIZED:
        name = f"quantized_{role}_{stage}_{bits}"
        engine, expected = worker.two_steps(alone, role, 0, rank, dtype, bits)
        start = alone.causal_lm() if role == "actor" else alone.reward_model()
        same_weights(folder, name, engine, start)
        assert results[name]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert results[name]["norm"] == pytest.approx(expected["norm"], rel=1e-4)


def test_step_3_runs_with_adapters_under_zero_3_in_bf16_on_two_ranks(results):
    result = results["half_step3"]
    first = result["metrics"][0]
    assert result["finite"]
    assert result["moved"] >= 14
    assert first["policy/first_log_ratio_max"] == first["kl/k1"] == 0.0


# ------------------------------------------------------------------- step 3 on a vLLM server


@pytest.mark.parametrize(("stage", "rank"), worker.SERVED)
def test_a_server_gets_the_weights_of_both_ranks_and_answers_each_prompt_once(
    results, stage, rank
):
    result = results[f"served_{stage}_{rank}"]
    assert result["answered"] == 16
    assert result["whole"]
    assert max(result["differences"]) < 1e-4
    assert ["weights not updated" in stop for stop in result["stops"]] == [True, True]


# ------------------------------------------------------------------- step 3, run through


@pytest.mark.parametrize(("stage", "rank", "hybrid"), worker.STEP3)
def test_step_3_runs_two_iterations_with_finite_metrics_and_moves_the_actor(
    results, stage, rank, hybrid
):
    result = results[f"step3_{stage}_{rank}_{hybrid}"]
    assert result["finite"]
    assert result["moved"] >= 14
    first = result["metrics"][0]
    assert abs(first["kl/k1"]) < 1e-3
    assert abs(first["kl/k3"]) < 1e-3
    assert abs(first["policy/ratio_mean"] - 1) < 1e-3
    assert abs(first["policy/approx_kl"]) < 1e-3
    assert result["metrics"][1]["kl/k3"] > 1e-6
    assert len({len(reply) for reply in result["tokens"][0]}) > 2, "all responses have one length"


@pytest.mark.parametrize(("stage", "rank", "hybrid"), worker.STEP3)
def test_every_stage_with_and_without_the_hybrid_engine_samples_the_same_and_ends_the_same(
    results, folder, stage, rank, hybrid
):
    result, expected = results[f"step3_{stage}_{rank}_{hybrid}"], results[f"step3_0_{rank}_False"]
    assert result["tokens"] == expected["tokens"]
    given, expected = (
        torch.load(folder / f"weights_step3_{name}.pt")
        for name in (f"{stage}_{rank}_{hybrid}", f"0_{rank}_False")
    )
    for name, weight in expected.items():
        assert_close(given[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, k=name: f"{k}: {m}")


# ------------------------------------------------------------------- ZeRO-3


def test_in_generation_mode_the_weights_are_whole_folded_and_without_hooks(results):
    record = results["gathering"]
    assert record["sharded_before"]
    assert record["hooks_before"] > 0
    assert record["whole_inside"]
    assert record["folded_inside"]
    assert record["hooks_inside"] == 0


@pytest.mark.parametrize("when", ["after", "after exception"])
def test_on_leaving_generation_mode_everything_is_as_it_was(results, when):
    assert {k: v for k, v in results["gathering"][when].items()} == {
        "sharded": True, "hooks": True, "unmoved": True, "same_logits": True, "folded": False,
    }


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_export_under_zero_3_is_that_at_zero_0(results, folder, role):
    plain, zero3 = (folder / f"export_{role}_{stage}" for stage in (0, 3))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        given, expected = load_file(zero3 / name), load_file(plain / name)
        assert given.keys() == expected.keys()
        for key, weight in expected.items():
            assert given[key].shape == weight.shape
            assert_close(given[key], weight, rtol=1e-4, atol=3e-6)
    assert json.loads((zero3 / "config.json").read_text()) == json.loads(
        (plain / "config.json").read_text()
    )
    assert results[f"export_{role}_3"]["unmoved"]


@pytest.mark.parametrize("stage", [*STAGES, "gathered"])
def test_the_average_is_right_swaps_back_exactly_and_leaves_the_run_alone(results, stage):
    record = results[f"ema_{stage}"]
    assert record["moved"]
    assert record["error"] < 1e-6
    assert record["back"]
    assert record["goes_on"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_both(results, stage):
    record = results[f"not_finite_{stage}"]
    assert record["skipped"]
    assert record["unmoved"]
    assert record["goes_on"]


@pytest.fixture(scope="module")
def by_transformers(alone):
    """Return what `generate` answers to the prompts of each rank, with and without the adapter."""
    made = {}
    for rank in (0, 4):
        torch.manual_seed(0)  # of the adapter, as in the worker
        engine = alone.trained("actor", 0, rank)
        model = fill_adapters(engine.module).eval()
        texts = islice(assistant_world.pretraining_texts(3), worker.GREEDY)
        dialogues = [messages for messages, _ in texts]
        for number, often in ((0, 2), (1, 40)):
            prompts = collate_prompts(
                [{"prompt_ids": alone.chat.prompt_ids(m)[-60:]} for m in dialogues[number::2]], 3
            )
            ends = torch.arange(0, len(alone.tokenizer), often)
            tokens = model.generate(
                input_ids=prompts.input_ids, attention_mask=prompts.attention_mask,
                do_sample=False, max_new_tokens=12, eos_token_id=ends.tolist(), pad_token_id=3,
            )[:, prompts.input_ids.shape[1] :]
            kept = rl_math.response_mask(tokens, ends).bool()
            made[rank, number] = [
                row[mask].tolist() for row, mask in zip(tokens, kept, strict=True)
            ]
    return made


@pytest.mark.parametrize(("stage", "unpin"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("rank", [0, 4])
def test_greedy_responses_on_two_ranks_are_the_tokens_that_transformers_gives(
    results, by_transformers, stage, unpin, rank
):
    """Also where weights are gathered layer by layer and one rank ends long before the other."""
    record = results[f"greedy_{stage}_{unpin}_{rank}"]
    assert record["in_step"] is unpin
    assert record["unmoved"]
    assert record["replies"] == [by_transformers[rank, number] for number in (0, 1)]
    short, long = (sum(map(len, replies)) for replies in record["replies"])
    assert 2 * short < long


# ------------------------------------------------------------------- what is said over ranks


def test_measuring_on_two_ranks_covers_each_row_once(results):
    assert results["measured"]["lengths"] == sorted(
        float(len(row["input_ids"])) for row in worker.TOKENS[:7]
    )


def test_sums_maxima_and_rows_are_of_all_ranks(results):
    record = results["over_ranks"]
    assert (record["sum"], record["max"], record["rows"]) == (3.0, 2.0, [0, 0, 1, 10])


def test_ranks_on_processors_of_which_one_is_slow_in_bf16_all_take_fp32(results):
    assert results["over_ranks"]["auto"] == ["torch.float32"] * 2


def test_each_rank_samples_responses_of_its_own(results):
    first, second = results["over_ranks"]["tokens"]
    assert first != second


def test_advantages_are_whitened_over_the_tokens_of_all_ranks(results):
    first, second = results["over_ranks"]["advantages"]
    advantages = torch.tensor(first + second)
    assert advantages.mean().abs() < 1e-5
    assert advantages.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert abs(sum(first) / len(first)) > 1e-3, "each rank has whitened by itself"


def test_the_mean_score_is_that_of_all_ranks(results):
    record = results["over_ranks"]
    expected = sum(record["scores"]) / len(record["scores"])
    assert math.isclose(record["score_mean"], expected, rel_tol=1e-5)
