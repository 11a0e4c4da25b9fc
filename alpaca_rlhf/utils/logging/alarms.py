"""Alarms: what goes wrong in PPO while the loss looks fine, told from the metrics of its rounds.

Each alarm says what it saw and what to do, once a run. The thresholds stand in `Limits`; a healthy
run of the embedded pipeline stays well within all of them (docs/tracking.md has its figures).

    alarms = Alarms(Limits())
    for metrics in rounds:
        for alarm in alarms.check(metrics):
            print(alarm.kind, alarm.message)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]

# How far from 0 a log-ratio may be before the first update.
EXACT = 1e-5  # one rank in fp32
CLOSE = 1e-3  # several ranks, or another precision


@dataclass(frozen=True)
class Limits:
    """When an alarm goes off.

    Attributes:
        window: rounds that are averaged, at the beginning and now, before they are compared.
        first_log_ratio: largest log-ratio before the first update.
        kl: nats a reply.
        score_gain: deviations of the first rounds' scores by which the score counts as up.
        eos_drop: fall of the share of replies that end.
        length_factor, length_tokens: a reply is too long when it is longer by both of these.
        repetition_rise: growth of the share of repeated token pairs.
        entropy_share: what must be left of the first rounds' entropy.
        critic_rounds: rounds in which the critic may still explain nothing.
    """

    window: int = 5
    first_log_ratio: float = EXACT
    kl: float = 15.0
    score_gain: float = 0.5
    eos_drop: float = 0.1
    length_factor: float = 2.0
    length_tokens: float = 8.0
    repetition_rise: float = 0.1
    entropy_share: float = 0.25
    critic_rounds: int = 20


@dataclass(frozen=True)
class Alarm:
    """What went off.

    Attributes:
        kind: short name, the same for every run.
        message: what was seen, and what to do.
    """

    kind: str
    message: str


class Alarms:
    """Looks at each round's metrics as they come; each kind of alarm goes off once.

    Args:
        limits: when.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._history: list[Row] = []
        self._told: set[str] = set()

    def check(self, metrics: Row) -> list[Alarm]:
        """The alarms that this round sets off; what a round did not measure is not judged."""
        self._history.append(metrics)
        new = [alarm for look in CHECKS for alarm in look(self._history, self._limits)
               if alarm.kind not in self._told]
        self._told |= {alarm.kind for alarm in new}
        return new


def _first_ratio(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    seen = history[-1].get("policy/first_log_ratio_max", 0.0)
    if not seen <= limits.first_log_ratio:
        yield Alarm(
            "ratio",
            f"at the first update a log-ratio is {seen:.2g}, not 0 (allowed "
            f"{limits.first_log_ratio:g}): dropout is on, or the precision of rollout and update "
            "differ, or --temperature is not the same in both",
        )


def _kl(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    now = _mean(history[-limits.window :], "kl/k1")
    if len(history) >= limits.window and now is not None and not now <= limits.kl:
        yield Alarm(
            "kl",
            f"the KL to the reference is running away: {now:.1f} nats a reply over the last "
            f"{limits.window} rounds (limit {limits.kl:g}); raise --kl_coef, lower "
            "--actor_learning_rate, or take --kl_controller adaptive",
        )


# What may be bought with a rising score: metric, kind, and whether it moved too far.
_PRICES: dict[str, tuple[str, Callable[[float, float, Limits], bool], str]] = {
    "response/eos_rate": (
        "eos", lambda first, now, limits: first - now >= limits.eos_drop,
        "fewer replies end: eos rate {first:.2f} → {now:.2f}; raise --missing_eos_penalty, or "
        "--max_answer_seq_len if replies are cut short"),
    "response/length_mean": (
        "length", lambda first, now, limits: now >= limits.length_factor * first
        and now - first >= limits.length_tokens,
        "replies grow: {first:.1f} → {now:.1f} tokens; see whether the reward model prefers long "
        "replies (its report: accuracy by length), raise --kl_coef"),
    "response/repetition": (
        "repetition", lambda first, now, limits: now - first >= limits.repetition_rise,
        "replies repeat themselves: share of repeated pairs {first:.2f} → {now:.2f}; look at the "
        "samples, raise --kl_coef, lower --actor_learning_rate"),
}


def _hacking(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    score = _first_and_now(history, "reward/score_mean", limits)
    spread = _mean(history[: limits.window], "reward/score_std")
    if score is None or spread is None or score[1] - score[0] < limits.score_gain * spread:
        return
    for name, (kind, too_far, text) in _PRICES.items():
        pair = _first_and_now(history, name, limits)
        if pair is not None and too_far(*pair, limits):
            yield Alarm(kind, f"the score rises ({score[0]:.2f} → {score[1]:.2f}), but "
                        + text.format(first=pair[0], now=pair[1]))


def _entropy(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    pair = _first_and_now(history, "policy/entropy", limits)
    if pair is not None and pair[1] < limits.entropy_share * pair[0]:
        yield Alarm(
            "entropy",
            f"the policy's entropy collapses: {pair[0]:.3f} → {pair[1]:.3f} nats a token; lower "
            "--actor_learning_rate or --ppo_epochs, raise --kl_coef, or give --entropy_coef 0.01",
        )


def _critic(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    now = _mean(history[-limits.window :], "value/explained_variance")
    if len(history) > limits.critic_rounds and now is not None and not now > 0:
        yield Alarm(
            "critic",
            f"the critic explains nothing: explained variance {now:.2f} over the last "
            f"{limits.window} rounds, after {len(history)}; raise --critic_learning_rate, or give "
            "--critic_warmup_steps",
        )


CHECKS = (_first_ratio, _kl, _hacking, _entropy, _critic)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def _first_and_now(
    history: Sequence[Row], name: str, limits: Limits
) -> tuple[float, float] | None:
    """Means over the first and the last rounds, once these do not overlap."""
    if len(history) < 2 * limits.window:
        return None
    first, now = (_mean(part, name) for part in (history[: limits.window],
                                                 history[-limits.window :]))
    return None if first is None or now is None else (first, now)
