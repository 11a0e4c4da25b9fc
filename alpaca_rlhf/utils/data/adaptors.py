"""The forms of rows: how each known data set becomes `Sample(messages, chosen, rejected)`.

`ADAPTORS`, at the end, is the table. A new data set is one entry in it: its names, the columns by
which its rows are known, and a function that makes a sample of a row, or several, and raises
`Unusable` with the reason when it cannot. The helpers below do the checking.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from alpaca_rlhf.utils.data.reading import Row
from alpaca_rlhf.utils.data.tokenizer import Message

EMBEDDED = "embedded"
LOCAL_JSON = "local/jsonfile"


@dataclass(frozen=True)
class Sample:
    """One dialogue that ends with a user's turn, and its replies.

    Attributes:
        messages: role and content, a user's turn last. A turn in the form of Stanford Alpaca has
            `instruction` and `input` too, for the template of that name; its content is both.
        chosen: the (better) reply.
        rejected: the worse reply, None where the data has only one.
        history_is_trained: whether step 1 may train the assistant's earlier turns; False where
            each of them is the reply of a row of its own.
        language: as the data states it, or None.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str | None = None
    history_is_trained: bool = field(default=True, compare=False)
    language: str | None = field(default=None, compare=False)

    def prompt_key(self) -> str:
        """The text by which equal prompts are known."""
        turns = [{"content": m["content"], "role": m["role"]} for m in self.messages]
        return json.dumps(turns, ensure_ascii=False)


class Unusable(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


Made = Sample | Iterable[Sample | Unusable]


@dataclass(frozen=True)
class Adaptor:
    """How rows of one form are read.

    Attributes:
        names: of the data sets that have this form.
        columns: what a row must have.
        convert: row -> sample, or samples; raises (or gives) `Unusable`.
        gather: makes rows of many rows first, where a sample is spread over several.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    convert: Callable[[Row], Made]
    gather: Callable[[Iterable[Row]], Iterator[Row | Unusable]] | None = None

    def fits(self, row: Row) -> bool:
        """Whether the row has the columns."""
        return all(column in row for column in self.columns)

    def read(self, rows: Iterable[Row], unused: Counter[str]) -> Iterator[Sample]:
        """The samples of rows; what cannot be used is added to `unused` by its reason."""
        for row in self.gather(rows) if self.gather else rows:
            for made in [row] if isinstance(row, Unusable) else self._samples(row):
                if isinstance(made, Unusable):
                    unused[str(made)] += 1
                else:
                    yield made

    def _samples(self, row: Row) -> Iterator[Sample | Unusable]:
        language = next((row[c] for c in ("lang", "language") if isinstance(row.get(c), str)), None)
        try:
            # A column that only some rows lack is an empty one there.
            made = self.convert({**dict.fromkeys(self.columns), **row})
            for sample in [made] if isinstance(made, Sample) else made:
                if isinstance(sample, Sample) and sample.language is None:
                    sample = replace(sample, language=language)
                yield sample
        except Unusable as reason:
            yield reason


# --- texts and turns -----------------------------------------------------------------------------

_HUMAN_ASSISTANT = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):", re.MULTILINE)
_USER_ASSISTANT = re.compile(r"(?:^|\s|</s>)(USER|ASSISTANT):")
_ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "model": "assistant",
}
# JSON can spell half of a character ("\\ud83d"); no encoding has it.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_dialogue(text: str) -> list[Message]:
    """`Human: … Assistant: …` text -> turns; a last turn that is empty stands as "".

    Raises:
        Unusable: the text does not begin with a Human's turn.
    """
    parts = _HUMAN_ASSISTANT.split(text.strip())
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human":
        raise Unusable("dialogue does not begin with Human:")
    return _turns_of(parts)


def _turns_of(parts: list[str]) -> list[Message]:
    """Names and texts in turn, after whatever stands before the first name."""
    return [
        {"role": _ROLES[who.lower()], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _text(value: Any, what: str) -> str:
    """A text that is not empty, without the space around it."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is not text")
    if not value.strip():
        raise Unusable(f"empty {what}")
    return value.strip()


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unusable(f"{what} is no list")
    if not value:
        raise Unusable(f"empty {what}")
    return value


def _get(value: Any, key: str, what: str) -> Any:
    if not isinstance(value, dict):
        raise Unusable(f"{what} is not an object")
    return value.get(key)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(f"{what} is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise Unusable(f"{what} is not a number")
    return value


def _turns(value: Any, what: str) -> list[Message]:
    """A list of {role, content} or {from, value} -> turns in order, roles by our names."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Unusable(f"{what} is neither text nor messages")
    pairs = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
             for turn in value]
    if not all(isinstance(role, str) and isinstance(said, str) for role, said in pairs):
        raise Unusable(f"{what} is neither text nor messages")
    if any(role.lower() not in _ROLES for role, _ in pairs):
        raise Unusable("role is not system, user or assistant")
    return [{"role": _ROLES[role.lower()], "content": said.strip()} for role, said in pairs]


def _ending_with_user(turns: list[Message]) -> list[Message]:
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"]:
        raise Unusable("dialogue does not end with a user's turn")
    return turns


def _in_order(turns: list[Message]) -> list[Message]:
    """A system's turn or none, then user and assistant in turn, the user last."""
    _ending_with_user(turns)
    talk = turns[1:] if turns[0]["role"] == "system" else turns
    if [turn["role"] for turn in talk] != (["user", "assistant"] * len(talk))[: len(talk)]:
        raise Unusable("roles out of order")
    if not all(turn["content"] for turn in talk):
        raise Unusable("empty turn")
    return turns


def _messages(prompt: Any, what: str = "prompt") -> list[Message]:
    """A prompt as text, as Human/Assistant text or as messages -> turns ending with the user's."""
    if not isinstance(prompt, str):
        return _in_order(_turns(prompt, what))
    if not prompt.strip():
        raise Unusable(f"empty {what}")
    if not _is_dialogue(prompt):
        return [_user(prompt.strip())]
    turns = parse_dialogue(prompt)
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return _ending_with_user(turns)


def _is_dialogue(text: Any) -> bool:
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None


def _reply(value: Any, side: str) -> str:
    """A reply as text, or as messages of which the last is the assistant's."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        if value[-1].get("role", "assistant") != "assistant":
            raise Unusable(f"{side} does not end with the assistant's turn")
        value = value[-1].get("content")
    return _text(value, side)


def _sample(messages: list[Message], chosen: Any, rejected: Any = None, **more: Any) -> Sample:
    """A checked sample; `rejected` None is none."""
    better = _reply(chosen, "chosen")
    worse = None if rejected is None else _reply(rejected, "rejected")
    if better == worse:
        raise Unusable("chosen equals rejected")
    texts = (better, worse or "", *(text for message in messages for text in message.values()))
    if any(_HALF_CHARACTER.search(text) for text in texts):
        raise Unusable("text is not valid Unicode")
    return Sample(tuple(messages), better, worse, **more)


def _pair(messages: list[Message], chosen: Any, rejected: Any) -> Sample:
    if rejected is None:
        raise Unusable("rejected is not text")
    return _sample(messages, chosen, rejected)


def _by_score(messages: list[Message], replies: list[tuple[float, Any]]) -> Sample:
    """The best and the worst of scored replies; of equal ones none is better."""
    best, worst = max(replies, key=lambda r: r[0]), min(replies, key=lambda r: r[0])
    if len(replies) == 1:
        return _sample(messages, best[1])
    if best[0] == worst[0]:
        raise Unusable("tie")
    return _pair(messages, best[1], worst[1])


def _whole_pair(chosen: list[Message], rejected: list[Message]) -> Sample:
    """Two whole dialogues that part at their last reply."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("pair parts before the last reply")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("dialogue does not end with Assistant:")
    messages = _ending_with_user(chosen[:-1])
    return _pair(messages, chosen[-1]["content"], rejected[-1]["content"])


# --- the forms -----------------------------------------------------------------------------------


def _chosen_rejected(row: Row) -> Sample:
    """Whole dialogues, as Human/Assistant text or as messages; the prompt is what they share."""
    sides = row["chosen"], row["rejected"]
    if all(isinstance(side, list) and side for side in sides):
        chosen, rejected = (_turns(side, "dialogue") for side in sides)
        _in_order(chosen[:-1])
        return _whole_pair(chosen, rejected)
    if not all(isinstance(side, str) for side in sides):
        raise Unusable("chosen or rejected is not text")
    return _whole_pair(*map(parse_dialogue, sides))


def _prompt_chosen_rejected(row: Row) -> Sample:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if _is_whole(chosen) and _is_whole(rejected):
        return _chosen_rejected(row)
    if _is_dialogue(prompt) and _is_dialogue(chosen) and _is_dialogue(rejected):
        return _chosen_rejected(row)
    sides = chosen, rejected
    if all(isinstance(side, str) and side.lstrip().startswith(_NAME) for side in sides):
        # As in yitingxie/rlhf-reward-datasets.
        chosen, rejected = (side.rsplit(_NAME, 1)[-1] for side in sides)
    return _pair(_messages(prompt), chosen, rejected)


_NAME = "Assistant:"


def _is_whole(side: Any) -> bool:
    """Whether messages are a dialogue, not only the reply."""
    return (isinstance(side, list) and len(side) > 1 and isinstance(side[0], dict)
            and side[0].get("role") != "assistant")


def _question_chosen_rejected(row: Row) -> Sample:
    messages = [_user(_text(row["question"], "question"))]
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system.strip()})
    return _pair(messages, row["chosen"], row["rejected"])


def _shp(row: Row) -> Sample:
    messages = [_user(_text(row["history"], "history"))]
    if row["labels"] not in (0, 1):
        raise Unusable("labels is not 0 or 1")
    replies = row["human_ref_B"], row["human_ref_A"]
    return _pair(messages, replies[int(row["labels"])], replies[1 - int(row["labels"])])


def _alpaca_eval(row: Row) -> Sample:
    preference = row["preference"]
    if preference not in (1, 2):
        raise Unusable("tie" if preference == 0 else "preference is not 0, 1 or 2")
    better, worse = ("output_1", "output_2") if preference == 1 else ("output_2", "output_1")
    return _pair(_messages(row["instruction"], "instruction"), row[better], row[worse])


def _webgpt(row: Row) -> Sample:
    question = _text(_get(row["question"], "full_text", "question"), "question")
    replies = []
    for i in (0, 1):
        answer = _text(row[f"answer_{i}"], f"answer_{i}")
        marks_off = re.sub(r"\s?\[\d+(?:,\s*\d+)*\]", "", answer)
        replies.append((_number(row[f"score_{i}"], "score"), marks_off))
    return _by_score([_user(question)], replies)


def _scored_responses(row: Row) -> Sample:
    """GPT-4-LLM's comparison data: some replies, each with a score."""
    question = _text(row["user_input"], "user_input")
    replies = [
        (_number(_get(reply, "score", "response"), "score"), reply.get("response"))
        for reply in _list(row["responses_and_scores"], "responses_and_scores")
    ]
    return _by_score([_user(question)], replies)


def _miracl(row: Row) -> Sample:
    sides = []
    for side in ("positive_passages", "negative_passages"):
        sides.append(_get(_list(row[side], side)[0], "text", side))
    return _pair([_user(_text(row["query"], "query"))], *sides)


def _instruction(instruction: Any, extra: Any) -> list[Message]:
    """An instruction of Stanford Alpaca's form, with its input if it has one."""
    if extra is not None and not isinstance(extra, str):
        raise Unusable("input is not text")
    text = _text(instruction, "instruction")
    if extra is None or not extra.strip():
        return _messages(text, "instruction")
    extra = extra.strip()
    turn = {**_user(f"{text}\n\n{extra}"), "instruction": text, "input": extra}
    return [turn]


def _alpaca(row: Row) -> Sample:
    messages = _instruction(row["instruction"], row.get("input"))
    # In MultiTurnAlpaca the instruction is the dialogue so far, whose replies have their own rows.
    return _sample(messages, row["output"], history_is_trained=len(messages) == 1)


def _seed_task(row: Row) -> Iterator[Sample | Unusable]:
    for instance in _list(row["instances"], "instances"):
        try:
            extra, output = (_get(instance, key, "instance") for key in ("input", "output"))
            yield _sample(_instruction(row["instruction"], extra), output)
        except Unusable as reason:
            yield reason


def _conversation(column: str) -> Callable[[Row], Sample]:
    """A whole dialogue in one column; what follows the last reply is left off."""

    def convert(row: Row) -> Sample:
        turns = _turns(row[column], column)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            raise Unusable("no assistant's turn")
        return _sample(_in_order(turns[:-1]), turns[-1]["content"])

    return convert


def _prompt_completion(row: Row) -> Sample:
    return _sample(_messages(row["prompt"]), row["completion"])


def _user_assistant_prompt(row: Row) -> Sample:
    """`USER: … ASSISTANT:` text, after a system's text or none."""
    parts = _USER_ASSISTANT.split(_text(row["prompt"], "prompt"))
    turns = _turns_of([said.replace("</s>", "") for said in parts])
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    system: list[Message] = [{"role": "system", "content": parts[0].strip()}]
    return _sample(_in_order((system if parts[0].strip() else []) + turns), row["label"])


def _question_answer(
    question: str, answer: str, first_question: bool = False, first_answer: bool = False
) -> Callable[[Row], Sample]:
    """Two columns; of a column that holds a list, the first."""

    def convert(row: Row) -> Sample:
        asked, given = row[question], row[answer]
        asked = _list(asked, question)[0] if first_question else asked
        given = _list(given, answer)[0] if first_answer else given
        return _sample([_user(_text(asked, question))], _text(given, answer))

    return convert


def _mkqa(row: Row) -> Iterator[Sample | Unusable]:
    for language in ("zh_cn", "ja"):
        try:
            question = _text(_get(row["queries"], language, "queries"), "query")
            answers = _list(_get(row["answers"], language, "answers"), "answers")
            answer = _text(_get(answers[0], "text", "answer"), "answer")
            yield _sample([_user(question)], answer, language=language)
        except Unusable as reason:
            yield reason


# --- trees of messages ---------------------------------------------------------------------------


def _tree(row: Row) -> Iterator[Sample | Unusable]:
    """One sample for each prompter's turn of an Open Assistant tree: its best and worst reply."""
    open_nodes: list[tuple[Any, list[Message]]] = [(row["prompt"], [])]
    while open_nodes:
        node, path = open_nodes.pop()
        try:
            turns = [*path, _user(_tree_text(node, "prompter"))]
        except Unusable as reason:
            yield reason
            continue
        replies, unusable = _tree_replies(node)
        yield from unusable
        try:
            language = node.get("lang") if isinstance(node.get("lang"), str) else None
            chosen, rejected = _best_and_worst(replies)
            yield _sample(turns, chosen, rejected, history_is_trained=False, language=language)
        except Unusable as reason:
            yield reason
        for reply in reversed(replies):
            said = {"role": "assistant", "content": reply["text"].strip()}
            below = reply.get("replies") or []
            more = below if isinstance(below, list) else []
            open_nodes += [(child, [*turns, said]) for child in reversed(more)]


def _tree_text(node: Any, role: str) -> str:
    if _get(node, "deleted", "message"):
        raise Unusable("deleted message")
    if node.get("role") != role:
        raise Unusable("roles out of order")
    return _text(node.get("text"), "message")


def _tree_replies(node: Row) -> tuple[list[Row], list[Unusable]]:
    """The usable replies to a turn, best first, those without a rank last; and the others."""
    below = node.get("replies")
    usable, others = [], []
    for reply in below if isinstance(below, list) else []:
        try:
            _tree_text(reply, "assistant")
            usable.append(reply)
        except Unusable as reason:
            others.append(reason)
    return sorted(usable, key=lambda reply: _rank(reply, math.inf)), others


def _rank(reply: Row, otherwise: float) -> float:
    try:
        return _number(reply.get("rank"), "rank")
    except Unusable:
        return otherwise


def _best_and_worst(replies: list[Row]) -> tuple[str, str | None]:
    if not replies:
        raise Unusable("prompt without a reply")
    ranked = [reply for reply in replies if _rank(reply, math.inf) != math.inf]
    if len(ranked) > 1 and _rank(ranked[0], 0) != _rank(ranked[-1], 0):
        return ranked[0]["text"], ranked[-1]["text"]
    return replies[0]["text"], None


def _trees(rows: Iterable[Row]) -> Iterator[Row | Unusable]:
    """Open Assistant's flat messages -> trees; what hangs on no root is counted."""
    nodes: dict[str, Row] = {}
    below: dict[str, list[str]] = {}
    for row in rows:
        name, parent = row.get("message_id"), row.get("parent_id")
        if not isinstance(name, str) or not name or not isinstance(parent, str | None):
            yield Unusable("message_id or parent_id is not text")
        elif name in nodes:
            yield Unusable("message_id occurs twice")
        else:
            nodes[name] = {**row, "replies": []}
            below.setdefault(parent or "", []).append(name)
    for parent, children in below.items():
        if parent in nodes:
            nodes[parent]["replies"] += [nodes[child] for child in children]
    roots = below.get("", [])
    for name in roots:
        yield {"prompt": nodes[name]}
    orphans = [c for p, children in below.items() if p and p not in nodes for c in children]
    lost = _reached(orphans, below)
    yield from (Unusable("parent message is missing") for _ in lost)
    circling = len(nodes) - len(lost) - len(_reached(roots, below))
    yield from (Unusable("tree cycle") for _ in range(circling))


def _reached(start: list[str], below: dict[str, list[str]]) -> set[str]:
    reached, waiting = set(start), list(start)
    while waiting:
        new = [child for child in below.get(waiting.pop(), []) if child not in reached]
        reached.update(new)
        waiting += new
    return reached


# --- the table -----------------------------------------------------------------------------------

# The order counts for what has no name: the first entry whose columns a row has is taken, so a form
# with more columns stands before one with fewer of them.
ADAPTORS = (
    Adaptor(("Dahoas/synthetic-instruct-gptj-pairwise", "Dahoas/rm-static", "Dahoas/static-hh",
             "Dahoas/full-hh-rlhf", "yitingxie/rlhf-reward-datasets",
             "HuggingFaceH4/ultrafeedback_binarized",
             "argilla/ultrafeedback-binarized-preferences-cleaned", LOCAL_JSON, EMBEDDED),
            ("prompt", "chosen", "rejected"), _prompt_chosen_rejected),
    Adaptor(("Intel/orca_dpo_pairs",), ("question", "chosen", "rejected"),
            _question_chosen_rejected),
    Adaptor(("Anthropic/hh-rlhf", "argilla/dpo-mix-7k"), ("chosen", "rejected"), _chosen_rejected),
    Adaptor(("stanfordnlp/SHP",), ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    Adaptor(("tatsu-lab/alpaca_eval",), ("instruction", "output_1", "output_2", "preference"),
            _alpaca_eval),
    Adaptor(("openai/webgpt_comparisons",),
            ("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt),
    Adaptor(("GPT-4-LLM",), ("user_input", "responses_and_scores"), _scored_responses),
    Adaptor(("OpenAssistant/oasst1",), ("message_id", "parent_id", "role", "text"), _tree, _trees),
    Adaptor(("OpenAssistant/oasst1",), ("message_tree_id", "prompt"), _tree),
    Adaptor(("Cohere/miracl-zh-queries-22-12", "Cohere/miracl-ja-queries-22-12"),
            ("query", "positive_passages", "negative_passages"), _miracl),
    Adaptor(("seed_tasks",), ("instruction", "instances"), _seed_task),
    Adaptor(("tatsu-lab/alpaca", "yahma/alpaca-cleaned", "vicgalle/alpaca-gpt4", "GPT-4-LLM",
             "MultiTurnAlpaca"), ("instruction", "output"), _alpaca),
    Adaptor(("ShareGPT", "ChatAlpaca"), ("conversations",), _conversation("conversations")),
    Adaptor(("ShareGPT", "ChatAlpaca", "HuggingFaceH4/ultrachat_200k"), ("messages",),
            _conversation("messages")),
    Adaptor(("pvduy/sharegpt_alpaca_oa_vicuna_format",), ("prompt", "label"),
            _user_assistant_prompt),
    Adaptor(("prompt-completion",), ("prompt", "completion"), _prompt_completion),
    Adaptor(("wangrui6/Zhihu-KOL",), ("INSTRUCTION", "RESPONSE"),
            _question_answer("INSTRUCTION", "RESPONSE")),
    Adaptor(("Hello-SimpleAI/HC3-Chinese", "Hello-SimpleAI/HC3"), ("question", "human_answers"),
            _question_answer("question", "human_answers", first_answer=True)),
    Adaptor(("mkqa", "apple/mkqa"), ("queries", "answers"), _mkqa),
    Adaptor(("lmqg/qag_jaquad",), ("questions", "paragraph"),
            _question_answer("questions", "paragraph", first_question=True)),
    Adaptor(("lmqg/qg_jaquad",), ("question", "sentence"),
            _question_answer("question", "sentence")),
)


def names() -> list[str]:
    """Every name a data set may be called by."""
    known = dict.fromkeys(name for adaptor in ADAPTORS for name in adaptor.names)
    return [name for name in known if name != EMBEDDED]


def forms() -> str:
    """The columns of every form, for messages."""
    return "; ".join(dict.fromkeys("+".join(adaptor.columns) for adaptor in ADAPTORS))


def named(name: str) -> list[Adaptor]:
    """The forms that go by a name: some data sets come in two."""
    return [adaptor for adaptor in ADAPTORS if name in adaptor.names]
