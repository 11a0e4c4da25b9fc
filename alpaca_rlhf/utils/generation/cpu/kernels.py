"""Compiled operations of a decoding step on a CPU: the loops of `kernels.c`.

    multiply = Product(layer)
    multiply.fill()
    y = multiply(normalized(x, norm_weight, 1e-6))  # [N, in] -> [N, out]

They are compiled for this machine's processor on first use, which takes half a second and the
compiler named by the variable CXX, or `c++`. Weights and KV cache are in fp32 or bf16; inputs,
outputs and sums are in fp32. None of them has a gradient.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
TIMEOUT = 60  # seconds for the compiler

_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "columns": [],
    "lay_out": [_POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _INTEGER],
    "product": [
        _POINTER, _INTEGER, _INTEGER, _POINTER, _POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER],
    "normalize": [_POINTER, _INTEGER, _INTEGER, _POINTER, _FLOAT, _POINTER],
    "attend": [
        _POINTER, _INTEGER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _POINTER, _POINTER, _POINTER,
        _INTEGER, _INTEGER, _POINTER, _FLOAT, _POINTER, _POINTER, _INTEGER, _INTEGER,
    ],
}


class KernelsMissing(Exception):
    """The kernels cannot be compiled; the message is one line."""


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load the kernels, once per process.

    No file is kept, so none can be stale or built for another processor.

    Raises:
        KernelsMissing: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or "c++"
    try:
        with tempfile.TemporaryDirectory() as folder:
            built = str(Path(folder) / "kernels.so")
            subprocess.run(
                [*shlex.split(compiler), *FLAGS, "-x", "c", str(SOURCE), "-o", built, "-lm"],
                check=True, timeout=TIMEOUT, capture_output=True, text=True,
            )
            loaded = ctypes.CDLL(built)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        output = isinstance(error, subprocess.CalledProcessError) and error.stderr
        lines = (output or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise KernelsMissing(f"{compiler} cannot compile its kernels: {reason}") from error
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    loaded.columns.restype = _INTEGER
    return loaded


class Product:
    """Multiplies few rows by the weights of linear layers, copied into a layout for that.

    Args:
        layers: linear layers with the same input, all in fp32 or all in bf16, on the CPU; their
            outputs are concatenated.
    """

    def __init__(self, *layers: Any) -> None:
        self._layers, self._multiply = layers, library().product
        self._outputs = sum(len(layer.weight) for layer in layers)
        self._inputs = layers[0].weight.shape[1]
        columns, dtype = library().columns(), layers[0].weight.dtype
        self._half = dtype == torch.bfloat16
        self._panels = _allocate(-(-self._outputs // columns) * columns * self._inputs, dtype)
        self._bias: Tensor | None = None

    def fill(self) -> None:
        """Copy the layers' weights and biases as they are now."""
        offset = 0
        for layer in self._layers:
            weight = layer.weight.detach().contiguous()
            library().lay_out(
                weight.data_ptr(), *weight.shape, offset, self._panels.data_ptr(),
                self._half, torch.get_num_threads(),
            )
            offset += len(weight)
        if any(layer.bias is not None for layer in self._layers):
            self._bias = torch.cat([
                torch.zeros(len(layer.weight)) if layer.bias is None
                else layer.bias.detach().float() for layer in self._layers
            ])

    def __call__(self, x: Tensor) -> Tensor:
        """Return [N, out] for x [N, in], both in fp32."""
        x = x.contiguous()
        y = x.new_empty(len(x), self._outputs)
        self._multiply(
            x.data_ptr(), len(x), self._inputs, self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(), self._outputs, y.data_ptr(),
            self._half, torch.get_num_threads(),
        )
        return y


def _allocate(count: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialized numbers, in huge pages where the system has them.

    With small pages, getting the memory takes longer than filling it.
    """
    memory = mmap.mmap(-1, dtype.itemsize * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def normalized(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the root mean square normalization (Zhang and Sennrich 2019, eq. 4) of x [N, D]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    library().normalize(x.data_ptr(), *x.shape, weight.data_ptr(), epsilon, y.data_ptr())
    return y


def attended(
    joined: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, front: int,
    starts: Tensor, scale: float,
) -> Tensor:
    """Return the attention of each row's new token; its key and value go into the cache.

    Args:
        joined: [N, (H + 2 K) D], queries of H heads, keys and values of K, before the rotary
            embedding.
        cosines, sines: [N, D] of the rotary embedding (Su et al. 2021, eq. 34; the two sides of a
            plane are a half apart, not neighbours).
        keys, values: the cache [at least N, K, columns, D], fp32 or bf16.
        front: the column of the new tokens.
        starts: [N] int64, the first column that each row attends to.
        scale: of the products of query and key.

    Returns:
        [N, H D].

    Raises:
        ValueError: cosines and sines have another shape.
    """
    rows, (_, key_heads, columns, size) = len(joined), keys.shape
    if cosines.shape != (rows, size):
        raise ValueError(f"rotary embedding {list(cosines.shape)}, expected [{rows}, {size}]")
    heads = joined.shape[1] // size - 2 * key_heads
    scores = joined.new_empty(rows * heads * columns)
    y = joined.new_empty(rows, heads * size)
    library().attend(
        joined.data_ptr(), rows, heads, key_heads, size, cosines.data_ptr(), sines.data_ptr(),
        keys.data_ptr(), values.data_ptr(), columns, front, starts.data_ptr(), scale,
        scores.data_ptr(), y.data_ptr(), keys.dtype == torch.bfloat16, torch.get_num_threads(),
    )
    return y
