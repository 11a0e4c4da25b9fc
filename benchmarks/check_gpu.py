"""Prove the program on this machine: one table of checks, on one or more GPUs or on a CPU.

    bash scripts/check_gpu.sh [--output FILE] [--only NAME ...] [--list]

Downloads nothing and takes at most ten minutes. Each row is one check of `gpu_checks.py` and ends
as PASS, FAIL with the line to report, or SKIP with the reason why this machine cannot do it. Rows
run in a worker process, one after the other; a row that fails, crashes, hangs or runs out of memory
ends its worker, and a new one goes on with the next row. The JSON file (default: check_gpu.json)
has versions, devices and every row with its figures, to be pasted into an issue. Exit code 1 if a
row failed, 2 for a wrong option. docs/gpu.md says more.
"""

import argparse
import contextlib
import fnmatch
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

HERE = Path(__file__).resolve().parent
TOTAL = 600  # seconds of all rows; those that have not begun by then are skipped
PATIENCE = 5  # seconds that a worker has to end itself
START_UP = 180  # seconds that a worker may take to import the libraries
PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
LOG_LINES = 40  # of a failed row, for the JSON file


class Skip(Exception):
    """Raised by a check that this machine cannot do; the text is the reason."""


class Wrong(Exception):
    """Raised by a check whose result is not what it must be; the text is the line to report."""


class Row(NamedTuple):
    """A check: "module:function", what it gets after the folder, and its time limit in seconds."""

    check: str
    arguments: tuple[Any, ...] = ()
    limit: float = 120


class Result(NamedTuple):
    """The end of a row; `figures` are its measurements, `log` the end of a failed row's output."""

    name: str
    status: str
    seconds: float
    message: str
    figures: dict[str, Any]
    log: list[str] = []


# Of a process among ranks; the worker is none of them.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
PRECISIONS = ("fp32", "bf16", "fp16")
FIRST = "machine"  # in every selection: it describes the machine for the JSON file
ROWS = {
    FIRST: Row("gpu_checks:machine", limit=60),
    "doctor": Row("gpu_checks:run_doctor", limit=60),
    **{f"curve {dtype}": Row("gpu_checks:curve", (dtype,)) for dtype in PRECISIONS[1:]},
    **{f"decoding {step}": Row("gpu_checks:decoding", (step,))
       for step in ("eager", "compiled", "graph")},
    **{f"logprobs {dtype}": Row("gpu_checks:logprobs", (dtype,)) for dtype in PRECISIONS},
    "logprobs flash": Row("gpu_checks:logprobs", ("bf16", "flash_attention_2")),
    **{f"step {step} {dtype}": Row("gpu_checks:steps", (step, dtype), 180)
       for step in (1, 2, 3) for dtype in PRECISIONS},
    "resume killed": Row("gpu_checks:killed"),
    "resume stopped": Row("gpu_checks:stopped"),
    "resume moved": Row("gpu_checks:moved"),
    "two ranks": Row("gpu_checks:two_ranks", limit=180),
    "one visible device": Row("gpu_checks:one_visible_device", limit=180),
    "memory": Row("gpu_checks:memory", limit=180),
    **{f"speed {rows} rows": Row("gpu_checks:speed", (rows,)) for rows in (16, 64)},
    "offload": Row("gpu_checks:offload", limit=240),  # the last: it may have to compile
}


# ------------------------------------------------------------------- the worker


def work() -> None:
    """Run the rows that stdin lists; write a line of JSON for each on stdout, the rest on stderr.

    The first line says that the libraries are imported. The worker ends with the first row that
    fails, because a failure may leave a device or its memory unusable.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(*values: Any) -> None:
        # The size of the log says where the next row's output begins.
        sys.stdout.flush()
        results.write(json.dumps([os.fstat(2).st_size, *values]) + "\n")
        results.flush()

    folder, rows = json.load(sys.stdin)
    checks = []
    for check, arguments in rows:
        module, _, name = check.partition(":")
        checks.append((getattr(importlib.import_module(module), name), arguments))
    write("ready")
    for check, arguments in checks:
        start = time.perf_counter()
        status, figures = PASS, {}
        try:
            message, figures = check(Path(folder), *arguments)
        except Skip as reason:
            status, message = SKIP, str(reason)
        except BaseException as error:  # SystemExit, too, is the end of a check
            status, message = FAIL, one_line(error)
            traceback.print_exc()
        write(status, time.perf_counter() - start, message, figures)
        if status == FAIL:
            os._exit(1)  # not the interpreter's end: threads of a broken collective would stay
        gc.collect()
    os._exit(0)


def one_line(error: BaseException) -> str:
    """Return an error as one line: of our own the text, of any other also the type."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, Wrong) else f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------- the table


class Worker:
    """A process that runs rows in turn, in a session of its own.

    Args:
        rows: the checks.
        folder: for models, data and results, which the rows share.
        log: file for all output.
    """

    def __init__(self, rows: Sequence[Row], folder: Path, log: Path) -> None:
        self._log, self._unread = log, b""
        paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
        with log.open("ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-c", "import check_gpu; check_gpu.work()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                start_new_session=True,
                env={**kept, "PYTHONPATH": os.pathsep.join(paths)},
            )
        given = [str(folder), [(row.check, row.arguments) for row in rows]]
        stdin = self._pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has ended already; `read` says how
            stdin.write(json.dumps(given).encode())
            stdin.close()

    def output(self) -> list[str]:
        """Return what the row that has not been read yet, or has failed, has printed."""
        with self._log.open("rb") as log:
            log.seek(self._start)
            text = log.read().decode(errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def read(self, seconds: float) -> list[Any] | str:
        """Return the worker's next line, or why there is none, after at most these seconds."""
        output, end = self._pipe(self._process.stdout), time.monotonic() + seconds
        while b"\n" not in self._unread:
            if not select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
                return self._reason(f"no result after {seconds:.0f} s")
            part = os.read(output.fileno(), 1 << 16)
            if not part:
                code = self._process.wait()
                by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return self._reason(f"the process ended with {by}")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        end_of_log, *values = json.loads(line)
        if values[0] != FAIL:
            self._start = end_of_log
        return values

    def end(self) -> None:
        """End the process and every process that it has started.

        SIGTERM first: a compilation releases its lock, for which later ones would wait.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(PATIENCE)
        self._pipe(self._process.stdout).close()

    def _reason(self, what: str) -> str:
        last = self.output()[-1:]
        return f"{what}; last line: {last[0]}" if last else what

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def run(rows: dict[str, Row], folder: Path, total: float = TOTAL) -> Iterator[Result]:
    """Run rows, and yield the result of each as it ends.

    Args:
        rows: checks by name.
        folder: for everything that they write.
        total: seconds of all of them together.
    """
    left, start = list(rows), time.monotonic()
    worker: Worker | None = None
    try:
        while left:
            remaining = total - (time.monotonic() - start)
            if remaining <= 0:
                break
            given: list[Any] | str = []
            began = time.monotonic()
            if worker is None:
                worker = Worker([rows[name] for name in left], folder, folder / "log")
                given = worker.read(min(START_UP, remaining))
            if not isinstance(given, str):
                given = worker.read(min(rows[left[0]].limit, remaining))
            if isinstance(given, str):
                given = [FAIL, time.monotonic() - began, given, {}]
            result = Result(left.pop(0), *given)
            if result.status == FAIL:
                result = result._replace(log=worker.output()[-LOG_LINES:])
                worker.end()
                worker = None
            yield result
    finally:
        if worker is not None:
            worker.end()
    for name in left:
        reason = f"not run, {total:.0f} s are over: run it with --only {name!r}"
        yield Result(name, SKIP, 0.0, reason, {})


def line(result: Result) -> str:
    """Return a row of the table."""
    return f"{result.status}  {result.name:<18} {result.seconds:6.1f} s  {result.message}"


def selected(patterns: Sequence[str]) -> dict[str, Row]:
    """Return the rows whose name contains one of the patterns or matches it as a glob.

    Raises:
        ValueError: a pattern selects no row.
    """
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in ROWS):
            raise ValueError(f"--only {pattern!r}: no row has this name; --list shows all names")
    return {name: row for name, row in ROWS.items()
            if name == FIRST or any(_matches(name, pattern) for pattern in patterns or "*")}


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatch.fnmatchcase(name, pattern)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows, print the table, write the JSON file; return the exit code."""
    parser = argparse.ArgumentParser(
        "check_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("check_gpu.json"), metavar="FILE",
                        help="JSON file for the results (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME",
                        help="rows to run: parts of their names, or globs such as 'step ? bf16'")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    options = parser.parse_args(argv)
    try:
        rows = selected(options.only)
        if not options.list:
            options.output.touch()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(rows))
        return 0
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="check_gpu-") as folder:
        for result in run(rows, Path(folder)):
            results.append(result)
            print(line(result), flush=True)
    seconds = time.monotonic() - start
    counts = {kind: sum(result.status == kind for result in results)
              for kind in (PASS, FAIL, SKIP)}
    options.output.write_text(json.dumps({
        "machine": results[0].figures, "seconds": seconds, "counts": counts,
        "rows": [result._asdict() for result in [results[0]._replace(figures={}), *results[1:]]],
    }, indent=1) + "\n")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items())
          + f" ({seconds:.0f} s); written to {options.output}")
    return 1 if counts[FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
