"""Rows of any known form -> `Sample(messages, chosen, rejected)`. Adding a data set adds one entry.

A row that an adaptor cannot use is counted by its reason, never dropped silently. An adaptor is
chosen by the data set's name, for a local file by its columns, or by `name=path`.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.data import assistant_world
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.errors import UserError

EMBEDDED = "embedded"
LOCAL_JSON = "local/jsonfile"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One dialogue that ends with a user's turn, and its replies.

    Attributes:
        messages: role and content, a user's turn last.
        chosen: the (better) reply.
        rejected: the worse reply, None where the data has only one.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str | None = None

    def prompt_key(self) -> str:
        """The text by which equal prompts are known."""
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True)


@dataclass
class RawData:
    """What was read from one or more data sets.

    Attributes:
        train: samples to train on, of all three steps.
        held_out: samples the data set itself set apart; empty where it did not.
        counted_out: how many rows were not used, by reason.
    """

    train: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    counted_out: Counter[str] = field(default_factory=Counter)


class Unusable(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Adaptor:
    """How rows of one form are read.

    Attributes:
        names: of the data sets that have this form.
        columns: what a row must have.
        convert: row -> sample; raises `Unusable`.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    convert: Callable[[Row], Sample]


_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):", re.MULTILINE)
_ROLES = {"Human": "user", "Assistant": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant")
# JSON can spell half of a character ("\\ud83d"); no encoding has it.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_dialogue(text: str) -> list[Message]:
    """`Human: … Assistant: …` text -> turns; a last turn that is empty stands as "".

    Raises:
        Unusable: the text does not begin with a Human's turn.
    """
    parts = _TURN.split(text.strip())
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human":
        raise Unusable("dialogue does not begin with Human:")
    return [
        {"role": _ROLES[who], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _messages(prompt: Any) -> list[Message]:
    """A prompt as text, as Human/Assistant text or as messages -> turns ending with the user's."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Unusable("empty prompt")
        if not re.match(r"\s*Human:", prompt):
            return [{"role": "user", "content": prompt.strip()}]
        turns = parse_dialogue(prompt)
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
        prompt = turns
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str) for turn in prompt
    ):
        raise Unusable("prompt is neither text nor messages")
    if any(turn["role"] not in _KNOWN_ROLES for turn in prompt):
        raise Unusable(f"role is not {', '.join(_KNOWN_ROLES[:-1])} or {_KNOWN_ROLES[-1]}")
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise Unusable("dialogue does not end with a user's turn")
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in prompt]


def _reply(value: Any, side: str) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise Unusable(f"{side} is not text")
    if not value.strip():
        raise Unusable(f"empty {side}")
    return value.strip()


def _pair(messages: list[Message], chosen: Any, rejected: Any) -> Sample:
    better, worse = _reply(chosen, "chosen"), _reply(rejected, "rejected")
    if better == worse:
        raise Unusable("chosen equals rejected")
    texts = (better, worse, *(message["content"] for message in messages))
    if any(_HALF_CHARACTER.search(text) for text in texts):
        raise Unusable("text is not valid Unicode")
    return Sample(tuple(messages), better, worse)


def _prompt_chosen_rejected(row: Row) -> Sample:
    return _pair(_messages(row["prompt"]), row["chosen"], row["rejected"])


def _hh_rlhf(row: Row) -> Sample:
    if not isinstance(row["chosen"], str) or not isinstance(row["rejected"], str):
        raise Unusable("chosen or rejected is not text")
    chosen, rejected = parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("pair parts before the last reply")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("dialogue does not end with Assistant:")
    return _pair(_messages(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"])


def _alpaca_eval(row: Row) -> Sample:
    preference = row["preference"]
    if preference not in (1, 2):
        raise Unusable("tie" if preference == 0 else "preference is not 0, 1 or 2")
    better, worse = ("output_1", "output_2") if preference == 1 else ("output_2", "output_1")
    return _pair(_messages(row["instruction"]), row[better], row[worse])


# The order counts for local files: the first entry whose columns a file has is taken.
ADAPTORS = (
    Adaptor((LOCAL_JSON, EMBEDDED), ("prompt", "chosen", "rejected"), _prompt_chosen_rejected),
    Adaptor(
        ("tatsu-lab/alpaca_eval",), ("instruction", "output_1", "output_2", "preference"),
        _alpaca_eval,
    ),
    Adaptor(("Anthropic/hh-rlhf",), ("chosen", "rejected"), _hh_rlhf),
)


def load(data_paths: list[str], flag: str = "--data_path") -> RawData:
    """Read every data set of `--data_path`; an empty list stands for the embedded one.

    Args:
        data_paths: hub names, `local/jsonfile`, files, folders or `name=path`.
        flag: the flag they came from, for messages.

    Raises:
        UserError: a path, form or line that cannot be read, or nothing usable in it.
    """
    if not data_paths:
        distributed.say("--data_path is not given: using the embedded data set")
    data = RawData()
    for data_path in data_paths or [EMBEDDED]:
        given = f"{flag} {data_path}"
        adaptor, parts = _open(data_path, given)
        used, unused = 0, Counter[str]()
        for split, rows in parts.items():
            samples = data.held_out if split == "eval" else data.train
            for row in rows:
                try:
                    # A column that only some rows lack is an empty one there.
                    samples.append(adaptor.convert({**dict.fromkeys(adaptor.columns), **row}))
                    used += 1
                except Unusable as reason:
                    unused[str(reason)] += 1
        if not used:
            reasons = "; ".join(f"{n} {reason}" for reason, n in unused.items())
            raise UserError(f"{given}: no usable row ({reasons}); give other data")
        data.counted_out += unused
    return data


def _open(data_path: str, given: str) -> tuple[Adaptor, dict[str, list[Row]]]:
    """The adaptor for a data set, and its rows by split ("train", "eval").

    `given` is the flag and its value, for messages; so it is below.
    """
    name, path = "", data_path
    if not Path(data_path).exists() and "=" in data_path:
        name, _, path = data_path.partition("=")
    if data_path == EMBEDDED:
        return _adaptor_named(EMBEDDED), {
            "train": assistant_world.rows("train"), "eval": assistant_world.rows("eval")
        }
    if data_path == LOCAL_JSON:
        path = "data"
        if not Path(path).is_dir():
            raise UserError(
                f"{given}: there is no folder {Path(path).absolute()}; put "
                "train.json and eval.json there, or give the path of a file"
            )
    if Path(path).is_dir():
        parts = _folder(Path(path), given)
    elif Path(path).is_file():
        parts = {"train": read_rows(Path(path))}
    elif not name and any(data_path in adaptor.names for adaptor in ADAPTORS):
        parts = _hub(data_path, given)
    else:
        known = ", ".join(_names())
        raise UserError(
            f"{given}: no such file or folder, and no data set of that name is "
            f"known; known are {known}, and local .json, .jsonl and .parquet files"
        )
    first = next((row for rows in parts.values() for row in rows), None)
    if first is None:
        raise UserError(f"{given}: the file is empty; give one with rows")
    known_name = name or (data_path if data_path in _names() else "")
    if known_name and known_name not in _names():
        raise UserError(
            f"{given}: no adaptor {name}; known are {', '.join(_names())}"
        )
    adaptor = _adaptor_named(known_name) if known_name else _adaptor_for(first, given)
    missing = [column for column in adaptor.columns if column not in first]
    if missing:
        raise UserError(
            f"{given}: no column {', '.join(missing)}; "
            f"the columns found are {', '.join(first)}"
        )
    return adaptor, parts


def _names() -> list[str]:
    return [name for adaptor in ADAPTORS for name in adaptor.names if name != EMBEDDED]


def _adaptor_named(name: str) -> Adaptor:
    return next(adaptor for adaptor in ADAPTORS if name in adaptor.names)


def _adaptor_for(row: Row, given: str) -> Adaptor:
    for adaptor in ADAPTORS:
        if all(column in row for column in adaptor.columns):
            return adaptor
    forms = "; ".join("+".join(adaptor.columns) for adaptor in ADAPTORS)
    raise UserError(
        f"{given}: the columns {', '.join(row) or '(none)'} fit no known form; "
        f"known are {forms}"
    )


def _folder(folder: Path, given: str) -> dict[str, list[Row]]:
    """train.* and eval.* (or test.*, validation.*) files of a folder."""
    stems = {"train": "train", "eval": "eval", "test": "eval", "validation": "eval"}
    parts: dict[str, list[Row]] = {}
    for file in sorted(folder.iterdir()):
        split = stems.get(file.name.split(".")[0])
        if split and file.is_file():
            parts.setdefault(split, []).extend(read_rows(file))
    if "train" not in parts:
        raise UserError(
            f"{given}: the folder {folder} has no train.json, train.jsonl or "
            "train.parquet; add one, or give the file itself"
        )
    return parts


def _hub(name: str, given: str) -> dict[str, list[Row]]:
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds when the hub is out of reach
        raise UserError(
            f"{given}: the hub did not give it ({type(error).__name__}); download it "
            f"and give {name}=PATH"
        ) from error
    splits = {"train": "train", "test": "eval", "validation": "eval", "eval": "eval"}
    return {splits[split]: list(rows) for split, rows in found.items() if split in splits}


def read_rows(path: Path) -> list[Row]:
    """Rows of a .json (one list, or lines), .jsonl or .parquet file; .json and .jsonl also .gz.

    Raises:
        UserError: the file is not of its form; the message names the line.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a parquet file; write it again") from error
    if kind not in (".json", ".jsonl"):
        raise UserError(f"{path}: unknown kind of file; known are .json, .jsonl (.gz), .parquet")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); write it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from error
    if kind == ".json" and text.lstrip().startswith("["):
        return _one_list(text, path)
    return list(_lines(text, path))


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """JSON as Python; `line` is where in the file `text` stands, None when it is all of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, reason = line or error.lineno, error.msg
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        line, reason = line or 1, str(error).split(";")[0]
    raise UserError(f"{path}, line {line}: not JSON ({reason}); mend or remove the line")


def _one_list(text: str, path: Path) -> list[Row]:
    rows = _parsed(text, path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, entry {number}: not an object with named columns; mend or remove it"
            )
    return rows


def _lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line, path, number)
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: not an object with named columns; mend or remove the line"
            )
        yield row
