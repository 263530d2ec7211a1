"""Keys and values of texts that are being written, with room for the tokens that will follow.

transformers puts every new token's keys and values at the end of the old ones by copying all of
them, and texts whose prompts were read apart cannot be written together.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens for which there is room; a power of two would put all rows on the same lines of a cache.
_SPARE = 72


class _RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, size) that are the beginning of a longer buffer."""

    def __init__(self, buffers: Sequence[Tensor], used: int) -> None:
        super().__init__()
        self.lazy_initialization(*buffers)
        self._hold(buffers, used)

    def _hold(self, buffers: Sequence[Tensor], used: int) -> None:
        self._buffers = list(buffers)
        self.keys, self.values = (buffer[:, :, :used] for buffer in buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new tokens behind the others, and give all of them."""
        used = self.keys.shape[2]
        needed = used + key_states.shape[2]
        if needed > self._buffers[0].shape[2]:
            self._buffers = [_longer(old, used, needed) for old in self._buffers]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, used:needed] = new
        self._hold(self._buffers, needed)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows."""
        rows = beam_idx.to(self.keys.device)
        self._hold([buffer.index_select(0, rows) for buffer in self._buffers], self.keys.shape[2])


def _longer(old: Tensor, used: int, needed: int) -> Tensor:
    rows, heads, _, size = old.shape
    new = old.new_empty(rows, heads, needed + _SPARE, size)
    new[:, :, :used] = old[:, :, :used]
    return new


def can_be_joined(cache: Any) -> bool:
    """Whether a cache holds the keys and values of all tokens of all layers, and nothing else."""
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers
    )


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the rows of several, padded on the left with zeros; these are emptied."""
    length = max(cache.get_seq_length() for cache in caches)
    for number in range(len(caches[0].layers)):
        layers = [cache.layers[number] for cache in caches]
        buffers = []
        for parts in ([layer.keys for layer in layers], [layer.values for layer in layers]):
            _, heads, _, size = parts[0].shape
            rows = sum(len(part) for part in parts)
            buffer = parts[0].new_zeros(rows, heads, length + _SPARE, size)
            start = 0
            for part in parts:
                buffer[start : start + len(part), :, length - part.shape[2] : length] = part
                start += len(part)
            buffers.append(buffer)
        for layer in layers:
            layer.keys = layer.values = None
        caches[0].layers[number] = _RoomyLayer(buffers, length)
    return caches[0]


def with_room(cache: DynamicCache, rows: int, length: int) -> DynamicCache:
    """An empty cache of the same layers, with room for so many rows of so many tokens."""
    empty = DynamicCache()
    for layer in cache.layers:
        olds = (layer.keys, layer.values)
        news = [old.new_empty(rows, old.shape[1], length, old.shape[3]) for old in olds]
        empty.layers.append(_RoomyLayer(news, 0))
    return empty
