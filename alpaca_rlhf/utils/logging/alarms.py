"""Alarms for PPO runs that go wrong while the loss looks fine, from the metrics of the iterations.

Each alarm says what was seen and what to do, once per run. The thresholds are in `Limits`; a
healthy run of the embedded pipeline stays well within them (docs/tracking.md has its figures).

    alarms = Alarms(Limits())
    for metrics in iterations:
        for alarm in alarms.check(metrics):
            print(alarm.kind, alarm.message)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]

UNLIMITED = float("inf")


@dataclass(frozen=True)
class Limits:
    """Thresholds of the alarms.

    Attributes:
        window: number of iterations, the first and the latest, whose means are compared.
        first_log_ratio_max, first_log_ratio_mean: largest and mean distance from 0 of a log-ratio
            before the first update.
        decoding_difference_max, decoding_difference_mean: largest and mean difference between the
            log-probabilities of decoding and of the training's forward pass, in nats.
        kl: KL to the reference model in nats per sequence.
        score_gain: rise of the mean score that counts as rising, in standard deviations of the
            first scores.
        eos_drop: fall of the share of responses that end with eos.
        length_factor, length_tokens: growth of the mean response length; both must be exceeded.
        repetition_rise: rise of the share of repeated token pairs.
        entropy_share: smallest share of the first entropy.
        critic_iterations: iterations that the critic has to reach a positive explained variance.
    """

    window: int = 5
    first_log_ratio_max: float = 1e-5
    first_log_ratio_mean: float = UNLIMITED
    decoding_difference_max: float = 1e-2
    decoding_difference_mean: float = UNLIMITED
    kl: float = 15.0
    score_gain: float = 0.5
    eos_drop: float = 0.1
    length_factor: float = 2.0
    length_tokens: float = 8.0
    repetition_rise: float = 0.1
    entropy_share: float = 0.25
    critic_iterations: int = 20

    @classmethod
    def of_precision(cls, fp32: bool, ranks: int) -> "Limits":
        """Return the limits for fp32, on one or several ranks, or for bf16 and fp16.

        In half precision shapes and kernels change the rounding of single tokens by a tenth of a
        nat, so means are limited there.
        """
        if fp32:
            return cls(first_log_ratio_max=1e-5 if ranks == 1 else 1e-3)
        return cls(first_log_ratio_max=UNLIMITED, first_log_ratio_mean=1e-2,
                   decoding_difference_max=UNLIMITED, decoding_difference_mean=5e-2)


@dataclass(frozen=True)
class Alarm:
    """An alarm that went off.

    Attributes:
        kind: short name.
        message: what was seen, and what to do.
    """

    kind: str
    message: str


class Alarms:
    """Checks each iteration's metrics; each kind of alarm goes off once.

    Args:
        limits: thresholds.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._history: list[Row] = []
        self._told: set[str] = set()

    def check(self, metrics: Row) -> list[Alarm]:
        """Return the new alarms of this iteration; a metric that is missing is not checked."""
        self._history.append(metrics)
        new = [alarm for check in CHECKS for alarm in check(self._history, self._limits)
               if alarm.kind not in self._told]
        self._told |= {alarm.kind for alarm in new}
        return new


def _ratio(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    for kind, limit in (("max", limits.first_log_ratio_max), ("mean", limits.first_log_ratio_mean)):
        seen = history[-1].get(f"policy/first_log_ratio_{kind}", 0.0)
        if not seen <= limit:
            yield Alarm("ratio", (
                f"before the first update the log-ratios are not 0: {kind} {seen:.2g} (allowed: "
                f"{limit:g}); dropout is on, or rollout and update differ in precision or "
                "--temperature"))


def _decoding(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    for kind, limit in (("max", limits.decoding_difference_max),
                        ("mean", limits.decoding_difference_mean)):
        seen = history[-1].get(f"rollout/decoding_difference_{kind}", 0.0)
        if not seen <= limit:
            yield Alarm("decoding", (
                f"decoding gives other log-probabilities than the forward pass: {kind} difference "
                f"{seen:.2g} nats (allowed: {limit:g}); responses may come from stale weights: "
                "leave --enable_hybrid_engine or --enable_cuda_graph out, and report it"))


def _kl(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    now = _mean(history[-limits.window :], "kl/k1")
    if len(history) >= limits.window and now is not None and not now <= limits.kl:
        yield Alarm("kl", (
            f"the KL to the reference model is {now:.1f} nats per sequence over the last "
            f"{limits.window} iterations (limit: {limits.kl:g}); raise --kl_coef, lower "
            "--actor_learning_rate, or take --kl_controller adaptive"))


def _reward_hacking(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    """Find a score that rises at the expense of the responses."""
    score = _first_and_now(history, "reward/score_mean", limits)
    std = _mean(history[: limits.window], "reward/score_std")
    if score is None or std is None or score[1] - score[0] < limits.score_gain * std:
        return
    rises = f"the score rises ({score[0]:.2f} → {score[1]:.2f}), but "
    eos = _first_and_now(history, "response/eos_rate", limits)
    if eos and eos[0] - eos[1] >= limits.eos_drop:
        yield Alarm("eos", rises + (
            f"fewer responses end with eos: {eos[0]:.2f} → {eos[1]:.2f}; raise "
            "--missing_eos_penalty, or --max_answer_seq_len if responses are cut short"))
    length = _first_and_now(history, "response/length_mean", limits)
    if length and length[1] >= max(
            limits.length_factor * length[0], limits.length_tokens + length[0]):
        yield Alarm("length", rises + (
            f"responses grow: {length[0]:.1f} → {length[1]:.1f} tokens; check accuracy by length "
            "in the report of the reward model, raise --kl_coef"))
    pairs = _first_and_now(history, "response/repetition", limits)
    if pairs and pairs[1] - pairs[0] >= limits.repetition_rise:
        yield Alarm("repetition", rises + (
            f"responses repeat themselves: share of repeated token pairs {pairs[0]:.2f} → "
            f"{pairs[1]:.2f}; look at the samples, raise --kl_coef, lower --actor_learning_rate"))


def _entropy(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    entropy = _first_and_now(history, "policy/entropy", limits)
    if entropy and entropy[1] < limits.entropy_share * entropy[0]:
        yield Alarm("entropy", (
            f"the entropy of the policy collapses: {entropy[0]:.3f} → {entropy[1]:.3f} nats per "
            "token; lower --actor_learning_rate or --ppo_epochs, raise --kl_coef, or give "
            "--entropy_coef 0.01"))


def _critic(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    now = _mean(history[-limits.window :], "value/explained_variance")
    if len(history) > limits.critic_iterations and now is not None and not now > 0:
        yield Alarm("critic", (
            f"the critic does not predict the returns: explained variance {now:.2f} over the last "
            f"{limits.window} of {len(history)} iterations; raise --critic_learning_rate, or give "
            "--critic_warmup_steps"))


CHECKS = (_ratio, _decoding, _kl, _reward_hacking, _entropy, _critic)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def _first_and_now(
    history: Sequence[Row], name: str, limits: Limits
) -> tuple[float, float] | None:
    """Return the means over the first and the latest window, as soon as they do not overlap."""
    if len(history) < 2 * limits.window:
        return None
    first, now = _mean(history[: limits.window], name), _mean(history[-limits.window :], name)
    return None if first is None or now is None else (first, now)
