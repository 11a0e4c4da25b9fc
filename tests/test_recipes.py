"""The recipes in configs/ parse, fit together, and say for what hardware they are."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from programs import MAINS, REPOSITORY
from published import PUBLISHED, config_of, without_weights, write_config

from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.arguments import notices
from alpaca_rlhf.utils.configs import Step1Config, Step2Config, Step3Config
from alpaca_rlhf.utils.data import formats
from alpaca_rlhf.utils.memory.memory_plan import Place, plan

CONFIGS = REPOSITORY / "configs"
RECORDS = {1: Step1Config, 2: Step2Config, 3: Step3Config}
RUN = ("tiny", "smollm2_135m")  # on a CPU, through run_pipeline.sh, which names their folders
PLANNED_PEAK = r"Memory by the plan: ([\d.]+) GB on each device, in phase (\w+)\."
FOLDERS = {1: "--output_dir OUT/actor", 2: "--output_dir OUT/critic",
           3: "--output_dir OUT/final --actor_model_name_or_path OUT/actor "
              "--critic_model_name_or_path OUT/critic"}


@dataclass(frozen=True)
class Hardware:
    """Hardware of a recipe, as in the name of its folder."""

    text: str
    ranks: int
    memory: int  # of each device, in GB
    launcher: str


_BOOTSTRAP = "python alpaca_rlhf/training_model/my_deepspeed.py --num_gpus"
HARDWARE = {
    "24gb": Hardware("1 x 24 GB", 1, 24, f"{_BOOTSTRAP} 1"),
    "80gb": Hardware("1 x 80 GB", 1, 80, f"{_BOOTSTRAP} 1"),
    "8x80gb": Hardware("8 x 80 GB", 8, 80, f"{_BOOTSTRAP} 8"),
    "2nodes": Hardware("2 nodes of 8 x 80 GB", 16, 80, "bash scripts/multi_node/pdsh.sh HOSTFILE"),
}
RECIPES = sorted(folder.name for folder in CONFIGS.iterdir())
PLANNED = [name for name in RECIPES if name not in RUN]


def hardware(recipe: str) -> Hardware:
    return HARDWARE[recipe.rpartition("_")[2]]


def parse(recipe: str, step: int, *words: str) -> Any:
    """The arguments of a step, as its file gives them."""
    given = FOLDERS[step].split() if recipe in RUN else []
    return arguments.parse(
        RECORDS[step], [*given, *words, "--config", str(CONFIGS / recipe / f"step{step}.yaml")])


def without_weights_of(recipe: str, folder: Path) -> dict[int, Any]:
    """The arguments of a recipe's steps, with folders of configurations in place of its models.

    Those for step 3 hold what steps 1 and 2 leave, the configuration of an adapter included.
    """
    steps = {step: parse(recipe, step) for step in (1, 2)}
    models = {step: args.model.model_name_or_path for step, args in steps.items()}
    bases = {step: write_config(name, folder / f"base{step}") for step, name in models.items()}
    left = {step: write_config(name, folder / f"step{step}", scores=step == 2)
            for step, name in models.items()}
    for step, args in steps.items():
        if args.model.lora_dim:
            adapter = Path(left[step]) / "adapter"
            adapter.mkdir()
            (adapter / "adapter_config.json").write_text(json.dumps({
                "peft_type": "LORA", "r": args.model.lora_dim,
                "lora_alpha": args.lora.lora_alpha or 2 * args.model.lora_dim,
                "base_model_name_or_path": bases[step],
                "modules_to_save": ["score"] if step == 2 else None}))
    return {
        **{step: parse(recipe, step, "--model_name_or_path", bases[step]) for step in (1, 2)},
        3: parse(recipe, 3, "--actor_model_name_or_path", left[1],
                 "--critic_model_name_or_path", left[2]),
    }


# --- what the files say --------------------------------------------------------------------------


def test_the_recipes_are_those_of_the_models_and_hardware_that_people_have():
    assert {name.rpartition("_")[0] for name in PLANNED} == {
        "llama_7b", "llama3.1_8b", "qwen3_0.6b", "qwen3_1.7b", "qwen3_8b", "tinyllama_1.1b",
        "smollm2_360m", "smollm2_1.7b", "opt_1.3b"}
    assert {name.rpartition("_")[2] for name in PLANNED} == set(HARDWARE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_three_files_that_parse_and_none_of_their_options_is_idle(recipe):
    assert sorted(path.name for path in (CONFIGS / recipe).iterdir()) == [
        "step1.yaml", "step2.yaml", "step3.yaml"]
    for step in RECORDS:
        assert notices(parse(recipe, step)) == []


@pytest.mark.parametrize("step", RECORDS)
@pytest.mark.parametrize("recipe", PLANNED)
def test_the_header_has_hardware_memory_and_command_and_says_that_no_one_has_run_it(recipe, step):
    text = (CONFIGS / recipe / f"step{step}.yaml").read_text()
    header = [line.removeprefix("#").strip()
              for line in re.match(r"(#.*\n)+", text).group().splitlines()]  # type: ignore
    target = hardware(recipe)
    assert re.fullmatch(rf"[\w.,\- ]+, step {step} \([\w \-]+\) on {target.text}\. "
                        r"No one has run it yet\.", header[0])
    assert re.fullmatch(PLANNED_PEAK, header[-4])
    command = " ".join(header[-3:]).replace(" \\", "")
    assert command == (f"{target.launcher} {MAINS[step].relative_to(REPOSITORY)} "
                       f"--config configs/{recipe}/step{step}.yaml")
    assert max(map(len, text.splitlines())) <= 100


def test_the_readme_lists_every_recipe():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| | 1 × 24 GB |"))
    listed = set()
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        models, *cells = line.strip("|").split("|")
        listed |= {f"{model}_{target}" for model in re.findall(r"`([^`]+)`", models)
                   for target, cell in zip(HARDWARE, cells, strict=True) if cell.strip()}
    assert listed == set(PLANNED)


# --- whether the steps fit together --------------------------------------------------------------


@pytest.mark.parametrize("recipe", PLANNED)
def test_each_step_reads_what_the_steps_before_it_write(recipe):
    first, second, third = (parse(recipe, step) for step in RECORDS)
    places = [args.run.output_dir for args in (first, second, third)]
    assert places == [f"output/{recipe}/{name}" for name in ("actor", "critic", "final")]
    assert [role.model_name_or_path for role in (third.actor, third.critic)] == places[:2]
    lengths = third.rollout.max_prompt_seq_len + third.sampling.max_new_tokens
    assert lengths == first.batches.max_seq_len == second.batches.max_seq_len
    assert len({args.data.data_split for args in (first, second, third)}) == 1
    assert len({args.loading.dtype for args in (first, second, third)}) == 1


@pytest.mark.parametrize("recipe", PLANNED)
def test_what_shares_a_base_or_quantizes_it_does_so_in_all_steps_with_the_same_ranks(recipe):
    first, second, third = (parse(recipe, step) for step in RECORDS)
    ranks = [first.model.lora_dim, second.model.lora_dim]
    if third.roles.share_backbone:
        assert first.model.model_name_or_path == second.model.model_name_or_path
        assert [third.actor.lora_dim, third.critic.lora_dim] == ranks and min(ranks) > 0
    quantized = {args.lora.load_in_4bit for args in (first, second, third)}
    assert quantized == {recipe.endswith(("8b_24gb", "llama_7b_24gb"))}
    stages = {first.model.zero_stage, second.model.zero_stage, third.actor.zero_stage,
              third.critic.zero_stage}
    assert stages == ({3} if ranks == [0, 0] and "8b" in recipe else {2})


@pytest.mark.parametrize("recipe", PLANNED)
def test_optimizer_steps_have_all_their_micro_batches_and_as_many_rows_as_usual(recipe):
    ranks = hardware(recipe).ranks
    for step in (1, 2):
        args = parse(recipe, step)
        rows = args.batches.per_device_train_batch_size * args.schedule.gradient_accumulation_steps
        assert rows * ranks in (64, 128)
    args = parse(recipe, 3)
    rollouts = args.rollout.per_device_generation_batch_size * args.rollout.generation_batches
    micro_batch = args.ppo.per_device_training_batch_size
    rows = micro_batch * args.schedule.gradient_accumulation_steps
    assert rollouts % rows == 0 and rollouts // rows in (1, 2)
    assert rollouts * ranks in (64, 128, 256)


@pytest.mark.parametrize("recipe", PLANNED)
def test_models_are_known_to_the_tests_and_data_sets_to_the_program(recipe):
    for step in RECORDS:
        args = parse(recipe, step)
        paths = [*args.data.data_path, *(args.sft.sft_only_data_path if step == 1 else [])]
        assert paths and {path.partition("=")[0] for path in paths} <= set(formats.names())
        if step < 3:
            assert args.model.model_name_or_path in PUBLISHED
            limit = config_of(args.model.model_name_or_path).max_position_embeddings
            assert args.batches.max_seq_len <= limit


# --- without weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_its_configuration_builds(name, tmp_path):
    model = without_weights(write_config(name, tmp_path))
    assert model.num_parameters() == PUBLISHED[name].parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


@pytest.mark.parametrize("recipe", PLANNED)
def test_a_recipe_s_models_can_be_configurations_alone(recipe, tmp_path):
    steps = without_weights_of(recipe, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    for step, role in ((1, steps[3].actor), (2, steps[3].critic)):
        base = PUBLISHED[parse(recipe, step).model.model_name_or_path].parameters
        assert without_weights(steps[step].model.model_name_or_path).num_parameters() == base
        model = without_weights(role.model_name_or_path)
        assert type(model).__name__.endswith(
            "ForCausalLM" if step == 1 else "ForSequenceClassification")
        assert (Path(role.model_name_or_path) / "adapter").exists() == bool(
            steps[step].model.lora_dim)


QUICK = ("smollm2_360m_24gb",)  # the others take some seconds a step


@pytest.mark.parametrize("recipe", [
    recipe if recipe in QUICK else pytest.param(recipe, marks=pytest.mark.slow)
    for recipe in PLANNED])
def test_the_plan_of_each_step_is_that_of_its_header_and_leaves_a_tenth_of_the_device(
    recipe, tmp_path
):
    target = hardware(recipe)
    for step, args in without_weights_of(recipe, tmp_path).items():
        found = plan(args, Place(ranks=target.ranks, cpu=False))
        assert found.peak < 0.9 * target.memory * 1e9, found.worst.device
        stated = re.search(PLANNED_PEAK, (CONFIGS / recipe / f"step{step}.yaml").read_text())
        assert stated.groups() == (f"{found.peak / 1e9:.1f}", found.worst.name)
