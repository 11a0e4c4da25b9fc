"""The exceptions that end a run in one line: a mistake of the user's, and an end on purpose.

`UserError` is raised where input enters, with a message of one line: what is wrong (flag or file,
and value) and the remedy. `console.run_main` prints that line and exits with code 2; any other
exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A wrong flag, path, file, column or model: one line, exit code 2."""


class TrainingStopped(Exception):
    """A training was ended on purpose before its last step; the message is one line.

    Args:
        message: says why, and how to go on.
        code: of the process's exit.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
