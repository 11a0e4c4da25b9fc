"""Data formats: how the rows of each known data set become `Sample(messages, chosen, rejected)`.

`FORMATS`, at the end, is the table. A new format is one entry in it: names of data sets, the
columns that tell it from the others, and a function that makes a sample (or several) from a row
and raises `Unusable` with the reason when it cannot. The checks are in `samples`.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

from alpaca_rlhf.utils.data.samples import (
    Sample,
    Unusable,
    best_and_worst,
    in_order,
    is_dialogue,
    list_of,
    messages_of,
    number_of,
    pair_of,
    parse_dialogue,
    sample_of,
    text_of,
    turns_between,
    turns_of,
    user_turn,
    value_of,
    whole_pair,
)
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.errors import UserError

Row = dict[str, Any]
EMBEDDED = "embedded"
LOCAL_JSON = "local/jsonfile"


@dataclass(frozen=True)
class DataFormat:
    """A format of rows."""

    names: tuple[str, ...]  # data sets in this format
    columns: tuple[str, ...]  # those a row must have
    convert: Callable[[Row], Sample | Iterable[Sample | Unusable]]  # also raises Unusable
    # Joins rows first, where a sample is spread over several.
    gather: Callable[[Iterable[Row]], Iterator[Row | Unusable]] | None = None

    def read(self, rows: Iterable[Row], unused: Counter[str]) -> Iterator[Sample]:
        """Yield the samples of rows; what cannot be used is added to `unused` by its reason."""
        for row in self.gather(rows) if self.gather else rows:
            for made in [row] if isinstance(row, Unusable) else self._samples(row):
                if isinstance(made, Unusable):
                    unused[str(made)] += 1
                else:
                    yield made

    def _samples(self, row: Row) -> Iterator[Sample | Unusable]:
        language = next((row[c] for c in ("lang", "language") if isinstance(row.get(c), str)), None)
        try:
            # A column that only some of the rows lack counts as empty.
            made = self.convert({**dict.fromkeys(self.columns), **row})
            for sample in [made] if isinstance(made, Sample) else made:
                if isinstance(sample, Sample) and sample.language is None:
                    sample = replace(sample, language=language)
                yield sample
        except Unusable as reason:
            yield reason


# --- pairs ---------------------------------------------------------------------------------------


def _chosen_rejected(row: Row) -> Sample:
    """Read whole dialogues, as `Human: …` text or as messages; the prompt is what they share."""
    sides = row["chosen"], row["rejected"]
    if all(isinstance(side, list) and side for side in sides):
        chosen, rejected = (turns_of(side, "dialogue") for side in sides)
        in_order(chosen[:-1])
        return whole_pair(chosen, rejected)
    if not all(isinstance(side, str) for side in sides):
        raise Unusable("chosen or rejected is not text")
    return whole_pair(*map(parse_dialogue, sides))


_NAME = "Assistant:"


def _prompt_chosen_rejected(row: Row) -> Sample:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    sides = chosen, rejected
    if all(map(_is_whole, sides)) or all(map(is_dialogue, (prompt, *sides))):
        return _chosen_rejected(row)
    if all(isinstance(side, str) and side.lstrip().startswith(_NAME) for side in sides):
        # As in yitingxie/rlhf-reward-datasets.
        chosen, rejected = (side.rsplit(_NAME, 1)[-1] for side in sides)
    return pair_of(messages_of(prompt), chosen, rejected)


def _is_whole(side: Any) -> bool:
    """Return whether messages are a dialogue, not the response alone."""
    return (isinstance(side, list) and len(side) > 1 and isinstance(side[0], dict)
            and side[0].get("role") != "assistant")


def _question_chosen_rejected(row: Row) -> Sample:
    messages = [user_turn(text_of(row["question"], "question"))]
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system.strip()})
    return pair_of(messages, row["chosen"], row["rejected"])


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
        answer = text_of(row[f"answer_{i}"], f"answer_{i}")
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


def _alpaca(row: Row) -> Sample:
    messages = instruction_turns(row["instruction"], row.get("input"))
    # In MultiTurnAlpaca the instruction is the dialogue so far; its responses have their own rows.
    return sample_of(messages, row["output"], history_is_trained=len(messages) == 1)


def _seed_task(row: Row) -> Iterator[Sample | Unusable]:
    for instance in list_of(row["instances"], "instances"):
        try:
            extra, output = (value_of(instance, key, "instance") for key in ("input", "output"))
            yield sample_of(instruction_turns(row["instruction"], extra), output)
        except Unusable as reason:
            yield reason


def _conversation(column: str, row: Row) -> Sample:
    """Read a whole dialogue; what follows the last response is left out."""
    turns = turns_of(row[column], column)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise Unusable("no assistant turn")
    return sample_of(in_order(turns[:-1]), turns[-1]["content"])


def _prompt_completion(row: Row) -> Sample:
    return sample_of(messages_of(row["prompt"]), row["completion"])


_USER_ASSISTANT = re.compile(r"(?:^|\s|</s>)(USER|ASSISTANT):")


def _user_assistant_prompt(row: Row) -> Sample:
    """Read `USER: … ASSISTANT:` text, with or without a system text before it."""
    parts = _USER_ASSISTANT.split(text_of(row["prompt"], "prompt"))
    turns = turns_between([part.replace("</s>", "") for part in parts])
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    system: list[Message] = [{"role": "system", "content": parts[0].strip()}]
    return sample_of(in_order((system if parts[0].strip() else []) + turns), row["label"])


def _question_answer(question: str, answer: str) -> Callable[[Row], Sample]:
    """Read two columns; "column[]" is the first of the column's list."""

    def value(row: Row, name: str) -> str:
        column = name.removesuffix("[]")
        return text_of(row[column] if name == column else list_of(row[column], column)[0], column)

    return lambda row: sample_of([user_turn(value(row, question))], value(row, answer))


def _mkqa(row: Row) -> Iterator[Sample | Unusable]:
    for language in ("zh_cn", "ja"):
        try:
            question = text_of(value_of(row["queries"], language, "queries"), "query")
            answers = list_of(value_of(row["answers"], language, "answers"), "answers")
            answer = text_of(value_of(answers[0], "text", "answer"), "answer")
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
            turn = {"role": "assistant", "content": response["text"].strip()}
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

# The order matters for data without a name: the first format whose columns a row has is taken, so
# a format with more columns stands before one with fewer of them.
FORMATS = (
    DataFormat(("Dahoas/synthetic-instruct-gptj-pairwise", "Dahoas/rm-static", "Dahoas/static-hh",
                "Dahoas/full-hh-rlhf", "yitingxie/rlhf-reward-datasets",
                "HuggingFaceH4/ultrafeedback_binarized",
                "argilla/ultrafeedback-binarized-preferences-cleaned", LOCAL_JSON, EMBEDDED),
               ("prompt", "chosen", "rejected"), _prompt_chosen_rejected),
    DataFormat(("Intel/orca_dpo_pairs",), ("question", "chosen", "rejected"),
               _question_chosen_rejected),
    DataFormat(("Anthropic/hh-rlhf", "argilla/dpo-mix-7k"), ("chosen", "rejected"),
               _chosen_rejected),
    DataFormat(("stanfordnlp/SHP",), ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    DataFormat(("tatsu-lab/alpaca_eval",), ("instruction", "output_1", "output_2", "preference"),
               _alpaca_eval),
    DataFormat(("openai/webgpt_comparisons",),
               ("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt),
    DataFormat(("GPT-4-LLM",), ("user_input", "responses_and_scores"), _scored_responses),
    DataFormat(("OpenAssistant/oasst1",), ("message_id", "parent_id", "role", "text"),
               _tree_samples, _trees_of_messages),
    DataFormat(("OpenAssistant/oasst1",), ("message_tree_id", "prompt"), _tree_samples),
    DataFormat(("Cohere/miracl-zh-queries-22-12", "Cohere/miracl-ja-queries-22-12"),
               ("query", "positive_passages", "negative_passages"), _miracl),
    DataFormat(("seed_tasks",), ("instruction", "instances"), _seed_task),
    DataFormat(("tatsu-lab/alpaca", "yahma/alpaca-cleaned", "vicgalle/alpaca-gpt4", "GPT-4-LLM",
                "MultiTurnAlpaca"), ("instruction", "output"), _alpaca),
    DataFormat(("ShareGPT", "ChatAlpaca"), ("conversations",),
               partial(_conversation, "conversations")),
    DataFormat(("ShareGPT", "ChatAlpaca", "HuggingFaceH4/ultrachat_200k"), ("messages",),
               partial(_conversation, "messages")),
    DataFormat(("pvduy/sharegpt_alpaca_oa_vicuna_format",), ("prompt", "label"),
               _user_assistant_prompt),
    DataFormat(("prompt-completion",), ("prompt", "completion"), _prompt_completion),
    DataFormat(("wangrui6/Zhihu-KOL",), ("INSTRUCTION", "RESPONSE"),
               _question_answer("INSTRUCTION", "RESPONSE")),
    DataFormat(("Hello-SimpleAI/HC3-Chinese", "Hello-SimpleAI/HC3"), ("question", "human_answers"),
               _question_answer("question", "human_answers[]")),
    DataFormat(("mkqa", "apple/mkqa"), ("queries", "answers"), _mkqa),
    DataFormat(("lmqg/qag_jaquad",), ("questions", "paragraph"),
               _question_answer("questions[]", "paragraph")),
    DataFormat(("lmqg/qg_jaquad",), ("question", "sentence"),
               _question_answer("question", "sentence")),
)


def names() -> list[str]:
    """Return every name of a data set whose format is known."""
    known = dict.fromkeys(name for one in FORMATS for name in one.names)
    return [name for name in known if name != EMBEDDED]


def choose(name: str, row: Row, flag: str) -> DataFormat:
    """Return the format of a data set: the one with its name and the columns of its first row.

    The name "" goes by the columns alone.

    Raises:
        UserError: no format fits.
    """
    candidates = [one for one in FORMATS if name in one.names] if name else list(FORMATS)
    for one in candidates:
        if row.keys() >= set(one.columns):
            return one
    columns = ", ".join(row) or "(none)"
    if name:
        missing = [column for column in candidates[0].columns if column not in row]
        raise UserError(f"{flag}: no column {', '.join(missing)}; the columns found are {columns}")
    known = "; ".join(dict.fromkeys("+".join(one.columns) for one in FORMATS))
    raise UserError(f"{flag}: the columns {columns} fit no known data format; known are {known}")
