"""The one exception that stands for a mistake of the user's, not of the program.

Raised where input enters, with a message of one line: what is wrong (flag or file, and value) and
the remedy. `distributed.run_main` prints that line and exits with code 2; any other exception is a
bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A wrong flag, path, file, column or model: one line, exit code 2."""


class TrainingStopped(Exception):
    """A training was ended on purpose before its last step; the message is one line."""
