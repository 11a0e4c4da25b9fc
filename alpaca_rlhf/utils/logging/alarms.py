"""Alarms: problems of PPO that the loss does not show, found in the metrics of its iterations.

Each alarm is reported once per run, with its figures and a remedy. The thresholds are in `Limits`;
a healthy run of the embedded pipeline stays well within them (docs/tracking.md has its figures).

    alarms = Alarms(Limits())
    for metrics in iterations:
        for alarm in alarms.check(metrics):
            print(alarm.kind, alarm.message)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]

# Largest absolute log-ratio allowed before the first update.
EXACT = 1e-5  # one rank in fp32
CLOSE = 1e-3  # several ranks, or another precision


@dataclass(frozen=True)
class Limits:
    """Thresholds of the alarms.

    Attributes:
        window: iterations whose mean is compared, the first ones and the latest ones.
        first_log_ratio: largest absolute log-ratio before the first update.
        kl: largest KL in nats per sequence.
        score_gain: rise of the score that counts, in std of the first iterations' scores.
        eos_drop: largest fall of the eos rate.
        length_factor, length_tokens: responses are too long when they grow by both of these.
        repetition_rise: largest rise of the share of repeated bigrams.
        entropy_share: smallest share of the first iterations' entropy.
        critic_rounds: iterations in which the critic may explain nothing.
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
    """An alarm: its kind, the same for every run, and figures with a remedy."""

    kind: str
    message: str


class Alarms:
    """Checks the metrics of each iteration; each kind of alarm goes off once."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._history: list[Row] = []
        self._reported: set[str] = set()

    def check(self, metrics: Row) -> list[Alarm]:
        """Return the new alarms of an iteration; metrics that are missing are not checked."""
        self._history.append(metrics)
        new = [alarm for look in CHECKS for alarm in look(self._history, self._limits)
               if alarm.kind not in self._reported]
        self._reported |= {alarm.kind for alarm in new}
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
            f"the KL to the reference model is running away: {now:.1f} nats per sequence over the "
            f"last {limits.window} iterations (limit {limits.kl:g}); raise --kl_coef, lower "
            "--actor_learning_rate, or take --kl_controller adaptive",
        )


# Signs of reward hacking, when the score rises: metric, kind, and whether it changed too much.
_SIGNS: dict[str, tuple[str, Callable[[float, float, Limits], bool], str]] = {
    "response/eos_rate": (
        "eos", lambda first, now, limits: first - now >= limits.eos_drop,
        "fewer responses end: eos rate {first:.2f} → {now:.2f}; raise --missing_eos_penalty, or "
        "--max_answer_seq_len if responses are truncated"),
    "response/length_mean": (
        "length", lambda first, now, limits: now >= limits.length_factor * first
        and now - first >= limits.length_tokens,
        "responses grow: {first:.1f} → {now:.1f} tokens; check whether the reward model prefers "
        "long responses (accuracy by length in its report), raise --kl_coef"),
    "response/repetition": (
        "repetition", lambda first, now, limits: now - first >= limits.repetition_rise,
        "responses repeat themselves: share of repeated bigrams {first:.2f} → {now:.2f}; see the "
        "samples, raise --kl_coef, lower --actor_learning_rate"),
}


def _hacking(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    score = _first_and_now(history, "reward/score_mean", limits)
    spread = _mean(history[: limits.window], "reward/score_std")
    if score is None or spread is None or score[1] - score[0] < limits.score_gain * spread:
        return
    for name, (kind, too_far, text) in _SIGNS.items():
        pair = _first_and_now(history, name, limits)
        if pair is not None and too_far(*pair, limits):
            yield Alarm(kind, f"the score rises ({score[0]:.2f} → {score[1]:.2f}), but "
                        + text.format(first=pair[0], now=pair[1]))


def _entropy(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    pair = _first_and_now(history, "policy/entropy", limits)
    if pair is not None and pair[1] < limits.entropy_share * pair[0]:
        yield Alarm(
            "entropy",
            f"the policy's entropy collapses: {pair[0]:.3f} → {pair[1]:.3f} nats per token; lower "
            "--actor_learning_rate or --ppo_epochs, raise --kl_coef, or give --entropy_coef 0.01",
        )


def _critic(history: Sequence[Row], limits: Limits) -> Iterator[Alarm]:
    now = _mean(history[-limits.window :], "value/explained_variance")
    if len(history) > limits.critic_rounds and now is not None and not now > 0:
        yield Alarm(
            "critic",
            f"the critic explains nothing: explained variance {now:.2f} over the last "
            f"{limits.window} iterations, after {len(history)}; raise --critic_learning_rate, "
            "or give --critic_warmup_steps",
        )


CHECKS = (_first_ratio, _kl, _hacking, _entropy, _critic)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def _first_and_now(
    history: Sequence[Row], name: str, limits: Limits
) -> tuple[float, float] | None:
    """Return means over the first and the latest iterations, once these do not overlap."""
    if len(history) < 2 * limits.window:
        return None
    first, now = (_mean(part, name) for part in (history[: limits.window],
                                                 history[-limits.window :]))
    return None if first is None or now is None else (first, now)
