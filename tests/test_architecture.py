"""The floors: imports only go to the same floor or down; and the habits that can be counted."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alpaca_rlhf

PACKAGE = Path(alpaca_rlhf.__file__).parent
STEPS = ("step1_supervised_finetuning", "step2_reward_model_finetuning", "step3_rlhf_finetuning")

# A file, or a folder for all the files in it that are not named; the most exact entry counts.
FLOORS = {
    "doctor.py": 4,
    "inspect_data.py": 4,
    "inference": 4,
    "training_model": 4,
    "training_model/step3_rlhf_finetuning": 3,
    "training_model/step3_rlhf_finetuning/main.py": 4,
    "training_model/step3_rlhf_finetuning/win_rate.py": 4,
    "evaluation": 3,
    "demo": 1,
    "utils/supervised.py": 3,
    "utils/training_loop.py": 2,
    "utils/engine.py": 2,
    "utils/preflight.py": 2,
    "utils/run": 2,
    "utils/generation": 2,
    "utils/data/prepare.py": 2,
    "utils/data": 1,
    "utils/model": 1,
    "utils/logging": 1,
    "utils/distributed.py": 1,
    "utils/ds_config.py": 1,
    "utils/optimizer.py": 1,
    "utils/arguments.py": 0,
    "utils/configs.py": 0,
    "utils/console.py": 0,
    "utils/errors.py": 0,
    "utils/losses.py": 0,
    "utils/rl_math.py": 0,
    "utils/data/chat_template.py": 0,
    "__init__.py": 0,
}
FILES = sorted(
    str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.read_text()
)
# Programs of a console, which run before or beside the ranks that `console.say` speaks for.
CONSOLE = (
    "training_model/my_deepspeed.py", "doctor.py", "inspect_data.py"
)
LONGEST_FUNCTION = 60


def floor(file):
    entries = [e for e in FLOORS if file == e or file.startswith(e.removesuffix(".py") + "/")]
    return FLOORS[max(entries, key=len)] if entries else 0


def tree(file):
    return ast.parse((PACKAGE / file).read_text())


def as_file(module):
    """alpaca_rlhf.utils.losses -> utils/losses.py; None for what is no module of the package."""
    path = PACKAGE.parent / Path(*module.split("."))
    if path.with_suffix(".py").exists():
        return str(path.with_suffix(".py").relative_to(PACKAGE))
    return None


def imported(file):
    """Files of the package that a file imports, and the names of everything else."""
    ours, others = set(), set()
    for node in ast.walk(tree(file)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == "alpaca_rlhf":
                ours |= {found for found in [as_file(name)] if found}
            else:
                others.add(name.split(".")[0])
    return ours, others


def breaches(file, ours):
    return sorted(other for other in ours if floor(other) > floor(file))


@pytest.mark.parametrize("file", FILES)
def test_every_module_has_its_floor_in_the_table(file):
    assert any(file == e or file.startswith(e.removesuffix(".py") + "/") for e in FLOORS)


@pytest.mark.parametrize("file", FILES)
def test_imports_only_go_to_the_same_floor_or_down(file):
    assert breaches(file, imported(file)[0]) == []


def test_an_import_that_goes_up_is_noticed():
    assert breaches("utils/losses.py", {"utils/rl_math.py", "utils/training_loop.py"}) == [
        "utils/training_loop.py"
    ]
    assert floor("training_model/step3_rlhf_finetuning/rollout.py") == 3
    assert floor("training_model/step3_rlhf_finetuning/main.py") == 4
    assert floor("utils/data/batches.py") == 1


@pytest.mark.parametrize("file", FILES)
def test_a_step_never_imports_a_step(file):
    mine = [step for step in STEPS if f"/{step}/" in file]
    for other in imported(file)[0]:
        steps = [step for step in STEPS if f"/{step}/" in other]
        assert not (mine and steps) or steps == mine, other


@pytest.mark.parametrize("file", [file for file in FILES if floor(file) < 4])
def test_below_the_mains_nobody_knows_the_arguments(file):
    assert "utils/arguments.py" not in imported(file)[0]


@pytest.mark.parametrize(
    ("file", "allowed"),
    [("utils/losses.py", {"torch"}), ("utils/rl_math.py", {"torch"}),
     ("utils/arguments.py", {"transformers", "yaml"}), ("utils/errors.py", set()),
     ("utils/data/chat_template.py", set())],
)
def test_the_ground_floor_knows_the_standard_library_and_little_else(file, allowed):
    assert imported(file)[1] - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("module", ["alpaca_rlhf.utils.arguments", "alpaca_rlhf.utils.errors"])
def test_reading_the_arguments_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0


def calls(file, name):
    return [
        node.lineno for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    ]


@pytest.mark.parametrize("file", [file for file in FILES if file not in CONSOLE])
def test_nothing_is_printed_but_through_the_console(file):
    assert calls(file, "print") == []


@pytest.mark.parametrize("file", FILES)
def test_the_search_path_is_left_alone(file):
    touched = [
        node.lineno for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]
    assert touched == []


@pytest.mark.parametrize("file", FILES)
def test_no_exception_is_caught_without_a_name(file):
    bare = [
        node.lineno for node in ast.walk(tree(file))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


@pytest.mark.parametrize("file", [file for file in FILES if file != "utils/distributed.py"])
def test_no_device_is_named_outside_distributed(file):
    """Nor any kind of accelerator; `"cpu"` as the place of host memory is no choice of device."""
    named = [
        node.lineno for node in ast.walk(tree(file))
        if (isinstance(node, ast.Constant) and isinstance(node.value, str)
            and node.value.split(":")[0] in ("cuda", "xpu", "mps", "npu"))
        or (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"))
        or (isinstance(node, ast.Attribute) and node.attr == "cuda")
    ]
    assert named == []


def functions(file):
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1, node


@pytest.mark.parametrize("file", FILES)
def test_no_function_is_longer_than_60_lines(file):
    assert [(name, n) for name, n, _ in functions(file) if n > LONGEST_FUNCTION] == []


@pytest.mark.parametrize("file", FILES)
def test_every_function_has_types(file):
    lacking = []
    for name, _, node in functions(file):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        typed = all(a.annotation for a in given if a.arg not in ("self", "cls"))
        if not typed or (node.returns is None):
            lacking.append(name)
    assert lacking == []


@pytest.mark.parametrize("file", FILES)
def test_no_line_is_longer_than_100_columns(file):
    lines = (PACKAGE / file).read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("file", FILES)
def test_a_module_opens_with_what_it_is(file):
    assert ast.get_docstring(tree(file))


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_left_to_be_done(file):
    source = (PACKAGE / file).read_text()
    assert not any(mark in source for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X"))


def test_no_table_entry_is_left_over():
    for entry in FLOORS:
        assert (PACKAGE / entry).exists(), entry
