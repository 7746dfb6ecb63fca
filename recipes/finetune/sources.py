"""Sources of pretrained models: folders, the hub, configurations; in safetensors alone."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import trainer
from trainer import distributed, json_files
from trainer.checks import warn_of_nonfinite
from trainer.loggers.files import replace_file
from trainer.options import nearest
from trainer.texts import first_names
from trainer.untrusted import check_source, confined

try:
    import transformers
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoTokenizer,
        Wav2Vec2FeatureExtractor,
    )
except ImportError as error:
    raise ImportError(
        "pretrained models need transformers: pip install 'cortex-speech[hf]'"
    ) from error

logger = logging.getLogger(__name__)

CONFIG = "config.json"
EXTRACTOR = "preprocessor_config.json"
EXTRACTORS = (EXTRACTOR, "processor_config.json")  # files that may have its settings
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
UNTRAINED = "masked_spec_embed"  # A model that was trained without masks lacks it.
SHOWN = 3  # names that an error lists
# Of the mapping of a model with random weights: what its feature extractor does.
OF_EXTRACTOR = ("sampling_rate", "do_normalize", "return_attention_mask")


def described(
    source: str | Mapping[str, Any],
    kept: Path | None,
    kinds: Sequence[str],
    extracting: type = Wav2Vec2FeatureExtractor,
) -> tuple[Any, Any]:
    """Return the configuration and the feature extractor of a model.

    Args:
        source: a folder, a name on the hub, or a mapping with the configuration.
        kept: folder of the run that may have both; then ``source`` is not read.
        kinds: model types that are allowed.
        extracting: class of the feature extractor.

    Raises:
        ValueError: there is no such model, it is of another kind, or it asks for code or a form of
            weights that is not of transformers itself.
    """
    in_run = kept is not None and (Path(kept) / CONFIG).is_file()
    if isinstance(source, Mapping) and not in_run:
        return _from_mapping(source, kinds)
    name = source = str(kept) if in_run else local(str(source))
    if in_run:  # It may come from elsewhere: its files are its own.
        for each in os.listdir(name):
            confined(name, os.path.join(name, each))
    if os.path.isdir(name):
        _check_has(source, name, (CONFIG,))
        _check_has(source, name, EXTRACTORS)
    values = told(source, lambda: transformers.PreTrainedConfig.get_config_dict(name)[0])
    if not isinstance(values, Mapping):
        raise ValueError(f"source {source} cannot be used: its {CONFIG} is no object of JSON")
    check_kind(source, values.get("model_type"), kinds)
    if values.get("quantization_config"):
        raise ValueError(f"source {source} is quantised; allowed: weights in 16 or 32 bits")
    config = told(source, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))
    if "/" in str(config._attn_implementation):  # transformers would download it, and run it.
        raise ValueError(
            f"source {source} asks for the code {config._attn_implementation!r} of the hub, which "
            f"is not run: remove attn_implementation from its {CONFIG}"
        )
    extractor = told(
        source, lambda: AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
    )
    if not isinstance(extractor, extracting):
        raise ValueError(
            f"source {source} has a {type(extractor).__name__}; needed is a {extracting.__name__}"
        )
    rate = extractor.sampling_rate
    if type(rate) is not int or rate < 1:
        raise ValueError(f"source {source} has the sampling_rate {rate!r}; allowed: whole Hz")
    return config, extractor


def tokenizer_of(source: str, kept: Path | None = None) -> Any:
    """Return the tokenizer of a folder or of a name on the hub, or of a folder of the run.

    Raises:
        ValueError: there is none, or it needs code of its own.
    """
    name = local(source) if kept is None else str(kept)
    if os.path.isdir(name):
        _check_has(source, name, TOKENIZERS)
    return told(source, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=False))


def _check_has(source: str, folder: str, files: Sequence[str]) -> None:
    if not any(os.path.isfile(os.path.join(folder, each)) for each in files):
        raise ValueError(
            f"source {source} cannot be used: the folder has no {' or '.join(files)}, as "
            "save_pretrained of transformers writes"
        )


def local(source: str) -> str:
    """Return the folder of a source with ``~`` for the home folder, or its name on the hub.

    Raises:
        ValueError: it looks like a path, and there is no such folder; or it is outside of a run
            folder that is being read, and named by this alone.
    """
    check_source(source)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return path
    if path.startswith((".", "/")) or path.count("/") > 1 or os.path.lexists(path):
        raise ValueError(
            f"source {source} is no folder; allowed: the folder of a model with config.json and "
            "model.safetensors, or a name on the hub such as facebook/wav2vec2-base"
        )
    return source


def check_kind(source: Any, kind: Any, kinds: Sequence[str]) -> None:
    """Raise ValueError for a model type that is not among ``kinds``."""
    if kind in kinds:
        return
    known = kind in transformers.CONFIG_MAPPING
    why = (
        "is no model of the kind that this needs"
        if known
        else f"is not known to transformers {transformers.__version__}{nearest(str(kind), kinds)}"
    )
    raise ValueError(
        f"source {_name(source)} has the model type {kind!r}, which {why}; allowed: "
        f"{', '.join(kinds)}"
    )


def _from_mapping(source: Mapping[str, Any], kinds: Sequence[str]) -> tuple[Any, Any]:
    values = dict(source)
    kind = values.pop("model_type", None)
    check_kind(source, kind, kinds)
    extracting = {name: values.pop(name) for name in OF_EXTRACTOR if name in values}
    known = AutoConfig.for_model(kind)
    if unknown := sorted(set(values) - set(known.to_dict())):
        raise ValueError(
            f"source has {unknown[0]!r}, which is no setting of {kind}"
            f"{nearest(unknown[0], known.to_dict())}"
        )
    config = told(source, lambda: AutoConfig.for_model(kind, **values))
    masked = getattr(config, "feat_extract_norm", "layer") == "layer"
    return config, Wav2Vec2FeatureExtractor(**{"return_attention_mask": masked, **extracting})


def made(config: Any, maker: Any = AutoModel) -> nn.Module:
    """Return the model of a configuration, with random weights."""
    model: nn.Module = told("of the YAML", lambda: maker.from_config(config, dtype=torch.float32))
    return model


def loaded(
    source: str | Mapping[str, Any], config: Any, maker: Any = AutoModel, optional: str = ""
) -> tuple[nn.Module, list[str]]:
    """Return a model with the weights of its source; random ones where that is a mapping.

    Args:
        source: a folder, a name on the hub, or a mapping with the configuration.
        config: the configuration.
        maker: class of transformers that makes the model.
        optional: beginning of the names of weights that the source may lack.

    Returns:
        The model, and the names of the optional weights that are new.

    Raises:
        ValueError: the source has no weights in safetensors, or not those of this model.
    """
    if isinstance(source, Mapping):
        return made(config, maker), []
    name = local(source)
    if os.path.isdir(name):
        _check_weights(source, Path(name))
    model, found = told(
        source,
        lambda: maker.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # They are named below.
        ),
    )
    if found["mismatched_keys"]:
        wrong = [f"{key} {(*a,)}, not {(*b,)}" for key, a, b in sorted(found["mismatched_keys"])]
        raise ValueError(
            f"source {source} has weights of other shapes: {first_names(wrong, SHOWN)}"
        )
    missing = [each for each in sorted(found["missing_keys"]) if not each.endswith(UNTRAINED)]
    if lacking := [each for each in missing if not optional or not each.startswith(optional)]:
        raise ValueError(
            f"source {source} lacks {len(lacking)} weights of {type(model).__name__}: "
            f"{first_names(lacking, SHOWN)}"
        )
    warn_of_nonfinite(source, model.state_dict())
    return model, missing


def _check_weights(source: str, folder: Path) -> None:
    """Raise ValueError for a folder that does not have its weights in safetensors of its own."""
    files = os.listdir(folder)
    if ADAPTER in files:
        raise ValueError(
            f"source {source} has an adapter ({ADAPTER}), whose base may be elsewhere: merge it "
            "(merge_and_unload of peft) and save the whole model"
        )
    if not any(each.endswith(".safetensors") for each in files):
        pickled = sorted(each for each in files if each.endswith((".bin", ".pt", ".pth", ".ckpt")))
        having = f"pickled weights alone ({pickled[0]})" if pickled else "no weights"
        raise ValueError(
            f"source {source} has {having}, and must have them in safetensors, as "
            "model.save_pretrained(folder) of transformers writes them"
        )
    if INDEX in files:
        index = told(source, lambda: json_files.read(folder / INDEX))
        places = index.get("weight_map") if isinstance(index, dict) else None
        names = set(map(str, places.values())) if isinstance(places, dict) else {"no file"}
        if wrong := sorted(names - {each for each in files if each.endswith(".safetensors")}):
            raise ValueError(
                f"source {source} cannot be used: its {INDEX} names {wrong[0][:80]!r}, which is no "
                "file of the folder in safetensors"
            )


class Pretrained(Protocol):
    """A module with the weights of a source, and a description in the run folder."""

    described_in_run: bool

    def keep(self) -> None:
        """Write the description."""

    def load_pretrained(self) -> None:
        """Load the weights of the source."""


def begin(module: Pretrained, run: trainer.Run) -> bool:
    """Prepare a module for a training: the weights of its source, or soon those of a checkpoint.

    Every rank calls it. The description of the module is kept in the run folder, unless the
    checkpoints have only what trains (``save: trainable``) and need the source for the rest.

    Returns:
        True if there is no checkpoint yet.
    """
    fresh = not run.checkpointer.find()
    if fresh and module.described_in_run:  # A run that was stopped before its first checkpoint.
        module.load_pretrained()
    distributed.barrier()  # Every rank has looked.
    if distributed.is_main() and getattr(run.options, "save", "all") == "all":
        module.keep()
    distributed.barrier()
    return fresh


def keep(folder: Path, *parts: Any) -> None:
    """Write the description of a model into a folder of the run: what has ``to_json_string``.

    The configuration comes last: where it is, the others are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in reversed(parts):
        config = isinstance(part, transformers.PreTrainedConfig)
        text = json.dumps(part.to_dict(), indent=2, sort_keys=True)
        replace_file(folder / (CONFIG if config else EXTRACTOR), [text.encode()], "description")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager in which transformers shows errors alone: what is missing is told here."""
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def told(source: Any, work: Callable[[], Any]) -> Any:
    """Call a function of transformers; its errors are one sentence that names the source."""
    try:
        with _quiet():
            return work()
    except Exception as error:  # Of many kinds, such as huggingface_hub's and safetensors' own.
        reason = " ".join(str(error).split())
        name = _name(source)
        raise ValueError(f"source {name} cannot be used: {reason}") from error


def _name(source: Any) -> str:
    return "of the YAML" if isinstance(source, Mapping) else str(source)
