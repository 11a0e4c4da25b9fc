"""Responses of several models to the same prompts, side by side."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alpaca_rlhf.evaluation.conversation import cleaned, printable
from alpaca_rlhf.evaluation.results import write_output
from alpaca_rlhf.evaluation.saved import open_policy, open_scorer, short_names
from alpaca_rlhf.utils.configs import LoadingConfig, PromptEvalConfig, SamplingConfig
from alpaca_rlhf.utils.console import say, table
from alpaca_rlhf.utils.data import formats
from alpaca_rlhf.utils.data.samples import Tally, Unusable, user_turn
from alpaca_rlhf.utils.data.sources import read_rows
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import UNREADABLE, read_text

Record = dict[str, Any]  # of a response: model, path, reply, tokens, ended and, if scored, score
WIDTH = 100


def run(config: PromptEvalConfig, *, sampling: SamplingConfig, loading: LoadingConfig) -> None:
    """Generate with one model after the other; show and write all responses.

    Raises:
        UserError: a model or the prompts cannot be used.
    """
    prompts = read_prompts(config)
    sampling = replace(sampling, num_generations=config.replies)
    scorer = open_scorer(config.reward_model, loading) if config.reward_model else None
    names = short_names(config.path)
    records: list[list[Record]] = [[] for _ in prompts]
    for name, path in zip(names, config.path, strict=True):
        policy = open_policy(path, loading)
        responses = policy.respond(prompts, sampling, config.seed)
        scores = scorer.rate(prompts, responses) if scorer else None
        for i, some in enumerate(responses):
            for j, response in enumerate(some):
                record = {"model": name, "path": path, **response.record()}
                if scores is not None:
                    record["score"] = scores[i][j]
                records[i].append(record)
        del policy  # only one model is in memory at a time
    for number, (messages, answers) in enumerate(zip(prompts, records, strict=True), 1):
        say(shown(number, messages, answers))
    say(totals(names, records))
    if (config.output or "").endswith(".md"):
        text = markdown(prompts, records)
    else:
        text = "".join(
            json.dumps({"prompt": messages, "answers": answers}, ensure_ascii=False) + "\n"
            for messages, answers in zip(prompts, records, strict=True))
    write_output(config.output, text)


# --- prompts -------------------------------------------------------------------------------------


def read_prompts(config: PromptEvalConfig) -> list[list[Message]]:
    """Read the prompts of the file and of the command line, with the system message if given.

    Raises:
        UserError: the file cannot be read, or has a row that is no prompt.
    """
    found = list(prompts_of_file(Path(config.prompts))) if config.prompts else []
    found += [[user_turn(cleaned(text))] for text in config.prompt]
    if not found:
        raise UserError(f"--prompts {config.prompts}: has no prompt in it")
    found = found[: config.limit or None]
    if config.system:
        system: Message = {"role": "system", "content": cleaned(config.system)}
        found = [[system, *(m for m in one if m["role"] != "system")] for one in found]
    return found


def prompts_of_file(path: Path) -> Iterator[list[Message]]:
    """Read a file of prompts.

    Raises:
        UserError: it cannot be read, or a row is no prompt; names the row.
    """
    if path.suffix.lower() == ".txt":
        try:
            lines = read_text(path).splitlines()
        except (UnicodeDecodeError, *UNREADABLE) as error:
            raise UserError(f"--prompts {path}: cannot be read ({error})") from error
        yield from ([user_turn(line.strip())] for line in lines if line.strip())
        return
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    for number, row in enumerate(read_rows(path), 1):
        try:
            yield messages_in(row)
        except Unusable as reason:
            raise UserError(f"--prompts {path}, row {number}: {reason}; correct it") from None


def messages_in(row: dict[str, Any]) -> list[Message]:
    """Return the prompt in a row of any data format; of a dialogue, all before its last response.

    Raises:
        Unusable: there is none.
    """
    tally = Tally()
    for sample in formats.read([row], "", tally):
        return list(sample.messages)
    raise Unusable(tally.unfit or next(iter(tally.unused), "no prompt"))


# --- responses -----------------------------------------------------------------------------------


def shown(number: int, messages: Sequence[Message], responses: Sequence[Record]) -> str:
    """Format a prompt and all responses to it for the console."""
    lines = [f"\n--- {number}: " + "\n    ".join(_turns(messages))]
    for record in responses:
        facts = f"{record['tokens']} tokens" + ("" if record["ended"] else ", cut")
        facts += f", score {record['score']:.2f}" if "score" in record else ""
        lines.append(f"{record['model']} ({facts})")
        for part in (printable(record["reply"]) or "(nothing)").splitlines():
            lines += textwrap.wrap(part, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _turns(messages: Sequence[Message]) -> list[str]:
    if len(messages) == 1:
        return messages[0]["content"].splitlines()
    return [f"{m['role']}: {line}" for m in messages for line in m["content"].splitlines()]


def totals(names: Sequence[str], records: Sequence[Sequence[Record]]) -> str:
    """Format the means over all prompts, a line for each model."""
    rows = []
    for name in names:
        mine = [record for some in records for record in some if record["model"] == name]
        means = [f"{sum(record[key] for record in mine) / len(mine):.3f}"
                 for key in ("tokens", "ended", "score") if key in mine[0]]
        rows.append([name, str(len(mine)), *means])
    headers = ["model", "responses", "tokens", "share with eos", "score"]
    return "\n" + table(headers[: len(rows[0])], rows)


def markdown(prompts: Sequence[list[Message]], records: Sequence[Sequence[Record]]) -> str:
    """Return a Markdown table for each prompt, with a row for each response."""
    parts = []
    for number, (messages, responses) in enumerate(zip(prompts, records, strict=True), 1):
        headers = ["model", "response", "tokens", "score"]
        headers = headers if "score" in responses[0] else headers[:3]
        rows = [headers, ["---"] * len(headers)]
        for record in responses:
            tokens = f"{record['tokens']}" + ("" if record["ended"] else " (cut)")
            score = [f"{record['score']:.2f}"] if "score" in record else []
            rows.append([record["model"], _cell(record["reply"]), tokens, *score])
        prompt = "\n\n".join(f"> {_cell(line)}" for line in _turns(messages))
        lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        parts.append(f"## {number}\n\n{prompt}\n\n{lines}\n")
    return "".join(parts)


def _cell(text: str) -> str:
    """Escape text so that it stays in its cell and is shown as it is."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(mark, safe)
    return text
