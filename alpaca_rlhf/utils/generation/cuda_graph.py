"""A decoding step as a CUDA graph: the model's own forward pass, launched as a whole.

On a GPU, launching the hundreds of kernels of a small model's forward pass from Python takes longer
than running them. A graph is recorded once for each number of rows and launched for every token.
Shapes must not change within it, so it attends to all columns of the cache, and what changes from
token to token is read from tensors: the tokens, their positions, the front's column and a mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from alpaca_rlhf.utils.generation.kv_cache import SlotCache

WARM_UP = 3  # passes before recording: libraries choose their kernels in the first ones


def record(run: Callable[[], Tensor], pool: Any = None) -> tuple[Callable[[], None], Tensor, Any]:
    """Record a forward pass, in the way that PyTorch's notes on CUDA graphs prescribe.

    Args:
        run: the forward pass.
        pool: memory of graphs of which no two run at the same time; None makes one.

    Returns:
        A function that launches it, the tensor that holds its result until another graph of the
        pool runs, and the pool.
    """
    device = get_accelerator()
    stream = device.Stream()
    stream.wait_stream(device.current_stream())
    with device.stream(stream):
        for _ in range(WARM_UP):
            run()
    device.current_stream().wait_stream(stream)
    graph = device.create_graph()
    with device.capture_to_graph(graph, pool=pool):
        result = run()
    return partial(device.replay_graph, graph), result, pool or graph.pool()


def attends_in_windows(model: PreTrainedModel) -> bool:
    """Return whether some layers see only a part of what is before a token."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return kinds != {"full_attention"} or any(windows)


class _AllColumns(DynamicLayer):
    """Keys and values of one layer [rows, heads, columns, head size], all of which are seen.

    Args:
        keys, values: buffers.
        front: [1] the column to write.
    """

    def __init__(self, keys: Tensor, values: Tensor, front: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._front = keys, values, front
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column [rows, heads, 1, size] at the front; return all columns."""
        self.keys.index_copy_(2, self._front, key_states)
        self.values.index_copy_(2, self._front, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


class GraphStep:
    """Computes the next logits of all rows by CUDA graphs.

    Args:
        model: a model without an `objection`.
    """

    name = "the CUDA graph"
    reusable = False  # a graph knows where the weights were when it was recorded

    def __init__(self, model: Any) -> None:
        self._model = model
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None  # of memory, shared by the graphs for all numbers of rows

    @staticmethod
    def objection(model: PreTrainedModel) -> str | None:
        """Return the reason why there is no graph for a model, or None."""
        if model.device.type == "cpu":
            return "it needs a GPU"
        if attends_in_windows(model):
            return "some layers attend to a window"
        return None

    def fill(self) -> None:
        """Drop all graphs: they are recorded again where the weights are now."""
        self._graphs, self._pool = {}, None

    release = fill

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """Return logits [N, V] after tokens [N], valid until the next call."""
        graph = self._graphs.get(cache.rows)
        if graph is None or not graph.reads(cache):
            graph = self._graphs[cache.rows] = _Graph(self._model, tokens, cache, self._pool)
            self._pool = graph.pool
        return graph(tokens, cache)


class _Graph:
    """The graph for one number of rows and the buffers of one cache."""

    def __init__(self, model: Any, tokens: Tensor, cache: SlotCache, pool: Any) -> None:
        self._keys = cache.layers[0].keys
        self._columns = torch.arange(cache.columns, device=tokens.device)
        self._tokens = tokens.unsqueeze(-1).clone()
        self._positions = cache.positions.clone()
        self._front = self._columns[:1].clone()
        # [rows, 1, 1, columns], added to the scores.
        self._mask = torch.zeros(
            len(tokens), 1, 1, cache.columns, dtype=model.dtype, device=tokens.device
        )
        self._copy_inputs(tokens, cache)
        rows = len(tokens)
        whole = Cache(layers=[
            _AllColumns(layer.keys[:rows], layer.values[:rows], self._front)
            for layer in cache.layers
        ])
        self._launch, self._logits, self.pool = record(lambda: model(
            input_ids=self._tokens, attention_mask=self._mask, position_ids=self._positions,
            past_key_values=whole, use_cache=True, logits_to_keep=1,
        ).logits[:, -1], pool)

    def reads(self, cache: SlotCache) -> bool:
        """Return whether the graph was recorded on the buffers of this cache."""
        return bool(cache.layers) and cache.layers[0].keys is self._keys

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        self._copy_inputs(tokens, cache)
        self._launch()
        return self._logits

    def _copy_inputs(self, tokens: Tensor, cache: SlotCache) -> None:
        self._tokens.copy_(tokens.unsqueeze(-1))
        self._positions.copy_(cache.positions)
        self._front.fill_(cache.front)
        columns = self._columns
        visible = (columns >= cache.starts.unsqueeze(-1)) & (columns <= cache.front)
        self._mask.zero_().masked_fill_(
            ~visible[:, None, None], torch.finfo(self._mask.dtype).min
        )
