"""The run configurations for PyCharm and VS Code: what they start is there and takes the flags."""

import json
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from alpaca_rlhf.training_model import my_deepspeed
from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.configs import Step1Config, Step2Config, Step3Config

REPOSITORY = Path(__file__).resolve().parents[1]
PYCHARM = sorted(REPOSITORY.glob(".run/*.run.xml"))
CODE = json.loads((REPOSITORY / ".vscode" / "launch.json").read_text())["configurations"]
LAUNCHES = {entry["name"]: entry for entry in CODE if entry["request"] == "launch"}
RECORDS = {"step1_supervised_finetuning": Step1Config,
           "step2_reward_model_finetuning": Step2Config,
           "step3_rlhf_finetuning": Step3Config}


def pycharm(path: Path) -> tuple[str, str, list[str]]:
    """Name, script and words of a configuration."""
    [configuration] = ElementTree.parse(path).getroot().iter("configuration")
    options = {option.get("name"): option.get("value") for option in configuration.iter("option")}
    words = [word.replace("$PROJECT_DIR$", str(REPOSITORY))
             for word in shlex.split(str(options["PARAMETERS"]))]
    script = str(options["SCRIPT_NAME"]).replace("$PROJECT_DIR$", str(REPOSITORY))
    return str(configuration.get("name")), script, words


def code(name: str) -> tuple[str, list[str]]:
    """Script and words of a configuration."""
    root = ("${workspaceFolder}", str(REPOSITORY))
    entry = LAUNCHES[name]
    return entry["program"].replace(*root), [word.replace(*root) for word in entry["args"]]


def starts(script: str, words: list[str], debug: bool) -> None:
    """The bootstrap takes these words, and the step its part of them."""
    from deepspeed.launcher import runner

    assert Path(script) == REPOSITORY / "alpaca_rlhf" / "training_model" / "my_deepspeed.py"
    own, others = my_deepspeed.OwnFlags().take(words, runner.parse_args)
    assert own.debug == debug
    options = runner.parse_args(others)
    main = Path(options.user_script)
    assert main.is_file()
    assert main.is_relative_to(REPOSITORY)
    args = arguments.parse(RECORDS[main.parent.name], options.user_args)
    assert Path(str(args.run.output_dir)).is_relative_to(REPOSITORY / "output")


@pytest.mark.parametrize("path", PYCHARM, ids=lambda path: path.name)
def test_a_pycharm_configuration_starts_its_step(path):
    name, script, words = pycharm(path)
    starts(script, words, "debug" in name)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_vs_code_configuration_starts_its_step(name):
    starts(*code(name), "debug" in name)


def test_both_editors_have_the_same_six():
    assert {name: (script, words) for name, script, words in map(pycharm, PYCHARM)} == {
        name: code(name) for name in LAUNCHES}
    assert len(PYCHARM) == 6


def test_the_first_three_are_the_command_lines_of_old_scripts():
    words = {name.split()[1]: words for name, _, words in map(pycharm, PYCHARM)
             if "debug" not in name}
    for step, flags in {
        "1": "--gradient_accumulation_steps 2 --lora_dim 128 --zero_stage 0 --deepspeed",
        "2": "--num_padding_at_beginning 0 --gradient_accumulation_steps 2 --zero_stage 0 "
             "--deepspeed",
        "3": "--actor_zero_stage 0 --critic_zero_stage 0 --num_padding_at_beginning 0 "
             "--gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128 "
             "--enable_hybrid_engine --actor_gradient_checkpointing",
    }.items():
        assert flags in " ".join(words[step])


def test_attaching_uses_the_ports_that_debug_ranks_waits_on():
    attaching = [entry["connect"] for entry in CODE if entry["request"] == "attach"]
    default = my_deepspeed.OwnFlags().get_default("debug_port")
    assert attaching == [{"host": "127.0.0.1", "port": default + rank} for rank in (0, 1)]
