"""Data loading: batches, samplers, loaders, bad items, and the feed of the training loop."""

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
from trainer.data.feed import DataFeed, make_feed
from trainer.data.items import (
    BadItem,
    BadItemPolicy,
    in_epoch,
    item_generator,
    item_seed,
    report_bad,
)
from trainer.data.loader import Loader, Stream, make_loader, resumable

__all__ = [
    "BadItem",
    "BadItemPolicy",
    "Batch",
    "DataFeed",
    "BatchIndex",
    "DistributedBatchSampler",
    "Loader",
    "Padded",
    "Stream",
    "batch_ids",
    "batch_sizes",
    "collate",
    "count_examples",
    "in_epoch",
    "item_generator",
    "item_seed",
    "make_feed",
    "make_loader",
    "pad",
    "report_bad",
    "resumable",
    "to_device",
]
