"""What a YAML may name: an allow-list, asked before an import and again of what was found.

A YAML is data that people pass around, and `!apply:os.system` would run it as a program. So a name
resolves only when

1. it is written in plain ASCII and no part of it begins with an underscore,
2. every module on its way belongs to an allowed package (asked before it is imported) and goes by
   its own name, so that `torch.utils.data.os.system` ends at `os`,
3. what is found was itself defined in an allowed package, so that a re-export of something else
   does not pass, and is not among what is refused there.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from trainer.options import nearest

BUILTINS = """
    abs bool dict float frozenset int len list max min range round set slice sorted str sum tuple
"""

ALLOWED = """
    collections.Counter collections.OrderedDict collections.defaultdict math
    torch.device torch.dtype torch.Size torch.Tensor torch.Generator
    torch.distributions torch.fft torch.linalg torch.nn torch.optim torch.signal torch.special
    torch.utils.data
    torchaudio.compliance torchaudio.functional torchaudio.models torchaudio.transforms torchmetrics
    lhotse.augmentation lhotse.dataset.cut_transforms lhotse.dataset.sampling
    lhotse.dataset.signal_transforms lhotse.features.fbank lhotse.features.kaldi
    lhotse.features.mfcc lhotse.features.spectrogram
    recipes
    trainer.metrics trainer.optim.ema trainer.checkpoint.checkpointer trainer.clipping
    trainer.data trainer.epochs
    trainer.schedules
"""

# The longest prefix decides, so these hold inside what is allowed above, and inside the whole of a
# package that a user allows: what runs code or commands, reads pickles, writes files or downloads.
REFUSED = """
    torch.classes torch.compile torch.cuda.jiterator torch.distributed torch.export torch.fork
    torch.from_file torch.fx torch.hub torch.import_ir_module torch.import_ir_module_from_buffer
    torch.jit torch.library torch.load torch.multiprocessing torch.onnx torch.ops torch.package
    torch.parse_ir torch.save torch.serialization torch.storage torch.testing
    torch.utils.benchmark torch.utils.bottleneck torch.utils.bundled_inputs
    torch.utils.collect_env torch.utils.cpp_extension torch.utils.data.backward_compatibility
    torch.utils.data.datapipes torch.utils.data.graph torch.utils.data.graph_settings
    torch.utils.file_baton torch.utils.hipify torch.utils.mobile_optimizer torch.utils.model_dump
    torch.utils.model_zoo torch.utils.show_pickle torch.utils.tensorboard torch.wait
    torchaudio.datasets torchaudio.io torchaudio.load torchaudio.save torchaudio.utils
    torchaudio.models.decoder.download_pretrained_files
    torchaudio.models.decoder._ctc_decoder.download_pretrained_files
    lhotse.audio.backend lhotse.bin lhotse.caching lhotse.features.io lhotse.hf lhotse.kaldi
    lhotse.lazy lhotse.recipes lhotse.serialization lhotse.shar lhotse.tools lhotse.utils
    lhotse.workflows lhotse.dataset.signal_transforms.GlobalMVN.from_file lhotse.dataset.webdataset
    recipes.common.scoreboard recipes.common.streaming.convert_file
    recipes.common.streaming.enhance_file recipes.common.streaming.enhance_files
    recipes.common.speech_cache recipes.common.synthesiser recipes.tacotron2.phonemiser
    recipes.common.enhancing recipes.common.run_folder recipes.common.mel.write_mel
    recipes.tacotron2.pictures.write_picture recipes.tacotron2.sound.write_sound
    recipes.clipping_study.page recipes.clipping_study.study recipes.clipping_study.train
    trainer.config trainer.config.hyperparameters trainer.cli trainer.main
"""
# The parts of each recipe that are programs, or leave files behind.
REFUSED += "".join(
    f" recipes.{task}.{part}"
    for task in ("asr", "hifigan", "metricgan", "segan", "separation", "tacotron2")
    for part in ("infer", "scoring", "train")
)

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")
PLAIN = (bool, int, float, str, list, tuple, dict, set, frozenset, type(None))
_ABSENT = object()


class Guard:
    """Turns the names in a YAML into what they name, where that is allowed.

    `allow` are packages, modules or single objects by dotted name, in addition to `ALLOWED`.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self.rules = dict.fromkeys(ALLOWED.split(), True)
        self.rules |= dict.fromkeys(REFUSED.split(), False)
        for name in [allow] if isinstance(allow, str) else allow:
            if not NAME.fullmatch(name):
                raise ValueError(f"allow must hold names such as 'mypackage', not {name!r}")
            self.rules[name] = True

    def locate(self, name: str) -> Any:
        """The object with this dotted name; ValueError where it is not allowed or not there."""
        self._check_spelling(name)
        head, _, rest = name.partition(".")
        bare = rest if head == "builtins" else name
        if bare in BUILTINS.split():
            return getattr(builtins, bare)
        if not self._related(head):
            raise self._refusal(name)
        found: Any = None
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            found = self._step(found, parts[:count], name)
        self._check_found(found, name)
        return found

    def check_attribute(self, value: Any, name: str) -> None:
        """Refuse an attribute of a built object that is a module, or code from elsewhere."""
        code = inspect.isroutine(value) or inspect.isclass(value)
        if inspect.ismodule(value) or (code and not self._defined_inside(value)):
            raise self._refusal(name, f"it comes from {_origin(value)}")

    def _decision(self, name: str) -> bool | None:
        """What the longest rule that covers `name` says; None where none does."""
        while name:
            if name in self.rules:
                return self.rules[name]
            name = name.rpartition(".")[0]
        return None

    def _related(self, module: str) -> bool:
        """Whether a module lies in something allowed, or on the way to it."""
        ahead = (rule.startswith(f"{module}.") for rule, allowed in self.rules.items() if allowed)
        return self._decision(module) is True or any(ahead)

    def _check_spelling(self, name: str) -> None:
        strange = next((letter for letter in name if not letter.isascii()), None)
        if strange:
            letter = unicodedata.name(strange, "a strange character")
            raise ValueError(f"{name!r} has the letter {strange!r} ({letter}), which is not ASCII")
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a public name: parts joined by dots, none beginning with '_'"
            )

    def _step(self, owner: Any, parts: list[str], name: str) -> Any:
        """The next part of a dotted name: a submodule where there is one, else an attribute."""
        path, part = ".".join(parts), parts[-1]
        known = self._related(path)
        if known and (owner is None or inspect.ismodule(owner)) and _is_module(path):
            _import(path, name)
        found = sys.modules.get(path) if owner is None else getattr(owner, part, _ABSENT)
        if found is None and owner is None:
            raise ValueError(f"{name} is not there: no module is called {path!r}")
        if found is _ABSENT:
            place = ".".join(parts[:-1])
            if not known and self._decision(place) is not True and _is_module(path):
                raise self._refusal(name)
            raise ValueError(
                f"{name} is not there: {place} has no {part!r}{nearest(part, _public(owner))}"
            )
        if inspect.ismodule(found) and not (found.__name__ == path and known):
            why = f"{path} is the module {found.__name__}" if found.__name__ != path else ""
            raise self._refusal(name, why)
        return found

    def _check_found(self, found: Any, name: str) -> None:
        """The second half of the guard: what was found, whatever it was called."""
        decision = self._decision(name)
        if name not in self.rules and not inspect.ismodule(found) and not isinstance(found, PLAIN):
            allowed = decision is not False and self._defined_inside(found)
        else:
            allowed = decision is True
        if not allowed:
            raise self._refusal(name, f"it is defined in {_origin(found)}")

    def _defined_inside(self, found: Any) -> bool:
        """Whether the code or the class of an object is from somewhere allowed."""
        origin = _origin(found)
        names = {
            getattr(found, key, type(found).__qualname__) for key in ("__qualname__", "__name__")
        }
        decisions = {self._decision(f"{origin}.{label}") for label in names}
        if decisions == {None} and inspect.isbuiltin(found):
            # torch's operations come from its compiled part: zeros, relu, conv1d …
            return bool(re.fullmatch(r"torch|torch\._C\._(nn|fft|linalg|special)", origin))
        return decisions == {True}

    def _refusal(self, name: str, why: str = "") -> ValueError:
        head = name.partition(".")[0]
        heads = sorted({rule.partition(".")[0] for rule, good in self.rules.items() if good})
        hint = "" if head in heads else nearest(head, heads)
        return ValueError(
            f"{name} is not allowed{f' ({why})' if why else ''}; a YAML may name what builds "
            f"things in {', '.join(heads)} and plain builtins such as dict; a package of your own "
            f"is allowed by trainer.main(train, allow=['package']){hint}"
        )


def _origin(found: Any) -> str:
    """The module in which an object, or else its class, is defined."""
    if inspect.ismodule(found):
        return found.__name__
    origin = getattr(found, "__module__", None)
    return str(origin or type(found).__module__)


def _public(owner: Any) -> list[str]:
    """The names that `owner` offers, submodules not yet imported among them."""
    below = [each.name for each in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    return [each for each in [*dir(owner), *below] if not each.startswith("_")]


def _is_module(path: str) -> bool:
    """Whether there is a module of this name; its parents are imported already."""
    try:
        return importlib.util.find_spec(path) is not None
    except (ImportError, ValueError):  # The parent is no package, or has no spec.
        return False


def _import(path: str, name: str) -> None:
    try:
        importlib.import_module(path)
    except Exception as error:
        extra = (
            " (the recipes' packages are installed by pip install 'cortex-speech[recipes]')"
            if isinstance(error, ModuleNotFoundError)
            else ""
        )
        raise ValueError(
            f"{name} needs the module {path}, whose import failed: "
            f"{type(error).__name__}: {error}{extra}"
        ) from error
