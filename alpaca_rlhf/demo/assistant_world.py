"""The embedded data set: a tiny assistant's world, made by a deterministic generator.

It stands in for a real preference data set when no `--data_path` is given, so that the three steps
can be seen working without a network. Some 40 facts of 13 kinds ("the capital of Spain is Madrid",
"a duck says quack") are asked for in many phrasings, alone or as the follow-up of an earlier
question: so few, because two million parameters must learn in a minute to tell right from wrong.

Replies differ in what an assistant can do well or badly: the content, a polite opening, a polite
closing, ending whole, not repeating oneself. `gold_score` measures all of it from the text alone.
Pairs are labelled by that rule (with a share of labels flipped) but the reward model only ever sees
the pairs; the rule is kept for judging whether RLHF made the replies better or merely pleased the
reward model. Against the second, a share of the replies is put together at random from parts, as a
policy under pressure writes them, and many pairs differ in content alone.

    rows("train"), rows("eval")    preference rows
    pretraining_texts()            endless dialogues of all qualities, for the tiny base model
    gold_score(messages, reply)    the rule
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Literal

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

OPENINGS = ("Sure!", "Of course!", "Certainly!", "Good question!", "With pleasure!", "Gladly!")
CLOSINGS = (
    "I hope this helps.",
    "Let me know if you need more.",
    "Feel free to ask again.",
    "Thank you for asking.",
    "Just ask if anything is unclear.",
)
EVASIONS = ("I am not sure.", "It depends.", "I will tell you.", "Here is the answer.")
PREFIXES = (
    "",
    "Please tell me: ",
    "Hello! ",
    "I have a question. ",
    "Quick question: ",
    "My child wants to know: ",
    "For my homework: ",
    "Can you help me? ",
)
SUFFIXES = ("", " Thank you.", " Please answer.", " I forgot.", " I would like to know.")
FOLLOW_UPS = (
    "What about {s}?",
    "And {s}?",
    "And for {s}?",
    "How about {s}?",
    "Now {s}, please.",
    "Next one: {s}.",
    "Do the same for {s}.",
    "Then {s}?",
)


@dataclass(frozen=True)
class Kind:
    """One kind of instruction: how it is asked, how it is answered, and its facts.

    `{s}` stands for the subject, `{a}` for the answer, `{A}` for the answer with a capital.
    """

    name: str
    table: str
    """Facts as `subject: answer, subject: answer`; several right answers are joined by `/`."""
    mistakes: str
    """What people say who do not know: answers that are right for no subject of the kind."""
    phrasings: tuple[str, ...]
    statements: tuple[str, ...]
    terse: tuple[str, ...] = ("{A}.", "The answer is {a}.")
    needed: int = 1
    """How many different right answers a reply must hold."""

    @property
    def wrong_answers(self) -> list[str]:
        """The mistakes, one by one."""
        return self.mistakes.split(", ")


@dataclass(frozen=True)
class Fact:
    """A subject of one kind with its right answers."""

    kind: Kind
    subject: str
    answers: tuple[str, ...]

    def fill(self, form: str, answers: tuple[str, ...]) -> str:
        """`form` with this subject and `answers` ("a, b and c" where there are several)."""
        text = answers[0]
        if len(answers) > 1:
            text = ", ".join(answers[:-1]) + " and " + answers[-1]
        return form.format(s=self.subject, a=text, A=text[0].upper() + text[1:])


KINDS = (
    Kind(
        "capital",
        "Spain: Madrid, France: Paris, Italy: Rome",
        "Milan, Lyon, Seville",
        (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Name the capital of {s}.",
            "Tell me the capital of {s}.",
            "What is the capital city of {s}?",
            "{s} has which capital?",
            "Do you know the capital of {s}?",
            "What is the name of the capital of {s}?",
        ),
        ("The capital of {s} is {a}.", "{A} is the capital of {s}."),
    ),
    Kind(
        "opposite",
        "hot: cold, big: small, fast: slow",
        "round, loud, sweet",
        (
            "What is the opposite of {s}?",
            "Give me the opposite of {s}.",
            "Which word is the opposite of {s}?",
            "Name the opposite of the word {s}.",
            "What word means the opposite of {s}?",
            "Tell me the opposite of {s}.",
            "If something is not {s}, what is it?",
            "Find the opposite of {s}.",
        ),
        ("The opposite of {s} is {a}.", "Something that is not {s} is {a}."),
    ),
    Kind(
        "colour",
        "banana: yellow, strawberry: red, carrot: orange",
        "blue, black, purple",
        (
            "What colour is a {s}?",
            "Which colour does a {s} have?",
            "Tell me the colour of a {s}.",
            "Name the colour of a {s}.",
            "What is the colour of a {s}?",
            "I paint a {s}. Which colour do I take?",
            "A {s} has which colour?",
            "Do you know the colour of a {s}?",
        ),
        ("A {s} is {a}.", "The colour of a {s} is {a}."),
    ),
    Kind(
        "sound",
        "duck: quack, frog: croak, lion: roar",
        "tick, boom, ring",
        (
            "What sound does a {s} make?",
            "What does a {s} say?",
            "Which sound does a {s} make?",
            "How does a {s} sound?",
            "Tell me the sound of a {s}.",
            "Name the sound that a {s} makes.",
            "What noise does a {s} make?",
            "What do you hear from a {s}?",
        ),
        ("A {s} says {a}.", "The sound of a {s} is {a}."),
    ),
    Kind(
        "young",
        "dog: puppy, cat: kitten, cow: calf",
        "foal, duckling, cub",
        (
            "What is the young of a {s} called?",
            "What do you call a baby {s}?",
            "Name the young of a {s}.",
            "What is a baby {s} called?",
            "What is the name for a young {s}?",
            "Tell me the word for a young {s}.",
            "How is the baby of a {s} called?",
            "Which word means a young {s}?",
        ),
        ("A young {s} is a {a}.", "The baby of a {s} is called a {a}."),
    ),
    Kind(
        "past",
        "go: went, run: ran, eat: ate",
        "goed, runned, eated",
        (
            "What is the past tense of {s}?",
            "Give me the past tense of {s}.",
            "Name the past form of {s}.",
            "What is the past form of the verb {s}?",
            "Today I {s}. And yesterday?",
            "Put the verb {s} in the past tense.",
            "Tell me the past of {s}.",
            "How do I write {s} in the past?",
        ),
        ("The past tense of {s} is {a}.", "Today I {s}, yesterday I {a}."),
    ),
    Kind(
        "home",
        "bee: hive, bird: nest, horse: stable",
        "office, car, sea",
        (
            "Where does the {s} live?",
            "What is the home of the {s}?",
            "Where is the home of the {s}?",
            "Name the place where the {s} lives.",
            "In which place does the {s} live?",
            "Tell me where the {s} lives.",
            "Where do I find the {s}?",
            "Where does the {s} sleep?",
        ),
        ("The {s} lives in the {a}.", "The home of the {s} is the {a}."),
    ),
    Kind(
        "tool",
        "hammer: driving nails, saw: cutting wood, broom: sweeping floors",
        "cooking soup, writing letters, catching fish",
        (
            "What is a {s} for?",
            "What do I use a {s} for?",
            "What is a {s} used for?",
            "Why do people have a {s}?",
            "Tell me the use of a {s}.",
            "What can I do with a {s}?",
            "Name the purpose of a {s}.",
            "What is the purpose of a {s}?",
        ),
        ("A {s} is for {a}.", "People use a {s} for {a}."),
    ),
    Kind(
        "after",
        "Monday: Tuesday, spring: summer, breakfast: lunch",
        "Sunday, winter, midnight",
        (
            "What comes after {s}?",
            "Which one follows {s}?",
            "What follows {s}?",
            "Name what comes right after {s}.",
            "What do we have after {s}?",
            "Tell me what comes after {s}.",
            "What is next after {s}?",
            "When {s} is over, what begins?",
        ),
        ("After {s} comes {a}.", "{A} comes after {s}."),
    ),
    Kind(
        "french",
        "bread: pain, water: eau, milk: lait",
        "brot, agua, latte",
        (
            "What is {s} in French?",
            "Translate {s} into French.",
            "How do you say {s} in French?",
            "Give me the French word for {s}.",
            "Tell me the French word for {s}.",
            "What do the French say for {s}?",
            "Put the word {s} into French.",
            "What is the French for {s}?",
        ),
        ("The French word for {s} is {a}.", "In French, {s} is {a}."),
    ),
    Kind(
        "category",
        "rose: flower, oak: tree, salmon: fish",
        "metal, planet, insect",
        (
            "What kind of thing is {s}?",
            "To which group does {s} belong?",
            "What sort of thing is {s}?",
            "Which category does {s} belong to?",
            "Put {s} into a category.",
            "Name the category of {s}.",
            "Tell me what kind of thing {s} is.",
            "What is the category of the word {s}?",
        ),
        ("The category of {s} is {a}.", "The word {s} belongs to the group {a}."),
    ),
    Kind(
        "list",
        "fruits: apples/pears/cherries/grapes/melons, "
        "vegetables: onions/beans/peas/carrots/leeks, animals: dogs/cats/horses/lions/camels",
        "stones, clouds, bricks, spoons, coins",
        (
            "List three {s}.",
            "Name three {s}.",
            "Give me three {s}.",
            "Tell me three {s}.",
            "Which three {s} do you know?",
            "I need a list of three {s}.",
            "Write down three {s}.",
            "Can you list three {s}?",
        ),
        ("Three {s} are {a}.", "Here are three {s}: {a}."),
        terse=("{A}.",),
        needed=3,
    ),
    Kind(
        "job",
        "hair: barber, meat: butcher, shoes: cobbler",
        "pilot, dentist, painter",
        (
            "Who works with {s}?",
            "Which job has to do with {s}?",
            "Who deals with {s}?",
            "Whose work is {s}?",
            "Name the job that deals with {s}.",
            "Which worker looks after {s}?",
            "Tell me who works with {s}.",
            "Who takes care of {s} for a living?",
        ),
        ("The {a} works with {s}.", "Working with {s} is the job of the {a}."),
    ),
)


def _facts_of(kind: Kind) -> tuple[Fact, ...]:
    pairs = (entry.split(": ") for entry in kind.table.split(", "))
    return tuple(Fact(kind, subject, tuple(answers.split("/"))) for subject, answers in pairs)


FACTS = {kind.name: _facts_of(kind) for kind in KINDS}
ALL_FACTS = tuple(fact for kind in KINDS for fact in FACTS[kind.name])


def fingerprint() -> str:
    """A hash of this generator, for keys of what is built from its text."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------ the gold rule


def _words(text: str) -> str:
    """The words of `text` in lower case, each between spaces, so that `in` finds whole words."""
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


@cache
def _kind_terms(kind: Kind) -> frozenset[str]:
    """All subjects, answers and mistakes of a kind, each as `_words` gives them."""
    facts = FACTS[kind.name]
    answers = [answer for fact in facts for answer in fact.answers]
    return frozenset(map(_words, [fact.subject for fact in facts] + answers + kind.wrong_answers))


@cache
def _statements(fact: Fact) -> frozenset[str]:
    """Every whole sentence that states the fact rightly."""
    chosen = permutations(fact.answers, fact.kind.needed)
    return frozenset(fact.fill(form, some) for some in chosen for form in fact.kind.statements)


def _content(fact: Fact, reply: str, body: list[str]) -> float:
    """1 for the fact stated in a sentence of its own, 0.6 for its bare answer, 0 when it is absent
    or when a mistake or another answer or subject of the kind stands beside it."""
    words = _words(reply)
    right = {_words(answer) for answer in fact.answers}
    wrong = _kind_terms(fact.kind) - right - {_words(fact.subject)}
    if any(term in words for term in wrong):
        return 0.0
    if sum(term in words for term in right) < fact.kind.needed:
        return 0.0
    return 1.0 if any(part in _statements(fact) for part in body) else 0.6


def _repetitions(reply: str) -> int:
    """How often the reply says something again: doubled words and three words in a row."""
    words = _words(reply).split()
    doubled = sum(a == b for a, b in zip(words, words[1:], strict=False))
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return doubled + len(triples) - len(set(triples))


def gold_score(messages: list[Message], reply: str) -> float:
    """How good `reply` is as the next turn after `messages`, in [0, 1], from the text alone.

    Right content is worth 0.5; a polite opening 0.2, a polite closing 0.2 and a whole last
    sentence 0.1, all three cut to two fifths where the content is missing or wrong. A second
    opening or closing, further sentences, repetition and length are charged. Raises `ValueError`
    for a prompt that is not of this world.
    """
    fact = _fact_asked_for(messages)
    sentences = _sentences(reply)
    if not sentences:
        return 0.0
    opened, closed = sentences[0] in OPENINGS, sentences[-1] in CLOSINGS
    body = sentences[int(opened) : len(sentences) - int(closed)]
    stray = sum(part in OPENINGS or part in CLOSINGS for part in body)
    content = _content(fact, reply, body)
    whole = sentences[-1][-1] in ".!"
    trimmings = 0.2 * opened + 0.2 * closed + 0.1 * whole
    score = 0.5 * content + trimmings * (1.0 if content else 0.4)
    score -= 0.15 * stray + 0.1 * max(0, len(body) - stray - 1)
    score -= min(0.4, 0.05 * _repetitions(reply))
    score -= 0.02 * max(0, len(_words(reply).split()) - 26)
    return min(1.0, max(0.0, score))


# -------------------------------------------------------------------------------- the prompts


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


@cache
def _questions() -> dict[str, Fact]:
    """Every question without prefix and suffix, and the fact it asks for."""
    return {
        phrasing.format(s=fact.subject): fact
        for fact in ALL_FACTS
        for phrasing in fact.kind.phrasings
    }


@cache
def _follow_ups(name: str) -> dict[str, Fact]:
    return {form.format(s=fact.subject): fact for fact in FACTS[name] for form in FOLLOW_UPS}


def _fact_of_question(text: str) -> Fact | None:
    for prefix in PREFIXES:
        for suffix in SUFFIXES:
            if text.startswith(prefix) and text.endswith(suffix):
                fact = _questions().get(text[len(prefix) : len(text) - len(suffix)])
                if fact is not None:
                    return fact
    return None


def _fact_asked_for(messages: list[Message]) -> Fact:
    turns = [message["content"] for message in messages if message["role"] == "user"]
    fact = _fact_of_question(turns[0]) if turns else None
    for text in turns[1:]:
        fact = fact and _follow_ups(fact.kind.name).get(text)
    if fact is None:
        raise ValueError(f"not a prompt of the assistant's world: {turns[-1:]!r}")
    return fact


def _question(rng: random.Random, fact: Fact) -> Message:
    phrasing = rng.choice(fact.kind.phrasings).format(s=fact.subject)
    prefix = rng.choice(PREFIXES) if rng.random() < 0.6 else ""
    return _user(prefix + phrasing + (rng.choice(SUFFIXES) if rng.random() < 0.4 else ""))


def _prompt(rng: random.Random, fact: Fact) -> list[Message]:
    if rng.random() >= TWO_TURN_SHARE:
        return [_question(rng, fact)]
    earlier = rng.choice([other for other in FACTS[fact.kind.name] if other != fact])
    follow_up = rng.choice(FOLLOW_UPS).format(s=fact.subject)
    reply = _right(rng, earlier, rng.choice(fact.kind.statements))
    return [_question(rng, earlier), _assistant(reply), _user(follow_up)]


def _is_held_out(messages: list[Message]) -> bool:
    """Whether a prompt belongs to evaluation: by its text, so that no seed mixes the splits."""
    text = "\n".join(message["content"] for message in messages if message["role"] == "user")
    return hashlib.sha256(text.encode()).digest()[0] < 26


def _new_prompt(rng: random.Random, fact: Fact, split: Split) -> list[Message]:
    while True:
        messages = _prompt(rng, fact)
        if _is_held_out(messages) == (split == "eval"):
            return messages


# -------------------------------------------------------------------------------- the replies


def _right(rng: random.Random, fact: Fact, form: str) -> str:
    return fact.fill(form, tuple(rng.sample(fact.answers, fact.kind.needed)))


def _mistaken(rng: random.Random, fact: Fact, form: str) -> str:
    """What somebody says who does not know."""
    if rng.random() < 0.2:
        return rng.choice(EVASIONS)
    return fact.fill(form, tuple(rng.sample(fact.kind.wrong_answers, fact.kind.needed)))


def _misplaced(rng: random.Random, fact: Fact, form: str) -> str:
    """What is right for another subject: of the same kind, of any kind, or its answer alone."""
    draw = rng.random()
    if draw < 0.4:
        stranger = rng.choice(ALL_FACTS)
        return _right(rng, stranger, rng.choice(stranger.kind.statements))
    other = rng.choice([each for each in FACTS[fact.kind.name] if each.answers != fact.answers])
    if draw < 0.8:
        return _right(rng, other, form)
    return fact.fill(form, tuple(rng.sample(other.answers, fact.kind.needed)))


def _wrong(rng: random.Random, fact: Fact, form: str) -> str:
    return (_mistaken if rng.random() < MISTAKEN_SHARE else _misplaced)(rng, fact, form)


def _form(rng: random.Random, fact: Fact) -> str:
    return rng.choice(fact.kind.terse if rng.random() < 0.2 else fact.kind.statements)


def _trimmed(opening: str, body: str, closing: str) -> str:
    return " ".join(part for part in (opening, body, closing) if part)


def _trimmings(rng: random.Random, share: float) -> tuple[str, str]:
    opening = rng.choice(OPENINGS) if rng.random() < share else ""
    return opening, rng.choice(CLOSINGS) if rng.random() < share else ""


def _written(
    rng: random.Random, fact: Fact, right_share: float, trimmed_share: float, wrong: Body = _wrong
) -> str:
    """A reply as a person may write one: in order, though not always right, whole or polite."""
    form = _form(rng, fact)
    body = (_right if rng.random() < right_share else wrong)(rng, fact, form)
    opening, closing = _trimmings(rng, trimmed_share)
    fault = rng.random()
    if fault < 0.05:
        body = f"{body} {body}"
    if fault > 0.94:
        cut = body.split(" ")
        return _trimmed(opening, " ".join(cut[: rng.randint(1, len(cut))]).rstrip("."), "")
    return _trimmed(opening, body, closing)


def _stub(rng: random.Random, fact: Fact) -> str:
    """A statement that breaks off before it has said anything."""
    words = _right(rng, fact, rng.choice(fact.kind.statements)).split(" ")
    return " ".join(words[: rng.randint(1, len(words) - 1)])


def _assembled(rng: random.Random, fact: Fact) -> str:
    """One to five parts in any order, as a policy writes that only pleases a reward model."""

    def right() -> str:
        return _right(rng, fact, _form(rng, fact))

    def wrong() -> str:
        return _wrong(rng, fact, _form(rng, fact))

    def several() -> str:
        candidates = rng.sample(FACTS[fact.kind.name], 3)
        return " ".join(_right(rng, each, _form(rng, each)) for each in candidates)

    makers: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(OPENINGS),
        lambda: rng.choice(CLOSINGS),
        right,
        wrong,
        several,
        lambda: _stub(rng, fact),
        lambda: rng.choice(EVASIONS),
    )
    weights = (30, 30, 18, 12, 4, 10, 4)
    parts = [make() for make in rng.choices(makers, weights, k=rng.randint(1, 4))]
    if rng.random() < 0.2:
        parts.append(parts[-1])
    return " ".join(parts)


def _reply(rng: random.Random, fact: Fact) -> str:
    if rng.random() < ASSEMBLED_SHARE:
        return _assembled(rng, fact)
    return _written(rng, fact, right_share=0.75, trimmed_share=0.15)


def _content_contrast(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Two replies with the same opening, closing and form: one right, the other not."""
    form = _form(rng, fact)
    opening, closing = _trimmings(rng, 0.15)
    if rng.random() < 0.1:  # right against nothing, politely
        empty = _trimmed(rng.choice(OPENINGS), "", rng.choice(CLOSINGS))
        return _trimmed(opening, _right(rng, fact, form), closing), empty
    right, wrong = _right(rng, fact, form), _wrong(rng, fact, form)
    if rng.random() < 0.1:  # right but plain against wrong but polite
        return right, _trimmed(rng.choice(OPENINGS), wrong, rng.choice(CLOSINGS))
    return _trimmed(opening, right, closing), _trimmed(opening, wrong, closing)


def _style_contrast(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Two replies with the same content, right or wrong, one of them better written."""
    form = _form(rng, fact)
    body = (_right if rng.random() < 0.75 else _wrong)(rng, fact, form)
    plain, better = _trimmings(rng, 0.1), _trimmings(rng, 0.2)
    worse = _trimmed(plain[0], body, plain[1])
    fault = rng.random()
    if fault < 0.15:
        worse = f"{worse} {rng.choice((rng.choice(OPENINGS), rng.choice(CLOSINGS), body))}"
    elif fault < 0.25:
        worse = worse[: rng.randint(1, len(worse) - 1)]
    return _trimmed(better[0], body, better[1]), worse


def _pair(rng: random.Random, fact: Fact, messages: list[Message]) -> tuple[str, str]:
    """Two replies whose gold differs, the better one first."""
    while True:
        draw = rng.random()
        if draw < CONTENT_CONTRAST_SHARE:
            first, second = _content_contrast(rng, fact)
        elif draw < CONTENT_CONTRAST_SHARE + STYLE_CONTRAST_SHARE:
            first, second = _style_contrast(rng, fact)
        else:
            first, second = _reply(rng, fact), _reply(rng, fact)
        gap = gold_score(messages, first) - gold_score(messages, second)
        if abs(gap) >= MINIMUM_GOLD_GAP:
            return (first, second) if gap > 0 else (second, first)


# ------------------------------------------------------------------------------- public streams


def rows(split: Split, seed: int = 0) -> list[dict]:
    """Preference rows `{"prompt": messages, "chosen": str, "rejected": str}`, in a mixed order.

    No prompt occurs twice, and none of one split occurs in the other, whatever the seeds. Every
    fact is asked for about equally often. `FLIPPED_SHARE` of the pairs are the wrong way round, in
    both splits.
    """
    count, rng = ROW_COUNT[split], random.Random(f"rows {split} {seed}")
    prompts: dict[str, tuple[Fact, list[Message]]] = {}
    while len(prompts) < count:
        for fact in rng.sample(ALL_FACTS, len(ALL_FACTS)):
            messages = _new_prompt(rng, fact, split)
            prompts.setdefault(repr(messages), (fact, messages))
    chosen = rng.sample(list(prompts.values())[:count], count)
    flipped = set(rng.sample(range(count), round(FLIPPED_SHARE * count)))
    made = []
    for index, (fact, messages) in enumerate(chosen):
        better, worse = _pair(rng, fact, messages)
        if index in flipped:
            better, worse = worse, better
        made.append({"prompt": messages, "chosen": better, "rejected": worse})
    return made


def pretraining_texts(seed: int = 0) -> Iterator[tuple[list[Message], str]]:
    """Dialogues without end, `(messages, reply)`, of all qualities, right in well over half.

    Held-out prompts are left out; the facts come round evenly.
    """
    rng = random.Random(f"pretraining {seed}")
    while True:
        for fact in rng.sample(ALL_FACTS, len(ALL_FACTS)):
            messages = _new_prompt(rng, fact, "train")
            if rng.random() < PRETRAINING_ASSEMBLED_SHARE:
                yield messages, _assembled(rng, fact)
            else:
                yield messages, _written(rng, fact, 0.9, 0.25, wrong=_mistaken)
