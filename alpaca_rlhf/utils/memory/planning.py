"""Needs of a run, said before it loads any weights: `--dry_run`, `--fit` and a warning.

    python main.py --dry_run                     # the plan, and what would lower it
    python main.py --dry_run --fit 24GB          # the cheapest flags with which it fits

`memory_plan` computes the numbers; here they are compared with the memory that is free, and flags
are tried in the order of what they cost.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from alpaca_rlhf.utils import console, distributed, preflight
from alpaca_rlhf.utils.configs import RoleConfig, Step3Config, StepConfig, groups, options
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.memory import memory_plan
from alpaca_rlhf.utils.memory.memory_plan import Parts, Phase, Place, Plan, Speed
from alpaca_rlhf.utils.model.weights.backbone import has_adapter, require_shareable

GB = 1e9
WORTH_A_FLAG = 0.01  # share of the peak that a flag must save to be named


def check(args: StepConfig) -> None:
    """Make the checks of `preflight`, and warn where the plan exceeds the memory that is free.

    Raises:
        UserError: as `preflight.check`; or not even the weights fit.
    """
    models = preflight.planned(args)
    preflight.check(models, args.tracking.trackers)
    if isinstance(args, Step3Config) and args.roles.share_backbone and not (
            args.run.dry_run and not has_adapter(args.actor)):
        require_shareable((args.actor, args.critic), args.lora)
    if args.run.dry_run or not all(
            preflight.has_config(model.role.model_name_or_path) for model in models):
        return
    warning = memory_warning(args)
    if warning:
        console.say(warning)


def memory_warning(args: StepConfig) -> str | None:
    """Return a warning with a remedy if the run will not fit into the free memory, else None.

    Raises:
        UserError: not even the weights fit.
    """
    place = Place(distributed.world_size(), distributed.on_cpu())
    device, host = distributed.free_memory()
    try:
        if memory_plan.bound(args, place) < min(device, host):
            return None
        found = memory_plan.plan(args, place)
    except UserError as error:
        return f"warning: {error}"
    if found.peak <= device and (found.peak if place.cpu else 0.0) + found.host <= host:
        return None
    free = f"{device / GB:.1f} GB are free"
    if not place.cpu:
        free += f" on the device and {host / GB:.1f} GB in host memory"
    limits = (device, device if place.cpu else host)
    if found.weights > (device if place.cpu else device + host):
        raise UserError(f"the weights alone take {found.weights / GB:.1f} GB on each rank, and "
                        f"{free}; {_remedy(args, place, limits)}")
    takes = f"{found.peak / GB:.1f} GB"
    if found.host > host:
        takes += f" and {found.host / GB:.1f} GB of host memory"
    return (f"warning: phase {found.worst.name} takes {takes} on each rank, most of it "
            f"{_largest(found.worst)}, and {free}; {_remedy(args, place, limits)}")


def _remedy(args: StepConfig, place: Place, limits: tuple[float, float]) -> str:
    flags = fit(args, place, *limits)
    if flags:
        return f"try {flags[1]}"
    return "take a smaller model, or more ranks and --zero_stage 3"


def _largest(phase: Phase) -> str:
    parts = {name: size for name, size in phase.device.items() if name != "process"}
    return max(parts, key=lambda name: parts[name])


# --- flags that lower it -------------------------------------------------------------------------


def _roles(args: StepConfig) -> dict[str, RoleConfig]:
    return {name: getattr(args, name) for name, group, _ in groups(type(args))
            if group is RoleConfig}


def _with_roles(args: Any, **changes: Any) -> Any:
    return replace(args, **{name: replace(role, **changes) for name, role in _roles(args).items()})


def _bf16(args: Any, place: Place) -> Any:
    fp32 = distributed.resolve_dtype(args.loading.dtype).itemsize == 4
    elsewhere = place.cpu != distributed.on_cpu()
    if not fp32 or not (elsewhere or distributed.has_bf16()):
        return None
    return replace(args, loading=replace(args.loading, dtype="bf16"))


def _release_cache(args: Any, place: Place) -> Any:
    if not isinstance(args, Step3Config) or args.hybrid.release_inference_cache:
        return None
    return replace(args, hybrid=replace(args.hybrid, release_inference_cache=True))


def _micro_batch(args: Any, place: Place) -> Any:
    accumulation = 2 * args.schedule.gradient_accumulation_steps
    schedule = replace(args.schedule, gradient_accumulation_steps=accumulation)
    if isinstance(args, Step3Config):
        rows = args.ppo.per_device_training_batch_size
        smaller: Any = {"ppo": replace(args.ppo, per_device_training_batch_size=rows // 2)}
    else:
        rows = args.batches.per_device_train_batch_size
        smaller = {"batches": replace(
            args.batches, per_device_train_batch_size=rows // 2, per_device_eval_batch_size=min(
                rows // 2, args.batches.per_device_eval_batch_size))}
    return replace(args, schedule=schedule, **smaller) if rows % 2 == 0 else None


def _checkpointing(args: Any, place: Place) -> Any:
    if all(role.gradient_checkpointing for role in _roles(args).values()):
        return None
    return _with_roles(args, gradient_checkpointing=True)


def _generation_batch(args: Any, place: Place) -> Any:
    if not isinstance(args, Step3Config):
        return None
    rows, batches = args.rollout.per_device_generation_batch_size, args.rollout.generation_batches
    if rows % (2 * args.sampling.num_generations):
        return None
    return replace(args, rollout=replace(
        args.rollout, per_device_generation_batch_size=rows // 2, generation_batches=2 * batches))


def _stage(stage: int) -> "Change":
    def change(args: Any, place: Place) -> Any:
        lower = min(role.zero_stage for role in _roles(args).values()) < stage
        quantized = args.lora.bits is not None
        shares = isinstance(args, Step3Config) and args.roles.share_backbone
        if place.ranks == 1 or not lower or (stage == 3 and (quantized or shares)):
            return None
        return _with_roles(args, zero_stage=stage)
    return change


def _lora(args: Any, place: Place) -> Any:
    if any(role.lora_dim for role in _roles(args).values()):
        return None
    made = _with_roles(args, lora_dim=16)
    return replace(made, lora=replace(made.lora, only_optimize_lora=True))


def _frozen(args: Any) -> bool:
    """Return whether all bases are frozen, and whole on each rank."""
    return bool(args.lora.only_optimize_lora) and all(
        role.lora_dim and role.zero_stage < 3 for role in _roles(args).values())


def _share(args: Any, place: Place) -> Any:
    if not isinstance(args, Step3Config) or args.roles.share_backbone or not _frozen(args):
        return None
    return replace(args, roles=replace(args.roles, share_backbone=True))


def _quantize(bits: int) -> "Change":
    def change(args: Any, place: Place) -> Any:
        if (args.lora.bits or 16) <= bits or not _frozen(args):
            return None
        return replace(args, lora=replace(
            args.lora, load_in_4bit=bits == 4, load_in_8bit=bits == 8))
    return change


def _offload(args: Any, place: Place) -> Any:
    if place.cpu or args.engine.offload or _frozen(args):
        return None
    made = _with_roles(args, zero_stage=3)
    return replace(made, engine=replace(args.engine, offload=True))


Change = Callable[[Any, Place], Any]  # arguments -> changed ones, or None where it cannot be
# The cheapest first, in time and in what is learned.
CHANGES: tuple[Change, ...] = (
    _bf16, _release_cache, _stage(2), _micro_batch, _generation_batch, _checkpointing, _stage(3),
    _lora, _share, _quantize(8), _quantize(4), _offload)


def flags(before: StepConfig, after: StepConfig) -> str:
    """Return the flags by which two settings differ, as they are typed."""
    words = []
    for option in options(type(after)):
        was, now = (getattr(getattr(args, option.group), option.name) for args in (before, after))
        if was != now and now is not False and option.name != "only_optimize_lora":
            words.append(f"--{option.flag}" + ("" if now is True else f" {now}"))
    return " ".join(words)


def savings(args: StepConfig, place: Place, found: Plan) -> Iterator[tuple[str, float]]:
    """Yield flags, each by itself, and the bytes that they save at the peak: the cheapest first."""
    for change in CHANGES:
        changed = change(args, place)
        if changed is None:
            continue
        saved = found.peak - memory_plan.plan(changed, place).peak
        if saved > WORTH_A_FLAG * found.peak:
            yield flags(args, changed), saved


def fit(
    args: StepConfig, place: Place, device: float, host: float = float("inf")
) -> tuple[Any, str] | None:
    """Return the cheapest setting found that fits, and its flags; None if there is none.

    Changes are made in their order until it fits, and those that were not needed are taken back.

    Args:
        args: the setting to start from.
        place: ranks and device.
        device, host: bytes that a rank may take.
    """
    def fits(found: Plan) -> bool:
        return found.peak <= device and found.host <= host

    made, now, found = list[Change](), args, memory_plan.plan(args, place)
    for change in CHANGES:
        while not fits(found) and (next_one := change(now, place)) is not None:
            better = memory_plan.plan(next_one, place)
            if better.peak > (1 - WORTH_A_FLAG) * found.peak and better.host >= found.host:
                break
            made, now, found = [*made, change], next_one, better
    if not fits(found):
        return None
    for change in reversed(made[:-1]):
        fewer = list(made)
        fewer.remove(change)
        if fits(memory_plan.plan(_changed(args, fewer, place), place)):
            made = fewer
    now = _changed(args, made, place)
    return now, flags(args, now)


def _changed(args: Any, changes: list[Change], place: Place) -> Any:
    for change in changes:
        args = change(args, place) or args
    return args


# --- the report ----------------------------------------------------------------------------------


def report(args: StepConfig, longest: int) -> None:
    """Print the plan of a run, what would lower it, and, with `--fit`, a setting that fits.

    Args:
        args: the setting.
        longest: tokens of the longest sequence (step 3: prompt) of the data.

    Raises:
        UserError: nothing fits into the memory of `--fit`.
    """
    place = here(args, longest)
    limit = args.run.fit_bytes
    if limit is not None:
        found = fit(args, place, limit)
        if found is None:
            raise UserError(f"--fit {args.run.fit}: no setting of this model fits; take a smaller "
                            "model, shorter sequences or more ranks")
        args, changed = found
        console.say(f"fits into {limit / GB:g} GB with: {changed or 'the flags given'}")
    console.say(describe(args, place))


def here(args: StepConfig, longest: int | None = None) -> Place:
    """Return the place that a dry run plans for: this process, or with `--fit` an accelerator."""
    import psutil

    cpu, given = distributed.on_cpu() and args.run.fit is None, args.run.speeds
    speed = Speed(*given) if given else None
    if speed is None and cpu == distributed.on_cpu():
        speed = memory_plan.measured_speed(distributed.resolve_dtype(args.loading.dtype))
    return Place(ranks=distributed.world_size(), cpu=cpu, longest=longest, speed=speed,
                 process=psutil.Process().memory_info().rss)


def describe(args: StepConfig, place: Place) -> str:
    """Return the plan as a table, with the phase that decides and the flags that would lower it."""
    found = memory_plan.plan(args, place)
    worst = found.worst
    lines = [f"plan of each of {place.ranks} rank(s), peak GB by phase "
             + ("(device and host are the same memory)" if place.cpu else "on the device"),
             _table(found.phases, [phase.device for phase in found.phases])]
    if any(phase.host for phase in found.phases):
        lines += ["in host memory", _table(found.phases, [phase.host for phase in found.phases])]
    lines.append(f"{worst.name} decides: {worst.total / GB:.2f} GB, most of it {_largest(worst)}")
    lower = [f"{words} (-{saved / GB:.2f} GB)" for words, saved in savings(args, place, found)]
    lines.append("to lower it, cheapest first: " + ("; ".join(lower) or "no flag would"))
    plain, recomputed = (size / GB for size in memory_plan.activations(args, place))
    lines.append(f"activations and logits of a micro-batch: {plain:.2f} GB, with "
                 f"gradient checkpointing {recomputed:.2f} GB")
    parts = ", ".join(f"{name} {part / GB:.2f} GB" for name, part in found.disk.items())
    lines.append(f"disk: {parts or 'nothing, for there is no --output_dir'}")
    if place.speed:
        times = {phase.name: phase.seconds for phase in found.phases if phase.seconds}
        what = "PPO iteration" if isinstance(args, Step3Config) else "optimizer step"
        named = " + ".join(f"{name} {seconds:.2g}" for name, seconds in times.items())
        lines.append(
            f"estimated time of one {what} with sequences of the full length: {named} s at "
            f"{place.speed.flops / 1e12:.3g} TFLOP/s and {place.speed.bandwidth / GB:.3g} GB/s")
    return "\n".join(lines)


def _table(phases: list[Phase], columns: list[Parts]) -> str:
    names = dict.fromkeys(name for parts in columns for name in parts)
    rows = [[name, *(f"{parts[name] / GB:.2f}" if name in parts else "" for parts in columns)]
            for name in names]
    rows.append(["total", *(f"{sum(parts.values()) / GB:.2f}" for parts in columns)])
    return console.table(["", *(phase.name for phase in phases)], rows)
