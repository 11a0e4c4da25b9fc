"""Run configurations of PyCharm and VS Code: the steps that they start accept their flags."""

import json
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from programs import REPOSITORY

from alpaca_rlhf.training_model import my_deepspeed
from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.configs import Step1Config, Step2Config, Step3Config

ENTRIES = json.loads((REPOSITORY / ".vscode" / "launch.json").read_text())["configurations"]
RECORDS = {"step1_supervised_finetuning": Step1Config,
           "step2_reward_model_finetuning": Step2Config,
           "step3_rlhf_finetuning": Step3Config}


def pycharm(path: Path) -> tuple[str, str, list[str]]:
    """Name, script and arguments of a configuration."""
    [configuration] = ElementTree.parse(path).getroot().iter("configuration")
    options = {option.get("name"): str(option.get("value"))
               for option in configuration.iter("option")}
    parts = [options["SCRIPT_NAME"], *shlex.split(options["PARAMETERS"])]
    script, *words = [part.replace("$PROJECT_DIR$", str(REPOSITORY)) for part in parts]
    return str(configuration.get("name")), script, words


def vs_code(entry: dict) -> tuple[str, str, list[str]]:
    """Name, script and arguments of a configuration."""
    script, *words = [part.replace("${workspaceFolder}", str(REPOSITORY))
                      for part in (entry["program"], *entry["args"])]
    return entry["name"], script, words


PYCHARM = [pycharm(path) for path in sorted(REPOSITORY.glob(".run/*.run.xml"))]
VS_CODE = [vs_code(entry) for entry in ENTRIES if entry["request"] == "launch"]


@pytest.mark.parametrize(("name", "script", "words"), PYCHARM, ids=[name for name, *_ in PYCHARM])
def test_a_configuration_starts_its_step(name, script, words):
    from deepspeed.launcher import runner

    assert Path(script) == REPOSITORY / "alpaca_rlhf" / "training_model" / "my_deepspeed.py"
    own, others = my_deepspeed.OwnFlags().take(words, runner.parse_args)
    assert own.debug == ("debug" in name)
    options = runner.parse_args(others)
    main = Path(options.user_script)
    assert main.is_file()
    assert main.is_relative_to(REPOSITORY)
    args = arguments.parse(RECORDS[main.parent.name], options.user_args)
    assert Path(str(args.run.output_dir)).is_relative_to(REPOSITORY / "output")


def test_both_editors_have_the_same_six():
    assert sorted(PYCHARM) == sorted(VS_CODE)
    assert len(PYCHARM) == 6


def test_the_first_three_are_the_command_lines_of_old_scripts():
    words = {name.split()[1]: words for name, _, words in PYCHARM if "debug" not in name}
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
    attaching = [entry["connect"] for entry in ENTRIES if entry["request"] == "attach"]
    default = my_deepspeed.OwnFlags().get_default("debug_port")
    assert attaching == [{"host": "127.0.0.1", "port": default + rank} for rank in (0, 1)]
