"""The model families that people bring: special tokens, architectures, LoRA, all three steps."""

import json
from pathlib import Path

import pytest
import torch
from conftest import fill_adapters
from families import FAMILIES, LLAMA, byte_tokenizer, save
from golden_curves import run, step1, step2, step3
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from alpaca_rlhf.utils import preflight
from alpaca_rlhf.utils.configs import AdapterConfig, EngineConfig, LoadingConfig, RoleConfig
from alpaca_rlhf.utils.data.chat_template import jinja
from alpaca_rlhf.utils.data.encode import (
    FILTERED_OUT,
    Lengths,
    encode_pairs,
    encode_prompts,
    encode_sft,
)
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, load_tokenizer
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.memory import memory_plan
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
from alpaca_rlhf.utils.model.reward_model import load_reward_model
from alpaca_rlhf.utils.model.weights import whole
from alpaca_rlhf.utils.preflight import Planned

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
WHOLE = {"zero_optimization": {"stage": 0}}
LONG = Lengths(10**4, 10**4, "truncate", "--max_seq_len 20000")
ORDINARY = ("gpt2", "opt350m", "qwen3")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def role_of(path, **options):
    return RoleConfig(model_name_or_path=str(path), **options)


def planned(path, scores=False, **options):
    kept = {name: options.pop(name) for name in ("lora_dim", "zero_stage", "lora_module_name")
            if name in options}
    adapters = AdapterConfig(
        only_optimize_lora=True, lora_dropout=options.pop("lora_dropout", 0.0))
    return Planned(role_of(path, **kept), LoadingConfig(dtype="fp32"), adapters, EngineConfig(),
                   scores=scores, **options)


def load(path, scores=False, tokenizer=None):
    load_one = load_reward_model if scores else load_causal_lm
    return load_one(role_of(path), LoadingConfig(dtype="fp32"), WHOLE,
                    tokenizer or load_tokenizer(str(path))).eval()


def saved_config(folder, kind, **values):
    """A folder with nothing but a model's configuration."""
    AutoConfig.for_model(kind, **values).save_pretrained(folder)
    return str(folder)


def refusal(*models):
    with pytest.raises(UserError) as refused:
        preflight.check(list(models))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- special tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "eos", "pad", "said"), [
    ("opt", ("</s>", 2), ("<pad>", 1), ""),
    ("gpt2", ("<|endoftext|>", 256), ("<pad>", 257), "a new token"),
    ("pythia", ("<|endoftext|>", 0), ("<|padding|>", 1), "pad is '<|padding|>' from here on\n"),
    ("smollm2", ("<|endoftext|>", 0), ("<pad>", 259), "a new token"),
    ("llama2", ("</s>", 2), ("<unk>", 0), "pad is '<unk>' from here on\n"),
    ("llama3", ("<|end_of_text|>", 257), ("<pad>", 266), "a new token"),
    ("qwen2", ("<|endoftext|>", 256), ("<pad>", 259), "a new token"),
    ("gemma2", ("<eos>", 1), ("<pad>", 0), ""),
    ("smollm3", ("<|im_end|>", 268), ("<pad>", 269), "a new token"),
])
def test_special_tokens_are_told_by_text_and_id_and_what_changes_is_said(
    tmp_path, capsys, name, eos, pad, said
):
    byte_tokenizer(FAMILIES[name]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == eos
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == pad
    printed = capsys.readouterr().out
    assert printed.endswith(said + ("" if said.endswith("\n") else "\n") if said else "")


def test_a_token_without_text_gets_the_usual_one_where_the_vocabulary_has_it(tmp_path, capsys):
    byte_tokenizer(FAMILIES["llama2"]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "eos_token": "", "bos_token": "", "unk_token": ""}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert "eos_token is empty in its config; eos is '</s>'" in capsys.readouterr().out


def test_an_eos_that_the_vocabulary_lacks_is_none_though_it_has_the_id_of_unk():
    from tiny_model import word_tokenizer

    from alpaca_rlhf.utils.data.tokenizer import _is_real

    tokenizer = word_tokenizer("hi")
    assert _is_real(tokenizer, "eos")
    tokenizer.convert_ids_to_tokens = lambda number: "<unk>"
    assert not _is_real(tokenizer, "eos")


def test_markup_that_a_user_added_stays_in_the_text_and_control_tokens_do_not():
    tokenizer = byte_tokenizer(FAMILIES["qwen3"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    tokenizer.add_tokens(["<note>"])
    chat = ChatFormat(tokenizer)
    ids = chat.response_ids("<tool>1<|im_start|></tool><note>")
    assert ids[0] == tokenizer.convert_tokens_to_ids("<tool>")
    assert chat.decode(ids) == "<tool>1</tool><note>"


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2"])
def test_a_response_of_nothing_but_eos_is_empty(name):
    family = FAMILIES[name]
    tokenizer = byte_tokenizer(family)
    tokenizer.chat_template = jinja("human_assistant", adds_bos=False)
    chat = ChatFormat(tokenizer)
    assert chat.decode([chat.eos_id]) == ""
    assert chat.is_empty(f" {tokenizer.eos_token}{tokenizer.eos_token} ")
    (row,) = encode_sft([Sample((user("hi"),), tokenizer.eos_token)], chat, LONG)
    assert row[FILTERED_OUT] == "empty response"


def test_other_ids_that_end_a_response_are_no_part_of_it():
    tokenizer = byte_tokenizer(FAMILIES["gemma2"])
    tokenizer.chat_template = jinja("human_assistant", adds_bos=False)
    chat = ChatFormat(tokenizer)
    ids = [*chat.response_ids("Yes.")[:-1], 107]
    assert chat.decode(ids) == "Yes.<end_of_turn>"
    chat.hide([1, 107])
    assert chat.decode(ids) == "Yes."


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_prompt_that_is_cut_keeps_bos_and_the_systems_text(system):
    tokenizer = byte_tokenizer(FAMILIES["llama2"])
    tokenizer.chat_template = jinja("human_assistant", adds_bos=True)
    chat = ChatFormat(tokenizer)
    messages = [user("Is this " + "very " * 40 + "long?")]
    messages = [{"role": "system", "content": system}] * bool(system) + messages
    (row,) = encode_prompts([Sample(tuple(messages), "")], chat, Lengths.of_prompt(40, "truncate"))
    text = tokenizer.decode(row["prompt_ids"])
    assert len(row["prompt_ids"]) == 40
    assert text.startswith("<s>" + system)
    assert text.endswith("long?\n\nAssistant:")
    sample = Sample(tuple(messages), "Yes.")
    (row,) = encode_sft([sample], chat, Lengths.of_sequence(60, "truncate"), train_on_prompt=True)
    assert row["labels"] == row["input_ids"]
    assert tokenizer.decode(row["input_ids"]).startswith("<s>" + system)


def test_a_systems_text_that_is_too_long_leaves_half_of_the_prompt_to_its_end():
    assert Lengths.of_prompt(6, "truncate").fit(list(range(20)), head=15)[0] == [
        0, 1, 2, 17, 18, 19]


@pytest.mark.parametrize("scores", [False, True])
def test_the_embeddings_get_the_same_rows_in_every_copy_before_pad_is_configured(tmp_path, scores):
    path = save(FAMILIES["llama3"], tmp_path / "base")
    first, second = load(path, scores), load(path, scores)
    assert first.get_input_embeddings().num_embeddings == first.config.vocab_size == 267
    assert not scores or first.config.pad_token_id == 266
    assert first.get_input_embeddings().weight.equal(second.get_input_embeddings().weight)


@pytest.mark.parametrize("pad", [-1, 4000])
def test_a_pad_id_outside_the_embeddings_is_left_out(tmp_path, pad):
    path = save(FAMILIES["llama2"], tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": pad}))
    preflight.check([planned(path, scores=True)])
    assert load(path, scores=True).config.pad_token_id == 0


# --- architectures -------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 64}


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize(("kind", "sizes"), [
    ("bert", TINY), ("roberta", TINY), ("electra", TINY), ("deberta-v2", TINY),
    ("t5", {"d_model": 16, "num_layers": 1}), ("bart", {"d_model": 16}),
])
def test_encoders_are_refused_in_every_step(tmp_path, kind, sizes, scores):
    path = saved_config(tmp_path, kind, **sizes)
    assert refusal(planned(path, scores)) == (
        f"{path}: {kind} is an encoder, not a causal decoder, which predicts the next token; give "
        "a model such as LLaMA or Qwen")


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_model_whose_text_part_is_no_causal_lm_is_refused(tmp_path, kind):
    path = saved_config(tmp_path, kind)
    assert refusal(planned(path)) == (
        f"{path}: {kind} is a multimodal model, with parts for vision or audio, whose text part is "
        "no causal LM by itself; give a model of text alone")


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MULTIMODAL = {
    "gemma3": ("gemma3_text", "siglip_vision_model", True, {"mm_tokens_per_image": 1}),
    "llava": ("llama", "clip_vision_model", False, {}),
    "mistral3": ("mistral", "pixtral", True, {}),
}


def multimodal(kind, folder, **changes):
    """Write a stand-in of a model with a vision part; returns it and its path."""
    text, vision, tied, more = MULTIMODAL[kind]
    tokenizer = byte_tokenizer(FAMILIES["gemma3"])
    tokenizer.save_pretrained(folder)
    rows = 1 + max(tokenizer.get_vocab().values())
    torch.manual_seed(0)
    sizes = {**LLAMA, "head_dim": 8, "vocab_size": rows, "initializer_range": 0.2}
    config = AutoConfig.for_model(
        kind, text_config={"model_type": text, **sizes, **changes}, tie_word_embeddings=tied,
        vision_config={"model_type": vision, **VISION}, **more)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    return model, str(folder)


@pytest.mark.parametrize("kind", list(MULTIMODAL))
def test_of_a_multimodal_model_the_text_part_is_taken(tmp_path, capsys, kind):
    whole, path = multimodal(kind, tmp_path)
    preflight.check([planned(path, lora_dim=2), planned(path, scores=True)])
    part, ids = load(path), torch.arange(3, 27).view(2, 12)
    assert type(part).__name__.endswith("ForCausalLM")
    with torch.no_grad():
        assert_close(part(ids).logits, whole(input_ids=ids).logits)
    scorer = load(path, scores=True)
    assert scorer.get_input_embeddings().weight.equal(whole.get_input_embeddings().weight)
    said = f"{path}: of a multimodal model the text part ({MULTIMODAL[kind][0]}) is taken\n"
    assert said in capsys.readouterr().out


def test_a_multimodal_model_without_the_weights_of_its_text_part_is_refused(tmp_path):
    _, path = multimodal("llava", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="layers.2.input_layernorm.weight is missing"):
        load(path)


def test_a_family_without_a_classifier_is_refused_as_a_reward_model(tmp_path):
    path = saved_config(tmp_path, "cohere", **TINY)
    assert refusal(planned(path, scores=True)).startswith(
        f"{path}: cohere cannot be built as a reward model (Unrecognized configuration class")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_are_refused_where_they_end_too_early(tmp_path, name):
    path = save(FAMILIES[name], tmp_path)
    preflight.check([planned(path, length=512)])
    assert refusal(planned(path, length=513, length_flags="--max_seq_len 513")) == (
        f"--max_seq_len 513: {path} has 512 positions, and a sequence may have 513 tokens; give "
        "at most 512")


def test_rotary_positions_have_no_end(tmp_path):
    preflight.check([planned(save(FAMILIES["qwen2"], tmp_path), length=600)])


def test_prompt_and_response_together_count_in_step_3(monkeypatch):
    from alpaca_rlhf.utils import arguments
    from alpaca_rlhf.utils.configs import Step3Config

    args = arguments.parse(Step3Config, [
        "--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c",
        "--max_prompt_seq_len", "300", "--max_answer_seq_len", "213"])
    for model in preflight.planned(args):
        assert (model.length, model.decodes) == (513, True)
        assert model.length_flags == "--max_prompt_seq_len 300 and --max_answer_seq_len 213"


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_eager_attention_is_taken_where_there_is_no_sdpa_and_said_once(tmp_path, capsys, name):
    path = save(FAMILIES[name], tmp_path)
    capsys.readouterr()
    preflight.check([planned(path), planned(path, scores=True)])
    said = "gemma2 has no SDPA; --attn_implementation eager is taken\n"
    assert capsys.readouterr().out == (said if name == "gemma2" else "")
    assert load(path).config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")


@pytest.mark.parametrize(("kind", "sizes"), [
    ("mamba", {"hidden_size": 16, "num_hidden_layers": 1}),
    ("qwen3_next", {"layer_types": ["linear_attention"], **TINY, "num_experts": 2}),
    ("lfm2", {"layer_types": ["conv"], **TINY}),
])
def test_the_hybrid_engine_refuses_recurrent_layers(tmp_path, kind, sizes):
    path = saved_config(tmp_path, kind, **sizes)
    assert refusal(planned(path, decodes=True)) == (
        f"{path}: {kind} has recurrent layers, and rows of different lengths are decoded with a KV "
        "cache; give a model with attention in every layer")


# --- LoRA ----------------------------------------------------------------------------------------

MOE = {"vocab_size": 80, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
       "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4,
       "num_experts_per_tok": 2, "initializer_range": 0.2, "max_position_embeddings": 64}
EXPERTS = {
    "mixtral": MOE, "gpt_oss": {**MOE, "layer_types": ["full_attention"]},
    "qwen3_moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 24},
}


def expert_model(kind):
    torch.manual_seed(0)
    made = AutoConfig.for_model(kind, **EXPERTS[kind])
    return AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()


def adapted(model):
    role, adapters = RoleConfig(lora_dim=2), AdapterConfig(only_optimize_lora=True)
    targets = lora.match_modules(model, role)
    lora.require_coverage(model, targets, role, adapters)
    return fill_adapters(lora.add_lora(model, targets, role, adapters)).eval()


@torch.no_grad()
def check_merged(made, plain):
    """Folded and merged weights give the adapter's logits, and folding is undone."""
    ids = torch.arange(24).view(2, 12)
    expected, base = made(ids).logits, plain(ids).logits
    before = whole.gathered_state_dict(made, on_this_rank=True)
    with lora.folded(made):
        assert_close(made(ids).logits, expected, rtol=1e-4, atol=1e-4)
    after = whole.gathered_state_dict(made, on_this_rank=True)
    assert all(after[name].equal(before[name]) for name in before)
    plain.load_state_dict(whole.merged_state_dict(made, on_this_rank=True)[0], strict=False)
    assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 0.05


@pytest.mark.parametrize("name", ["gpt2", "phi3", "falcon", "pythia"])
def test_a_merged_export_of_transposed_and_fused_projections_gives_the_adapters_logits(
    tmp_path, name
):
    path = save(FAMILIES[name], tmp_path)
    check_merged(adapted(load(path)), load(path))


@pytest.mark.parametrize("kind", list(EXPERTS))
def test_experts_are_adapted_and_their_merged_export_gives_the_adapters_logits(kind):
    made = adapted(expert_model(kind))
    trained = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert sum("experts" in name for name in trained) == 4  # A and B of two weights
    check_merged(made, expert_model(kind))


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"zero_stage": 3}])
def test_options_that_experts_do_not_go_with_are_refused(tmp_path, option):
    path = saved_config(tmp_path, "mixtral", **MOE)
    (flag, value), = option.items()
    assert refusal(planned(path, lora_dim=2, **option)) == (
        f"--{flag} {value}: adapters on weights such as model.layers.0.mlp.experts.gate_up_proj "
        "do not work with it; leave it out, or name other layers by --lora_module_name")


def test_adapters_that_would_leave_the_larger_part_frozen_are_refused_with_what_it_is(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing = torch.nn.Parameter(torch.zeros(400, 400))

    model = load(save(FAMILIES["qwen2"], tmp_path))
    model.model.layers[0].odd = Odd()
    role, adapters = RoleConfig(lora_dim=2), AdapterConfig(only_optimize_lora=True)
    with pytest.raises(UserError) as refused:
        lora.require_coverage(model, lora.match_modules(model, role), role, adapters)
    assert str(refused.value) == (
        "--lora_dim: adapters would leave the larger part frozen: they cover 15,360 parameters, "
        "and not odd.mixing (160,000); train without LoRA, or name what to adapt by "
        "--lora_module_name")


def test_the_parameters_counted_for_experts_are_those_that_peft_makes(tmp_path):
    path = saved_config(tmp_path, "mixtral", **MOE)
    made = adapted(expert_model("mixtral"))
    weights = [(w.numel(), w.requires_grad) for w in made.parameters()]
    total, trained = sum(n for n, _ in weights), sum(n for n, train in weights if train)
    found = memory_plan.sizes(planned(path, lora_dim=2))
    assert (found.base + found.adapter, found.trained) == (total, trained)


# --- templates -----------------------------------------------------------------------------------

# As Qwen3's: the last response has a thinking block, earlier ones have lost theirs.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}{% else %}"
    "{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3-Thinking's: its generation prompt opens the thinking block.
THINKING = QWEN3.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
# As DeepSeek-R1's distilled models: so does theirs, and no rendered response has one.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% else %}"
    "{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
)
# As Llama 3.1's: a date before the system's text.
DATED = (
    "{{ bos_token }}{% set date = strftime_now('%d %b %Y') if strftime_now is defined else '1' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THOUGHT = "<think>\nIt is so.\n</think>\n\nYes."
DIALOGUES = [
    [user("Hi.")],
    [user("Hi."), assistant("Oh."), user("So?")],
    [user("Hi."), assistant(THOUGHT), user("So?"), assistant("Hm. Oh."), user("And?")],
]


@pytest.mark.parametrize("answer", ["Yes.", THOUGHT, "<think>\n\n</think>\n\nNo", " two\n\nlines "])
@pytest.mark.parametrize(("name", "template"), [
    ("qwen3", QWEN3), ("qwen3", THINKING), ("llama3", DATED), ("gemma2", None), ("gemma3", None),
    ("phi3", None)])
def test_a_template_that_depends_on_where_a_turn_stands_gives_its_own_ids(
    tmp_path, name, template, answer
):
    tokenizer = byte_tokenizer(FAMILIES[name])
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    chat = ChatFormat(load_tokenizer(str(tmp_path), "tokenizer"))
    for messages in DIALOGUES:
        prompt = chat.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False)
        whole = chat.tokenizer.apply_chat_template(
            [*messages, assistant(answer.rstrip())], return_dict=False)
        (sft,) = encode_sft([Sample(tuple(messages), answer)], chat, LONG)
        (pair,) = encode_pairs([Sample(tuple(messages), answer, "Never.")], chat, LONG)
        (row,) = encode_prompts([Sample(tuple(messages), answer)], chat, LONG)
        assert row["prompt_ids"] == prompt == whole[: len(prompt)]
        ids = sft["input_ids"]
        assert ids == pair["chosen_ids"] == whole[: len(ids)]
        assert chat.tokenizer.decode(whole[len(ids) :]) in ("", "\n")
        responses = 1 + sum(m["role"] == "assistant" for m in messages)
        assert sum(label == chat.eos_id for label in sft["labels"]) == responses


def test_a_template_that_opens_a_thinking_block_which_no_response_has_is_refused(tmp_path):
    tokenizer = byte_tokenizer(FAMILIES["qwen3"])
    tokenizer.chat_template = R1
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        ChatFormat(load_tokenizer(str(tmp_path), "tokenizer"))
    assert str(refused.value) == (
        "--chat_template tokenizer: the template's generation prompt is not the text that precedes "
        "a response; choose human_assistant")


# --- all three steps -----------------------------------------------------------------------------


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({
        "prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}) + "\n"
        for i in range(60)))
    return path


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.slow) for name in FAMILIES])
def test_a_family_goes_through_all_three_steps_with_lora(name, tmp_path, group):
    base = save(FAMILIES[name], tmp_path / "base")
    three_steps(base, ["--chat_template", "tokenizer"] if FAMILIES[name].template else [], tmp_path)


def test_a_multimodal_model_goes_through_all_three_steps_with_lora(tmp_path, group):
    _, base = multimodal("gemma3", tmp_path / "base")
    three_steps(base, ["--zero_stage", 3], tmp_path)
    config = json.loads((tmp_path / "ppo" / "actor" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]


def three_steps(base, own, tmp_path):
    """Run a model through all three steps, and load what they export."""
    shared = ["--data_path", rows(tmp_path), "--data_output_path", tmp_path / "cache",
              "--data_split", "1,1,1"]
    supervised = ["--model_name_or_path", base, *own, "--lora_dim", 2, "--max_steps", 2,
                  "--per_device_train_batch_size", 4, "--max_seq_len", 128]
    run(step1, tmp_path / "sft", *supervised, *shared)
    run(step2, tmp_path / "reward", *supervised, *shared)
    metrics = run(
        step3, tmp_path / "ppo", "--actor_model_name_or_path", tmp_path / "sft",
        "--critic_model_name_or_path", tmp_path / "reward", "--actor_lora_dim", 2,
        "--critic_lora_dim", 2, "--enable_hybrid_engine", "--max_steps", 4,
        "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 2,
        "--max_prompt_seq_len", 96, "--max_answer_seq_len", 6, "--eval_prompts", 2, *shared)
    assert len(metrics) == 2
    assert abs(metrics[0]["kl/k1"]) < 1e-4
    assert metrics[0]["rollout/decoding_difference_max"] < 1e-3
    for folder, auto in ((tmp_path / "ppo" / "actor", AutoModelForCausalLM),
                         (tmp_path / "ppo" / "critic", AutoModelForSequenceClassification)):
        _, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))


# --- the table of docs/models.md -----------------------------------------------------------------


def table(folder: Path) -> str:
    """The families of the tests as a table: what their tokenizers lack and what LoRA adapts."""
    lines = ["| family | type | attention | positions | pad | LoRA adapts |",
             "| --- | --- | --- | --- | --- | --- |"]
    for name, family in FAMILIES.items():
        path = save(family, folder / name)
        before = byte_tokenizer(family)
        after = load_tokenizer(path)
        model = load(path, tokenizer=after)
        targets = lora.match_modules(model, RoleConfig(lora_dim=2))
        kinds = ", ".join(sorted({target.rsplit(".", 1)[-1] for target in targets}))
        added = "a new `<pad>`" if len(after) > len(before) else f"`{after.pad_token}`"
        added = added.replace("|", "\\|")
        learned = not getattr(model.config, "rope_parameters", None)
        lines.append(f"| {family.title} | `{family.kind}` | {model.config._attn_implementation} | "
                     f"{'learned' if learned else 'rotary'} | {added} | {kinds} |")
    return "\n".join(lines)


def test_the_table_of_families_is_that_of_the_documentation(tmp_path):
    assert table(tmp_path) in DOCUMENT.read_text()
