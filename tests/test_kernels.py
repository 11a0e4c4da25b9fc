"""The compiled loops of a decoding step: each against the same thing said in torch."""

import ctypes

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


def assert_close(given, expected):
    torch.testing.assert_close(given, expected, rtol=2e-5, atol=2e-5)


# ------------------------------------------------------------------- products


def laid_out(weight, bias=None):
    return Product(*weight.shape).fill([weight], [bias])


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 16, 48, 49, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (1, 1), (15, 63), (17, 65), (100, 200)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_a_linear_layer(rows, outputs, inputs, has_bias):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if has_bias else None
    assert_close(laid_out(weight, bias)(x), F.linear(x, weight, bias))


def test_what_is_not_contiguous_is_multiplied_as_well():
    x, weight = torch.randn(40, 8).t(), torch.randn(40, 20).t()
    assert_close(laid_out(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("parts", [(16, 32), (1, 2, 3), (15, 17, 50), (40, 8, 8)])
@pytest.mark.parametrize("biased", [(), (0,), (1,)])
def test_the_layers_of_one_input_stand_one_after_the_other(parts, biased):
    x, weights = torch.randn(5, 70), [torch.randn(part, 70) for part in parts]
    biases = [torch.randn(p) if i in biased else None for i, p in enumerate(parts)]
    multiply = Product(sum(parts), 70)
    for _ in range(2):  # what is filled again is as good as new
        for weight in weights:
            weight.mul_(1.5)
        expected = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        assert_close(multiply.fill(weights, biases)(x), torch.cat(expected, dim=-1))


@pytest.mark.parametrize("shapes", [[(3, 4)], [(4, 5)], [(2, 4), (2, 5)]])
def test_weights_of_another_shape_are_refused(shapes):
    with pytest.raises(ValueError, match=r"not \[4, 4\]"):
        Product(4, 4).fill([torch.zeros(shape) for shape in shapes], [None] * len(shapes))


def test_a_rows_product_is_the_same_to_the_bit_whatever_rows_it_comes_with():
    x, multiply = torch.randn(50, 300), laid_out(torch.randn(70, 300), torch.randn(70))
    whole = multiply(x)
    for rows in (1, 4, 16, 49):
        assert multiply(x[:rows]).equal(whole[:rows])


# ------------------------------------------------------------------- between the products


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_normalized_rows_are_those_of_torch(size):
    x, weight = 3 * torch.randn(5, size), torch.randn(size)
    assert_close(normalized(x, weight, 1e-5), F.rms_norm(x, (size,), weight, 1e-5))


def turned(x, cosines, sines):
    """The rotary embedding of heads [rows, heads, size]."""
    left, right = x.chunk(2, dim=-1)
    return x * cosines[:, None] + torch.cat([-right, left], dim=-1) * sines[:, None]


def by_torch(joined, cosines, sines, keys, values, front, starts, scale):
    """The same as `attended`, with caches of its own."""
    rows, (_, key_heads, columns, size) = len(joined), keys.shape
    heads = joined.view(rows, -1, size)
    split = heads.shape[1] - 2 * key_heads
    queries, key, value = heads.split([split, key_heads, key_heads], dim=1)
    keys, values = keys[:rows].clone(), values[:rows].clone()
    keys[:, :, front], values[:, :, front] = turned(key, cosines, sines), value
    place = torch.arange(columns)
    mask = (place >= starts[:, None]) & (place <= front)
    result = F.scaled_dot_product_attention(
        turned(queries, cosines, sines).unsqueeze(2), keys, values, mask[:, None, None],
        scale=scale, enable_gqa=True,
    )
    return result.reshape(rows, -1), keys, values


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (9, 3), (6, 1)])
@pytest.mark.parametrize("size", [2, 6, 24, 64])
@pytest.mark.parametrize("spread", [1.0, 30.0])  # of scores: the second leaves one token, or two
def test_attention_is_that_of_torch_and_fills_the_cache(heads, key_heads, size, spread):
    torch.manual_seed(size)
    rows, slots, columns, front = 5, 7, 90, 71
    joined = torch.randn(rows, (heads + 2 * key_heads) * size)
    angles = torch.randn(rows, size // 2).repeat(1, 2)
    keys, values = torch.randn(2, slots, key_heads, columns, size)
    keys[:, :, front:], values[:, :, front:] = torch.nan, torch.nan  # is not read
    starts = torch.tensor([0, 3, front, front - 1, 40])
    given = (angles.cos(), angles.sin())
    scale = spread * size**-0.5
    expected, *filled = by_torch(
        joined, *given, keys.nan_to_num(), values.nan_to_num(), front, starts, scale
    )
    result = attended(joined, *given, keys, values, front, starts, scale)
    assert_close(result, expected)
    for cache, right in zip((keys, values), filled, strict=True):
        assert_close(cache[:rows, :, : front + 1], right[:, :, : front + 1])
        assert cache[:, :, front + 1 :].isnan().all()
        assert cache[rows:, :, front].isnan().all()


def test_scores_that_are_far_apart_or_very_large_do_no_harm():
    size = 4
    keys, values = torch.zeros(1, 1, 3, size), torch.zeros(1, 1, 3, size)
    keys[0, 0, :, 0] = torch.tensor([1e5, -1e5, 0.0])
    values[0, 0, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    joined = torch.tensor([[1e3, 0, 0, 0, 0, 0, 0, 0, 3.0, 0, 0, 0]])
    still = torch.ones(1, size), torch.zeros(1, size)
    result = attended(joined, *still, keys, values, 2, torch.tensor([0]), 1.0)
    assert_close(result, torch.tensor([[1.0, 0, 0, 0]]))


# ------------------------------------------------------------------- what cannot be


def test_angles_of_another_size_than_the_heads_are_refused():
    keys = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        attended(torch.zeros(1, 12), torch.ones(1, 2), torch.ones(1, 2), keys, keys.clone(), 2,
                 torch.tensor([0]), 1.0)


@pytest.mark.parametrize(("compiler", "said"), [
    ("no-such-compiler", "no-such-compiler does not compile .*: .*No such file"),
    ("sh -c 'echo note; echo an error: out of paper >&2; echo so; exit 1'", "error: out of paper$"),
    ("false", "returned non-zero exit status 1"),
    ("true", "true does not compile .*: .*cannot open shared object"),
    ("sh -c '", "No closing quotation"),
])
def test_a_compiler_that_is_missing_or_fails_is_told_in_one_line(monkeypatch, compiler, said):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(KernelsMissing, match=said) as raised:
        kernels.library.__wrapped__()
    assert "\n" not in str(raised.value)


def test_the_compiler_is_called_once_a_process(monkeypatch):
    first = kernels.library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.library() is first
    assert isinstance(first, ctypes.CDLL)
