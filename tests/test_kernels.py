"""The compiled operations of a decoding step, each compared with torch."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from alpaca_rlhf.utils.generation.cpu import kernels
from alpaca_rlhf.utils.generation.cpu.kernels import KernelsMissing, Product, attended, normalized


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


DTYPES = [torch.float32, torch.bfloat16]


def assert_close(given, expected, tolerance=2e-5):
    torch.testing.assert_close(given.float(), expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------- products


def filled(*layers):
    product = Product(*layers)
    product.fill()
    return product


def linear(outputs, inputs, has_bias=False, dtype=torch.float32):
    bias = torch.randn(outputs, dtype=dtype) if has_bias else None
    return SimpleNamespace(weight=torch.randn(outputs, inputs, dtype=dtype), bias=bias)


def expected(x, *layers):
    return torch.cat([
        F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
        for layer in layers
    ], dim=-1)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 16, 48, 49, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (1, 1), (15, 63), (17, 65), (100, 200)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_that_of_a_linear_layer(rows, outputs, inputs, has_bias, dtype):
    torch.manual_seed(rows)
    x, layer = torch.randn(rows, inputs), linear(outputs, inputs, has_bias, dtype)
    assert_close(filled(layer)(x), expected(x, layer))


def test_tensors_that_are_not_contiguous_are_multiplied_correctly():
    x, layer = torch.randn(40, 8).t(), SimpleNamespace(weight=torch.randn(40, 20).t(), bias=None)
    assert_close(filled(layer)(x), expected(x, layer))


@pytest.mark.parametrize("parts", [(16, 32), (1, 2, 3), (15, 17, 50), (40, 8, 8)])
@pytest.mark.parametrize("biased", [None, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_with_the_same_input_are_joined_and_can_be_filled_again(parts, biased, dtype):
    x = torch.randn(5, 70)
    layers = [linear(p, 70, i == biased, dtype) for i, p in enumerate(parts)]
    product = Product(*layers)
    for _ in range(2):
        for layer in layers:
            layer.weight.mul_(1.5)
        product.fill()
        assert_close(product(x), expected(x, *layers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_of_a_row_is_bit_for_bit_the_same_whatever_rows_it_comes_with(dtype):
    x, product = torch.randn(50, 300), filled(linear(70, 300, True, dtype))
    whole = product(x)
    for rows in (1, 4, 16, 49):
        assert product(x[:rows]).equal(whole[:rows])


# ------------------------------------------------------------------- between the products


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_normalized_rows_are_those_of_torch(size):
    x, weight = 3 * torch.randn(5, size), torch.randn(size)
    assert_close(normalized(x, weight, 1e-5), F.rms_norm(x, (size,), weight, 1e-5))


def rotated(x, cosines, sines):
    """Apply the rotary embedding to heads [rows, heads, size]."""
    left, right = x.chunk(2, dim=-1)
    return x * cosines[:, None] + torch.cat([-right, left], dim=-1) * sines[:, None]


def attended_by_torch(joined, cosines, sines, keys, values, front, starts, scale):
    """The same as `attended`, with copies of the cache in fp32."""
    rows, (_, key_heads, columns, size) = len(joined), keys.shape
    heads = joined.view(rows, -1, size)
    split = heads.shape[1] - 2 * key_heads
    queries, key, value = heads.split([split, key_heads, key_heads], dim=1)
    keys, values = keys[:rows].clone(), values[:rows].clone()
    keys[:, :, front], values[:, :, front] = rotated(key, cosines, sines), value
    keys, values = keys.float(), values.float()
    column = torch.arange(columns)
    mask = (column >= starts[:, None]) & (column <= front)
    result = F.scaled_dot_product_attention(
        rotated(queries, cosines, sines).unsqueeze(2), keys, values, mask[:, None, None],
        scale=scale, enable_gqa=True,
    )
    return result.reshape(rows, -1), keys, values


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (9, 3), (6, 1)])
@pytest.mark.parametrize("size", [2, 6, 24, 64])
@pytest.mark.parametrize("spread", [1.0, 30.0])  # of scores: the second leaves one token or two
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_that_of_torch_and_fills_the_cache(heads, key_heads, size, spread, dtype):
    torch.manual_seed(size)
    rows, slots, columns, front = 5, 7, 90, 71
    joined = torch.randn(rows, (heads + 2 * key_heads) * size)
    angles = torch.randn(rows, size // 2).repeat(1, 2)
    keys, values = torch.randn(2, slots, key_heads, columns, size).to(dtype)
    # A key may be rounded to the neighbour in bf16 if it is computed in another order.
    tolerance = 2e-5 if dtype == torch.float32 else 0.01 * spread
    keys[:, :, front:], values[:, :, front:] = torch.nan, torch.nan  # is not read
    starts = torch.tensor([0, 3, front, front - 1, 40])
    given = (angles.cos(), angles.sin())
    scale = spread * size**-0.5
    by_torch, *caches = attended_by_torch(
        joined, *given, keys.nan_to_num(), values.nan_to_num(), front, starts, scale
    )
    result = attended(joined, *given, keys, values, front, starts, scale)
    assert_close(result, by_torch, tolerance)
    assert (result - by_torch).abs().mean() < 1e-4
    for cache, right in zip((keys, values), caches, strict=True):
        assert_close(cache[:rows, :, : front + 1], right[:, :, : front + 1], tolerance)
        assert cache[:, :, front + 1 :].isnan().all()
        assert cache[rows:, :, front].isnan().all()


def test_large_scores_that_are_far_apart_do_not_overflow():
    size = 4
    keys, values = torch.zeros(1, 1, 3, size), torch.zeros(1, 1, 3, size)
    keys[0, 0, :, 0] = torch.tensor([1e5, -1e5, 0.0])
    values[0, 0, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    joined = torch.tensor([[1e3, 0, 0, 0, 0, 0, 0, 0, 3.0, 0, 0, 0]])
    still = torch.ones(1, size), torch.zeros(1, size)
    result = attended(joined, *still, keys, values, 2, torch.tensor([0]), 1.0)
    assert_close(result, torch.tensor([[1.0, 0, 0, 0]]))


def test_a_rotary_embedding_of_another_shape_than_the_heads_is_refused():
    keys = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"\[1, 2\], expected \[1, 4\]"):
        attended(torch.zeros(1, 12), torch.ones(1, 2), torch.ones(1, 2), keys, keys.clone(), 2,
                 torch.tensor([0]), 1.0)


# ------------------------------------------------------------------- the compiler


@pytest.mark.parametrize(("compiler", "reason"), [
    ("no-such-compiler", "no-such-compiler cannot compile .*: .*No such file"),
    ("sh -c 'echo note; echo an error: out of paper >&2; echo so; exit 1'", "error: out of paper$"),
    ("false", "returned non-zero exit status 1"),
    ("true", "true cannot compile .*: .*cannot open shared object"),
    ("sh -c '", "No closing quotation"),
])
def test_a_compiler_that_is_missing_or_fails_is_reported_in_one_line(monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(KernelsMissing, match=reason) as raised:
        kernels.library.__wrapped__()
    assert "\n" not in str(raised.value)


def test_the_compiler_is_called_once_per_process(monkeypatch):
    first = kernels.library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.library() is first
    assert isinstance(first, ctypes.CDLL)
