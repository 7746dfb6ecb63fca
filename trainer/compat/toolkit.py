"""Recognition of SpeechBrain's recipes, datasets and lengths, without importing it."""

from __future__ import annotations

import functools
import logging
import sys
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from trainer import checks
from trainer.seed import reseed

PACKAGE = "speechbrain"

# Methods of SpeechBrain's Brain that this loop does not call.
UNCALLED = (
    "_compile", "_fit_train", "_fit_valid", "_save_intra_epoch_ckpt",
    "_should_save_intra_epoch_ckpt", "_train_loader_specifics", "_wrap_distributed",
)  # fmt: skip

logger = logging.getLogger("trainer")


def is_theirs(obj: Any) -> bool:
    """Return True for an object of a SpeechBrain class or a subclass."""
    return any(_in_package(cls.__module__) for cls in type(obj).__mro__)


def written_for_it(kind: type) -> bool:
    """Return True for a class that uses SpeechBrain's names, from its module or a closure.

    Args:
        kind: class of a Brain; its base classes count, too.
    """
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] in (__name__.partition(".")[0], "builtins"):
            continue
        seen = [*vars(sys.modules.get(cls.__module__, object)).values()]
        for value in vars(cls).values():
            for cell in (isinstance(value, FunctionType) and value.__closure__) or ():
                with suppress(ValueError):  # The cell is empty.
                    seen.append(cell.cell_contents)
        if any(_names_package(value) for value in seen):
            return True
    return False


def _names_package(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return _in_package(value.__name__) or value.__name__ == f"{__package__}.{PACKAGE}"
    return isinstance(value, (type, FunctionType)) and _in_package(value.__module__)


def _in_package(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] == PACKAGE


def warn_of_uncalled(kind: type) -> None:
    """Warn of methods of a SpeechBrain recipe's class that override parts of its loop."""
    if found := [name for name in UNCALLED if hasattr(kind, name)]:
        warn_once(
            f"{kind.__name__} has {', '.join(found)}, which overrides a part of SpeechBrain's loop "
            "and is never called here: use the hooks on_fit_start, on_stage_start and on_stage_end"
        )


def check_lengths() -> None:
    """Make SpeechBrain's masked losses refuse integer lengths, such as `Padded.lengths`.

    These losses expect lengths relative to the longest item; a length of 1 or more masks nothing.
    """
    losses: Any = sys.modules.get(f"{PACKAGE}.nnet.losses")
    masked = getattr(losses, "compute_masked_loss", None)
    if losses is None or masked is None or hasattr(masked, "__wrapped__"):
        return

    @functools.wraps(masked)
    def checked(loss_fn: Any, predictions: Any, targets: Any, length: Any = None, *more: Any,
                **options: Any) -> Any:  # fmt: skip
        if isinstance(length, Tensor) and not length.is_floating_point():
            raise ValueError(
                "a loss of SpeechBrain's got lengths that are whole numbers, and it takes shares "
                "of the longest item, between 0 and 1: give batch.sig.relative() of a Padded sig"
            )
        return masked(loss_fn, predictions, targets, length, *more, **options)

    losses.compute_masked_loss = checked


@functools.cache
def warn_once(text: str) -> None:
    """Warn, once for each text."""
    logger.warning("%s", text)


# Functions that seed; a YAML that calls one sets the seed of the run by its argument.
SEEDING = (
    "torch.manual_seed", "torch.random.manual_seed", f"{PACKAGE}.utils.seed_everything",
    f"{PACKAGE}.utils.seed.seed_everything", "lightning.seed_everything",
    "lightning.fabric.seed_everything", "lightning.pytorch.seed_everything",
    "pytorch_lightning.seed_everything", "pytorch_lightning.utilities.seed.seed_everything",
    "lightning_fabric.seed_everything",
)  # fmt: skip

SET_SEED = f"{__name__}.set_seed"

# Parts of SpeechBrain that a YAML may not name: they run commands or code, read pickles, download,
# or write files at any path.
CLOSED_PARTS = """
    core.create_experiment_directory create_experiment_directory dataio.dataio.load_pickle
    dataio.dataio.load_pkl dataio.dataio.save_md5 dataio.dataio.save_pkl dataio.dataio.write_audio
    dataio.dataio.write_stdout dataio.dataio.write_txt_file dataio.legacy inference pretrained
    utils.DER utils.data_utils.download_file utils.fetching utils.hpopt utils.importutils
    utils.kmeans utils.superpowers
"""
CLOSED = [f"{PACKAGE}.{name}" for name in CLOSED_PARTS.split()]


def set_seed(seed: int = 0, verbose: bool = True, deterministic: bool = False) -> int:
    """Seed Python, NumPy and torch, and return the seed.

    Args:
        seed: a whole number of 0 or more.
        verbose: not used.
        deterministic: let torch use only deterministic algorithms.

    Raises:
        ValueError: the seed is no whole number of 0 or more.
    """
    seed = checks.whole("set_seed", "seed", seed, 0)
    reseed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
    return seed
