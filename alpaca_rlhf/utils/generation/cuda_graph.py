"""A decoding step as a CUDA graph: the model's own forward pass, launched as one.

A step of a small model is over sooner on a GPU than Python has launched its hundreds of kernels. A
graph is recorded once for each number of rows and launched whole for every token. Nothing in it may
change its shape, so it attends to the whole of the cache's buffers, and what changes from token to
token lies in tensors that it reads: the tokens, their positions, the front's column, and a mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import PreTrainedModel

from alpaca_rlhf.utils.generation.kv_cache import SlotCache

WARM_UP = 3  # passes before recording: libraries choose their kernels in the first ones


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Take down what a pass does, as PyTorch's notes on CUDA graphs say it is done.

    Returns:
        What launches it, and the tensor that holds its result then.
    """
    device = get_accelerator()
    stream = device.Stream()
    stream.wait_stream(device.current_stream())
    with device.stream(stream):
        for _ in range(WARM_UP):
            run()
    device.current_stream().wait_stream(stream)
    graph = device.create_graph()
    with device.capture_to_graph(graph):
        result = run()
    return partial(device.replay_graph, graph), result


class GraphStep:
    """The next token's logits, for every row of a cache.

    Args:
        model: one that there is no `objection` to, weights whole.
    """

    name = "the CUDA graph"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._graphs: dict[int, _Graph] = {}

    @staticmethod
    def objection(model: PreTrainedModel) -> str | None:
        """None, or what stands in the way of a graph of this model."""
        if model.device.type == "cpu":
            return "a graph is for a GPU"
        if getattr(model.config, "sliding_window", None) is not None:
            return "the model attends to a sliding window"
        return None

    def fill(self) -> "GraphStep":
        """Take the model's weights where they are now: graphs that know them elsewhere are void."""
        self._graphs = {}
        return self

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """Logits [rows, V] after tokens [rows], good until the next step."""
        graph = self._graphs.get(cache.rows)
        if graph is None or not graph.reads(cache):
            graph = self._graphs[cache.rows] = _Graph(self._model, tokens, cache)
        return graph(tokens, cache)


class _Graph:
    """One graph, for a number of rows and a cache's buffers."""

    def __init__(self, model: Any, tokens: Tensor, cache: SlotCache) -> None:
        self._keys = cache.layers[0].keys
        self._columns = torch.arange(cache.columns, device=tokens.device)
        self._tokens = tokens.unsqueeze(-1).clone()
        self._positions = cache.positions.clone()
        self._front = self._columns[:1].clone()
        # [rows, 1, 1, columns], added to the scores.
        self._mask = torch.zeros(
            len(tokens), 1, 1, cache.columns, dtype=model.dtype, device=tokens.device
        )
        self._take(tokens, cache)
        whole = cache.whole(self._front)
        self._launch, self._logits = record(lambda: model(
            input_ids=self._tokens, attention_mask=self._mask, position_ids=self._positions,
            past_key_values=whole, use_cache=True, logits_to_keep=1,
        ).logits[:, -1])

    def reads(self, cache: SlotCache) -> bool:
        """Whether these are the buffers that were recorded."""
        return bool(cache.layers) and cache.layers[0].keys is self._keys

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        self._take(tokens, cache)
        self._launch()
        return self._logits

    def _take(self, tokens: Tensor, cache: SlotCache) -> None:
        self._tokens.copy_(tokens.unsqueeze(-1))
        self._positions.copy_(cache.positions)
        self._front.fill_(cache.front)
        columns = self._columns
        seen = (columns >= cache.starts.unsqueeze(-1)) & (columns <= cache.front)
        self._mask.zero_().masked_fill_(
            ~seen[:, None, None], torch.finfo(self._mask.dtype).min
        )
