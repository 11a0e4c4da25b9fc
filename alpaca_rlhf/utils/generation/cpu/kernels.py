"""What a decoding step does between Python's lines, on a CPU in fp32: the loops of `kernels.c`.

    multiply = Product(outputs, inputs).fill([weight], [bias])
    y = multiply(normalized(x, norm_weight, 1e-6))  # [rows, in] -> [rows, out]

They are compiled for this machine's processor when they are first asked for, which takes half a
second and the compiler that the variable CXX names, or `c++`. None of them has a gradient.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
PATIENCE = 60  # seconds for the compiler

_POINTER, _NUMBER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "columns": [],
    "lay_out": [_POINTER, _NUMBER, _NUMBER, _NUMBER, _POINTER, _NUMBER],
    "product": [_POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER, _NUMBER, _POINTER, _NUMBER],
    "normalize": [_POINTER, _NUMBER, _NUMBER, _POINTER, _REAL, _POINTER],
    "attend": [
        _POINTER, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER, _POINTER, _POINTER,
        _NUMBER, _NUMBER, _POINTER, _REAL, _POINTER, _POINTER, _NUMBER,
    ],
}


class KernelsMissing(Exception):
    """The kernels cannot be compiled; the message is one line."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, once a process.

    The file is gone as soon as it is loaded: none is left to be stale, or of another processor.

    Raises:
        KernelsMissing: no compiler, or one that refuses.
    """
    compiler = os.environ.get("CXX") or "c++"
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = str(Path(folder) / "kernels.so")
            subprocess.run(
                [*shlex.split(compiler), *FLAGS, "-x", "c", str(SOURCE), "-o", made, "-lm"],
                check=True, timeout=PATIENCE, capture_output=True, text=True,
            )
            loaded = ctypes.CDLL(made)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        refused = isinstance(error, subprocess.CalledProcessError) and error.stderr
        said = (refused or str(error)).strip().splitlines()
        why = next((line for line in said if "error" in line), said[-1])
        raise KernelsMissing(
            f"{compiler} does not compile the kernels of a faster step: {why}"
        ) from error
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    loaded.columns.restype = _NUMBER
    return loaded


class Product:
    """x -> x W^T + b, for few rows, with a copy of W that is laid out for them.

    Args:
        outputs, inputs: W's shape.
    """

    def __init__(self, outputs: int, inputs: int) -> None:
        self._multiply, self._inputs, self._outputs = library().product, inputs, outputs
        columns = library().columns()
        self._panels = _room(-(-outputs // columns) * columns * inputs)
        self._bias: Tensor | None = None

    def fill(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> "Product":
        """Take W and b as they are now: those of several layers are put one after the other.

        Args:
            weights: [part of out, in] each, fp32 on the CPU.
            biases: [part of out] each; None is zeros.

        Raises:
            ValueError: the shapes are not those of the whole.
        """
        given = [sum(len(w) for w in weights), *{w.shape[1] for w in weights}]
        if given != [self._outputs, self._inputs]:
            raise ValueError(f"weights {given}, not [{self._outputs}, {self._inputs}]")
        offset = 0
        for weight in weights:
            held = weight.detach().contiguous()
            library().lay_out(
                held.data_ptr(), *held.shape, offset, self._panels.data_ptr(),
                torch.get_num_threads(),
            )
            offset += len(held)
        if any(bias is not None for bias in biases):
            self._bias = torch.cat([
                torch.zeros(len(weight)) if bias is None else bias.detach()
                for weight, bias in zip(weights, biases, strict=True)
            ])
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        x = x.contiguous()
        rows = len(x)
        y = x.new_empty(rows, self._outputs)
        self._multiply(
            x.data_ptr(), rows, self._inputs, self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(), self._outputs, y.data_ptr(),
            torch.get_num_threads(),
        )
        return y


def _room(numbers: int) -> Tensor:
    """So many fp32, in the system's huge pages where it has some.

    To get a new page takes longer than to fill it if it is a small one.
    """
    room = mmap.mmap(-1, 4 * numbers, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.float32)


def normalized(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square normalization (Zhang and Sennrich 2019, equation 4) of x [rows, size]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    library().normalize(x.data_ptr(), *x.shape, weight.data_ptr(), epsilon, y.data_ptr())
    return y


def attended(
    joined: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, front: int,
    starts: Tensor, scale: float,
) -> Tensor:
    """Attention of the rows' new tokens, whose keys and values are put into the cache.

    Args:
        joined: [rows, (H + 2 K) size], queries of H heads, keys and values of K, not yet turned to
            their positions.
        cosines, sines: [rows, size], of the rotary embedding (Su et al. 2021, equation 34; halves,
            not neighbours, are the two sides of a plane).
        keys, values: the cache [at least rows, K, columns, size].
        front: the column of the new tokens.
        starts: [rows] int64, the first column that each row attends to.
        scale: of the products of query and key.

    Returns:
        [rows, H size].

    Raises:
        ValueError: angles that are not of the heads' size.
    """
    rows, (_, key_heads, columns, size) = len(joined), keys.shape
    if cosines.shape != (rows, size):
        raise ValueError(f"angles {list(cosines.shape)} are not of rows and heads [{rows}, {size}]")
    heads = joined.shape[1] // size - 2 * key_heads
    scores = joined.new_empty(rows * heads * columns)
    y = joined.new_empty(rows, heads * size)
    library().attend(
        joined.data_ptr(), rows, heads, key_heads, size, cosines.data_ptr(), sines.data_ptr(),
        keys.data_ptr(), values.data_ptr(), columns, front, starts.data_ptr(), scale,
        scores.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )
    return y
