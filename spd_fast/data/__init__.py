"""Data: step → batch, at a position that a resumed run finds again."""

from spd_fast.data.arrays import ArrayBatches, load_tokens
from spd_fast.data.streams import PackedTokens, StreamBatches, dataset_rows

__all__ = ["ArrayBatches", "PackedTokens", "StreamBatches", "dataset_rows", "load_tokens"]
