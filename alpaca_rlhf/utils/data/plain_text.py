"""Plain text for the language-modelling loss of step 3 (ptx): a local file or a hub data set."""

from pathlib import Path

from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError


def load_blocks(
    name: str, configuration: str | None, form: ChatFormat, block_size: int
) -> list[dict[str, list[int]]]:
    """Text as rows of `block_size` ids, every token of which is trained.

    Args:
        name: a local text file (paragraphs end with an empty line), or a hub data set with a
            column `text`.
        configuration: of the hub data set.
        form: the tokenizer; eos ends each text.
        block_size: tokens of a row; what does not fill the last row is left out.

    Raises:
        UserError: it cannot be read, or does not fill a single row.
    """
    flag = f"--unsupervised_dataset_name {name}"
    texts = _file(Path(name), flag) if Path(name).is_file() else _hub(name, configuration, flag)
    ids: list[int] = []
    for text in texts:
        if text.strip():
            ids += form.text_ids(text)
    starts = range(0, len(ids) - block_size + 1, block_size)
    blocks = [ids[start : start + block_size] for start in starts]
    if not blocks:
        raise UserError(
            f"{flag}: holds {len(ids)} tokens, less than one row of {block_size} "
            "(--max_prompt_seq_len + --max_answer_seq_len); give more text, or shorten the rows"
        )
    return [{"input_ids": block, "labels": block} for block in blocks]


def _file(path: Path, flag: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n\n")
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror}); give another") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: not UTF-8 at byte {error.start}; convert the file") from error


def _hub(name: str, configuration: str | None, flag: str) -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, configuration, split="train")
    except Exception as error:  # the library raises a dozen kinds when the hub is out of reach
        raise UserError(
            f"{flag}: no such file, and the hub did not give it ({type(error).__name__}); "
            "give a local text file"
        ) from error
    if "text" not in rows.column_names:
        raise UserError(
            f"{flag}: no column text; there are {', '.join(rows.column_names)}; give a data set "
            "with one, or a local text file"
        )
    return rows["text"]
