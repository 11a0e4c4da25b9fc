"""Memory, disk and time of a run by phase, from its arguments and the models' configurations.

    found = plan(args, Place(ranks=2, cpu=False))
    found.worst.device                           # {"weights: actor": 13.5e9, ...}, bytes of a rank

No weights are loaded. Activations, logits and KV cache come from `model.footprint`, which runs the
models' own code; weights, optimizer and DeepSpeed's buffers are counted (Rajbhandari et al. 2020,
section 3; Hu et al. 2021; Dettmers et al. 2023 for 4 bits). docs/memory.md compares the plan with
what runs have taken. Sequences are as long as the limits, or as the longest one of the data.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from alpaca_rlhf.utils import distributed, ds_config, preflight
from alpaca_rlhf.utils.configs import Step1Config, Step3Config, StepConfig
from alpaca_rlhf.utils.engine import LARGEST_BUCKET
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.kv_cache import SLACK
from alpaca_rlhf.utils.memory import footprint
from alpaca_rlhf.utils.memory.footprint import Job, Moment, Passes
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import load_config
from alpaca_rlhf.utils.model.reward_model import ScoreHead
from alpaca_rlhf.utils.preflight import Planned
from alpaca_rlhf.utils.projection import MOST_LOGITS

# Bytes per trained parameter, in fp32: Adam's moments; master weights; sums of gradients.
MOMENTS, MASTER_COPY, GRADIENT = 8, 4, 4
# DeepSpeed's defaults under ZeRO-3, in elements: what stays gathered between the passes, what is
# gathered ahead, and up to which size a parameter is kept whole beside its shard.
GATHERED, PREFETCHED, KEPT_WHOLE = 1e9, 5e7, 1e5
# Bytes per quantized weight: NF4 with a scale in 8 bits for 64 of them and an fp32 one for 256 of
# these; LLM.int8.
NF4, INT8 = 0.5 + 1 / 64 + 4 / (64 * 256), 1.0
AMPLE = 100  # times its width: more numbers than a layer keeps of a token
CONTEXT = 0.5e9  # of an accelerator's runtime on the device

Parts = dict[str, float]  # name of a part -> bytes


class Speed(NamedTuple):
    """FLOP/s of matrix products and bytes/s of memory, of one device."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Place:
    """Where a run is planned.

    Attributes:
        ranks: number of processes.
        cpu: device and host are the same memory.
        process: bytes that each process holds besides.
        longest: tokens of the longest sequence (step 3: prompt); None: as the flags allow.
        speed: of the device; None leaves the time out.
    """

    ranks: int = 1
    cpu: bool = True
    process: float = 0.0
    longest: int | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Phase:
    """Peak bytes of a rank by part, on its device and in host memory, and seconds of the work."""

    name: str
    device: Parts
    host: Parts = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.device.values())


@dataclass(frozen=True)
class Plan:
    """The phases of a run in their order, and bytes on disk by part.

    Attributes:
        phases, disk: as said.
        weights: bytes of all weights on one rank.
    """

    phases: list[Phase]
    disk: Parts
    weights: float

    @property
    def worst(self) -> Phase:
        """The phase that needs most of the device."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        """Bytes that a rank needs on its device."""
        return self.worst.total

    @property
    def host(self) -> float:
        """Bytes that a rank needs in host memory beside those of the device."""
        return max(sum(phase.host.values()) for phase in self.phases)


# --- models --------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Numbers of parameters.

    Attributes:
        base: of the model without its adapter.
        adapter: of an adapter, its head included.
        trained: of these two.
        linear: in linear layers of the decoder, which can be quantized.
        largest: in the largest of these.
        adapted: in weights with an adapter.
        laid_out: in weights that the compiled decoding step copies; 0 if there is no such step.
        small: of parameters that ZeRO-3 keeps whole.
        heaviest: of the largest weight.
    """

    base: int
    adapter: int
    trained: int
    linear: int
    largest: int
    adapted: int
    laid_out: int
    small: int
    heaviest: int


def sizes(model: Planned) -> Sizes:
    """Count a model's parameters without allocating them.

    Raises:
        UserError: there is no such model, or `--lora_module_name` matches nothing in it.
    """
    return _sizes(_key(model))


def _key(model: Planned) -> Planned:
    """Return the model without what changes neither its size nor its passes."""
    role = replace(model.role, learning_rate=0.0, lora_learning_rate=None, weight_decay=0.0,
                   zero_stage=0, gradient_checkpointing=False)
    adapters = replace(model.adapters, load_in_4bit=False, load_in_8bit=False)
    return Planned(role, model.loading, adapters, scores=model.scores)


@cache
def _sizes(model: Planned) -> Sizes:
    made, rank = preflight.empty(model), model.role.lora_dim
    heads = (made.get_output_embeddings(), getattr(made, "score", None))
    inside = [part.weight.numel() for part in made.modules()
              if isinstance(part, nn.Linear) and part not in heads]
    every = [weight.numel() for weight in made.parameters()]
    head = getattr(made, "score", None)
    targets = [lora.target_weight(made, name) for name in lora.match_modules(made, model.role)
               ] if rank else []
    pairs = [rank * side * (len(weight) if weight.dim() == 3 else 1)
             for weight in targets for side in weight.shape[-2:]]
    adapter = sum(pairs) + (sum(w.numel() for w in head.parameters()) if rank and head else 0)
    only = lora.base_is_frozen(model.role, model.adapters)
    compiled = not model.scores and LlamaStep.objection(made) in (None, LlamaStep.FOR_CPUS)
    return Sizes(
        base=sum(every), adapter=adapter, trained=adapter if only else sum(every) + adapter,
        linear=sum(inside), largest=max(inside, default=0),
        adapted=sum(weight.numel() for weight in targets),
        laid_out=sum(inside) + heads[0].weight.numel() if compiled else 0,
        small=sum(n for n in [*every, *pairs] if n <= KEPT_WHOLE),
        heaviest=max(every),
    )


def passes(model: Planned, job: Job) -> Passes:
    """Return what a micro-batch takes in a model; see `footprint.passes`.

    Raises:
        UserError: its layers need data to run, as some that choose experts do.
    """
    return _passes(_key(model), job)


@cache
def _passes(model: Planned, job: Job) -> Passes:
    role = model.role

    def adapted(made: Any) -> Any:
        if model.scores:
            made.score = ScoreHead(made.score)
        if not role.lora_dim:
            return made
        return lora.add_lora(made, lora.match_modules(made, role), role, model.adapters)

    try:
        return footprint.passes(preflight.empty(model).to(model.dtype), job, adapted)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise UserError(f"{role.model_name_or_path}: its memory cannot be planned, for its layers "
                        f"do not run on tensors without data ({reason}); the run itself needs "
                        "no plan") from error


class _Model:
    """A planned model in its place, and what stands of it all the time."""

    def __init__(self, planned: Planned, place: Place) -> None:
        role, dtype = planned.role, planned.dtype
        self.planned, self.place = planned, place
        self.sizes, self.width = sizes(planned), dtype.itemsize
        self.stage = ds_config.effective_stage(role.zero_stage, dtype)
        self.name = role.prefix.rstrip("_") or "model"
        self.frozen = lora.base_is_frozen(role, planned.adapters)

    @property
    def shares(self) -> int:
        """Number of ranks that share the weights."""
        return self.place.ranks if self.stage == 3 else 1

    @property
    def base(self) -> float:
        """Bytes of the weights without adapter on one rank, whole (ZeRO-3: its shard)."""
        bits, linear = self.planned.bits, self.sizes.linear
        width = NF4 if bits == 4 else INT8 if bits == 8 else self.width
        own = linear * width + (self.sizes.base - linear) * self.width
        kept = self.sizes.small * self.width if self.shares > 1 else 0
        return own / self.shares + kept

    @property
    def bucket(self) -> float:
        """Bytes of DeepSpeed's buffer for gradients, in fp32."""
        return GRADIENT * min(LARGEST_BUCKET, self.sizes.trained)

    def gathered(self, at_start: bool = True) -> float:
        """Bytes that ZeRO-3 gathers for a pass beside the shards; or of a dequantized weight.

        `at_start`: with what is gathered ahead then, before there are activations.
        """
        base = self.sizes.base
        if self.planned.bits is not None:
            return self.width * self.sizes.largest
        ahead = min(base, PREFETCHED) if at_start else 0.0
        return self.width * (min(base, GATHERED) + ahead) if self.shares > 1 else 0.0

    def weights(self, shared: bool) -> tuple[Parts, Parts]:
        """Return the weights on the device and in host memory, frozen copies among them."""
        planned, other = self.planned, {"actor": "reference model"}.get(self.name, "reward model")
        adapter = self.sizes.adapter * self.width / self.shares
        if shared:
            base = {"weights: shared base": self.base} if self.name == "actor" else {}
            both = 2 if planned.needs_frozen_copy else 1
            return base | {f"adapters: {self.name}, {other}": both * adapter}, {}
        device, host = {f"weights: {self.name}": self.base}, Parts()
        if adapter:
            device[f"adapters: {self.name}"] = adapter
        if planned.needs_frozen_copy and not self.frozen:
            moved = planned.engine.offload or planned.offloads_frozen_copy
            (host if moved and self.stage == 3 else device)[f"weights: {other}"] = self.base
        if planned.engine.offload and self.stage == 3:
            host[f"weights: {self.name}"] = device.pop(f"weights: {self.name}")
        return device, host

    def states(self) -> tuple[Parts, Parts]:
        """Return optimizer states, and the buffers that ZeRO-3 keeps, on device and host."""
        trained, ranks = self.sizes.trained, self.place.ranks
        copies = MOMENTS + (MASTER_COPY if self.stage else 0)
        states = {f"optimizer: {self.name}": copies * trained / (ranks if self.stage else 1)}
        kept: Parts = {}
        if self.stage == 3:
            kept = {"gradients": GRADIENT * trained / ranks, "buckets": self.bucket}
        return (kept, states) if self.planned.engine.offload else (states | kept, {})

    def moments(self, job: Job, accumulates: bool) -> list[Parts]:
        """Return what passes add: at the start, early, late (see `Passes`), and at the end."""
        trained, ranks = self.sizes.trained, self.place.ranks
        found, sums = passes(self.planned, job), GRADIENT * trained / (
            ranks if self.stage > 1 else 1)
        gradients, buckets, end = sums, self.bucket, 2 * self.bucket  # stages 1 and 2
        if self.stage == 0:
            buckets, end = 0.0, self.bucket if ranks > 1 else 0.0
        elif self.stage == 3:
            gradients = buckets = 0.0  # they stand all the time
        elif not accumulates and self.width == GRADIENT:
            gradients = 0.0
        during = [{"activations": peak.activations, "logits": peak.logits,
                   "gathered or dequantized": self.gathered(at_start=False),
                   "buckets": min(buckets, peak.gradients * GRADIENT / self.width)
                   if self.place.cpu else buckets,  # which is there as it is filled
                   "gradients": gradients if self.stage or accumulates else peak.gradients}
                  for peak in (found.early, found.late)]
        return [{"gathered or dequantized": self.gathered()}, *during,
                {"gradients": gradients, "buckets": end}]

    def export(self) -> float:
        """Bytes of the whole model in its precision, as it is exported."""
        return self.sizes.base * self.width


def held(model: Planned, ranks: int = 1) -> float:
    """Return bytes of a rank before an optimizer step: weights, optimizer states and gradients."""
    made = _Model(model, Place(ranks))
    states = sum(sum(parts.values()) for parts in made.states())
    sums = GRADIENT * made.sizes.trained / (ranks if made.stage > 1 else 1)
    return made.base + made.sizes.adapter * made.width + states + (sums if made.stage < 3 else 0)


# --- phases --------------------------------------------------------------------------------------


def _sum(*parts: Mapping[str, float]) -> Parts:
    """Add up parts of the same name; leave out what is nothing."""
    names = dict.fromkeys(name for some in parts for name in some)
    totals = {name: sum(some.get(name, 0.0) for some in parts) for name in names}
    return {name: total for name, total in totals.items() if total}


def _most(moments: list[Parts]) -> Parts:
    return max(moments, key=lambda parts: sum(parts.values()))


def _inference(moment: Moment, gathered: float = 0.0) -> Parts:
    return {"activations": moment.activations, "logits": moment.logits,
            "gathered or dequantized": gathered}


def _checkpoint(model: _Model) -> float:
    """Bytes of a checkpoint on disk: trained weights, master copy and moments."""
    return model.sizes.trained * (model.width + MOMENTS + (MASTER_COPY if model.stage else 0))


def plan(args: StepConfig, place: Place) -> Plan:
    """Return the plan of a step.

    Raises:
        UserError: there is no such model, or it is of a kind that is not served.
    """
    models = [_Model(planned, place) for planned in preflight.planned(args)]
    shared = isinstance(args, Step3Config) and args.roles.share_backbone
    weights = [model.weights(shared) for model in models]
    states = [model.states() for model in models]
    own = {"process": place.process} if place.cpu else {"process": CONTEXT}
    loaded = [_sum(own, *(pair[0] for pair in weights)), _sum(*(pair[1] for pair in weights))]
    device = _sum(loaded[0], *(pair[0] for pair in states))
    host = _sum(loaded[1], *(pair[1] for pair in states))
    largest = max(model.export() for model in models)
    reading = {"file being read": largest} if place.cpu else {}
    found = _ppo(args, models, place) if isinstance(args, Step3Config) else _supervised(
        args, models[0], place)
    # While it is written, the largest weight is there twice more.
    exported = max(model.export() + 2 * model.sizes.heaviest * model.width for model in models)
    saving = {"export": exported} if args.run.output_dir else {}
    phases = [Phase("load", _sum(loaded[0], reading), loaded[1]), *(
        Phase(name, _sum(device, parts), host, seconds) for name, parts, seconds in found)]
    phases.append(Phase("save", _sum(device, saving if place.cpu else {}),
                        _sum(host, {} if place.cpu else saving)))
    if place.cpu:  # the same memory
        phases = [replace(phase, device=_sum(phase.device, phase.host), host={})
                  for phase in phases]
    disk: Parts = {}
    if args.run.output_dir:
        kept = args.checkpoint.save_total_limit + 1  # the next is complete before one is removed
        disk = {f"{kept} checkpoints": kept * sum(map(_checkpoint, models)),
                "export": sum(model.export() for model in models)}
    total = sum(sum(part.values()) for part in loaded) - sum(own.values())
    return Plan(phases, disk, total)


def bound(args: Any, place: Place) -> float:
    """Return bytes that a rank never exceeds, far more than it needs, without tracing a pass."""
    models = [_Model(planned, place) for planned in preflight.planned(args)]
    if isinstance(args, Step3Config):
        rows = args.rollout.per_device_generation_batch_size
    else:
        rows = 2 * args.batches.per_device_eval_batch_size
    total = place.process if place.cpu else CONTEXT
    for model in models:
        job = _job(model, args)
        config = load_config(model.planned.role, model.planned.loading).get_text_config()
        layers, width = (getattr(config, name, None) for name in (
            "num_hidden_layers", "hidden_size"))
        if not layers or not width:
            return float("inf")  # a configuration of another kind
        if model.planned.loading.attn_implementation == "eager":
            width += config.num_attention_heads * job.length
        kept = width * (AMPLE * layers * job.rows + (2 * AMPLE + 2 * layers) * rows)
        weights = 4 * model.sizes.base * GRADIENT  # a copy, gathered or folded, exported
        trained = model.sizes.trained * (MOMENTS + MASTER_COPY + 4 * GRADIENT)
        total += weights + trained + job.length * kept * GRADIENT
    return total + 8 * MOST_LOGITS * GRADIENT


def activations(args: StepConfig, place: Place) -> list[float]:
    """Return bytes of activations and logits of a micro-batch, without and with checkpointing."""
    model = _Model(preflight.planned(args)[0], place)
    return [sum(passes(model.planned, _job(model, args)._replace(checkpointing=on)).training[:2])
            for on in (False, True)]


def _job(model: _Model, args: Any) -> Job:
    """Return the largest micro-batch of a model's training."""
    place, accumulation = model.place, args.schedule.gradient_accumulation_steps
    if isinstance(args, Step3Config):
        prompt = min(args.rollout.max_prompt_seq_len, place.longest or 10**9)
        response = args.sampling.max_new_tokens
        rows, length = args.ppo.per_device_training_batch_size, prompt + response
    else:
        rows, response = args.batches.per_device_train_batch_size, 0
        length = min(args.batches.max_seq_len, place.longest or 10**9)
        rows *= 1 if isinstance(args, Step1Config) else 2
    if args.schedule.max_tokens_per_micro_batch:
        most = max(1, args.schedule.max_tokens_per_micro_batch // length)
        rows = min(rows * accumulation, most)
    return Job(rows, length, rows * (response or length), policy=bool(response),
               checkpointing=model.planned.role.gradient_checkpointing)


Found = list[tuple[str, Parts, float]]  # phase, what comes on top of what stands, seconds


def _supervised(args: Any, model: _Model, place: Place) -> Found:
    """Return the phases of steps 1 and 2 between loading and saving."""
    job, accumulation = _job(model, args), args.schedule.gradient_accumulation_steps
    rows = args.batches.per_device_eval_batch_size * (1 if isinstance(args, Step1Config) else 2)
    evaluated = passes(model.planned, job._replace(
        rows=rows, tokens=rows * job.length, checkpointing=False, trains=False))
    flops = accumulation * passes(model.planned, job).training_flops
    update = _most(model.moments(job, accumulation > 1))
    return [("evaluation", _inference(evaluated.inference, model.gathered()), 0.0),
            ("update", update, flops / place.speed.flops if place.speed else 0.0)]


def _ppo(args: Step3Config, models: list[_Model], place: Place) -> Found:
    """Return rollout, scoring and update."""
    actor, critic = models
    jobs = [_job(model, args) for model in models]
    found = [passes(model.planned, job) for model, job in zip(models, jobs, strict=True)]
    accumulation = args.schedule.gradient_accumulation_steps
    rollouts = args.rollout.per_device_generation_batch_size * args.rollout.generation_batches
    count = rollouts / jobs[0].rows  # micro-batches of an iteration
    cache, step, seconds = _generation(args, actor, found[0].cache)
    stays = _sum({} if args.hybrid.release_inference_cache else _sum(cache, step), {
        "EMA": 4 * actor.sizes.trained / (place.ranks if actor.stage else 1)
    } if args.ppo.enable_ema else {})
    alone = [_inference(one.inference, model.gathered())
             for model, one in zip(models, found, strict=True)]
    scoring, kept = _most(alone), Parts()
    moments = [model.moments(job, accumulation > 1)
               for model, job in zip(models, jobs, strict=True)]
    repeatable = not (args.actor.dropout or args.critic.dropout or args.lora.lora_dropout) and max(
        args.actor.zero_stage, args.critic.zero_stage) < 3
    if repeatable and args.ppo.ppo_epochs == 1 and count <= 1:  # the graphs of scoring are used
        graphs = {"activations": found[0].saved + found[1].saved}
        scoring, kept = _sum(graphs, _most(alone)), {"activations": found[0].saved}
    update = _most([*moments[0], *(_sum(kept, parts) for parts in moments[1])])
    if args.ppo.unsupervised_dataset_name:
        text = jobs[0]._replace(tokens=jobs[0].rows * jobs[0].length, policy=False)
        update = _most([update, *actor.moments(text, True)])
    times = (0.0, 0.0, 0.0)
    if place.speed:
        scored = 2 * count * sum(one.inference_flops for one in found)
        epochs = args.ppo.ppo_epochs * count * sum(one.training_flops for one in found)
        times = (seconds, scored / place.speed.flops, epochs / place.speed.flops)
    ema = {"EMA": stays.get("EMA", 0.0)}
    return [("rollout", _sum(ema, cache, step, _rollout(args, actor, jobs[0])), times[0]),
            ("scoring", _sum(stays, scoring), times[1]), ("update", _sum(stays, update), times[2])]


def _generation(
    args: Step3Config, actor: _Model, token: float
) -> tuple[Parts, Parts, float]:
    """Return KV cache, what the decoding step copies, and seconds of an iteration's rollouts."""
    if args.rollout_engine.rollout_engine == "vllm":
        return {}, {}, 0.0
    rows, new = args.rollout.per_device_generation_batch_size, args.sampling.max_new_tokens
    prompt, speed = _job(actor, args).length - new, actor.place.speed
    cache = {"KV cache": token * rows * (prompt + new + SLACK)}
    step: Parts = {}
    if args.hybrid.enable_hybrid_engine and actor.place.cpu and actor.sizes.laid_out:
        width = 0 if actor.width == GRADIENT else GRADIENT  # adapters that are not merged
        step = {"weights for decoding": actor.sizes.laid_out * actor.width
                + width * actor.sizes.adapter}
    if speed is None:
        return cache, step, 0.0
    read = actor.export() if actor.shares > 1 else actor.base
    per_step = (read + token * rows * (prompt + new / 2)) / speed.bandwidth
    filled = passes(actor.planned, Job(rows, prompt, rows, trains=False)).inference_flops
    seconds = filled / speed.flops + new * per_step
    return cache, step, args.rollout.generation_batches * seconds


def _rollout(args: Step3Config, actor: _Model, job: Job) -> Parts:
    """Return what a rollout takes beside KV cache and decoding step, until it ends."""
    if args.rollout_engine.rollout_engine == "vllm":
        return {}
    rows, hybrid = args.rollout.per_device_generation_batch_size, args.hybrid.enable_hybrid_engine
    prompt = job.length - args.sampling.max_new_tokens
    filled = passes(actor.planned, Job(rows, prompt, rows, trains=False))
    parts = _inference(filled.inference, actor.gathered())
    parts["KV cache"] = filled.cache * rows / args.sampling.num_generations * prompt
    whole = hybrid and not args.hybrid.unpin_actor_parameters
    if actor.shares > 1 and whole:
        parts["gathered or dequantized"] = actor.export()
    elif hybrid and actor.width == GRADIENT:
        parts["folded weights"] = actor.sizes.adapted * GRADIENT
    return parts


# --- speed ---------------------------------------------------------------------------------------


@cache
def measured_speed(dtype: torch.dtype) -> Speed:
    """Measure matrix products and copies on this device, each for some hundredths of a second."""
    device = distributed.device()
    x, weight = (torch.ones(n, 1024, dtype=dtype, device=device) for n in (512, 1024))
    block = torch.ones(2**24, device=device)
    product = _seconds(lambda: nn.functional.linear(x, weight))
    return Speed(2 * x.numel() * len(weight) / product, 2 * block.nbytes / _seconds(block.clone))


def _seconds(run: Any) -> float:
    """Return the shortest time of some runs."""
    best, end = float("inf"), time.perf_counter() + 0.05
    for _ in range(100):
        start = time.perf_counter()
        run()
        get_accelerator().synchronize()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best
