"""Alarms for PPO runs that go wrong while the loss looks fine, from the metrics of the iterations.

Each alarm says what was seen and what to do, once per run. A healthy run of the embedded pipeline
stays well within the thresholds below (docs/tracking.md has its figures).
"""

from collections.abc import Iterator, Mapping, Sequence

Row = Mapping[str, float]

# Largest distance of the log-ratios from 0 before the first update, and of decoding's
# log-probabilities from those of the forward pass, in nats: in fp32 on one rank and on several. In
# half precision shapes change the rounding of single tokens by a tenth, so means are limited.
DECODING = {"rollout/decoding_difference_max": 1e-2}
EXACT = {"policy/first_log_ratio_max": 1e-5, **DECODING}
CLOSE = {"policy/first_log_ratio_max": 1e-3, **DECODING}
HALF = {"policy/first_log_ratio_mean": 1e-2, "rollout/decoding_difference_mean": 5e-2}
MAX_KL = 15.0  # to the reference model, in nats per sequence
WINDOW = 5  # iterations, the first and the latest, whose means are compared
SCORE_GAIN = 0.5  # rise of the mean score, in standard deviations of the first scores
EOS_DROP = 0.1  # fall of the share of responses that end with eos
# Growth of the mean response length; both must be exceeded.
LENGTH_FACTOR, LENGTH_TOKENS = 2.0, 8.0
REPETITION_RISE = 0.1  # rise of the share of repeated token pairs
ENTROPY_SHARE = 0.25  # of the first entropy
CRITIC_ITERATIONS = 20  # until the critic must reach a positive explained variance


class Alarms:
    """Checks each iteration's metrics; each kind of alarm goes off once.

    Args:
        limits: of log-ratios and decoding, by metric: EXACT, CLOSE or HALF.
        max_kl: largest KL to the reference model in nats per sequence.
    """

    def __init__(self, limits: Mapping[str, float] = EXACT, max_kl: float = MAX_KL) -> None:
        self._limits, self._max_kl = limits, max_kl
        self._history: list[Row] = []
        self._told: set[str] = set()

    def check(self, metrics: Row) -> dict[str, str]:
        """Return the new alarms of this iteration, {kind: message}."""
        self._history.append(metrics)
        alarms = dict([
            *_agreement(metrics, self._limits), *_kl(self._history, self._max_kl),
            *_reward_hacking(self._history), *_entropy(self._history), *_critic(self._history),
        ])
        new = {kind: message for kind, message in alarms.items() if kind not in self._told}
        self._told |= new.keys()
        return new


def _agreement(metrics: Row, limits: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for name, limit in limits.items():
        seen = metrics.get(name, 0.0)
        if seen <= limit:
            continue
        kind, found = name.rsplit("_", 1)[-1], f"{seen:.2g} (allowed: {limit:g})"
        if name.startswith("policy/"):
            yield "ratio", (
                f"before the first update the log-ratios are not 0: {kind} {found}; dropout is on, "
                "or rollout and update differ in precision or --temperature")
        else:
            yield "decoding", (
                f"decoding gives other log-probabilities than the forward pass: {kind} difference "
                f"{found}; responses may come from stale weights: leave --enable_hybrid_engine or "
                "--enable_cuda_graph out, and report it")


def _kl(history: Sequence[Row], limit: float) -> Iterator[tuple[str, str]]:
    now = _mean(history[-WINDOW:], "kl/k1")
    if len(history) >= WINDOW and now is not None and not now <= limit:
        yield "kl", (
            f"the KL to the reference model is {now:.1f} nats per sequence over the last "
            f"{WINDOW} iterations (limit: {limit:g}); raise --kl_coef, lower "
            "--actor_learning_rate, or take --kl_controller adaptive")


def _reward_hacking(history: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Find a score that rises at the expense of the responses."""
    score = _first_and_now(history, "reward/score_mean")
    std = _mean(history[:WINDOW], "reward/score_std")
    if score is None or std is None or score[1] - score[0] < SCORE_GAIN * std:
        return
    rises = f"the score rises ({score[0]:.2f} → {score[1]:.2f}), but "
    eos = _first_and_now(history, "response/eos_rate")
    if eos and eos[0] - eos[1] >= EOS_DROP:
        yield "eos", rises + (
            f"fewer responses end with eos: {eos[0]:.2f} → {eos[1]:.2f}; raise "
            "--missing_eos_penalty, or --max_answer_seq_len if responses are cut short")
    length = _first_and_now(history, "response/length_mean")
    if length and length[1] >= max(LENGTH_FACTOR * length[0], LENGTH_TOKENS + length[0]):
        yield "length", rises + (
            f"responses grow: {length[0]:.1f} → {length[1]:.1f} tokens; check accuracy by length "
            "in the report of the reward model, raise --kl_coef")
    pairs = _first_and_now(history, "response/repetition")
    if pairs and pairs[1] - pairs[0] >= REPETITION_RISE:
        yield "repetition", rises + (
            f"responses repeat themselves: share of repeated token pairs {pairs[0]:.2f} → "
            f"{pairs[1]:.2f}; look at the samples, raise --kl_coef, lower --actor_learning_rate")


def _entropy(history: Sequence[Row]) -> Iterator[tuple[str, str]]:
    entropy = _first_and_now(history, "policy/entropy")
    if entropy and entropy[1] < ENTROPY_SHARE * entropy[0]:
        yield "entropy", (
            f"the entropy of the policy collapses: {entropy[0]:.3f} → {entropy[1]:.3f} nats per "
            "token; lower --actor_learning_rate or --ppo_epochs, raise --kl_coef, or give "
            "--entropy_coef 0.01")


def _critic(history: Sequence[Row]) -> Iterator[tuple[str, str]]:
    now = _mean(history[-WINDOW:], "value/explained_variance")
    if len(history) > CRITIC_ITERATIONS and now is not None and not now > 0:
        yield "critic", (
            f"the critic does not predict the returns: explained variance {now:.2f} over the last "
            f"{WINDOW} of {len(history)} iterations; raise --critic_learning_rate, or give "
            "--critic_warmup_steps")


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def _first_and_now(history: Sequence[Row], name: str) -> tuple[float, float] | None:
    """Return the means over the first and the latest window, as soon as they do not overlap."""
    if len(history) < 2 * WINDOW:
        return None
    first, now = _mean(history[:WINDOW], name), _mean(history[-WINDOW:], name)
    return None if first is None or now is None else (first, now)
