"""From a dataset to batches that do not depend on who loads them.

`order` says which items make which batch of an epoch, on which rank; `items` is what a dataset may
tell its loader (bad items, randomness of their own); `workers` are the processes that load; `batch`
is what comes out; `loader` joins them: `make_loader` is what a Brain uses.
"""

from trainer.data.batch import Batch, Padded, collate, pad
from trainer.data.items import BadItem, Policy, item_generator, report_bad
from trainer.data.loader import Loader, make_loader, resumable
from trainer.data.order import Plan, Stream, parts

__all__ = [
    "BadItem",
    "Batch",
    "Loader",
    "Padded",
    "Plan",
    "Policy",
    "Stream",
    "collate",
    "item_generator",
    "make_loader",
    "pad",
    "parts",
    "report_bad",
    "resumable",
]
