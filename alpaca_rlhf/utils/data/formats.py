"""Data formats: how the rows of each known data set become `Sample(messages, chosen, rejected)`.

`FORMATS`, at the end, is the table. A new format is one entry in it: names of data sets, the
columns that tell it from the others, and a function that makes a sample (or several) from a row
and raises `Unusable` with the reason when it cannot. The checks are in `samples`.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache, partial
from itertools import repeat
from typing import Any

from alpaca_rlhf.utils.data.samples import (
    MARK_KEYS,
    ROLE_KEYS,
    TEXT_KEYS,
    Sample,
    Tally,
    Unusable,
    best_and_worst,
    first_of,
    flag_of,
    in_order,
    is_dialogue,
    is_open_dialogue,
    is_trained,
    is_turns,
    list_of,
    messages_of,
    number_of,
    pair_of,
    parse_dialogue,
    response_text,
    sample_of,
    split_turns,
    stripped,
    text_of,
    turns_of,
    user_turn,
    value_of,
    whole_pair,
)
from alpaca_rlhf.utils.data.tokenizer import Message

Row = dict[str, Any]
EMBEDDED = "embedded"
LOCAL_JSON = "local/jsonfile"

# Columns that mean the same, the first one that holds something counts.
_DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog")
_PROMPTS = ("prompt", "question", "query", "problem", "context_messages", "input")
_ANY_PROMPT = ("prompt", "instruction", *_PROMPTS[1:], *_DIALOGUES)
_RESPONSES = ("completion", "response", "output", "solution", "answer")
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt", "system_message")
_LABELS = ("label", "kto_tag", "weight", "train", "trainable")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Columns that may hold JSON in a string: a list or an object; the sides of a pair and the prompt
# only turns, for their text may be JSON of its own.
_STRUCTURED = (*_DIALOGUES, "context_messages", "history", "responses_and_scores", "instances",
               "positive_passages", "negative_passages", "human_answers", "queries", "answers",
               "questions")
_SIDES = ("chosen", "rejected", "completion")
# Last words of names of columns and keys that say nothing to train on.
_HARMLESS = set(
    "id ids idx index uuid hash source sources dataset datasource origin url license category "
    "topic task type tag tags domain subset split title subject difficulty quality level score "
    "scores rating ratings ratio difference rank margin model models generator annotator author "
    "lang language date time utc timestamp created version metadata meta tokens length len count "
    "turns state ability synthetic deleted markdown tie replies quotes chatgpt_answers "
    "raw_completion price_per_example time_per_example questions_answers paragraph_answer "
    "paragraph_sentence sentence_answer name emojis review_result is_classification".split())
_SIDE_WORDS = {"a", "b", "0", "1", "2", "chosen", "rejected"}  # may follow: score_chosen


class _Reading(dict[str, Any]):
    """A row that notes which of its columns are read; a column it lacks is None."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.seen.add(column)
        return super().get(column)

    get = __getitem__  # type: ignore[assignment]

    def held(self, columns: Sequence[str]) -> str:
        """Return the first of some columns that is not empty, or else one that it has."""
        there = [column for column in columns if column in self] or columns[:1]
        return next((c for c in there if not _is_empty(super(_Reading, self).get(c))), there[0])

    def unread(self, sample: Sample) -> Iterator[str]:
        """Yield the columns, and keys of turns, that hold something which the sample leaves out."""
        for column, value in self.items():
            if column in self.seen:
                turns = value if isinstance(value, list) else [value]
                yield from {f"key {key} of turns" for turn in turns if is_turns(turn)
                            for key, held in turn.items() if not _is_empty(held)
                            and key not in (*ROLE_KEYS, *TEXT_KEYS, *MARK_KEYS)
                            and not _is_harmless(key)}
            elif not (_is_empty(value) or _is_harmless(column) or _repeats(value, sample)):
                yield f"column {column}"


def _is_empty(value: Any) -> bool:
    text = value.strip() if isinstance(value, str) else value
    return text is None or text in ("", "[]", "{}", "null", [], {})


def _is_harmless(name: str) -> bool:
    words = re.split(r"[\W_]+", name.lower())
    while len(words) > 1 and words[-1] in _SIDE_WORDS:
        words.pop()
    return words[-1] in _HARMLESS or name.lower() in _HARMLESS


def _repeats(value: Any, sample: Sample) -> bool:
    """Return whether a value is one of the texts of a sample, or a rendering of the sample."""
    said = (sample.chosen, sample.rejected or "", *(m["content"] for m in sample.messages))
    texts = {text.strip() for text in said}
    last = sample.messages[-1]
    if isinstance(value, str):
        rendered = sample.chosen in value and last.get("instruction", last["content"]) in value
        return value.strip() in texts or rendered
    return is_turns(value) and all(
        str(first_of(turn, TEXT_KEYS)).strip() in texts
        for turn in (value if isinstance(value, list) else [value]) if turn)


@dataclass(frozen=True)
class DataFormat:
    """A format of rows."""

    names: tuple[str, ...]  # data sets in this format
    # Those a row must have: "a|b" is either, and after a colon stands what it holds (`_HOLDS`).
    columns: tuple[str, ...]
    convert: Callable[[Any], Sample | Iterable[Sample | Unusable]]  # also raises Unusable
    # Joins rows first, where a sample is spread over several.
    gather: Callable[[Iterable[Row]], Iterator[Row | Unusable]] | None = None
    absent: tuple[str, ...] = ()  # columns that must not hold a text or turns

    def fields(self) -> list[tuple[list[str], str]]:
        """Return the names of each column, and what it holds."""
        parts = [column.partition(":") for column in self.columns]
        return [(names.split("|"), kind) for names, _, kind in parts]

    def holds(self, shapes: dict[str, str]) -> bool:
        """Return whether each column of a row holds what it must."""
        return not any(shapes.get(column) in _HOLDS["said"] for column in self.absent) and all(
            any(shapes.get(name, "null") in _HOLDS[kind] for name in names)
            for names, kind in self.fields())

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """Return the columns that a row does not have."""
        return [names[0] for names, _ in self.fields() if not set(names) & set(columns)]

    def samples(self, row: Row) -> Iterator[Sample | Unusable]:
        """Yield the samples of a row, or why it has none."""
        row = row if isinstance(row, _Reading) else _Reading(row)
        language = next((row[c] for c in ("lang", "language") if isinstance(row[c], str)), None)
        try:
            made = self.convert(row)
            if media := next((c for c in _MEDIA if not _is_empty(row[c])), None):
                raise Unusable(f"column {media} is not text")
            for sample in [made] if isinstance(made, Sample) else made:
                if isinstance(sample, Sample):
                    sample = _labelled(sample, row)
                    if sample.language is None:
                        sample = replace(sample, language=language)
                yield sample
        except Unusable as reason:
            yield reason


def _labelled(sample: Sample, row: _Reading) -> Sample:
    """Leave out the response of a row that is marked as a bad one, as in KTO's data."""
    for column in _LABELS:
        if column not in row.seen and flag_of(dict.get(row, column)) is not None:
            if not flag_of(row[column]):
                return replace(sample, chosen="", rejected=None, lacking=f"{column} is false")
    return sample


def _in_context(row: _Reading, turns: list[Message]) -> list[Message]:
    """Put the columns of a system text and of earlier turns before a prompt."""
    own = turns[:1] if turns and turns[0]["role"] == "system" else []
    rest, column = turns[len(own) :], row.held(_SYSTEMS)
    if not own and not _is_empty(dict.get(row, column)):
        own = [{"role": "system", "content": text_of(row[column], column)}]
    return [*own, *_earlier(row["history"]), *rest]


def _earlier(history: Any) -> list[Message]:
    """Read earlier turns: pairs of texts, or messages."""
    if _is_empty(history):
        return []
    if is_turns(history):
        turns = turns_of(history, "history")
    else:
        pairs = list_of(history, "history")
        if all(isinstance(text, str) for text in pairs) and len(pairs) % 2 == 0:
            pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
        turns = []
        for pair in pairs:
            if isinstance(pair, dict):
                pair = [first_of(pair, ("user", "human", "instruction", *_PROMPTS)),
                        first_of(pair, ("assistant", "gpt", *_RESPONSES))]
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise Unusable("history is neither pairs of texts nor messages")
            turns += [user_turn(text_of(pair[0], "history")),
                      {"role": "assistant", "content": response_text(pair[1], "history")}]
    if not all(turn["content"] for turn in turns):
        raise Unusable("empty turn")
    return turns


def _prompt(row: _Reading) -> list[Message]:
    """Read the prompt of a row, with what stands before it in columns of its own."""
    column = row.held(_ANY_PROMPT)
    if column == "instruction":
        turns = instruction_turns(row["instruction"], row[row.held(_INPUTS)])
    else:
        turns = messages_of(row[column], column)
    return _in_context(row, turns)


# --- pairs ---------------------------------------------------------------------------------------


def _chosen_rejected(row: _Reading) -> Sample:
    """Read whole dialogues, as `Human: …` text or as messages; the prompt is what they share."""
    sides = row["chosen"], row["rejected"]
    if all(isinstance(side, list) and side for side in sides):
        chosen, rejected = (turns_of(side, "dialogue") for side in sides)
        in_order(chosen[:-1])
    elif all(isinstance(side, str) for side in sides):
        chosen, rejected = map(parse_dialogue, sides)
    else:
        raise Unusable("chosen or rejected is not text")
    return whole_pair(chosen, rejected, partial(_in_context, row))


def _prompt_chosen_rejected(row: _Reading) -> Sample:
    """Read a prompt and two responses, each of which may be a whole dialogue."""
    messages, sides = _prompt(row), [row["chosen"], row["rejected"]]
    if all(map(_is_whole, sides)):
        chosen, rejected = (turns_of(side, "dialogue") for side in sides)
        in_order(chosen[:-1])
        # A prompt that ends in what the dialogues share has more before it.
        longer = messages[-len(chosen) + 1 :] == chosen[:-1]
        return whole_pair(chosen, rejected, lambda shared: messages if longer else shared)
    prompt = dict.get(row, "prompt")
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides):
        is_open = is_open_dialogue(prompt)
        begin = prompt.strip() if is_open else f"Human: {prompt.strip()}\n\nAssistant:"
        for start in (begin, "Assistant:") if is_open else (begin,):
            if all(side.lstrip().startswith(start) for side in sides):
                # The prompt is repeated, or the name as in yitingxie/rlhf-reward-datasets.
                sides = [side.lstrip().removeprefix(start).removeprefix(" ") for side in sides]
                break
        else:
            if all(is_dialogue(side) and parse_dialogue(side)[0] == messages[0] for side in sides):
                return _chosen_rejected(row)
            if is_open:
                sides = [side.removeprefix(" ") for side in sides]
    return pair_of(messages, *sides)


def _is_whole(side: Any) -> bool:
    """Return whether messages are a dialogue, not the response alone."""
    return (isinstance(side, list) and len(side) > 1 and isinstance(side[0], dict)
            and first_of(side[0], ROLE_KEYS) not in ("assistant", "gpt"))


def _shp(row: Row) -> Sample:
    messages = [user_turn(text_of(row["history"], "history"))]
    if row["labels"] not in (0, 1):
        raise Unusable("labels is not 0 or 1")
    responses = row["human_ref_B"], row["human_ref_A"]
    return pair_of(messages, responses[int(row["labels"])], responses[1 - int(row["labels"])])


def _alpaca_eval(row: Row) -> Sample:
    preference = row["preference"]
    if preference not in (1, 2):
        raise Unusable("tie" if preference == 0 else "preference is not 0, 1 or 2")
    better, worse = ("output_1", "output_2") if preference == 1 else ("output_2", "output_1")
    return pair_of(messages_of(row["instruction"], "instruction"), row[better], row[worse])


def _webgpt(row: Row) -> Sample:
    question = text_of(value_of(row["question"], "full_text", "question"), "question")
    responses = []
    for i in (0, 1):
        answer = response_text(row[f"answer_{i}"], f"answer_{i}")
        without_marks = re.sub(r"\s?\[\d+(?:,\s*\d+)*\]", "", answer)
        responses.append((number_of(row[f"score_{i}"], "score"), without_marks))
    return best_and_worst([user_turn(question)], responses)


def _scored_responses(row: Row) -> Sample:
    """Read GPT-4-LLM's comparison data: several responses, each with a score."""
    question = text_of(row["user_input"], "user_input")
    responses = [
        (number_of(value_of(response, "score", "response"), "score"), response.get("response"))
        for response in list_of(row["responses_and_scores"], "responses_and_scores")
    ]
    return best_and_worst([user_turn(question)], responses)


def _miracl(row: Row) -> Sample:
    sides = [value_of(list_of(row[side], side)[0], "text", side)
             for side in ("positive_passages", "negative_passages")]
    return pair_of([user_turn(text_of(row["query"], "query"))], *sides)


# --- single responses ----------------------------------------------------------------------------


def instruction_turns(instruction: Any, extra: Any) -> list[Message]:
    """Read an instruction in Stanford Alpaca's format, with its input if it has one."""
    if extra is not None and not isinstance(extra, str):
        raise Unusable("input is not text")
    text = text_of(instruction, "instruction")
    if extra is None or not extra.strip():
        return messages_of(text, "instruction")
    extra = extra.strip()
    return [{**user_turn(f"{text}\n\n{extra}"), "instruction": text, "input": extra}]


def _alpaca(row: _Reading) -> Sample:
    own, output = _prompt(row), row[row.held(("output", *_RESPONSES))]
    if isinstance(output, list) and len(output) == 2:  # LLaMA-Factory's pairs: the better one first
        return pair_of(own, *output)
    # In MultiTurnAlpaca the instruction is the dialogue so far; its responses have their own rows.
    return sample_of(own, output, history_is_trained=not is_open_dialogue(row["instruction"]))


def _seed_task(row: Row) -> Iterator[Sample | Unusable]:
    for instance in list_of(row["instances"], "instances"):
        try:
            extra, output = (value_of(instance, key, "instance") for key in ("input", "output"))
            yield sample_of(instruction_turns(row["instruction"], extra), output)
        except Unusable as reason:
            yield reason


def _conversation(row: _Reading) -> Sample:
    """Read a whole dialogue; what follows the last response that is trained is left out."""
    column = row.held(_DIALOGUES)
    turns = turns_of(row[column], column)
    if not turns:
        raise Unusable("no assistant turn")
    last = next((i for i in range(len(turns))[::-1] if is_trained(turns[i])), None)
    if last is not None:
        return sample_of(_in_context(row, in_order(turns[:last])), turns[last]["content"])
    lacking = "no response"
    if turns[-1]["role"] == "assistant":
        lacking = "response is marked as not trained"
        turns.pop()
    return sample_of(_in_context(row, in_order(turns)), None, lacking=lacking)


_USER_ASSISTANT = re.compile(r"(?:^|\s|</s>)(USER|ASSISTANT):")


def _user_assistant_prompt(row: _Reading) -> Sample:
    """Read `USER: … ASSISTANT:` text, with or without a system text before it."""
    before, turns = split_turns(text_of(row["prompt"], "prompt"), _USER_ASSISTANT)
    turns = [{**turn, "content": turn["content"].replace("</s>", "").rstrip()} for turn in turns]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    system: list[Message] = [{"role": "system", "content": before.strip()}]
    own = in_order((system if before.strip() else []) + turns)
    return sample_of(_in_context(row, own), row["label"])


def _question_answer(question: str, answer: str) -> Callable[[Row], Sample]:
    """Read two columns; "column[]" is the first of the column's list."""

    def value(row: Row, name: str) -> tuple[Any, str]:
        column = name.removesuffix("[]")
        return row[column] if name == column else list_of(row[column], column)[0], column

    return lambda row: sample_of(
        [user_turn(text_of(*value(row, question)))], response_text(*value(row, answer)))


def _mkqa(row: Row) -> Iterator[Sample | Unusable]:
    for language in ("zh_cn", "ja"):
        try:
            question = text_of(value_of(row["queries"], language, "queries"), "query")
            answers = list_of(value_of(row["answers"], language, "answers"), "answers")
            answer = response_text(value_of(answers[0], "text", "answer"), "answer")
            yield sample_of([user_turn(question)], answer, language=language)
        except Unusable as reason:
            yield reason


# --- Open Assistant's trees of messages ----------------------------------------------------------


def _tree_samples(row: Row) -> Iterator[Sample | Unusable]:
    """Yield a sample for each prompter turn of a tree: its best and worst response."""
    open_nodes: list[tuple[Any, list[Message]]] = [(row["prompt"], [])]
    while open_nodes:
        node, path = open_nodes.pop()
        try:
            turns = [*path, user_turn(_tree_text(node, "prompter"))]
        except Unusable as reason:
            yield reason
            continue
        responses = []
        for response in _children(node):
            try:
                _tree_text(response, "assistant")
                responses.append(response)
            except Unusable as reason:
                yield reason
        responses.sort(key=_rank)
        try:
            language = node.get("lang") if isinstance(node.get("lang"), str) else None
            chosen, rejected = _best_and_worst_text(responses)
            yield sample_of(turns, chosen, rejected, history_is_trained=False, language=language)
        except Unusable as reason:
            yield reason
        for response in reversed(responses):
            turn = {"role": "assistant", "content": stripped(response["text"])}
            open_nodes += [(child, [*turns, turn]) for child in reversed(_children(response))]


def _tree_text(node: Any, role: str) -> str:
    if value_of(node, "deleted", "message"):
        raise Unusable("deleted message")
    if node.get("role") != role:
        raise Unusable("roles out of order")
    return text_of(node.get("text"), "message")


def _children(node: Row) -> list[Any]:
    below = node.get("replies")
    return below if isinstance(below, list) else []


def _rank(response: Row) -> float:
    """Return the rank of a response, 0 the best; unranked ones come last."""
    try:
        return number_of(response.get("rank"), "rank")
    except Unusable:
        return math.inf


def _best_and_worst_text(responses: list[Row]) -> tuple[str, str | None]:
    if not responses:
        raise Unusable("prompt without a response")
    ranked = [response for response in responses if _rank(response) != math.inf]
    if ranked and _rank(ranked[0]) != _rank(ranked[-1]):
        return ranked[0]["text"], ranked[-1]["text"]
    return responses[0]["text"], None


def _trees_of_messages(rows: Iterable[Row]) -> Iterator[Row | Unusable]:
    """Join flat messages to trees; a message that belongs to no tree is counted."""
    names: set[str] = set()
    replies: defaultdict[str, list[Row]] = defaultdict(list)  # by parent; roots under ""
    for row in rows:
        name, parent = row.get("message_id"), row.get("parent_id")
        if not isinstance(name, str) or not name or not isinstance(parent, str | None):
            yield Unusable("message_id or parent_id is not text")
        elif name in names:
            yield Unusable("message_id occurs twice")
        else:
            names.add(name)
            replies[parent or ""].append({**row, "replies": replies[name]})
    yield from ({"prompt": root} for root in replies[""])
    lost, waiting = len(names), list(replies[""])
    while waiting:
        node = waiting.pop()
        waiting += node["replies"]
        lost -= 1
    yield from repeat(Unusable("parent message is missing, or in a circle"), lost)


# --- the table -----------------------------------------------------------------------------------

# Shapes of values that a column may hold; by `_shape_of`.
_HOLDS = {
    "": ("empty", "text", "dialogue", "turns", "list", "object", "number"),
    "text": ("empty", "text", "dialogue"),
    "asked": ("text", "dialogue", "turns"),
    "said": ("empty", "text", "dialogue", "turns", "list"),
    "dialogue": ("dialogue", "turns"),
    "turns": ("turns",),
    "object": ("object",),
}
# The order matters: of several formats whose columns a row has, the first is taken. One with more
# columns stands before one with fewer of them.
FORMATS = (
    DataFormat(("Dahoas/synthetic-instruct-gptj-pairwise", "Dahoas/rm-static", "Dahoas/static-hh",
                "Dahoas/full-hh-rlhf", "yitingxie/rlhf-reward-datasets",
                "HuggingFaceH4/ultrafeedback_binarized",
                "argilla/ultrafeedback-binarized-preferences-cleaned", "Intel/orca_dpo_pairs",
                LOCAL_JSON, EMBEDDED),
               (f"{'|'.join(_ANY_PROMPT)}:asked", "chosen:said", "rejected:said"),
               _prompt_chosen_rejected),
    DataFormat(("Anthropic/hh-rlhf", "argilla/dpo-mix-7k"),
               ("chosen:dialogue", "rejected:dialogue"), _chosen_rejected),
    DataFormat(("stanfordnlp/SHP",), ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    DataFormat(("tatsu-lab/alpaca_eval",), ("instruction", "output_1", "output_2", "preference"),
               _alpaca_eval),
    DataFormat(("openai/webgpt_comparisons",),
               ("question:object", "answer_0", "answer_1", "score_0", "score_1"), _webgpt),
    DataFormat(("GPT-4-LLM",), ("user_input", "responses_and_scores"), _scored_responses),
    DataFormat(("OpenAssistant/oasst1",), ("message_id", "parent_id", "role", "text"),
               _tree_samples, _trees_of_messages),
    DataFormat(("OpenAssistant/oasst1",), ("message_tree_id", "prompt"), _tree_samples),
    DataFormat(("Cohere/miracl-zh-queries-22-12", "Cohere/miracl-ja-queries-22-12"),
               ("query", "positive_passages", "negative_passages"), _miracl),
    DataFormat(("seed_tasks",), ("instruction", "instances"), _seed_task),
    DataFormat(("tatsu-lab/alpaca", "yahma/alpaca-cleaned", "vicgalle/alpaca-gpt4", "GPT-4-LLM",
                "MultiTurnAlpaca"),
               ("instruction:asked", f"{'|'.join(('output', *_RESPONSES))}:said"), _alpaca),
    DataFormat(("ShareGPT", "ChatAlpaca", "HuggingFaceH4/ultrachat_200k"),
               (f"{'|'.join(_DIALOGUES)}:turns",), _conversation),
    DataFormat(("pvduy/sharegpt_alpaca_oa_vicuna_format",), ("prompt:text", "label:text"),
               _user_assistant_prompt, absent=_RESPONSES),
    DataFormat(("wangrui6/Zhihu-KOL",), ("INSTRUCTION", "RESPONSE"),
               _question_answer("INSTRUCTION", "RESPONSE")),
    DataFormat(("Hello-SimpleAI/HC3-Chinese", "Hello-SimpleAI/HC3"), ("question", "human_answers"),
               _question_answer("question", "human_answers[]")),
    DataFormat(("mkqa", "apple/mkqa"), ("queries", "answers"), _mkqa),
    DataFormat(("lmqg/qag_jaquad",), ("questions", "paragraph"),
               _question_answer("questions[]", "paragraph")),
    DataFormat(("lmqg/qg_jaquad",), ("question", "sentence"),
               _question_answer("question", "sentence")),
    DataFormat(("prompt-completion",),
               (f"{'|'.join(_PROMPTS)}:asked", f"{'|'.join(_RESPONSES)}:said"),
               lambda row: sample_of(_prompt(row), row[row.held(_RESPONSES)])),
    DataFormat(("prompt-only",), (f"{'|'.join(('instruction', *_PROMPTS))}:asked",),
               lambda row: sample_of(_prompt(row), None, lacking="no response"),
               absent=(*_RESPONSES, "chosen", "rejected", "RESPONSE", "answers", "human_answers",
                       "output_1", "answer_0", "human_ref_A", "responses_and_scores")),
)


def names() -> list[str]:
    """Return every name of a data set whose format is known."""
    known = dict.fromkeys(name for one in FORMATS for name in one.names)
    return [name for name in known if name != EMBEDDED]


def read(rows: Iterable[Row], name: str, tally: Tally) -> Iterator[Sample]:
    """Yield the samples of rows, each read by the format that its columns fit.

    What is left out is counted in `tally`. A name restricts the formats to those of the data set.
    """
    kept: dict[DataFormat, list[Row]] = {}
    for plain in rows:
        row = _Reading(unpacked(plain))
        chosen = choose(row, name)
        if chosen is None:
            tally.unused["no known data format"] += 1
            tally.unfit = tally.unfit or f"row {tally.rows}: {_refusal(name, row)}"
        elif chosen.gather:
            kept.setdefault(chosen, []).append(row)
        else:
            made = list(chosen.samples(row))
            if made and isinstance(made[0], Sample):
                tally.unread.update(row.unread(made[0]))
            yield from _counted(made, tally)
    for one, some in kept.items():
        for whole in one.gather(some) if one.gather else ():
            yield from _counted(
                [whole] if isinstance(whole, Unusable) else one.samples(whole), tally)


def _counted(made: Iterable[Sample | Unusable], tally: Tally) -> Iterator[Sample]:
    for one in made:
        if isinstance(one, Unusable):
            tally.unused[str(one)] += 1
        else:
            yield one


def fits(row: Row) -> bool:
    """Return whether an object is a row of a known format by what its columns hold."""
    shapes = {column: _shape_of(value) for column, value in unpacked(row).items()}
    return any(one.holds(shapes) for one in FORMATS)


def choose(row: Row, name: str = "") -> DataFormat | None:
    """Return the format of a row: by what its columns hold, or else by their names alone."""
    return _chosen(name, tuple((column, _shape_of(value)) for column, value in row.items()))


@lru_cache(maxsize=4096)
def _chosen(name: str, shapes: tuple[tuple[str, str], ...]) -> DataFormat | None:
    found, columns = dict(shapes), [column for column, _ in shapes]
    known = [one for one in FORMATS if not name or name in one.names]
    by_name = (one for one in known if not one.absent and not one.lacks(columns))
    return next((one for one in known if one.holds(found)), next(by_name, None))


def _shape_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "dialogue" if is_dialogue(value) else "text" if value.strip() else "empty"
    if is_turns(value):
        return "turns"
    return "list" if isinstance(value, list) else "object" if isinstance(value, dict) else "number"


def _refusal(name: str, row: Row) -> str:
    """Say what a row holds that fits no format, and which one is nearest."""
    known = [one for one in FORMATS if name in one.names] if name else [
        one for one in FORMATS if not one.absent]

    def closeness(one: DataFormat) -> float:
        return sum(max((SequenceMatcher(None, a.lower(), b.lower()).ratio() + (a == b)
                        for a in names for b in row), default=0.0)
                   for names, _ in one.fields()) / len(one.columns)

    nearest = max(known, key=closeness)
    held = ", ".join(f"{column} ({_shape_of(value)})" for column, value in row.items()) or "(none)"
    columns = " + ".join(next((name for name in names if name in row), names[0])
                         for names, _ in nearest.fields())
    missing = ", ".join(nearest.lacks(row)) or "none"
    text = (f"the columns {held} fit no known data format; the nearest is {columns} (missing: "
            f"{missing}); rename columns, or see docs/data.md for a row of each")
    return " ".join(text.split())


def unpacked(row: Row) -> Row:
    """Parse what is JSON in a string, where a column may hold that."""
    parsed = {column: value for column, text in row.items()
              if column in _MAY_BE_JSON and (value := _parsed(text)) is not None
              and (column in _STRUCTURED or is_turns(value))}
    if any(isinstance(row.get(side), str) and side not in parsed for side in _SIDES):
        parsed = {column: value for column, value in parsed.items() if column not in _SIDES}
    return {**row, **parsed}


_MAY_BE_JSON = {*_STRUCTURED, *_SIDES, "prompt"}


def _parsed(text: Any) -> Any:
    """Return the list or object in a text, or in each text of a list; None if there is none."""
    if isinstance(text, list):
        value = [_parsed(one) for one in text if isinstance(one, str)]
        return value if len(value) == len(text) and None not in value and is_turns(value) else None
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
