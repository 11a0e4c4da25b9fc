"""Decoding by CUDA graphs, with a stand-in for what records them: it runs the same code again."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import small_config
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alpaca_rlhf.training_model.step3_rlhf_finetuning import main
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.utils.arguments import parse_step3
from alpaca_rlhf.utils.generation import cuda_graph
from alpaca_rlhf.utils.generation.cuda_graph import GraphStep
from alpaca_rlhf.utils.generation.decoder import Decoder, RolloutRequest, SamplingConfig, agrees
from alpaca_rlhf.utils.generation.kv_cache import SlotCache

PAD, RECORD = 3, cuda_graph.record
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}
FAMILY = {
    "LLaMA": lambda small: LlamaForCausalLM(small_config(small.tokenizer)),
    "its own attention": lambda small: LlamaForCausalLM(
        small_config(small.tokenizer, attn_implementation="eager")),
    "norms of queries and keys": lambda small: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "learnt positions": lambda small: GPT2LMHeadModel(GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2)),
}


class Recorder:
    """What a graph does: the same reads and writes at the same places, at every launch."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        result = torch.full_like(run(), torch.nan)  # recording computes nothing

        def launch():
            result.copy_(run())

        return launch, result


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    stand_in = Recorder()
    monkeypatch.setattr(cuda_graph, "record", stand_in)
    return stand_in


def made(make, small):
    torch.manual_seed(0)
    return make(small).eval()


@pytest.mark.parametrize("kind", FAMILY)
def test_a_graph_gives_the_logits_of_the_models_own_forward_pass(small, kind):
    model = made(FAMILY[kind], small)
    assert agrees(model, GraphStep(model).fill())


def draw(model, small, sampling, step=None, order=slice(None)):
    prompts = small.prompts(8)
    return Decoder(model, slots=4, step=step).generate(
        RolloutRequest(prompts.input_ids[order], prompts.attention_mask[order]), sampling,
        torch.arange(0, len(small.tokenizer), 5), PAD, torch.Generator().manual_seed(2),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_write_what_the_forward_pass_writes_as_rows_come_and_go(
    small, temperature, recorder
):
    model = made(FAMILY["LLaMA"], small)
    sampling = SamplingConfig(90, temperature, n_samples_per_prompt=2)
    expected = draw(model, small, sampling)
    batch = draw(model, small, sampling, GraphStep(model).fill())
    assert batch.input_ids.equal(expected.input_ids)
    torch.testing.assert_close(batch.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert 1 <= recorder.recorded <= 3, "one graph for each number of rows: 4, 2, 1"


def test_a_graph_knows_one_caches_buffers_alone(small):
    model = made(FAMILY["LLaMA"], small)
    step, sampling = GraphStep(model).fill(), SamplingConfig(4, 0)
    draw(model, small, sampling, step)
    other = slice(4, 8)  # a decoder, and so a cache, of its own
    batch = draw(model, small, sampling, step, other)
    assert batch.input_ids.equal(draw(model, small, sampling, order=other).input_ids)
    assert not batch.input_ids.equal(draw(model, small, sampling, order=slice(4)).input_ids)


def test_after_filling_every_graph_is_recorded_anew(small, recorder):
    model = made(FAMILY["LLaMA"], small)
    step, cache = GraphStep(model).fill(), SlotCache()
    cache.begin(1, 1, 3, torch.device("cpu"))
    prompt = DynamicCache()
    model(input_ids=torch.tensor([[5]]), past_key_values=prompt)
    cache.admit(prompt, [0], [0], [1])
    for expected in (1, 1):
        step(torch.tensor([4]), cache)
        assert recorder.recorded == expected
    step.fill()(torch.tensor([4]), cache)
    assert recorder.recorded == 2


# ------------------------------------------------------------------- in the hybrid engine


def rollout(hybrid, small):
    prompts = small.prompts(4)
    return hybrid.generate(
        RolloutRequest(prompts.input_ids, prompts.attention_mask), SamplingConfig(6),
        torch.tensor([2]), PAD, torch.Generator().manual_seed(1),
    ).input_ids


@pytest.fixture
def anywhere(monkeypatch):
    """No objection to graphs on this machine."""
    monkeypatch.setattr(GraphStep, "objection", lambda model: None)


@pytest.mark.usefixtures("anywhere")
def test_the_hybrid_engine_decodes_by_graphs_where_they_are_asked_for(small, recorder):
    engine = small.trained("actor", lora=4)
    hybrid = HybridEngine(engine, enabled=True, slots=4, graphs=True)
    expected = rollout(HybridEngine(engine, enabled=True, slots=4), small)
    assert rollout(hybrid, small).equal(expected)
    first = recorder.recorded
    assert first >= 2  # for the comparison, and for the rollout
    assert hybrid._step is None, "a graph that knows this visit's weights outlives it"
    assert rollout(hybrid, small).equal(expected)
    assert recorder.recorded == first + 1


@pytest.mark.usefixtures("anywhere")
def test_what_no_graph_can_hold_is_decoded_by_the_forward_pass_and_said_once(
    small, monkeypatch, capsys
):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graph, "record", refuse)
    engine = small.trained("actor")
    hybrid = HybridEngine(engine, enabled=True, graphs=True)
    expected = rollout(HybridEngine(engine, enabled=False), small)
    assert all(rollout(hybrid, small).equal(expected) for _ in range(2))
    assert capsys.readouterr().out.splitlines() == [
        "warning: the CUDA graph fails (operation not permitted when stream is capturing); "
        "decoding goes through the model's forward pass"
    ]


@pytest.mark.usefixtures("anywhere")
def test_a_graph_that_gives_something_else_is_not_used(small, monkeypatch, capsys):
    def wrong(run):
        launch, result = Recorder()(run)
        return lambda: (launch(), result.mul_(1.1)), result

    monkeypatch.setattr(cuda_graph, "record", wrong)
    engine = small.trained("actor")
    rollout(HybridEngine(engine, enabled=True, graphs=True), small)
    assert "the CUDA graph does not give the model's own logits" in capsys.readouterr().out


# ------------------------------------------------------------------- for which models, and how


@pytest.mark.parametrize(("device", "window", "said"), [
    ("cpu", None, "a graph is for a GPU"),
    ("cuda", 8, "the model attends to a sliding window"),
    ("cuda", None, None),
])
def test_what_stands_in_the_way(device, window, said):
    model = SimpleNamespace(
        device=torch.device(device), config=SimpleNamespace(sliding_window=window))
    assert GraphStep.objection(model) == said


def test_recording_warms_up_beside_and_then_takes_down_one_pass(monkeypatch):
    events, streams = [], SimpleNamespace(wait_stream=lambda other: events.append("wait"))

    @contextlib.contextmanager
    def inside(name):
        events.append(f"into {name}")
        yield
        events.append(f"out of {name}")

    fake = SimpleNamespace(
        Stream=lambda: streams, current_stream=lambda: streams,
        stream=lambda stream: inside("stream"), create_graph=lambda: "graph",
        capture_to_graph=inside, replay_graph=lambda graph: events.append(f"launch {graph}"),
    )
    monkeypatch.setattr(cuda_graph, "get_accelerator", lambda: fake)
    launch, result = RECORD(lambda: events.append("pass") or len(events))
    warm_up = ["into stream", *["pass"] * cuda_graph.WARM_UP, "out of stream"]
    assert events == ["wait", *warm_up, "wait", "into graph", "pass", "out of graph"]
    assert result == events.index("into graph") + 2
    launch()
    assert events[-1] == "launch graph"


def test_without_a_gpu_one_line_says_what_decodes_instead(capsys):
    models = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"]
    asked = ["--enable_cuda_graph", "--enable_hybrid_engine"]
    assert not main.graphs(parse_step3([*models, *asked]))
    assert capsys.readouterr().out.splitlines() == [
        "--enable_cuda_graph: needs CUDA; the compiled step of a CPU is used"
    ]
    assert not main.graphs(parse_step3(models))
    assert capsys.readouterr().out == ""
