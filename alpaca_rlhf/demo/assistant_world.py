"""The embedded data set: questions and answers about a few facts, from a deterministic generator.

It replaces a preference data set when no `--data_path` is given, so that the three steps can be
seen working without a network. Some 40 facts of 13 kinds ("the capital of Spain is Madrid", "a duck
says quack") are asked for in many phrasings, alone or as a follow-up question: so few, because a
model of two million parameters must learn within a minute to tell right from wrong.

Responses differ in content, in a polite opening and closing, in being complete and in repetition.
`gold_score` measures all of it from the text. Pairs are labelled by that rule, with a share of the
labels flipped, and the reward model sees only the pairs: the rule tells whether RLHF improved the
responses or only raised the reward model's scores. To make the reward model robust, some responses
are assembled at random from parts, as an over-optimized policy writes them, and many pairs differ
in content alone.

    rows("train"), rows("eval")        preference rows
    pretraining_texts()                endless dialogues of all qualities, for the tiny base model
    gold_score(messages, response)     the rule
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Literal

import yaml

# Raise it whenever rows() or pretraining_texts() give other text: data that was prepared from this
# data set and the tiny base model are then made again.
FORMAT = 1

Message = dict[str, str]
Split = Literal["train", "eval"]
Body = Callable[[random.Random, "Fact", str], str]

ROW_COUNT: dict[Split, int] = {"train": 9000, "eval": 400}
FLIPPED_SHARE = 0.05
ASSEMBLED_SHARE = 0.15
MISTAKEN_SHARE = 0.75
CONTENT_CONTRAST_SHARE = 0.20
STYLE_CONTRAST_SHARE = 0.45
TWO_TURN_SHARE = 0.12
PRETRAINING_ASSEMBLED_SHARE = 0.10
MINIMUM_GOLD_GAP = 0.15

_DATA = yaml.safe_load(Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8"))
OPENINGS, CLOSINGS, EVASIONS, PREFIXES, SUFFIXES, FOLLOW_UPS = (_DATA[name] for name in (
    "openings", "closings", "evasions", "prefixes", "suffixes", "follow_ups"))


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of instruction, as facts.yaml has it: phrasings, statements and facts.

    `{s}` stands for the subject, `{a}` for the answer, `{A}` for the answer with a capital.
    """

    name: str
    facts: dict[str, list[str]]
    """Right answers for each subject."""
    mistakes: list[str]
    """Wrong answers of people who do not know: right for no subject of the kind."""
    phrasings: list[str]
    statements: list[str]
    terse: Sequence[str] = ("{A}.", "The answer is {a}.")
    needed: int = 1
    """Number of different right answers that a response needs."""


@dataclass(frozen=True, eq=False)
class Fact:
    """A subject of one kind with its right answers."""

    kind: Kind
    subject: str
    answers: list[str]

    def fill(self, form: str, answers: Sequence[str]) -> str:
        """Fill in `form` with this subject and `answers`; several become "a, b and c"."""
        text = answers[0]
        if len(answers) > 1:
            text = ", ".join(answers[:-1]) + " and " + answers[-1]
        return form.format(s=self.subject, a=text, A=text[0].upper() + text[1:])


KINDS = [Kind(**kind) for kind in _DATA["kinds"]]
FACTS = {kind.name: [Fact(kind, subject, answers) for subject, answers in kind.facts.items()]
         for kind in KINDS}
ALL_FACTS = [fact for facts in FACTS.values() for fact in facts]


# ------------------------------------------------------------------------------ the gold rule


def _words(text: str) -> str:
    """Return the words in lower case, each between spaces, so that `in` finds whole words."""
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "


@cache
def _terms(kind: Kind) -> frozenset[str]:
    """Return all subjects, answers and mistakes of a kind, each as `_words` gives them."""
    terms = [term for fact in FACTS[kind.name] for term in (fact.subject, *fact.answers)]
    return frozenset(map(_words, terms + kind.mistakes))


@cache
def _statements(fact: Fact) -> frozenset[str]:
    """Return every sentence that states the fact correctly."""
    chosen = permutations(fact.answers, fact.kind.needed)
    return frozenset(fact.fill(form, some) for some in chosen for form in fact.kind.statements)


def _content(fact: Fact, response: str, body: list[str]) -> float:
    """Grade the content.

    Returns:
        1 if a sentence of `body` states the fact, 0.6 if only its answer is there, 0 if the answer
        is missing or a mistake, another answer or another subject of the kind is there as well.
    """
    words = _words(response)
    right = {_words(answer) for answer in fact.answers}
    wrong = _terms(fact.kind) - right - {_words(fact.subject)}
    given = sum(term in words for term in right)
    if given < fact.kind.needed or any(term in words for term in wrong):
        return 0.0
    return 1.0 if any(part in _statements(fact) for part in body) else 0.6


def _repetitions(response: str) -> int:
    """Count repeated words: doubled ones, and three in a row that occur again."""
    words = _words(response).split()
    doubled = sum(a == b for a, b in pairwise(words))
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return doubled + len(triples) - len(set(triples))


def gold_score(messages: list[Message], response: str) -> float:
    """Score a response to `messages` between 0 and 1, from the text alone.

    Right content is worth 0.5; a polite opening 0.2, a polite closing 0.2 and a complete last
    sentence 0.1, all three reduced to two fifths where the content is missing or wrong. A second
    opening or closing, further sentences, repetition and length are deducted.

    Raises:
        ValueError: `messages` is not a prompt of this data set.
    """
    fact = _fact_asked_for(messages)
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", response.strip()) if part]
    if not sentences:
        return 0.0
    opened, closed = sentences[0] in OPENINGS, sentences[-1] in CLOSINGS
    body = sentences[int(opened) : len(sentences) - int(closed)]
    stray = sum(part in OPENINGS or part in CLOSINGS for part in body)
    content = _content(fact, response, body)
    form = 0.2 * opened + 0.2 * closed + 0.1 * (sentences[-1][-1] in ".!")
    score = 0.5 * content + form * (1.0 if content else 0.4)
    score -= 0.15 * stray + 0.1 * max(0, len(body) - stray - 1)
    score -= min(0.4, 0.05 * _repetitions(response))
    score -= 0.02 * max(0, len(_words(response).split()) - 26)
    return min(1.0, max(0.0, score))


# -------------------------------------------------------------------------------- the prompts


@cache
def _questions() -> dict[str, Fact]:
    """Return every question without prefix and suffix, and the fact it asks for."""
    return {phrasing.format(s=fact.subject): fact
            for fact in ALL_FACTS for phrasing in fact.kind.phrasings}


@cache
def _follow_ups(kind: Kind) -> dict[str, Fact]:
    return {form.format(s=fact.subject): fact for fact in FACTS[kind.name] for form in FOLLOW_UPS}


def _fact_of_question(text: str) -> Fact | None:
    for prefix, suffix in product(PREFIXES, SUFFIXES):
        if text.startswith(prefix) and text.endswith(suffix):
            fact = _questions().get(text[len(prefix) : len(text) - len(suffix)])
            if fact is not None:
                return fact
    return None


def _fact_asked_for(messages: list[Message]) -> Fact:
    turns = [message["content"] for message in messages if message["role"] == "user"]
    fact = _fact_of_question(turns[0]) if turns else None
    for text in turns[1:]:
        fact = fact and _follow_ups(fact.kind).get(text)
    if fact is None:
        raise ValueError(f"not a prompt of the embedded data set: {turns[-1:]!r}")
    return fact


def _question(rng: random.Random, fact: Fact) -> str:
    phrasing = rng.choice(fact.kind.phrasings).format(s=fact.subject)
    prefix = rng.choice(PREFIXES) if rng.random() < 0.6 else ""
    return prefix + phrasing + (rng.choice(SUFFIXES) if rng.random() < 0.4 else "")


def _prompt(rng: random.Random, fact: Fact) -> list[Message]:
    if rng.random() >= TWO_TURN_SHARE:
        return [{"role": "user", "content": _question(rng, fact)}]
    earlier = rng.choice([other for other in FACTS[fact.kind.name] if other != fact])
    follow_up = rng.choice(FOLLOW_UPS).format(s=fact.subject)
    response = _right(rng, earlier, rng.choice(fact.kind.statements))
    return [
        {"role": "user", "content": _question(rng, earlier)},
        {"role": "assistant", "content": response},
        {"role": "user", "content": follow_up},
    ]


def _prompt_of(split: Split, rng: random.Random, fact: Fact) -> list[Message]:
    """Draw prompts until one belongs to the split: its text decides, so no seed mixes splits."""
    while True:
        messages = _prompt(rng, fact)
        text = "\n".join(turn["content"] for turn in messages if turn["role"] == "user")
        held_out = hashlib.sha256(text.encode()).digest()[0] < 26
        if held_out == (split == "eval"):
            return messages


# ------------------------------------------------------------------------------ the responses


def _right(rng: random.Random, fact: Fact, form: str) -> str:
    return fact.fill(form, rng.sample(fact.answers, fact.kind.needed))


def _mistaken(rng: random.Random, fact: Fact, form: str) -> str:
    """Evade the question, or give answers that are right for no subject."""
    if rng.random() < 0.2:
        return rng.choice(EVASIONS)
    return fact.fill(form, rng.sample(fact.kind.mistakes, fact.kind.needed))


def _misplaced(rng: random.Random, fact: Fact, form: str) -> str:
    """State another fact, of any kind or of the same, or give its answer for this subject."""
    draw = rng.random()
    if draw < 0.4:
        stranger = rng.choice(ALL_FACTS)
        return _right(rng, stranger, rng.choice(stranger.kind.statements))
    other = rng.choice([each for each in FACTS[fact.kind.name] if each.answers != fact.answers])
    if draw < 0.8:
        return _right(rng, other, form)
    return fact.fill(form, rng.sample(other.answers, fact.kind.needed))


def _wrong(rng: random.Random, fact: Fact, form: str) -> str:
    return (_mistaken if rng.random() < MISTAKEN_SHARE else _misplaced)(rng, fact, form)


def _form(rng: random.Random, fact: Fact) -> str:
    return rng.choice(fact.kind.terse if rng.random() < 0.2 else fact.kind.statements)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _frame(rng: random.Random, share: float) -> tuple[str, str]:
    """Return an opening and a closing, each with probability `share` and else empty."""
    opening = rng.choice(OPENINGS) if rng.random() < share else ""
    return opening, rng.choice(CLOSINGS) if rng.random() < share else ""


def _written(
    rng: random.Random, fact: Fact, right_share: float, polite_share: float, wrong: Body = _wrong
) -> str:
    """Write a response in order, though not always right, complete or polite."""
    form = _form(rng, fact)
    body = (_right if rng.random() < right_share else wrong)(rng, fact, form)
    opening, closing = _frame(rng, polite_share)
    fault = rng.random()
    if fault < 0.05:
        body = f"{body} {body}"
    if fault > 0.94:
        words = body.split(" ")
        return _joined(opening, " ".join(words[: rng.randint(1, len(words))]).rstrip("."))
    return _joined(opening, body, closing)


def _assembled(rng: random.Random, fact: Fact) -> str:
    """Join one to five parts in any order, as a policy does that only pleases a reward model."""

    def right(of: Fact = fact) -> str:
        return _right(rng, of, _form(rng, of))

    def several() -> str:
        return " ".join(map(right, rng.sample(FACTS[fact.kind.name], 3)))

    def cut_short() -> str:
        words = _right(rng, fact, rng.choice(fact.kind.statements)).split(" ")
        return " ".join(words[: rng.randint(1, len(words) - 1)])

    makers: dict[Callable[[], str], int] = {
        lambda: rng.choice(OPENINGS): 30,
        lambda: rng.choice(CLOSINGS): 30,
        right: 18,
        lambda: _wrong(rng, fact, _form(rng, fact)): 12,
        several: 4,
        cut_short: 10,
        lambda: rng.choice(EVASIONS): 4,
    }
    drawn = rng.choices(list(makers), list(makers.values()), k=rng.randint(1, 4))
    parts = [make() for make in drawn]
    if rng.random() < 0.2:
        parts.append(parts[-1])
    return " ".join(parts)


def _response(rng: random.Random, fact: Fact) -> str:
    if rng.random() < ASSEMBLED_SHARE:
        return _assembled(rng, fact)
    return _written(rng, fact, right_share=0.75, polite_share=0.15)


def _content_contrast(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Write two responses with the same opening, closing and form: one right, the other not."""
    form = _form(rng, fact)
    opening, closing = _frame(rng, 0.15)
    if rng.random() < 0.1:  # right against nothing, politely
        empty = _joined(rng.choice(OPENINGS), rng.choice(CLOSINGS))
        return _joined(opening, _right(rng, fact, form), closing), empty
    right, wrong = _right(rng, fact, form), _wrong(rng, fact, form)
    if rng.random() < 0.1:  # right but plain against wrong but polite
        return right, _joined(rng.choice(OPENINGS), wrong, rng.choice(CLOSINGS))
    return _joined(opening, right, closing), _joined(opening, wrong, closing)


def _style_contrast(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Write two responses with the same content, right or wrong, one of them better written."""
    form = _form(rng, fact)
    body = (_right if rng.random() < 0.75 else _wrong)(rng, fact, form)
    plain, better = _frame(rng, 0.1), _frame(rng, 0.2)
    worse = _joined(plain[0], body, plain[1])
    fault = rng.random()
    if fault < 0.15:
        worse = f"{worse} {rng.choice((rng.choice(OPENINGS), rng.choice(CLOSINGS), body))}"
    elif fault < 0.25:
        worse = worse[: rng.randint(1, len(worse) - 1)]
    return _joined(better[0], body, better[1]), worse


def _pair(rng: random.Random, fact: Fact, messages: list[Message]) -> tuple[str, str]:
    """Write two responses with different gold scores, the better one first."""
    while True:
        draw = rng.random()
        if draw < CONTENT_CONTRAST_SHARE:
            first, second = _content_contrast(rng, fact)
        elif draw < CONTENT_CONTRAST_SHARE + STYLE_CONTRAST_SHARE:
            first, second = _style_contrast(rng, fact)
        else:
            first, second = _response(rng, fact), _response(rng, fact)
        gap = gold_score(messages, first) - gold_score(messages, second)
        if abs(gap) >= MINIMUM_GOLD_GAP:
            return (first, second) if gap > 0 else (second, first)


# ------------------------------------------------------------------------------- public streams


def rows(split: Split, seed: int = 0) -> list[dict]:
    """Return preference rows `{"prompt": messages, "chosen": str, "rejected": str}`, shuffled.

    No prompt occurs twice, and none of one split occurs in the other, whatever the seeds. Every
    fact is asked for about equally often. In both splits `FLIPPED_SHARE` of the labels are flipped.
    """
    count, rng = ROW_COUNT[split], random.Random(f"rows {split} {seed}")
    prompts: dict[str, tuple[Fact, list[Message]]] = {}
    while len(prompts) < count:
        for fact in rng.sample(ALL_FACTS, len(ALL_FACTS)):
            messages = _prompt_of(split, rng, fact)
            prompts.setdefault(repr(messages), (fact, messages))
    drawn = rng.sample(list(prompts.values())[:count], count)
    flipped = set(rng.sample(range(count), round(FLIPPED_SHARE * count)))
    made = []
    for index, (fact, messages) in enumerate(drawn):
        better, worse = _pair(rng, fact, messages)
        if index in flipped:
            better, worse = worse, better
        made.append({"prompt": messages, "chosen": better, "rejected": worse})
    return made


def pretraining_texts(seed: int = 0) -> Iterator[tuple[list[Message], str]]:
    """Yield dialogues `(messages, response)` without end: all qualities, well over half right.

    Held-out prompts are left out; the facts take turns.
    """
    rng = random.Random(f"pretraining {seed}")
    while True:
        for fact in rng.sample(ALL_FACTS, len(ALL_FACTS)):
            messages = _prompt_of("train", rng, fact)
            if rng.random() < PRETRAINING_ASSEMBLED_SHARE:
                yield messages, _assembled(rng, fact)
            else:
                yield messages, _written(rng, fact, 0.9, 0.25, wrong=_mistaken)
