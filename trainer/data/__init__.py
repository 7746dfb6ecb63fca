"""Data loading: batches, samplers, loaders, bad items, and the feed of the training loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainer.data.batch import (
    Batch,
    Padded,
    batch_ids,
    batch_sizes,
    collate,
    count_examples,
    pad,
    to_device,
)
from trainer.data.batch_sampler import BatchIndex, DistributedBatchSampler
from trainer.data.items import (
    BadItem,
    BadItemPolicy,
    in_epoch,
    item_generator,
    item_seed,
    report_bad,
)

if TYPE_CHECKING:
    from trainer.data.feed import DataFeed, make_feed
    from trainer.data.loader import Loader, Stream, make_loader, resumable

__all__ = [
    "BadItem", "BadItemPolicy", "Batch", "DataFeed", "BatchIndex", "DistributedBatchSampler",
    "Loader", "Padded", "Stream", "batch_ids", "batch_sizes", "collate", "count_examples",
    "in_epoch", "item_generator", "item_seed", "make_feed", "make_loader", "pad", "report_bad",
    "resumable", "to_device",
]  # fmt: skip

# Imported on first use: a trained model needs no loader.
_MODULES = {
    "DataFeed": "feed",
    "Loader": "loader",
    "Stream": "loader",
    "make_feed": "feed",
    "make_loader": "loader",
    "resumable": "loader",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
