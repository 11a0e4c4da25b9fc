"""Architecture of the package: imports only go down; and habits that can be read off the source.

A rule gives the breaches of a module. Each rule is one test over all modules, and another one sees
it notice a bad snippet.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alpaca_rlhf

PACKAGE = Path(alpaca_rlhf.__file__).parent
STEPS = "training_model/step"  # how their folders begin
LONGEST_FUNCTION, LONGEST_MAIN, LONGEST_LINE, MOST_BY_POSITION = 60, 40, 100, 4

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
    "utils/memory": 3,
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
    "utils/reward_function.py": 1,
    "utils/arguments.py": 0,
    "utils/configs.py": 0,
    "utils/console.py": 0,
    "utils/errors.py": 0,
    "utils/files.py": 0,
    "utils/losses.py": 0,
    "utils/projection.py": 0,
    "utils/rl_math.py": 0,
    "utils/data/chat_template.py": 0,
    "__init__.py": 0,
}
# Folders of one floor of which the first may import the second. Any module may import its own
# folder and those around it.
ALLOWED_SIDEWAYS = {
    (".", "training_model"),  # the doctor reads host files as the launcher does
    ("demo", "utils"),
    ("demo", "utils/data"),
    ("utils/data", "demo"),
    ("utils/generation", "utils/generation/cpu"),  # one of its decoding steps
    ("utils/model", "utils/model/weights"),  # quantized as they are loaded
}
# Third-party packages that modules of floor 0 may import.
THIRD_PARTY = {
    "utils/arguments.py": {"transformers", "yaml"},
    "utils/console.py": {"deepspeed", "torch", "transformers"},
    "utils/losses.py": {"torch"},
    "utils/projection.py": {"torch"},
    "utils/rl_math.py": {"torch"},
}
# Programs that print before or beside the ranks that `console.say` speaks for.
CONSOLE = ("training_model/my_deepspeed.py", "doctor.py")
# Breaches that are still there: exactly these.
KNOWN_BREACHES: dict[str, list[str]] = {}


class Module:
    """A source file of the package, `name` relative to it."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source, self.tree = name, source, ast.parse(source)
        self.folder = str(Path(name).parent)
        self.is_program = '\nif __name__ == "__main__":' in source
        self.nodes = list(ast.walk(self.tree))
        self.functions = list(self.all(ast.FunctionDef, ast.AsyncFunctionDef))
        self.calls = [(ast.unparse(call.func).split(".")[-1], call) for call in self.all(ast.Call)]
        self.imported = {alias.name for node in self.all(ast.Import) for alias in node.names}
        for node in self.all(ast.ImportFrom):
            self.imported |= {f"{node.module}.{alias.name}" for alias in node.names}

    def all(self, *kinds: type) -> Iterator:
        return (node for node in self.nodes if isinstance(node, kinds))

    @property
    def floor(self) -> int:
        return FLOORS[max(entries(self.name), key=len)]

    @property
    def imports(self) -> list["Module"]:
        """Modules of the package that it imports, or imports something from."""
        names = {name.removeprefix("alpaca_rlhf.").replace(".", "/") for name in self.imported
                 if name.startswith("alpaca_rlhf.")}
        paths = {f"{path}.py" for name in names for path in (name, str(Path(name).parent))}
        return [MODULES[path] for path in sorted(paths & set(MODULES))]


def entries(name: str) -> list[str]:
    """Entries of the table of floors that a file belongs to."""
    return [e for e in FLOORS if name == e or name.startswith(e.removesuffix(".py") + "/")]


PATHS = [path for path in sorted(PACKAGE.rglob("*.py")) if path.read_text()]
MODULES = {name: Module(name, path.read_text()) for path in PATHS
           for name in [str(path.relative_to(PACKAGE))]}

# --- rules: a module -> its breaches, each as a text that does not change with the lines around --


def imports_go_up(module: Module) -> list[str]:
    return [other.name for other in module.imports if other.floor > module.floor]


def imports_go_sideways(module: Module) -> list[str]:
    return [
        other.name for other in module.imports
        if other.floor == module.floor and not f"{module.folder}/".startswith(f"{other.folder}/")
        and (module.folder, other.folder) not in ALLOWED_SIDEWAYS
    ]


def a_program_imports_a_program_or_a_step_a_step(module: Module) -> list[str]:
    return [
        other.name for other in module.imports
        if (module.is_program and other.is_program) or (
            module.name.startswith(STEPS) and other.name.startswith(STEPS)
            and other.folder != module.folder)
    ]


def arguments_are_known_below_the_programs(module: Module) -> list[str]:
    return [o.name for o in module.imports if o.name == "utils/arguments.py" and module.floor < 4]


def floor_0_imports_packages(module: Module) -> list[str]:
    packages = {name.split(".")[0] for name in module.imported} - sys.stdlib_module_names
    allowed = {"alpaca_rlhf"} | THIRD_PARTY.get(module.name, set())
    return sorted(packages - allowed) if module.floor == 0 else []


def imports_are_relative(module: Module) -> list[str]:
    return [ast.unparse(node) for node in module.all(ast.ImportFrom) if node.level]


def length(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def functions_are_long(module: Module) -> list[str]:
    return [f.name for f in module.functions if length(f) > LONGEST_FUNCTION]


def main_is_no_table_of_contents(module: Module) -> list[str]:
    mains = [f for f in module.functions if f.name == "main" and length(f) > LONGEST_MAIN]
    return [f.name for f in mains if Path(module.name).name == "main.py"]


def functions_have_no_types(module: Module) -> list[str]:
    def typed(function):
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        return function.returns and all(a.annotation or a.arg in ("self", "cls") for a in given)

    return [f.name for f in module.functions if not typed(f)]


def fields_of(kind: ast.ClassDef) -> int:
    """Number of fields of a dataclass or a named tuple; 0 for another class."""
    signs = [ast.unparse(node) for node in (*kind.decorator_list, *kind.bases)]
    is_record = any("dataclass" in sign or sign == "NamedTuple" for sign in signs)
    return sum(isinstance(node, ast.AnnAssign) for node in kind.body) if is_record else 0


RECORDS = {kind.name for module in MODULES.values() for kind in module.all(ast.ClassDef)
           if fields_of(kind) > MOST_BY_POSITION}


def records_are_built_by_position(module: Module) -> list[str]:
    return [name for name, call in module.calls if name in RECORDS and (
        len(call.args) > MOST_BY_POSITION or any(isinstance(a, ast.Starred) for a in call.args))]


def records_are_copied_by_name(module: Module) -> list[str]:
    """`**{f.name: getattr(…, f.name)}` fills a record from another, unseen by mypy."""
    copies = [(name, ast.unparse(keyword.value.value)) for name, call in module.calls
              for keyword in call.keywords
              if keyword.arg is None and isinstance(keyword.value, ast.DictComp)]
    return [name for name, value in copies
            if value.startswith("getattr(") and value.endswith(".name)")]


def arguments_are_carried_downward(module: Module) -> list[str]:
    def names_args(node):
        return any(isinstance(one, ast.Name) and one.id == "args" for one in ast.walk(node))

    def takes_args(function):
        return any(one.arg == "args" for one in ast.walk(function.args) if isinstance(one, ast.arg))

    partials = [f"partial({ast.unparse(call.args[0])})" for name, call in module.calls
                if name == "partial" and names_args(call)]
    closures = [getattr(inner, "name", "lambda") for outer in module.functions
                for inner in ast.walk(outer)
                if isinstance(inner, ast.FunctionDef | ast.Lambda) and inner is not outer
                and names_args(inner) and not takes_args(inner)]
    return partials + closures


def lines_are_printed_past_the_console(module: Module) -> list[str]:
    return [ast.unparse(call) for name, call in module.calls
            if name == "print" and module.name not in CONSOLE]


def the_search_path_is_edited(module: Module) -> list[str]:
    return [n.attr for n in module.all(ast.Attribute) if ast.unparse(n) == "sys.path"]


def exceptions_are_caught_without_a_name(module: Module) -> list[str]:
    return ["except:" for node in module.all(ast.ExceptHandler) if node.type is None]


def devices_are_named_outside_distributed(module: Module) -> list[str]:
    """`"cpu"` may be the place of host memory, which is no choice of a device."""
    named = [node.value for node in module.all(ast.Constant) if isinstance(node.value, str)
             and node.value.split(":")[0] in ("cuda", "xpu", "mps", "npu")]
    named += [ast.unparse(node) for node in module.all(ast.Attribute) if node.attr == "cuda"]
    return named if module.name != "utils/distributed.py" else []


def lines_are_long(module: Module) -> list[str]:
    return [line for line in module.source.splitlines() if len(line) > LONGEST_LINE]


def it_does_not_say_what_it_is(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else ["no docstring"]


def work_is_left_to_do(module: Module) -> list[str]:
    return [mark for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X") if mark in module.source]


# --- tests ---------------------------------------------------------------------------------------

STEP1, STEP3 = (f"training_model/{name}_finetuning" for name in ("step1_supervised", "step3_rlhf"))
LINES = "\n    x = 1" * 40
BAD = [  # a rule, the name of a file, and a source that breaks the rule there
    (imports_go_up, "utils/losses.py", "from alpaca_rlhf.utils import training_loop"),
    (imports_go_up, f"{STEP3}/rollout.py",
     "from alpaca_rlhf.training_model.step3_rlhf_finetuning import main"),
    (imports_go_sideways, "utils/data/split.py", "from alpaca_rlhf.utils.model.lora import x"),
    (a_program_imports_a_program_or_a_step_a_step, "doctor.py",
     'from alpaca_rlhf import inspect_data\nif __name__ == "__main__":\n    pass'),
    (a_program_imports_a_program_or_a_step_a_step, f"{STEP1}/main.py",
     "from alpaca_rlhf.training_model.step3_rlhf_finetuning import rollout"),
    (arguments_are_known_below_the_programs, "utils/engine.py",
     "from alpaca_rlhf.utils.arguments import parse"),
    (floor_0_imports_packages, "utils/errors.py", "import torch.nn"),
    (imports_are_relative, "utils/errors.py", "from . import console"),
    (functions_are_long, "a.py", f"def f():{LINES}{LINES}"),
    (main_is_no_table_of_contents, f"{STEP1}/main.py", f"def main():{LINES}"),
    (functions_have_no_types, "a.py", "def f(a) -> int: ..."),
    (functions_have_no_types, "a.py", "def f(self, a: int): ..."),
    (records_are_built_by_position, "a.py", "configs.Step3Config(1, 2, 3, 4, 5)"),
    (records_are_built_by_position, "a.py", "Step3Config(1, *row)"),
    (records_are_copied_by_name, "a.py", "A(**{f.name: getattr(b, f.name) for f in fields(b)})"),
    (arguments_are_carried_downward, "a.py", "partial(perplexity, engine, args)"),
    (arguments_are_carried_downward, "a.py", "functools.partial(perplexity, seed=args.seed)"),
    (arguments_are_carried_downward, "a.py", "def f(args):\n    return lambda: args.seed"),
    (arguments_are_carried_downward, "a.py", "def f(args):\n    def g():\n        g(args.seed)"),
    (lines_are_printed_past_the_console, "utils/engine.py", "print(1)"),
    (the_search_path_is_edited, "a.py", "import sys\nsys.path.insert(0, '.')"),
    (exceptions_are_caught_without_a_name, "a.py", "try:\n    f()\nexcept:\n    pass"),
    (devices_are_named_outside_distributed, "utils/engine.py", "torch.device('cuda:0')"),
    (devices_are_named_outside_distributed, "utils/engine.py", "torch.cuda.synchronize()"),
    (lines_are_long, "a.py", "x" * 101),
    (it_does_not_say_what_it_is, "a.py", "x = 1"),
    (work_is_left_to_do, "a.py", "# TO" + "DO"),
]
RULES = list(dict.fromkeys(rule for rule, *_ in BAD))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nowhere(rule):
    found = [f"{module.name}: {breach}" for module in MODULES.values() for breach in rule(module)]
    assert found == KNOWN_BREACHES.get(rule.__name__, [])


@pytest.mark.parametrize(("rule", "name", "source"), BAD)
def test_a_breach_is_noticed(rule, name, source):
    assert len(rule(Module(name, source))) == 1


@pytest.mark.parametrize(("rule", "source"), [
    (records_are_built_by_position, "Step3Config(1, 2, 3, 4, seed=5)"),
    (records_are_built_by_position, "f(1, 2, 3, 4, 5)"),
    (arguments_are_carried_downward, "def f(args):\n    map(lambda args: args.x, args.rows)"),
    (functions_have_no_types, "def f(self, a: int) -> None: ..."),
])
def test_good_code_passes(rule, source):
    assert rule(Module("a.py", source)) == []


def in_circles(graph: dict[str, list[str]]) -> set[str]:
    """Names left when those without imports, and those that nobody imports, are taken away."""
    left = set(graph)
    while ends := {name for name in left if not left & set(graph[name])
                   or not any(name in graph[other] for other in left)}:
        left -= ends
    return left


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: [o.name for o in module.imports] for name, module in MODULES.items()}
    assert in_circles(graph) == set()
    assert in_circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["e"], "e": []}) == {"b", "c"}


def test_every_module_has_its_floor_and_no_entry_of_a_table_is_left_over():
    assert [name for name in MODULES if not entries(name)] == []
    assert [e for e in (*FLOORS, *THIRD_PARTY, *CONSOLE) if not (PACKAGE / e).exists()] == []
    pairs = {(module.folder, other.folder) for module in MODULES.values()
             for other in module.imports if module.floor == other.floor}
    assert ALLOWED_SIDEWAYS - pairs == set()


def test_the_arguments_are_read_without_torch():
    code = ("import sys\nfrom alpaca_rlhf.utils import arguments, configs, console, errors\n"
            "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0
