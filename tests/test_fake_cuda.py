"""The code's path on a GPU, on a machine without one: PyTorch's fake tensors on device cuda.

They have shapes and devices but no numbers, work in a CPU build, and raise where devices are mixed.
"""

import ctypes
import os
from argparse import Namespace
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import torch
from conftest import small_config, with_adapter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from alpaca_rlhf.training_model.step3_rlhf_finetuning import rollout
from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience
from alpaca_rlhf.utils import distributed, losses, rl_math
from alpaca_rlhf.utils.configs import PPOConfig, RewardConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import (
    PromptBatch,
    Rollout,
    collate_pairs,
    collate_prompts,
    collate_tokens,
)
from alpaca_rlhf.utils.generation import decoder
from alpaca_rlhf.utils.generation.sampling import sample
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import at_labels
from alpaca_rlhf.utils.model.reward_model import TokenScorer, scores
from alpaca_rlhf.utils.model.weights.ema import Ema
from alpaca_rlhf.utils.projection import Head

GPU = "cuda"
CUDA, META = 1, 14  # c10::DeviceType
B, P, R, V, D = 4, 6, 5, 420, 8


@pytest.fixture(scope="module", autouse=True)
def guard():
    """A device guard for cuda that does nothing, as tensors without data have one.

    Before some operations (indexing is one) PyTorch makes the tensor's device the current one. A
    build for CUDA without a GPU has a guard that does nothing for that; a build for the CPU has
    none and would raise.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, name)
    before = guards[CUDA]
    if before is None:
        guards[CUDA] = guards[META]
    yield
    guards[CUDA] = before


@pytest.fixture
def fake(guard):
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        yield mode


def floats(*shape):
    return torch.randn(*shape, device=GPU)


def ids(*shape):
    return torch.ones(*shape, dtype=torch.long, device=GPU)


def on_gpu(*tensors):
    return all(tensor.device.type == GPU for tensor in tensors)


def tensors(found):
    """The tensors in nested tuples, dicts and records."""
    if isinstance(found, torch.Tensor):
        return [found]
    parts = found if isinstance(found, tuple) else (
        found.values() if isinstance(found, dict) else vars(found).values())
    return [tensor for part in parts for tensor in tensors(part)]


def test_mixed_devices_raise(fake):
    with pytest.raises(Exception, match="devices"):
        floats(2) + torch.randn(2)


# --- the maths -----------------------------------------------------------------------------------

FUNCTIONS = {
    "token_loss": lambda: losses.token_loss(floats(B, D), Head(floats(V, D)), ids(B)),
    "chosen_logprobs": lambda: losses.chosen_logprobs(
        floats(B, D), Head(floats(V, D)), ids(B), 0.7, entropy=True),
    "pairwise_loss": lambda: losses.pairwise_loss(floats(B), floats(B)),
    "policy_loss": lambda: losses.policy_loss(*floats(3, B, R), ids(B, R), 0.2),
    "value_loss": lambda: losses.value_loss(*floats(3, B, R), ids(B, R), 0.2),
    "position_ids": lambda: rl_math.position_ids(ids(B, P)),
    "gather_last": lambda: rl_math.gather_last(floats(B, P), ids(B, P)),
    "response_mask": lambda: rl_math.response_mask(ids(B, R), ids(2)),
    "token_logprobs": lambda: rl_math.token_logprobs(floats(B, R, V), ids(B, R), 0.7),
    "kl_estimates": lambda: rl_math.kl_estimates(*floats(2, B, R), ids(B, R)),
    "token_rewards": lambda: rl_math.token_rewards(
        *floats(2, B, R), floats(B), ids(B, R), 0.05),
    "gae": lambda: rl_math.gae(*floats(2, B, R), ids(B, R), 1.0, 0.95),
    "whiten": lambda: rl_math.whiten(
        floats(B, R), ids(B, R), rl_math.masked_moments(floats(B, R), ids(B, R))),
    "sample": lambda: sample(
        floats(B, V), SamplingConfig(4), uniform(), ids(B, V).bool()),
    "sample greedily": lambda: sample(
        floats(B, V), SamplingConfig(4, temperature=0), uniform(), ids(B, V).bool()),
    "sample from few": lambda: sample(
        floats(B, V), SamplingConfig(4, 0.7, 0.9, 20), uniform(), ids(B, V).bool()),
}


def uniform():
    return torch.rand(B, dtype=torch.float64, device=GPU)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_maths_stay_on_the_device_of_their_arguments(fake, name):
    assert on_gpu(*tensors(FUNCTIONS[name]()))


# --- records and batches -------------------------------------------------------------------------


def experience(responses, prompts):
    sequences, numbers = ("input_ids", "attention_mask"), (
        "decoded_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns")
    return Experience(
        **{name: ids(B, prompts + responses) for name in sequences},
        **{name: floats(B, responses) for name in numbers},
        response_mask=ids(B, responses), score=floats(B), has_eos=ids(B).bool(),
    )


def test_joining_rollouts_of_different_lengths(fake):
    joined = Experience.joined([experience(R, P), experience(R + 2, P - 1)])
    assert joined.input_ids.shape == (2 * B, P + R + 2)
    assert on_gpu(*tensors(joined))


def test_batches_are_collated_on_the_host_and_move_with_to(fake):
    rows = [{"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "prompt_ids": [1, 5],
             "chosen_ids": [1, 5, 2], "rejected_ids": [1, 2]}] * 2
    batches = [collate(rows, 3) for collate in (collate_tokens, collate_pairs, collate_prompts)]
    batches.append(Rollout(*(torch.ones(2, 3, dtype=torch.long) for _ in range(4))))
    for batch in batches:
        assert not any(map(on_gpu, tensors(batch)))
        assert on_gpu(*tensors(batch.to(torch.device(GPU, 0))))


def test_rows_are_picked_on_the_device_of_the_record(fake, monkeypatch):
    # Only numbers tell how long the longest row is: this answers instead of them.
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: 2)
    picked = experience(R, P).rows([2, 0])
    assert on_gpu(*tensors(picked))
    assert len(picked) == 2


# --- models --------------------------------------------------------------------------------------


@pytest.fixture
def make(small):
    """A model of the given class on the fake GPU."""

    def build(model_class, with_lora=False, **changes):
        with unset_fake_temporarily():
            model = model_class(small_config(small.tokenizer, **changes))
            if with_lora:
                model = with_adapter(model)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    there = torch.empty(parameter.shape, device=GPU)
                    module._parameters[name] = nn.Parameter(there, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
        return model

    return build


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_actors_forward(make, fake, with_lora):
    model = make(LlamaForCausalLM, with_lora)

    def compute(loss, hidden, head, targets):
        assert on_gpu(hidden, head.weight, targets)
        return loss(floats(B, hidden.shape[1]), head, ids(B))  # numbers tell how many there are

    for loss in (losses.chosen_logprobs, losses.token_loss):
        assert on_gpu(at_labels(model, ids(B, P), ids(B, P), partial(compute, loss)))


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_critics_forward(make, fake, with_lora, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: P)
    scorer = TokenScorer(make(LlamaForSequenceClassification, with_lora, num_labels=1))
    values = scorer(ids(B, P + R))
    assert values.shape == (B, P + R)
    loss, _ = losses.value_loss(
        values[:, -R - 1 : -1], floats(B, R), floats(B, R), ids(B, R), 0.2
    )
    assert on_gpu(loss, scores(scorer, ids(B, P), ids(B, P)))


def test_decoding_with_a_cache(make, fake, monkeypatch):
    def ones(tensor):  # fake tensors have no numbers, and the decoder needs some
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

    monkeypatch.setattr(FakeTensor, "tolist", ones)
    sampling = SamplingConfig(3, repetition_penalty=1.2, num_generations=2)
    batch = decoder.Decoder(make(LlamaForCausalLM).eval(), slots=2).generate(
        PromptBatch(ids(B, P), ids(B, P)), sampling, ids(0), pad_id=3
    )
    assert batch.input_ids.shape == (2 * B, P + 3)
    assert on_gpu(*tensors(batch))


def test_folding_the_adapter_and_averaging_the_weights(make, fake):
    model = make(LlamaForCausalLM, with_lora=True)
    with lora.folded(model):
        assert on_gpu(*model.parameters())
    ema = Ema(model, decay=0.9)
    ema.update()
    with ema.swapped_in():
        assert on_gpu(*model.parameters())


def test_experience_is_made_on_the_device_of_the_rollout(small, fake, monkeypatch):
    # Metrics are numbers, which a fake tensor does not have.
    monkeypatch.setattr(rollout, "rollout_metrics", lambda scored: {"kl/k1": 0.0})
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0.0, 1.0])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.5)
    reward = RewardConfig(reward_normalization="reference")
    made, _ = rollout.make_experience(
        experience(R, P), rollout.RewardNormalizer(reward, ""), reward, PPOConfig(), kl_coef=0.05)
    assert on_gpu(*tensors(made))


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(1, 3, 0), (8, 3, 3), (2, 0, 0)])
def test_a_rank_takes_a_visible_device_and_deepspeed_the_same(
    monkeypatch, visible, local_rank, index
):
    """With one visible device a task (srun) it is device 0, in DeepSpeed's engine too."""
    taken = []

    def set_device(number):
        assert number < visible, "CUDA error: invalid device ordinal"
        taken.append(number)

    accelerator = Namespace(device_count=lambda: visible, device_name=lambda i="": f"cuda:{i}",
                            set_device=set_device)
    names = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": str(local_rank), "LOCAL_SIZE": "8",
             "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank)}
    monkeypatch.setattr(os, "environ", {**os.environ, **names})
    monkeypatch.setattr(distributed, "_place", distributed._Place())
    monkeypatch.setattr(distributed, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(deepspeed.runtime.engine, "get_accelerator", lambda: accelerator)
    # It binds NCCL to the device of LOCAL_RANK.
    monkeypatch.setattr(deepspeed, "init_distributed",
                        lambda **_: set_device(int(os.environ["LOCAL_RANK"])))
    distributed.initialize(0)
    engine = Namespace()
    deepspeed.DeepSpeedEngine._configure_with_arguments(engine, None, None)
    for name in ("get_world_size", "get_rank"):
        monkeypatch.setattr(deepspeed.runtime.engine.dist, name, lambda: 0)
    deepspeed.DeepSpeedEngine._set_distributed_vars(engine, None)
    assert taken == [index, index, index]
    assert distributed.is_first_on_node() == (local_rank == 0)
    assert distributed._place.local_size == 8
