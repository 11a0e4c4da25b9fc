"""`run_pipeline.sh`: what it runs, reuses and stops at, with steps that only pretend to train."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import REPOSITORY

STEPS = {"actor": "step1_supervised_finetuning", "critic": "step2_reward_model_finetuning",
         "final": "step3_rlhf_finetuning"}

# Stands in for a step: notes its flags, and writes the two files that a finished step leaves.
STEP = """
import json, pathlib, sys
words = sys.argv[1:]
with open(LOG, "a") as log:
    log.write(NAME + " " + " ".join(words) + chr(10))
output = pathlib.Path(words[words.index("--output_dir") + 1])
config = pathlib.Path(words[words.index("--config") + 1]).read_text()
if "exit" in config:
    sys.exit(int(config.split("exit: ")[1]))
if output.exists() and "--overwrite_output_dir" not in words:
    sys.exit(2)
output.mkdir(parents=True, exist_ok=True)
for name in ("training_arguments.json", "results.json")[: 1 if "torn" in config else 2]:
    (output / name).write_text(json.dumps(config))
"""

# Stands in for the launcher and for the table at the end.
LAUNCHER = """
import runpy, sys
if sys.argv[1] == "--num_gpus":
    with open(LOG, "a") as log:
        log.write("launcher --num_gpus " + sys.argv[2] + chr(10))
    del sys.argv[1:3]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
REPORT = """
import sys
print("table of " + sys.argv[1])
"""


class Tree:
    """A copy of the scripts around steps that only pretend, in a folder with a space in its name.

    Its environment is the one that runs the tests: the script that would prepare one is a stand-in
    too, so nothing is installed.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "the tree"
        self.log = folder / "log"
        self.log.touch()
        self.output = folder / "all output"
        scripts, package = self.root / "scripts", self.root / "alpaca_rlhf"
        scripts.mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "run_pipeline.sh", scripts)
        (scripts / "environment.sh").write_text(
            f'prepare_environment() {{ echo "prepared $*" >> "{self.log}"; }}\n')
        training = package / "training_model"
        for name, step in STEPS.items():
            self.write(training / step / "main.py", f"NAME = {name!r}" + STEP)
        self.write(training / "my_deepspeed.py", LAUNCHER)
        self.write(package / "__init__.py", "")
        self.write(package / "evaluation/report.py", REPORT)
        for number in (1, 2, 3):
            self.write_config(number, f"seed: {number}\n")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"LOG = {str(self.log)!r}\n{text}")

    def write_config(self, number: int, text: str) -> None:
        path = self.root / "configs" / "my tiny" / f"step{number}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the pipeline; afterwards the log holds this run only."""
        self.log.write_text("")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", str(self.root / "scripts" / "run_pipeline.sh"), "--config-dir",
             str(self.root / "configs" / "my tiny"), "--output-dir", str(self.output), *words],
            cwd=self.root, env={**os.environ, "PATH": path, "PYTHONPATH": str(self.root)},
            text=True, capture_output=True, timeout=60,
        )
        assert done.returncode == code, done
        return done

    def started(self) -> list[str]:
        """Return the steps that the last run has started."""
        lines = self.log.read_text().splitlines()
        return [line.split()[0] for line in lines if line.split()[0] in STEPS]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


ALL = ["actor", "critic", "final"]


def test_the_environment_the_three_steps_and_a_table_in_this_order(tree):
    done = tree.run()
    assert tree.log.read_text().splitlines()[0] == "prepared requirements.txt"
    assert tree.started() == ALL
    assert [line for line in done.stdout.splitlines() if not line.startswith("== step")] == [
        f"table of {tree.output}"]
    assert done.stderr == ""
    for name in ALL:
        assert (tree.output / name / "results.json").is_file()


def test_each_step_gets_its_config_its_output_and_the_flags_of_all(tree):
    tree.run("--", "--seed", "7", "--data_path", "a b.json")
    configs = tree.root / "configs" / "my tiny"
    output = tree.output
    models = (f"--actor_model_name_or_path {output}/actor "
              f"--critic_model_name_or_path {output}/critic ")
    extra = "--seed 7 --data_path a b.json"
    assert tree.log.read_text().splitlines()[1:] == [
        f"actor --config {configs}/step1.yaml --output_dir {output}/actor {extra}",
        f"critic --config {configs}/step2.yaml --output_dir {output}/critic {extra}",
        f"final --config {configs}/step3.yaml --output_dir {output}/final {models}{extra}",
    ]


def test_the_number_of_ranks_goes_to_the_launcher(tree):
    tree.run("--num_gpus", "2")
    assert tree.log.read_text().count("launcher --num_gpus 2\n") == 3


def raise_format(tree: Tree) -> None:
    script = tree.root / "scripts" / "run_pipeline.sh"
    text = script.read_text()
    assert "\nformat=3\n" in text
    script.write_text(text.replace("\nformat=3\n", "\nformat=4\n"))


@pytest.mark.parametrize(("change", "again"), [
    pytest.param(lambda tree: None, [], id="nothing"),
    pytest.param(lambda tree: tree.write(tree.root / "alpaca_rlhf" / "new.py", "# other code"), [],
                 id="code"),
    pytest.param(raise_format, ALL, id="format"),
    pytest.param(lambda tree: tree.write_config(1, "seed: 99\n"), ALL, id="config of step 1"),
    pytest.param(lambda tree: tree.write_config(2, "seed: 99\n"), ALL[1:], id="of step 2"),
    pytest.param(lambda tree: tree.write_config(3, "seed: 99\n"), ALL[2:], id="of step 3"),
    pytest.param(lambda tree: (tree.output / "critic" / "results.json").unlink(), ALL[1:],
                 id="output of step 2 is gone"),
])
def test_a_second_run_repeats_what_has_changed_and_every_step_after_it(tree, change, again):
    tree.run()
    change(tree)
    done = tree.run()
    assert tree.started() == again
    assert done.stdout.count("reused, finished before") == 3 - len(again)
    assert done.stdout.endswith(f"table of {tree.output}\n")
    tree.run()
    assert tree.started() == []


def test_changed_flags_run_all_steps_again_and_fresh_starts_over(tree):
    tree.run("--", "--seed", "1")
    for words in ("--", "--seed", "2"), ("--fresh",):
        (tree.output / "actor" / "notes").touch()
        tree.run(*words)
        assert tree.started() == ALL
        assert (tree.output / "actor" / "notes").exists(), "the steps know what is theirs"
    assert "--resume_from_checkpoint" not in tree.log.read_text()


@pytest.mark.parametrize("code", [1, 2, 7])
def test_a_failing_step_stops_the_pipeline_with_its_code(tree, code):
    tree.write_config(2, f"exit: {code}")
    done = tree.run(code=code)
    assert tree.started() == ["actor", "critic"]
    assert done.stderr == (
        f"run_pipeline: step 2 (reward model) failed with exit code {code}\n")
    assert "table of" not in done.stdout


@pytest.mark.parametrize(("finished", "changed", "code", "again"), [
    pytest.param(False, [], 1, ALL[1:], id="steps before a failure are reused"),
    pytest.param(True, [], 2, [], id="a refusal leaves the finished step valid"),
    pytest.param(True, [1], 2, ALL[1:], id="but not after a new step 1"),
])
def test_what_runs_after_step_2_has_failed(tree, finished, changed, code, again):
    if finished:
        tree.run()
    for number in changed:
        tree.write_config(number, "seed: 99\n")
    tree.write_config(2, f"exit: {code}")
    tree.run(code=code)
    tree.write_config(2, "seed: 2\n")
    tree.run()
    assert tree.started() == again


def test_a_step_that_ends_without_its_results_is_a_failure(tree):
    tree.write_config(3, "torn: true")
    done = tree.run(code=1)
    assert done.stderr == (
        f"run_pipeline: step 3 (PPO) ended without writing {tree.output}/final/results.json\n")


def test_somebody_elses_output_folder_is_not_overwritten(tree):
    (tree.output / "actor").mkdir(parents=True)
    (tree.output / "actor" / "mine").write_text("precious")
    tree.run(code=2)
    assert "--overwrite_output_dir" not in tree.log.read_text()
    tree.run("--fresh", code=2)
    assert (tree.output / "actor" / "mine").read_text() == "precious"


@pytest.mark.parametrize(("words", "line"), [
    (["--fast"], "unknown option --fast; flags of the steps go after --; see --help"),
    (["--num_gpus"], "--num_gpus needs a value"),
])
def test_a_wrong_option_or_a_missing_config_is_one_line(tree, words, line):
    done = tree.run(*words, code=2)
    assert (done.stdout, done.stderr) == ("", f"run_pipeline: {line}\n")
    config = tree.root / "configs" / "my tiny" / "step3.yaml"
    config.unlink()
    assert tree.run(code=2).stderr == f"run_pipeline: cannot read {config}\n"
    assert tree.log.read_text() == ""


def test_help_shows_how_to_call_it(tree):
    done = tree.run("--help")
    assert "bash scripts/run_pipeline.sh [--config-dir configs/tiny]" in done.stdout
    assert tree.started() == []


# --- the environment -----------------------------------------------------------------------------

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$(dirname "$0")/../pip.log"
[[ ! -f "$(dirname "$0")/../fail" ]]
"""


class Environment:
    """A virtual environment whose python only notes what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.root, self.venv = folder / "a tree", folder / "a venv"
        (self.root / "scripts").mkdir(parents=True)
        (self.venv / "bin").mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "environment.sh", self.root / "scripts")
        (self.root / "requirements.txt").write_text("torch==1\n")
        (self.root / "setup.py").write_text("setup()\n")
        python = self.venv / "bin" / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def prepare(self, code: int = 0) -> list[str]:
        """Prepare; gives the calls of python this has taken."""
        (self.venv / "pip.log").write_text("")
        done = subprocess.run(
            ["bash", "-c", 'source "$1" && prepare_environment requirements.txt', "bash",
             str(self.root / "scripts" / "environment.sh")],
            env={**os.environ, "VIRTUAL_ENV": str(self.venv)}, text=True, capture_output=True,
            timeout=60,
        )
        assert done.returncode == code, done
        return (self.venv / "pip.log").read_text().splitlines()


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


PIP = "-m pip install --quiet --disable-pip-version-check"


def test_requirements_and_the_repository_are_installed_once_and_after_a_change(environment):
    root = environment.root
    requirements = f"{PIP} --requirement {root}/requirements.txt"
    assert environment.prepare() == [
        requirements, f"{PIP} --no-deps --no-build-isolation --editable {root}"]
    assert environment.prepare() == []
    (root / "requirements.txt").write_text("torch==2\n")
    assert environment.prepare() == [requirements]


def test_a_failed_installation_is_tried_again(environment):
    (environment.venv / "fail").touch()
    assert len(environment.prepare(code=1)) == 1
    (environment.venv / "fail").unlink()
    assert len(environment.prepare()) == 2


def test_an_environment_without_python_is_refused(environment):
    (environment.venv / "bin" / "python").unlink()
    assert environment.prepare(code=2) == []
