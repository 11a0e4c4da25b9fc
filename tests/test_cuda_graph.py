"""Decoding with CUDA graphs; a stand-in for the recording runs the same code again."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import hybrid_engine, small_config
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.generation import cuda_graph, steps
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.cuda_graph import GraphStep
from alpaca_rlhf.utils.generation.decoder import Decoder
from alpaca_rlhf.utils.generation.steps import agrees

PAD, RECORD = 3, cuda_graph.record
FAMILY = {
    "LLaMA": lambda small: LlamaForCausalLM(small_config(small.tokenizer)),
    "eager attention": lambda small: LlamaForCausalLM(
        small_config(small.tokenizer, attn_implementation="eager")),
    "norms of queries and keys": lambda small: Qwen3ForCausalLM(Qwen3Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)),
    "learned positions": lambda small: GPT2LMHeadModel(GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2)),
}


class Recorder:
    """Reads and writes the same tensors at every launch, as a graph does."""

    def __init__(self):
        self.recorded, self.pools = 0, []

    def __call__(self, run, pool=None):
        self.recorded += 1
        self.pools.append(pool)
        result = torch.full_like(run(), torch.nan)  # recording computes nothing

        def launch():
            result.copy_(run())

        return launch, result, pool or "the pool"


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    stand_in = Recorder()
    monkeypatch.setattr(cuda_graph, "record", stand_in)
    return stand_in


def made(small, kind="LLaMA"):
    torch.manual_seed(0)
    return FAMILY[kind](small).eval()


@pytest.mark.parametrize("kind", FAMILY)
def test_a_graph_gives_the_logits_of_the_models_forward_pass(small, kind):
    model = made(small, kind)
    assert agrees(model, GraphStep(model))


def generated(decoder, prompts, small, sampling):
    return decoder.generate(
        prompts, sampling, torch.arange(0, len(small.tokenizer), 5), PAD,
        torch.Generator().manual_seed(2),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_generate_what_the_forward_pass_generates_as_rows_come_and_go(
    small, temperature, recorder
):
    model = made(small)
    sampling = SamplingConfig(90, temperature, num_generations=2)
    expected = generated(Decoder(model, slots=4), small.prompts(8), small, sampling)
    rollout = generated(
        Decoder(model, slots=4, step=GraphStep(model)), small.prompts(8), small, sampling)
    assert rollout.input_ids.equal(expected.input_ids)
    torch.testing.assert_close(
        rollout.decoded_logprobs, expected.decoded_logprobs, rtol=0, atol=1e-5)
    assert 1 <= recorder.recorded <= 3, "one graph for each number of rows: 4, 2, 1"
    assert recorder.pools == [None, "the pool", "the pool"][: recorder.recorded]


def test_a_graph_is_recorded_again_for_another_cache_and_after_filling(small, recorder):
    model, sampling = made(small), SamplingConfig(4, 0)
    step = GraphStep(model)

    def run(decoder, count):
        rollout = generated(decoder, small.prompts(count), small, sampling)
        plain = generated(Decoder(model, slots=1), small.prompts(count), small, sampling)
        assert rollout.input_ids.equal(plain.input_ids)
        return recorder.recorded

    first = Decoder(model, slots=1, step=step)
    assert [run(first, 2), run(first, 2)] == [1, 1]
    assert run(Decoder(model, slots=1, step=step), 3) == 2
    step.fill()
    assert run(first, 2) == 3


# ------------------------------------------------------------------- in the hybrid engine


def rollout(hybrid, small):
    return hybrid.generate(
        small.prompts(4), SamplingConfig(6), torch.tensor([2]), PAD,
        torch.Generator().manual_seed(1),
    ).input_ids


@pytest.fixture
def anywhere(monkeypatch):
    """Let graphs be used on this machine."""
    monkeypatch.setattr(GraphStep, "objection", lambda model: None)


@pytest.mark.usefixtures("anywhere")
def test_the_hybrid_engine_records_graphs_at_each_visit_and_keeps_none(
    small, recorder, monkeypatch
):
    released, release = [], GraphStep.release
    monkeypatch.setattr(GraphStep, "release", lambda step: released.append(1) or release(step))
    engine = small.trained("actor", lora=4)
    hybrid = hybrid_engine(engine, slots=4, enable_cuda_graph=True)
    expected = rollout(hybrid_engine(engine, slots=4), small)
    recorded = [recorder.recorded for _ in range(2) if rollout(hybrid, small).equal(expected)]
    assert recorded[0] >= 2  # for the comparison and for the rollout
    assert recorded[1] == recorded[0] + 1
    assert len(released) == 2


def refuses(run, pool):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def raises_something_else(run, pool):
    raise NotImplementedError


def scales(run, pool):
    launch, result, pool = Recorder()(run)
    return lambda: (launch(), result.mul_(1.1)), result, pool


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("record", "reason"), [
    (refuses, "it fails (operation not permitted when stream is capturing)"),
    (raises_something_else, "it fails (NotImplementedError)"),
    (scales, "it does not give the logits of the model's forward pass"),
])
def test_a_graph_that_fails_or_is_wrong_is_not_used_and_one_line_says_why(
    small, monkeypatch, capsys, record, reason
):
    monkeypatch.setattr(cuda_graph, "record", record)
    engine = small.trained("actor")
    hybrid = hybrid_engine(engine, enable_cuda_graph=True)
    expected = rollout(hybrid_engine(engine, enabled=False), small)
    assert all(rollout(hybrid, small).equal(expected) for _ in range(2))
    assert capsys.readouterr().out.splitlines() == [
        f"warning: the CUDA graph is not used: {reason}"]


def test_without_a_gpu_one_line_says_so_and_the_compiled_step_is_used(small, capsys):
    step = steps.fastest(made(small), use_cuda_graph=True)
    assert step.name == "the compiled decoding step"
    assert capsys.readouterr().out.splitlines() == ["the CUDA graph is not used: it needs a GPU"]


# ------------------------------------------------------------------- applicability and recording


@pytest.mark.parametrize(("device", "window", "reason"), [
    ("cpu", {}, "it needs a GPU"),
    ("cuda", {}, None),
    ("cuda", {"sliding_window": 8}, "some layers attend to a window"),
    ("cuda", {"attention_chunk_size": 8}, "some layers attend to a window"),
    ("cuda", {"layer_types": ["full_attention"] * 2}, None),
    ("cuda", {"layer_types": ["full_attention", "sliding_attention"]},
     "some layers attend to a window"),
])
def test_reasons_against_a_graph(device, window, reason):
    config = LlamaConfig(num_hidden_layers=2, **window)
    model = SimpleNamespace(device=torch.device(device), config=config)
    assert GraphStep.objection(model) == reason


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2))


@pytest.mark.parametrize(("build", "chosen"), [
    *((build, steps.MaskedStep) for kind, build in FAMILY.items() if kind != "LLaMA"),
    (lambda small: bloom(), steps.ForwardStep),  # its bias is made of a mask [N, W]
    (lambda small: LlamaForCausalLM(small_config(small.tokenizer, attention_chunk_size=3)),
     steps.ForwardStep),
])
def test_the_mask_is_made_once_a_token_where_all_layers_attend_to_all_columns(
    small, monkeypatch, build, chosen
):
    monkeypatch.setattr(LlamaStep, "objection", lambda model: "not this one")
    torch.manual_seed(0)
    model = build(small).eval()
    step = steps.fastest(model, use_cuda_graph=False)
    assert type(step) is chosen
    prompts, sampling = small.prompts(6), SamplingConfig(12, 0)
    prompts.input_ids.clamp_(max=59)
    made = [generated(Decoder(model, slots=4, step=step), prompts, small, sampling)
            for step in (step, None)]
    assert made[0].input_ids.equal(made[1].input_ids)


def test_recording_warms_up_on_another_stream_and_then_records_one_pass(monkeypatch):
    events, streams = [], SimpleNamespace(wait_stream=lambda other: events.append("wait"))
    graph, pools = SimpleNamespace(pool=lambda: "new pool"), []

    @contextlib.contextmanager
    def inside(name, pool=None):
        name = "graph" if name is graph else name
        pools.append(pool)
        events.append(f"into {name}")
        yield
        events.append(f"out of {name}")

    fake = SimpleNamespace(
        Stream=lambda: streams, current_stream=lambda: streams,
        stream=lambda stream: inside("stream"), create_graph=lambda: graph,
        capture_to_graph=inside, replay_graph=lambda one: events.append(f"launch {one is graph}"),
    )
    monkeypatch.setattr(cuda_graph, "get_accelerator", lambda: fake)
    launch, result, pool = RECORD(lambda: events.append("pass") or len(events))
    warm_up = ["into stream", *["pass"] * cuda_graph.WARM_UP, "out of stream"]
    assert events == ["wait", *warm_up, "wait", "into graph", "pass", "out of graph"]
    assert result == events.index("into graph") + 2
    launch()
    assert events[-1] == "launch True"
    assert pool == "new pool"
    assert RECORD(lambda: torch.ones(1), pool)[2] == pools[-1] == "new pool"
