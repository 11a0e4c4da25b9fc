"""The GPU's road on a machine without one: PyTorch's fake tensors on the device cuda.

They have shapes and devices but no numbers, work in a CPU build, and raise where devices are mixed.
"""

import ast
import ctypes
from pathlib import Path

import pytest
import torch
from conftest import small_config, with_adapter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import alpaca_rlhf
from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import (
    Experience,
    Rollout,
    ScoredRollout,
)
from alpaca_rlhf.utils import losses, rl_math
from alpaca_rlhf.utils.configs import PPOConfig, RewardConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import (
    PromptBatch,
    collate_pairs,
    collate_prompts,
    collate_tokens,
)
from alpaca_rlhf.utils.generation import decoder
from alpaca_rlhf.utils.generation.sampling import sample
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import forward_logits, response_logits
from alpaca_rlhf.utils.model.ema import Ema
from alpaca_rlhf.utils.model.reward_model import TokenScorer, scores

GPU = "cuda"
CUDA, META = 1, 14  # c10::DeviceType
B, P, R, V = 4, 6, 5, 420


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


def test_mixed_devices_raise(fake):
    with pytest.raises(Exception, match="devices"):
        floats(2) + torch.randn(2)


def test_losses(fake):
    mask = ids(B, R)
    assert on_gpu(losses.token_loss(floats(B, R, V), ids(B, R)))
    assert on_gpu(losses.pairwise_loss(floats(B), floats(B)))
    for function in (losses.policy_loss, losses.value_loss):
        loss, stats = function(floats(B, R), floats(B, R), floats(B, R), mask, 0.2)
        assert on_gpu(loss, *stats.values())


def test_masks_positions_and_last_tokens(fake):
    mask = ids(B, P)
    assert on_gpu(
        rl_math.position_ids(mask), rl_math.last_token_index(mask),
        rl_math.gather_last(floats(B, P), mask), rl_math.response_mask(ids(B, R), ids(2)),
    )


def test_log_probabilities_entropy_and_kl(fake):
    logits, tokens = floats(B, R, V), ids(B, R)
    logprobs = rl_math.token_logprobs(logits, tokens, 0.7)
    assert on_gpu(logprobs, rl_math.entropy(logits, 0.7))
    assert on_gpu(*rl_math.kl_estimates(logprobs, floats(B, R), ids(B, R)))


def test_rewards_advantages_and_whitening(fake):
    mask = ids(B, R)
    rewards = rl_math.token_rewards(floats(B, R), floats(B, R), floats(B), mask, 0.05)
    advantages, returns = rl_math.gae(rewards, floats(B, R), mask, 1.0, 0.95)
    moments = rl_math.masked_moments(advantages, mask)
    white = rl_math.whiten(advantages, mask, moments)
    assert on_gpu(rewards, advantages, returns, moments, white)


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(4), SamplingConfig(4, temperature=0), SamplingConfig(4, 0.7, 0.9, 20)],
)
def test_sampling(fake, sampling):
    uniform = torch.rand(B, dtype=torch.float64, device=GPU)
    token = sample(floats(B, V), sampling, uniform, ids(B, V).bool())
    assert on_gpu(token)
    assert token.shape == (B,)


def rollout(responses, prompts):
    return {
        "input_ids": ids(B, prompts + responses), "attention_mask": ids(B, prompts + responses),
        "response_mask": ids(B, responses), "decoded_logprobs": floats(B, responses),
    }


def experience(responses, prompts):
    numbers = {name: floats(B, responses) for name in
               ("logprobs", "ref_logprobs", "values", "advantages", "returns")}
    return Experience(
        **rollout(responses, prompts), **numbers, score=floats(B), has_eos=ids(B).bool()
    )


def test_joining_rollouts_of_unlike_lengths(fake):
    joined = Experience.joined([experience(R, P), experience(R + 2, P - 1)])
    assert joined.input_ids.shape == (2 * B, P + R + 2)
    assert on_gpu(*vars(joined).values())


def test_batches_are_collated_on_the_host_and_move_with_to(fake):
    rows = [{"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "prompt_ids": [1, 5],
             "chosen_ids": [1, 5, 2], "rejected_ids": [1, 2]}] * 2
    batches = [collate(rows, 3) for collate in (collate_tokens, collate_pairs, collate_prompts)]
    batches.append(Rollout(*(torch.ones(2, 3, dtype=torch.long) for _ in range(4))))
    for batch in batches:
        assert not any(map(on_gpu, vars(batch).values()))
        assert on_gpu(*vars(batch.to(torch.device(GPU, 0))).values())


def test_rows_are_picked_on_the_device_of_the_record(fake, monkeypatch):
    # How long the longest row is only numbers tell: those two questions are answered here.
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: 2)
    picked = experience(R, P).rows([2, 0])
    assert on_gpu(*vars(picked).values())
    assert len(picked) == 2


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
    from transformers import LlamaForCausalLM

    model = make(LlamaForCausalLM, with_lora)
    logits = response_logits(model, ids(B, P + R), ids(B, P + R), R)
    assert logits.shape == (B, R, V)
    logprobs = rl_math.token_logprobs(logits, ids(B, R))
    loss, _ = losses.policy_loss(logprobs, floats(B, R), floats(B, R), ids(B, R), 0.2)
    assert on_gpu(loss)
    assert on_gpu(losses.token_loss(
        forward_logits(model, ids(B, P), ids(B, P)), ids(B, P)
    ))


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_critics_forward(make, fake, with_lora):
    from transformers import LlamaForSequenceClassification

    scorer = TokenScorer(make(LlamaForSequenceClassification, with_lora, num_labels=1))
    values = scorer(ids(B, P + R), ids(B, P + R))
    assert values.shape == (B, P + R)
    loss, _ = losses.value_loss(
        values[:, -R - 1 : -1], floats(B, R), floats(B, R), ids(B, R), 0.2
    )
    assert on_gpu(loss, scores(scorer, ids(B, P), ids(B, P)))


def test_decoding_with_a_cache(make, fake, monkeypatch):
    from transformers import LlamaForCausalLM

    def ones(tensor):  # fake tensors have no numbers, and the decoder needs some
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

    monkeypatch.setattr(FakeTensor, "tolist", ones)
    sampling = SamplingConfig(3, repetition_penalty=1.2, num_generations=2)
    batch = decoder.Decoder(make(LlamaForCausalLM).eval(), slots=2).generate(
        PromptBatch(ids(B, P), ids(B, P)), sampling, ids(0), pad_id=3
    )
    assert batch.input_ids.shape == (2 * B, P + 3)
    assert on_gpu(*vars(batch).values())


def test_folding_the_adapter_and_averaging_the_weights(make, fake):
    from transformers import LlamaForCausalLM

    model = make(LlamaForCausalLM, with_lora=True)
    with lora.folded(model):
        assert on_gpu(*model.parameters())
    ema = Ema(model, decay=0.9)
    ema.update()
    with ema.swapped_in():
        assert on_gpu(*model.parameters())


def test_experience_is_made_on_the_device_of_the_rollout(small, fake, monkeypatch):
    from alpaca_rlhf.training_model.step3_rlhf_finetuning import rollout as room

    scored = ScoredRollout(
        **rollout(R, P), logprobs=floats(B, R), ref_logprobs=floats(B, R), values=floats(B, R),
        score=floats(B), has_eos=ids(B).bool(),
    )
    # Metrics are numbers for people, and a fake tensor has none.
    monkeypatch.setattr(room, "rollout_metrics", lambda scored: {"kl/k1": 0.0})
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0.0, 1.0])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.5)
    made, _ = room.make_experience(
        scored, room.ScoreNormalizer(RewardConfig(reward_normalization="reference"), ""),
        RewardConfig(), PPOConfig(), kl_coef=0.05,
    )
    assert on_gpu(*vars(made).values())


@pytest.mark.parametrize("function", ["position_ids", "response_mask", "gae"])
def test_a_device_named_in_the_maths_is_noticed(fake, monkeypatch, function):
    """The same functions with `device="cpu"` written into what they make."""
    source = ast.parse(Path(rl_math.__file__).read_text())
    makers = {"arange", "zeros_like", "ones_like", "cumsum"}

    class Named(ast.NodeTransformer):
        def visit_Call(self, node):
            self.generic_visit(node)
            if isinstance(node.func, ast.Attribute) and node.func.attr in makers:
                return ast.Call(ast.Attribute(node, "cpu", ast.Load()), [], [])
            return node

    broken = {}
    tree = ast.fix_missing_locations(Named().visit(source))
    exec(compile(tree, "broken", "exec"), broken)
    given = {
        "position_ids": (ids(B, P),), "response_mask": (ids(B, R), ids(2)),
        "gae": (floats(B, R), floats(B, R), ids(B, R), 1.0, 0.95),
    }[function]
    with pytest.raises((RuntimeError, AssertionError)):
        result = broken[function](*given)
        assert on_gpu(*(result if isinstance(result, tuple) else (result,)))


def test_nothing_of_the_package_names_the_gpu():
    package = Path(alpaca_rlhf.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "distributed.py":
            text = path.read_text().replace("cuda_graph", "")  # a flag and a module, no device
            assert "cuda" not in text, path
