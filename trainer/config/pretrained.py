"""Objects of transformers and peft in a YAML: only safetensors weights, no code of a model.

`!apply:transformers.AutoModel.from_pretrained [name or folder]` loads a model from a local folder
or from the hub; `AutoTokenizer.from_pretrained` and the like do the same. A run downloads missing
files when it builds its objects, after it has opened its folder. `load_hparams` downloads nothing.
`!name:` leaves the call to the program.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from ruamel.yaml.nodes import Node
from torch.nn import Module

from trainer import checks
from trainer.config.reading import PLAIN, items, location, nodes, object_name, plain, represent, tag

PACKAGES = ("transformers.", "peft.")
# Allowed values of arguments that could bring code, or files other than safetensors.
BOUND: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "use_safetensors": (True,),
    "weights_only": (True,),
    "allow_all_kernels": (False,),
    "attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "custom_generate": (None,),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
    "gguf_file": (None,),
    "kernel_config": (None,),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core",),
    "use_kernels": (False,),
    "use_pretrained_backbone": (False,),
}  # fmt: skip


def check_arguments(node: Node) -> None:
    """Raise ValueError for an argument that brings code or weights in other files.

    Args:
        node: an object whose name is allowed. Packages other than `PACKAGES` may pass
            ``trust_remote_code`` on.
    """
    theirs = object_name(node).startswith(PACKAGES)
    for each in nodes(node):
        for key, value in items(each):
            if theirs or key == "trust_remote_code":
                _check(key.lstrip("_"), value)


def maker(node: Node, target: Any, downloads: bool) -> Callable[..., Any]:
    """Return a function that loads only safetensors and no code; for `!name:`, a partial of it.

    Args:
        node: the object to make.
        target: `from_pretrained` or `from_config` of a class.
        downloads: True if missing files may be downloaded.
    """
    kind = target.__self__
    bound = {"trust_remote_code": False} if kind.__name__.startswith("Auto") else {}
    if target.__name__ == "from_pretrained" and (
        issubclass(kind, Module) or kind.__name__.startswith(("AutoModel", "AutoBackbone"))
    ):
        bound["use_safetensors"] = True
    later = tag(node).startswith("!name:")
    if target.__name__ == "from_pretrained" and not (later or downloads):
        bound["local_files_only"] = True

    def make(*args: Any, **kwargs: Any) -> Any:
        if later:
            return functools.partial(target, *args, **kwargs | bound)
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        try:
            made = target(*args, **kwargs | bound)
        except OSError as error:
            hint = ""
            if os.path.isdir(source):
                hint = " (weights must be in safetensors)" if "use_safetensors" in bound else ""
            elif "local_files_only" in bound:
                hint = (
                    " (nothing is downloaded while a YAML is read: a run by trainer.main "
                    "downloads, and !name: leaves the call to the program)"
                )
            raise ValueError(f"{' '.join(str(error).split())}{hint}") from error
        if isinstance(made, Module):
            checks.warn_of_nonfinite(source, made.state_dict())
        return made

    return make


def _check(key: str, value: Node) -> None:
    known = BOUND.get(key)
    if known is not None and (tag(value) not in PLAIN or plain(value) not in known):
        allowed = " or ".join(str(represent(each).value) for each in known)
        raise ValueError(
            f"{key} ({location(value)}) must be {allowed}: a model that a "
            "YAML names brings no code of its own, and weights in safetensors"
        )
