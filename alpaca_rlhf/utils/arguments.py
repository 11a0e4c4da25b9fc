"""The command line and the file of `--config`, read into the groups of `configs`.

    args = parse(Step1Config, ["--lora_dim", "8", "--output_dir", "actor"])
    args.model.learning_rate                     # 0.0003: the default with LoRA
    yaml.safe_dump(to_config(args), file)        # --config file gives equal arguments

`parse` checks everything and fills in the defaults that depend on other flags (the learning rates).
A mistake ends in one `UserError` of one line: flag, value, remedy. Imports no torch, so that
`--help` is quick.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
import sys
import types
from argparse import (
    SUPPRESS,
    Action,
    ArgumentError,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml

from alpaca_rlhf.utils.configs import (
    FILE_TRACKERS,
    Bound,
    Option,
    RoleConfig,
    RunConfig,
    SourcesConfig,
    Step3Config,
    StepConfig,
    groups,
    options,
)
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import UNREADABLE, expanded, read_text

Record = TypeVar("Record")


def values(args: Any) -> Iterator[tuple[Option, Any]]:
    """Yield each option of a program with its value."""
    for option in options(type(args)):
        yield option, getattr(getattr(args, option.group), option.name)


def parse(
    record: type[Record], argv: Sequence[str] | None = None, doc: str | None = None
) -> Record:
    """Read a program's options, check them, and fill in the defaults that depend on others.

    The program's docstring is its --help; a step has its own.

    Raises:
        UserError: a mistake in a flag or in the file of `--config`, in one line.
    """
    parser = _Parser(record, doc)
    words = list(sys.argv[1:] if argv is None else argv)
    namespace, rest = parser.parse_known_args(words)
    parser.refuse_unknown(rest)
    if getattr(namespace, "config", None) is not None:
        words = [*parser.config_argv(namespace.config), *words]
    read, given = vars(parser.parse_args(words)), parser.given(words)
    made: dict[str, Any] = {}
    for name, group, declared in groups(record):
        mine = {option.name: read[option.flag] for option in options(record)
                if option.group == name}
        if group is RoleConfig:
            mine["prefix"] = declared["prefix"]
            mine["rates"] = declared["defaults"].get("rates", RoleConfig.rates)
        made[name] = group(**mine)
    if issubclass(record, StepConfig):
        made["given"] = given
    args = record(**made)
    _check_values(args, given)
    if isinstance(args, StepConfig):
        _check_step(args)
        return _resolve(args)
    return args


def to_config(args: Any) -> dict[str, Any]:
    """Return {flag: value}, which gives back equal arguments when it is written to a file.

    Left out are `config`, `local_rank`, and unused flags that are unavailable or have no effect.
    """
    return {
        option.flag: value for option, value in values(args)
        if option.flag not in {"config", "local_rank"}
        and not ((option.metadata["unavailable"] or option.metadata["no_effect"])
                 and value == option.default)
    }


def roles(args: StepConfig) -> dict[str, RoleConfig]:
    """Return the trained models of a step, by the name of their group."""
    return {name: getattr(args, name) for name, group, _ in groups(type(args))
            if group is RoleConfig}


def notices(args: StepConfig) -> list[str]:
    """Return one line for each flag that was given and changes nothing."""
    lines = [f"--{option.flag} has no effect: {option.metadata['no_effect']}"
             for option in options(type(args))
             if option.metadata["no_effect"] and option.flag in args.given]
    for role in roles(args).values():
        if f"{role.prefix}lora_module_name" in args.given and role.lora_dim == 0:
            lines.append(f"{role.flag('lora_module_name')} has no effect: "
                         f"{role.flag('lora_dim')} is 0")
        if args.lora.bits is not None and role.lora_dim == 0:
            lines.append(f"--load_in_{args.lora.bits}bit has no effect on the "
                         f"{role.prefix.rstrip('_')}: {role.flag('lora_dim')} is 0")
    if args.tracking.logging_dir and not set(args.tracking.trackers) & set(FILE_TRACKERS):
        lines.append("--logging_dir has no effect: no tracker that writes files is asked for")
    if args.checkpoint.allow_changed_args and not args.checkpoint.resume_from_checkpoint:
        lines.append("--allow_changed_args has no effect: nothing is resumed")
    if isinstance(args, Step3Config):
        lines += _hybrid_notices(args)
        if args.ppo.align_overflow and args.loading.dtype != "fp16":
            lines.append("--align_overflow has no effect: only --dtype fp16 overflows")
        for flag, role in _offloaded(args):
            if role.lora_dim and args.lora.only_optimize_lora:
                lines.append(f"--{flag} has no effect: with LoRA there is no second model")
            elif role.zero_stage < 3:
                lines.append(f"--{flag} has no effect: {role.flag('zero_stage')} is not 3")
    return lines


def _offloaded(args: Step3Config) -> Iterator[tuple[str, RoleConfig]]:
    """Yield the flags given for frozen models, and the role that each is a copy of."""
    for flag, role in (("offload_reference_model", args.actor),
                       ("offload_reward_model", args.critic)):
        if getattr(args.roles, flag):
            yield flag, role


def _hybrid_notices(args: Step3Config) -> Iterator[str]:
    hybrid, stage = args.hybrid, args.actor.zero_stage
    engine = args.rollout_engine.rollout_engine
    idle = "hybrid" if engine == "vllm" else "rollout_engine"
    for option in options(type(args)):
        if option.group == idle and option.flag in args.given - {"rollout_engine"} and (
                not option.metadata["no_effect"]):
            yield f"--{option.flag} has no effect: --rollout_engine is {engine}"
    if engine == "vllm":
        return
    off = "without --enable_hybrid_engine "
    if hybrid.unpin_actor_parameters and stage < 3:
        yield "--unpin_actor_parameters has no effect: below ZeRO-3 nothing is gathered"
    elif hybrid.unpin_actor_parameters and not hybrid.enable_hybrid_engine:
        yield f"--unpin_actor_parameters has no effect: {off}layers are gathered one by one anyway"
    if hybrid.enable_cuda_graph and not hybrid.enable_hybrid_engine:
        yield f"--enable_cuda_graph has no effect: {off}the model's forward pass decodes"
    elif hybrid.enable_cuda_graph and hybrid.unpin_actor_parameters and stage == 3:
        yield "--enable_cuda_graph has no effect: with --unpin_actor_parameters weights come and go"


def _check_split(data_split: str) -> None:
    try:
        shares = SourcesConfig(data_split=data_split).shares
    except ValueError:
        shares = (math.nan,) * 3
    if not (all(math.isfinite(share) and share >= 0 for share in shares) and any(shares)):
        _refuse("data_split", data_split,
                "must be three numbers of 0 or more, not all 0, such as 2,4,4")


# --- reading -------------------------------------------------------------------------------------


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _boolean(text: str) -> bool:
    known = {"true": True, "yes": True, "t": True, "y": True, "1": True,
             "false": False, "no": False, "f": False, "n": False, "0": False}
    if text.lower() not in known:
        raise ValueError
    return known[text.lower()]


def _reader(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise ArgumentTypeError(f"{shlex.quote(text)}: must be {expected}") from None
    return read


_READERS: dict[Any, Callable[[str], Any]] = {
    int: _reader(int, "a whole number"), float: _reader(_finite, "a number"),
    bool: _reader(_boolean, "true or false"), str: expanded,
}
_WORDS = ("prompt", "system")  # flags whose text is never a path
_KINDS: dict[Any, str] = {
    _READERS[int]: "N", _READERS[float]: "X", _READERS[bool]: "[BOOL]",
}


class _HelpFormatter(RawDescriptionHelpFormatter):
    """One line for each flag: its names with underscores, its kind, and the default."""

    def _format_action_invocation(self, action: Action) -> str:
        names = ", ".join(name for name in action.option_strings if "-" not in name.lstrip("-"))
        if action.nargs == 0:
            return names
        kind = _KINDS.get(action.type, "TEXT")
        if action.choices is not None:
            kind = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{names} {kind}" + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or re.search(r"\(default|\(required", text) or action.default == "":
            return text
        names = {"True": "on", "False": "off", "None": "none", "[]": "none"}
        return f"{text} (default: {names.get(str(action.default), '%(default)s')})"


class _Parser(ArgumentParser):
    """A parser whose every complaint is a UserError of one line."""

    def __init__(self, record: type, doc: str | None) -> None:
        purpose, _, rest = str(doc or getattr(record, "purpose", "")).partition("\n")
        config = "[--config FILE] " * any(option.flag == "config" for option in options(record))
        super().__init__(
            description=purpose, epilog=rest.strip("\n") or None, allow_abbrev=False,
            usage=f"%(prog)s {config}[--flag value ...]", formatter_class=_HelpFormatter,
        )
        sections: dict[str, Any] = {}
        for name, group, declared in groups(record):
            title = declared["prefix"].rstrip("_") or group.title  # type: ignore[attr-defined]
            section = sections.get(title) or self.add_argument_group(title)
            sections[title] = section
            for option in options(record):
                if option.group == name:
                    self._add(section, option, declared)

    def _add(self, section: Any, option: Option, declared: dict[str, Any]) -> None:
        names = [form for name in (option.flag, *option.metadata["aliases"])
                 for form in (name, name.replace("_", "-"))]
        names = [f"--{name}" for name in dict.fromkeys(names)]
        kind, choices, several = _kind(option.hint)
        settings: dict[str, Any] = {"type": _READERS[kind], "choices": choices}
        if option.flag in _WORDS:
            settings["type"] = str
        if several:
            settings["nargs"] = "+"
        if kind is bool:
            settings |= {"nargs": "?", "const": True}
        section.add_argument(
            *names, dest=option.flag, default=option.default, help=_help(option, declared),
            **settings,
        )
        if kind is bool and option.default is True:
            forms = [f"no_{option.flag}", f"no-{option.flag}".replace("_", "-")]
            section.add_argument(*(f"--{form}" for form in forms), dest=option.flag,
                                 action="store_false", default=True, help=SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as `--flag value: what is expected`."""
        match = re.fullmatch(r"argument (--\w+)\S*: (.*)", message, re.DOTALL)
        if match is None:
            raise UserError(_one_line(message))
        flag, complaint = match.groups()
        if complaint.startswith("expected"):
            raise UserError(f"{flag}: needs a value")
        if complaint.startswith("ignored explicit argument"):
            raise UserError(f"{flag}: takes no value")
        raise UserError(_one_line(f"{flag} {complaint}"))

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise ArgumentError(action, f"{shlex.quote(str(value))}: must be one of {choices}")

    def valued_flags(self) -> dict[str, Action]:
        """Return every spelling of every flag that takes a value, without its dashes."""
        return {name[2:]: action for name, action in self._option_string_actions.items()
                if name.startswith("--") and action.nargs != 0}

    def given(self, argv: Sequence[str]) -> frozenset[str]:
        """Return the flags set in `argv`; a word that starts with two dashes is never a value."""
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in argv)
        return frozenset(action.dest for action in actions if action is not None)

    def refuse_unknown(self, rest: Sequence[str]) -> None:
        """Raise on what parsing left over: unknown flags with near misses, or stray words."""
        unknown = [word.partition("=")[0] for word in rest if re.match(r"--?[A-Za-z]", word)]
        if unknown:
            raise UserError(self._unknown("flag", unknown, prefix="--"))
        if rest:
            raise UserError(_one_line(f"stray value {shlex.quote(rest[0])}: it follows no flag "
                                      "that takes it; remove it or name its flag"))

    def _unknown(self, kind: str, names: Sequence[str], prefix: str) -> str:
        spellings = [prefix + name for name in self.valued_flags() if "-" not in name]
        listed = []
        for name in names:
            near = difflib.get_close_matches(name, spellings, n=1)
            listed.append(f"{name} (did you mean {near[0]}?)" if near else name)
        plural = "s" if len(names) > 1 else ""
        return _one_line(f"unknown {kind}{plural} {', '.join(listed)}; see --help")

    def config_argv(self, path: str) -> list[str]:
        """Return the file's flags as words of a command line; an error names the file."""
        mapping = _read_mapping("config", path)
        try:
            argv = self._words(mapping)
            _, rest = self.parse_known_args(argv)
            self.refuse_unknown(rest)
        except UserError as error:
            raise UserError(f"--config {_one_line(path)}: {error}") from None
        return argv

    def _words(self, mapping: dict[Any, Any]) -> list[str]:
        flags, words = self.valued_flags(), list[str]()
        seen: dict[str, Any] = {}
        unknown = [str(key) for key in mapping if str(key) not in flags]
        if unknown:
            raise UserError(self._unknown("key", unknown, prefix=""))
        for key, value in mapping.items():
            action = flags[str(key)]
            if action.dest == "config":
                raise UserError("config: a config file can not name another; remove the key")
            if action.dest in seen:
                raise UserError(f"{seen[action.dest]} and {key} are one flag; keep one of them")
            seen[action.dest] = key
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, dict | list) for item in items):
                raise UserError(f"{key}: holds a nested mapping or list; a value or a plain list "
                                "of values is expected")
            if isinstance(value, list) and action.nargs != "+":
                raise UserError(f"{key}: takes one value, not a list")
            texts = [str(item).lower() if isinstance(item, bool) else str(item)
                     for item in items if item is not None]
            if len(texts) == 1:
                words.append(f"--{action.dest}={texts[0]}")
            elif texts:
                words += [f"--{action.dest}", *texts]
        return words


def _kind(hint: Any) -> tuple[type, list[Any] | None, bool]:
    """Return the type of one value of an option, its choices, and whether it takes several."""
    if hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
        return _kind(hint)
    if get_origin(hint) is Literal:
        choices = list(get_args(hint))
        return type(choices[0]), choices, False
    if get_origin(hint) is list:
        return (*_kind(get_args(hint)[0])[:2], True)
    return hint, None, False


def _help(option: Option, declared: dict[str, Any]) -> str:
    text = option.metadata["help"] + " (required)" * option.metadata["required"]
    if "{" not in text or option.group not in ("model", "actor", "critic"):
        return text.replace("%", "%%")
    rates = declared["defaults"].get("rates", RoleConfig.rates)
    shown = f"{rates.full:g}"
    if rates.with_lora != rates.full:
        shown += f", with LoRA {rates.with_lora:g}"
    return text.format(prefix=declared["prefix"], rates=shown, adapter_rate=rates.adapters)


def _resolve(args: Any) -> Any:
    """Fill in the defaults that depend on other flags: learning rates, `only_optimize_lora`."""
    only_lora = args.lora.only_optimize_lora
    if only_lora is None:
        only_lora = any(role.lora_dim for role in roles(args).values())
    changes: dict[str, Any] = {"lora": replace(args.lora, only_optimize_lora=only_lora)}
    for name, role in roles(args).items():
        rate, adapters, rates = role.learning_rate, role.lora_learning_rate, role.rates
        if role.lora_dim and adapters is None:
            adapters = rates.adapters if rate is None else rate
        if rate is None:
            rate = rates.with_lora if role.lora_dim else rates.full
        changes[name] = replace(role, learning_rate=rate, lora_learning_rate=adapters)
    return replace(args, **changes)


# --- checks --------------------------------------------------------------------------------------


def _check_values(args: Any, given: frozenset[str]) -> None:
    """Check each value on its own: texts not empty, numbers in range, flags available."""
    for option, value in values(args):
        if option.metadata["required"] and option.flag not in given:
            raise UserError(f"--{option.flag} is required: {option.metadata['help']}")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip() and option.flag in given:
                _refuse(option.flag, text, "is empty; give a value or remove the flag")
        if option.flag == "data_split" and value is not None:
            _check_split(value)
        for part in (option.hint, *get_args(option.hint)):
            for bound in getattr(part, "__metadata__", ()):
                if isinstance(bound, Bound) and value is not None and not bound.holds(value):
                    _refuse(option.flag, value, bound.text)
        reason = option.metadata["unavailable"]
        if reason and value != option.default:
            _refuse(option.flag, value, f"not available in this version: {reason}; remove the flag")


def _check_step(args: StepConfig) -> None:
    if isinstance(args, Step3Config):
        _check_step3(args)
    if args.data.shares[args.step - 1] == 0:
        _refuse("data_split", args.data.data_split,
                f"leaves no data for step {args.step}; give its share, number {args.step} of the "
                "three, a value above 0")
    _check_plan(args.run)
    _check_lora(args)
    _check_quantization(args)
    _check_engine(args)
    if args.run.output_dir is None:
        checkpoint = args.checkpoint
        if checkpoint.save_steps:
            _refuse("save_steps", checkpoint.save_steps,
                    "needs --output_dir; give it or remove the flag")
        if checkpoint.resume_from_checkpoint == "latest":
            _refuse("resume_from_checkpoint", "latest", "needs --output_dir, whose checkpoints it "
                    "looks at; give it, or the folder of a checkpoint")


def _check_plan(run: RunConfig) -> None:
    """Check the flags that only a dry run has."""
    for flag, name, expected in (
            ("fit", "fit_bytes", "a size of memory above 0, such as 24GB"),
            ("speed", "speeds", "two numbers above 0, TFLOP/s and GB/s, such as 71,936")):
        value = getattr(run, flag)
        if value is not None and not run.dry_run:
            _refuse(flag, value, "needs --dry_run; give it or remove the flag")
        try:
            getattr(run, name)
        except ValueError:
            _refuse(flag, value, f"must be {expected}")


def _check_lora(args: StepConfig) -> None:
    """Refuse what only LoRA can use, without LoRA."""
    for role in roles(args).values():
        if role.lora_dim == 0 and role.lora_learning_rate is not None:
            _refuse(f"{role.prefix}lora_learning_rate", role.lora_learning_rate,
                    f"needs LoRA; give {role.flag('lora_dim')} or remove the flag")
    if any(role.lora_dim for role in roles(args).values()):
        return
    lora = args.lora
    for flag, value in (("only_optimize_lora", lora.only_optimize_lora),
                        ("lora_alpha", lora.lora_alpha), ("lora_dropout", lora.lora_dropout),
                        ("load_in_4bit", lora.load_in_4bit), ("load_in_8bit", lora.load_in_8bit)):
        if value:
            ranks = " or ".join(role.flag("lora_dim") for role in roles(args).values())
            _refuse(flag, value, f"needs LoRA; give {ranks}, or remove the flag")


def _check_quantization(args: StepConfig) -> None:
    """Refuse what quantized weights do not go with; `_check_lora` has seen that there is LoRA."""
    lora = args.lora
    if lora.load_in_4bit and lora.load_in_8bit:
        _refuse("load_in_8bit", True, "contradicts --load_in_4bit; remove one of the two")
    if lora.bits is None:
        return
    flag = f"--load_in_{lora.bits}bit"
    if lora.only_optimize_lora is False:
        _refuse("only_optimize_lora", False, f"does not go with {flag}: quantized weights cannot "
                "be trained; remove one of the two")
    for role in roles(args).values():
        if role.lora_dim and role.zero_stage == 3:
            _refuse(f"{role.prefix}zero_stage", 3, f"does not go with {flag}: ZeRO-3 cannot shard "
                    "quantized weights, nor --offload move them; take 2")
    if isinstance(args, Step3Config) and args.actor.lora_dim and (
            args.rollout_engine.rollout_engine == "vllm"):
        _refuse("rollout_engine", "vllm", f"does not go with {flag}: the servers would compute "
                "with weights that are not quantized; take native")


def _check_engine(args: StepConfig) -> None:
    if args.engine.deepspeed_config is not None:
        _read_mapping("deepspeed_config", args.engine.deepspeed_config)
    given = {option.flag: value for option, value in values(args)}
    for role in roles(args).values():
        if given[f"disable_{role.prefix}dropout"] and role.dropout:
            _refuse(f"{role.prefix}dropout", role.dropout,
                    f"contradicts --disable_{role.prefix}dropout; remove one of the two")
        if args.engine.offload and role.zero_stage == 0:
            _refuse("offload", True,
                    f"needs ZeRO; give {role.flag('zero_stage')} 1, 2 or 3, or remove the flag")


def _check_step3(args: Step3Config) -> None:
    for role, step in ((args.actor, 1), (args.critic, 2)):
        if not role.model_name_or_path:
            raise UserError(f"{role.flag('model_name_or_path')} is required: the folder step "
                            f"{step} wrote, or a hub id")
    if args.sampling.temperature == 0:
        _refuse("temperature", 0.0, "must be above 0")
    if args.hybrid.hybrid_engine_backend == "deepspeed":
        _refuse("hybrid_engine_backend", "deepspeed", "DeepSpeed's own kernels leave LoRA adapters "
                "out and do not follow today's LLaMA; take native, or remove the flag")
    batch, responses = args.rollout.per_device_generation_batch_size, args.sampling.num_generations
    if batch % responses:
        _refuse("num_generations", responses,
                f"must divide --per_device_generation_batch_size {batch}, which counts rollouts; "
                f"try {_near_divisors(batch, responses)}")
    batches, micro = args.rollout.generation_batches, args.ppo.per_device_training_batch_size
    if batch * batches % micro:
        _refuse("per_device_training_batch_size", micro,
                f"must divide the {batch * batches} rollouts of a PPO iteration "
                f"(--per_device_generation_batch_size {batch} x --generation_batches {batches}); "
                f"try {_near_divisors(batch * batches, micro)}")
    if args.roles.share_backbone:
        _check_shared_backbone(args)
    if args.rollout_engine.rollout_engine == "vllm" and not args.rollout_engine.urls:
        _refuse("rollout_engine", "vllm", "needs --vllm_url; give the servers that "
                "scripts/serve_rollouts.sh has started")
    urls = args.rollout_engine.urls
    if len(set(urls)) < len(urls):
        _refuse("vllm_url", " ".join(urls), "names a server twice; name each once")
    function = args.reward.reward_function
    name = r"[^\W\d]\w*"
    if function is not None and not re.fullmatch(rf"{name}(\.{name})*:{name}", function):
        _refuse("reward_function", function, "must be module:name, such as my_rewards:length")
    if args.reward.kl_controller == "adaptive" and args.reward.kl_coef == 0:
        _refuse("kl_coef", 0, "--kl_controller adaptive multiplies it, and 0 would stay 0; give "
                "a start above 0, such as 0.05")
    ppo = args.ppo
    if ppo.unsupervised_dataset_config_name is not None and ppo.unsupervised_dataset_name is None:
        _refuse("unsupervised_dataset_config_name", ppo.unsupervised_dataset_config_name,
                "needs --unsupervised_dataset_name; give it or remove the flag")


def _check_shared_backbone(args: Step3Config) -> None:
    for role in (args.actor, args.critic):
        if not role.lora_dim or args.lora.only_optimize_lora is False:
            raise UserError(f"--share_backbone: needs {role.flag('lora_dim')}, the rank that the "
                            "adapter of the earlier step has, and --only_optimize_lora")
        if role.zero_stage == 3:
            _refuse(f"{role.prefix}zero_stage", 3, "does not go with --share_backbone: the "
                    "engines of actor and critic would each gather and release the shared "
                    "weights; take 2")
        if role.lora_module_name is not None:
            _refuse(f"{role.prefix}lora_module_name", role.lora_module_name, "has no use with "
                    "--share_backbone: the adapters of steps 1 and 2 are taken; leave it out")


# --- small helpers -------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _refuse(flag: str, value: Any, why: str) -> NoReturn:
    shown = "" if value is True else " " + shlex.quote(str(value))
    raise UserError(_one_line(f"--{flag}{shown}: {why}"))


def _near_divisors(total: int, wanted: int) -> str:
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    below, above = [n for n in divisors if n < wanted][-1:], [n for n in divisors if n > wanted][:1]
    return " or ".join(map(str, below + above))


def _read_mapping(flag: str, path: str) -> dict[Any, Any]:
    """Read a mapping from a JSON file, or for `--config` from a YAML file too; empty is {}.

    Raises:
        UserError: names the file, the mistake and its line.
    """
    as_json = flag != "config" or ".json" in path.lower()[-9:]
    try:
        text = read_text(Path(path))
        content = json.loads(text) if as_json else yaml.safe_load(text)
    except FileNotFoundError:
        problem = "no such file"
    except UserError as error:
        raise UserError(f"--{flag} {_one_line(str(error))}") from error
    except UNREADABLE as error:
        problem = f"can not be read: {getattr(error, 'strerror', None) or error}"
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}: not valid JSON: {error.msg}"
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = f"{line}not valid YAML: {error.problem}"
    except (yaml.YAMLError, ValueError) as error:
        problem = f"not valid {'JSON' if as_json else 'YAML'}: {error}"
    else:
        if content is None and not as_json:
            return {}
        if isinstance(content, dict):
            return content
        problem = "must hold a mapping of names to values"
    _refuse(flag, path, problem)
