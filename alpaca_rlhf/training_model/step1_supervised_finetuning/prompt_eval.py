"""What two or more models answer to the same prompts, side by side.

    python -m alpaca_rlhf.training_model.step1_supervised_finetuning.prompt_eval \\
        --path output/actor output/final/actor --prompts questions.txt --output answers.md

Prompts: lines of a .txt file, or rows of a .jsonl, .json or .parquet file with `prompt`,
`messages`, `instruction` (and `input`) or `question`; or --prompt TEXT. Models: folders of step 1
or 3, adapters' folders or hub ids. Every model draws with the same numbers: like models answer
alike.
"""

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca_rlhf.inference import flags
from alpaca_rlhf.utils.errors import UserError

if TYPE_CHECKING:
    from alpaca_rlhf.evaluation.saved import Policy, Reply, Scorer
    from alpaca_rlhf.utils.data.tokenizer import Message

Answer = dict[str, Any]
WIDTH = 100


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of this program."""
    parser = flags.Parser(
        "python -m alpaca_rlhf.training_model.step1_supervised_finetuning.prompt_eval", __doc__
    )
    parser.add("--path", "models: folders of models or adapters, or hub ids", nargs="+",
               required=True)
    parser.add("--prompts", "file of prompts: .txt (one a line), .jsonl, .json or .parquet")
    parser.add("--prompt", "prompts, after those of the file", nargs="+", default=[])
    parser.add("--limit", "most prompts; 0: all", type=flags.number(int, low=0), default="0")
    parser.add("--system", "text that stands before every prompt", default="")
    parser.add("--replies", "replies of each model to each prompt", type=flags.number(int, low=1),
               default="1")
    parser.add("--reward_model", "folder of a reward model that scores the replies")
    parser.add("--seed", "of the sampling", type=flags.number(int, low=0), default=flags.SEED)
    parser.add_output("the answers: .jsonl, or .md for people")
    parser.add_sampling(temperature=1.0, top_p=1.0)
    parser.add_loading()
    args = parser.parse_args(argv)
    flags.check_output(args.output, ".jsonl", ".md")
    if not (args.prompts or args.prompt):
        raise UserError("--prompts or --prompt is required: what the models are to answer")
    return args


def main(args: argparse.Namespace) -> None:
    """Let each model answer, one after the other in memory; then show and write it all."""
    from alpaca_rlhf.evaluation.saved import open_policy, open_scorer, short_names
    from alpaca_rlhf.utils import console

    options = flags.load_options(args)
    prompts = dialogues(args)
    names = short_names(args.path)
    scorer = open_scorer(args.reward_model, options) if args.reward_model else None
    answers: list[list[Answer]] = [[] for _ in prompts]
    for name, path in zip(names, args.path, strict=True):
        policy = open_policy(path, options)
        for told, new in zip(answers, answered(policy, prompts, args, scorer), strict=True):
            told += [{"model": name, "path": path, **answer} for answer in new]
        del policy
    for number, (messages, told) in enumerate(zip(prompts, answers, strict=True), 1):
        console.say(shown(number, messages, told))
    console.say(totals(names, answers))
    write = markdown if (args.output or "").endswith(".md") else jsonl
    flags.write_output(args.output, "".join(write(prompts, answers)))


# --- prompts -------------------------------------------------------------------------------------


def dialogues(args: argparse.Namespace) -> "list[list[Message]]":
    """The prompts as messages, a system's text before each if one is given.

    Raises:
        UserError: the file cannot be read, or one of its rows is no prompt.
    """
    from alpaca_rlhf.inference.conversation import cleaned
    from alpaca_rlhf.utils.data.samples import user_turn

    found = list(of_file(Path(args.prompts))) if args.prompts else []
    found += [[user_turn(cleaned(text))] for text in args.prompt]
    if not found:
        raise UserError(f"--prompts {args.prompts}: has no prompt in it")
    found = found[: args.limit or None]
    if args.system:
        system: Message = {"role": "system", "content": cleaned(args.system)}
        found = [[system, *(m for m in one if m["role"] != "system")] for one in found]
    return found


def of_file(path: Path) -> "Iterator[list[Message]]":
    """The prompts of a file.

    Raises:
        UserError: it cannot be read, or a row is no prompt; names the row.
    """
    from alpaca_rlhf.utils.data.reading import read_rows
    from alpaca_rlhf.utils.data.samples import Unusable, user_turn

    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {path}: cannot be read ({error})") from error
        yield from ([user_turn(line.strip())] for line in lines if line.strip())
        return
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    for number, row in enumerate(read_rows(path), 1):
        try:
            yield messages_in(row)
        except Unusable as reason:
            raise UserError(f"--prompts {path}, row {number}: {reason}; mend it") from None


def messages_in(row: dict[str, Any]) -> "list[Message]":
    """What a row asks; of a whole dialogue, all before the last reply.

    Raises:
        Unusable: it asks nothing.
    """
    from alpaca_rlhf.utils.data.formats import instruction_turns
    from alpaca_rlhf.utils.data.samples import Unusable, in_order, messages_of, turns_of

    for column in ("messages", "conversations"):
        if column in row:
            turns = turns_of(row[column], column)
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            return in_order(turns)
    if "prompt" in row:
        return messages_of(row["prompt"])
    if "instruction" in row:
        return instruction_turns(row["instruction"], row.get("input"))
    if "question" in row:
        return messages_of(row["question"], "question")
    raise Unusable(f"the columns {', '.join(row) or '(none)'} have no prompt, messages, "
                   "instruction or question")


# --- answers -------------------------------------------------------------------------------------


def answered(
    policy: "Policy", prompts: "Sequence[list[Message]]", args: argparse.Namespace,
    scorer: "Scorer | None",
) -> list[list[Answer]]:
    """For each prompt a model's replies: `reply`, `tokens`, `ended` and, if scored, `score`."""
    from alpaca_rlhf.inference.conversation import fitted

    sampling = flags.sampling(args, policy.context, args.replies)
    ids = []
    for number, messages in enumerate(prompts, 1):
        try:
            ids.append(fitted(policy.form, messages, policy.context, sampling.max_new_tokens)[0])
        except UserError as error:
            raise UserError(f"{policy.name}, prompt {number}: {error}") from None
    replies = policy.replies(ids, sampling, args.seed)
    made = [[_answer(reply) for reply in some] for some in replies]
    if scorer is not None:
        scores = iter(scorer.rate(
            [messages for messages in prompts for _ in range(args.replies)],
            [reply for some in replies for reply in some],
        ))
        made = [[{**answer, "score": next(scores)} for answer in some] for some in made]
    return made


def _answer(reply: "Reply") -> Answer:
    return {"reply": reply.text, "tokens": len(reply.ids), "ended": reply.ended}


# --- showing -------------------------------------------------------------------------------------


def shown(number: int, messages: "Sequence[Message]", answers: Sequence[Answer]) -> str:
    """A prompt and what the models say to it."""
    from alpaca_rlhf.inference.conversation import printable

    lines = [f"\n--- {number}: " + "\n    ".join(_turns(messages))]
    for answer in answers:
        facts = f"{answer['tokens']} tokens" + ("" if answer["ended"] else ", cut")
        facts += f", score {answer['score']:.2f}" if "score" in answer else ""
        lines.append(f"{answer['model']} ({facts})")
        for part in (printable(answer["reply"]) or "(nothing)").splitlines():
            lines += textwrap.wrap(part, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _turns(messages: "Sequence[Message]") -> list[str]:
    if len(messages) == 1:
        return messages[0]["content"].splitlines()
    return [f"{m['role']}: {line}" for m in messages for line in m["content"].splitlines()]


def totals(names: Sequence[str], answers: Sequence[Sequence[Answer]]) -> str:
    """Means over the prompts, a line for each model."""
    from alpaca_rlhf.utils.console import table

    rows = []
    for name in names:
        mine = [answer for told in answers for answer in told if answer["model"] == name]
        mean = {key: f"{sum(a[key] for a in mine) / len(mine):.3f}"
                for key in ("tokens", "ended", "score") if key in mine[0]}
        rows.append([name, str(len(mine)), *mean.values()])
    headers = ["model", "replies", "tokens", "share that ended", "score"]
    return "\n" + table(headers[: len(rows[0])], rows)


def jsonl(
    prompts: "Sequence[list[Message]]", answers: Sequence[Sequence[Answer]]
) -> Iterator[str]:
    """A line for each prompt."""
    for messages, told in zip(prompts, answers, strict=True):
        row = {"prompt": messages, "answers": list(told)}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def markdown(
    prompts: "Sequence[list[Message]]", answers: Sequence[Sequence[Answer]]
) -> Iterator[str]:
    """A table for each prompt, one row for each reply."""
    for number, (messages, told) in enumerate(zip(prompts, answers, strict=True), 1):
        scored = "score" in told[0]
        yield f"## {number}\n\n" + "\n\n".join(map(_quoted, _turns(messages))) + "\n\n"
        yield "| model | reply | tokens |" + (" score |\n" if scored else "\n")
        yield "| --- | --- | --- |" + (" --- |\n" if scored else "\n")
        for answer in told:
            cut = "" if answer["ended"] else " (cut)"
            score = f" {answer['score']:.2f} |" if scored else ""
            yield (f"| {answer['model']} | {_cell(answer['reply'])} | {answer['tokens']}{cut} |"
                   f"{score}\n")
        yield "\n"


def _quoted(line: str) -> str:
    return f"> {_cell(line)}"


def _cell(text: str) -> str:
    """Text that stays in its cell, and is shown as it is."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(mark, safe)
    return text


if __name__ == "__main__":
    flags.run(parse, main)
