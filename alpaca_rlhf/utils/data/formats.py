"""The forms of rows: how each known data set becomes `Sample(messages, chosen, rejected)`.

`ADAPTORS`, at the end, is the table. A new data set is one entry in it: its names, the columns by
which its rows are known, and a function that makes a sample of a row, or several, and raises
`Unusable` with the reason when it cannot. The helpers in `samples` do the checking.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from alpaca_rlhf.utils.data.message_trees import tree_samples, trees_of_messages
from alpaca_rlhf.utils.data.reading import Row
from alpaca_rlhf.utils.data.samples import (
    Made,
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

EMBEDDED = "embedded"
LOCAL_JSON = "local/jsonfile"


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


# --- the forms -----------------------------------------------------------------------------------


def _chosen_rejected(row: Row) -> Sample:
    """Whole dialogues, as Human/Assistant text or as messages; the prompt is what they share."""
    sides = row["chosen"], row["rejected"]
    if all(isinstance(side, list) and side for side in sides):
        chosen, rejected = (turns_of(side, "dialogue") for side in sides)
        in_order(chosen[:-1])
        return whole_pair(chosen, rejected)
    if not all(isinstance(side, str) for side in sides):
        raise Unusable("chosen or rejected is not text")
    return whole_pair(*map(parse_dialogue, sides))


def _prompt_chosen_rejected(row: Row) -> Sample:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if _is_whole(chosen) and _is_whole(rejected):
        return _chosen_rejected(row)
    if is_dialogue(prompt) and is_dialogue(chosen) and is_dialogue(rejected):
        return _chosen_rejected(row)
    sides = chosen, rejected
    if all(isinstance(side, str) and side.lstrip().startswith(_NAME) for side in sides):
        # As in yitingxie/rlhf-reward-datasets.
        chosen, rejected = (side.rsplit(_NAME, 1)[-1] for side in sides)
    return pair_of(messages_of(prompt), chosen, rejected)


_NAME = "Assistant:"


def _is_whole(side: Any) -> bool:
    """Whether messages are a dialogue, not only the reply."""
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
    replies = row["human_ref_B"], row["human_ref_A"]
    return pair_of(messages, replies[int(row["labels"])], replies[1 - int(row["labels"])])


def _alpaca_eval(row: Row) -> Sample:
    preference = row["preference"]
    if preference not in (1, 2):
        raise Unusable("tie" if preference == 0 else "preference is not 0, 1 or 2")
    better, worse = ("output_1", "output_2") if preference == 1 else ("output_2", "output_1")
    return pair_of(messages_of(row["instruction"], "instruction"), row[better], row[worse])


def _webgpt(row: Row) -> Sample:
    question = text_of(value_of(row["question"], "full_text", "question"), "question")
    replies = []
    for i in (0, 1):
        answer = text_of(row[f"answer_{i}"], f"answer_{i}")
        marks_off = re.sub(r"\s?\[\d+(?:,\s*\d+)*\]", "", answer)
        replies.append((number_of(row[f"score_{i}"], "score"), marks_off))
    return best_and_worst([user_turn(question)], replies)


def _scored_responses(row: Row) -> Sample:
    """GPT-4-LLM's comparison data: some replies, each with a score."""
    question = text_of(row["user_input"], "user_input")
    replies = [
        (number_of(value_of(reply, "score", "response"), "score"), reply.get("response"))
        for reply in list_of(row["responses_and_scores"], "responses_and_scores")
    ]
    return best_and_worst([user_turn(question)], replies)


def _miracl(row: Row) -> Sample:
    sides = []
    for side in ("positive_passages", "negative_passages"):
        sides.append(value_of(list_of(row[side], side)[0], "text", side))
    return pair_of([user_turn(text_of(row["query"], "query"))], *sides)


def instruction_turns(instruction: Any, extra: Any) -> list[Message]:
    """An instruction of Stanford Alpaca's form, with its input if it has one."""
    if extra is not None and not isinstance(extra, str):
        raise Unusable("input is not text")
    text = text_of(instruction, "instruction")
    if extra is None or not extra.strip():
        return messages_of(text, "instruction")
    extra = extra.strip()
    turn = {**user_turn(f"{text}\n\n{extra}"), "instruction": text, "input": extra}
    return [turn]


def _alpaca(row: Row) -> Sample:
    messages = instruction_turns(row["instruction"], row.get("input"))
    # In MultiTurnAlpaca the instruction is the dialogue so far, whose replies have their own rows.
    return sample_of(messages, row["output"], history_is_trained=len(messages) == 1)


def _seed_task(row: Row) -> Iterator[Sample | Unusable]:
    for instance in list_of(row["instances"], "instances"):
        try:
            extra, output = (value_of(instance, key, "instance") for key in ("input", "output"))
            yield sample_of(instruction_turns(row["instruction"], extra), output)
        except Unusable as reason:
            yield reason


def _conversation(column: str) -> Callable[[Row], Sample]:
    """A whole dialogue in one column; what follows the last reply is left off."""

    def convert(row: Row) -> Sample:
        turns = turns_of(row[column], column)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            raise Unusable("no assistant's turn")
        return sample_of(in_order(turns[:-1]), turns[-1]["content"])

    return convert


def _prompt_completion(row: Row) -> Sample:
    return sample_of(messages_of(row["prompt"]), row["completion"])


_USER_ASSISTANT = re.compile(r"(?:^|\s|</s>)(USER|ASSISTANT):")


def _user_assistant_prompt(row: Row) -> Sample:
    """`USER: … ASSISTANT:` text, after a system's text or none."""
    parts = _USER_ASSISTANT.split(text_of(row["prompt"], "prompt"))
    turns = turns_between([said.replace("</s>", "") for said in parts])
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    system: list[Message] = [{"role": "system", "content": parts[0].strip()}]
    return sample_of(in_order((system if parts[0].strip() else []) + turns), row["label"])


def _question_answer(
    question: str, answer: str, first_question: bool = False, first_answer: bool = False
) -> Callable[[Row], Sample]:
    """Two columns; of a column that holds a list, the first."""

    def convert(row: Row) -> Sample:
        asked, given = row[question], row[answer]
        asked = list_of(asked, question)[0] if first_question else asked
        given = list_of(given, answer)[0] if first_answer else given
        return sample_of([user_turn(text_of(asked, question))], text_of(given, answer))

    return convert


def _mkqa(row: Row) -> Iterator[Sample | Unusable]:
    for language in ("zh_cn", "ja"):
        try:
            question = text_of(value_of(row["queries"], language, "queries"), "query")
            answers = list_of(value_of(row["answers"], language, "answers"), "answers")
            answer = text_of(value_of(answers[0], "text", "answer"), "answer")
            yield sample_of([user_turn(question)], answer, language=language)
        except Unusable as reason:
            yield reason


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
    Adaptor(("OpenAssistant/oasst1",), ("message_id", "parent_id", "role", "text"), tree_samples,
            trees_of_messages),
    Adaptor(("OpenAssistant/oasst1",), ("message_tree_id", "prompt"), tree_samples),
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
