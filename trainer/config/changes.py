"""Comparison of hyperparameters with those of an earlier start of the same run.

Values are compared with references filled in, and with the defaults of run options. A changed key
is of one of three kinds:

- extending: the run goes on, to another end. These are run options of this kind,
  `EpochCounter.limit`, `EarlyStopping.patience`, keys that one of these refers to, keys that the
  YAML lists under `resumable_keys`, and whole numbers computed from extending keys.
- neutral: device, workers, logging, checkpoints, evaluation batch sizes, paths, keys that the YAML
  lists under `neutral_keys`, and texts that are computed from neutral keys.
- training: any other key.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal
from urllib.parse import quote

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from trainer.config.building import STEP, resolve
from trainer.config.hyperparameters import MAX_SUMMARY, summary
from trainer.config.reading import (
    CORE,
    PLAIN,
    REFERENCE,
    REFERENCES,
    dump,
    find,
    get,
    object_name,
    paths,
    plain,
    represent,
    tag,
)
from trainer.config.registry import Registry
from trainer.options import METADATA, RunOptions, nearest, translated
from trainer.other_options import NAMES, RENAMED

Kind = Literal["extending", "neutral", "training"]

LISTS: dict[str, Kind] = {"resumable_keys": "extending", "neutral_keys": "neutral"}
EXTENDING = re.compile(r"(EpochCounter\w*\.(limit|0)|EarlyStopping\.(patience|2))$")
RECORDING = re.compile(r"(\.Checkpointer|\.loggers\.\w+|Logger)$")  # objects that train nothing
PATH = re.compile(r"(.+_)?(folder|dir|directory|path|file|root)s?")
PLACE = re.compile(
    r"device|verbose|(\w+_)?workers|(num_)?threads|pin_memory|prefetch(_factor)?"
    r"|log_(interval|every\w*|freq\w*|level|steps)|(\w+_)?loggers?|logging(_\w+)?"
)
STAGE = r"(valid(ation)?|val|dev|eval(uation)?|test)"
BATCH = r"(batch_(size|seconds|frames|samples|length)|max_batch_\w+)"
EVALUATION = re.compile(rf"(.*[._])?({STAGE}[._](.*[._])?{BATCH}|{BATCH}_{STAGE})")
TIMESTAMP = CORE + "timestamp"
ABSENT = "absent"
MAX_SUFFIX = 80  # characters


@dataclass(frozen=True)
class Change:
    """Key whose value differs from that of an earlier start."""

    key: str
    old: Any  # "absent" if there was none
    new: Any  # "absent" if there is none
    kind: Kind
    note: str = ""  # end of the message

    def __str__(self) -> str:
        old, new = self.old, self.new
        if isinstance(old, str) != isinstance(new, str):  # 1 and the text '1'
            old, new = (repr(each) if _may_be_value(each) else each for each in (old, new))
        if isinstance(old, str) and isinstance(new, str) and max(len(old), len(new)) > MAX_SUMMARY:
            start = max(len(os.path.commonprefix([old, new])) - MAX_SUMMARY // 2, 0)
            old, new = (f"{'…' * (start > 0)}{each[start:]}" for each in (old, new))
        old, new = (summary(represent(each)) for each in (old, new))
        return f"{self.key}: {old} -> {new}{self.note}"


class Settings:
    """Hyperparameters by dotted key.

    Args:
        root: the tree of a YAML, with references.
        registry: resolves the names of `!applyref:`.

    Attributes:
        resolved: the tree with references filled in.
        written: nodes as they are written, by key.
        values: plain values and tags of objects in force, by key.
    """

    def __init__(self, root: MappingNode, registry: Registry) -> None:
        self.registry = registry
        self.written: dict[str, Node] = dict(paths(root))
        self.resolved = resolve(root, registry)
        found = {key: value for key, value in _values(self.resolved) if key}
        # Options of other toolkits are compared by their meaning here.
        meant = translated({name: found[name] for name in RENAMED if name in found})
        found = {k: v for k, v in (meant | found).items() if k.partition(".")[0] not in NAMES}
        given = {key.partition(".")[0] for key in found}
        self.values = {k: v for k, v in vars(RunOptions()).items() if k not in given} | found
        self._listed: dict[str, Kind] = {}
        for name, kind in LISTS.items():
            node = get(self.resolved, name)
            keys = plain(node) if node is not None and tag(node) in PLAIN else node
            if keys is None:
                continue
            if not isinstance(keys, list) or not all(isinstance(each, str) for each in keys):
                raise ValueError(f"{name} must be a list of keys, such as [epochs]")
            for each in keys:
                if each not in self.written and each not in METADATA:
                    hint = nearest(each, self.written)
                    raise ValueError(f"{name} names {each!r}, which is no key of the YAML{hint}")
                self._listed[each] = kind
        # Keys that an extending key refers to, if it refers to one key only.
        self._extended: set[str] = set()
        waiting = [key for key in self.written if self._kind_by_place(key) == "extending"]
        while waiting:
            names = _referred(self.written.get(waiting.pop()))
            if len(names) == 1 and (origin := self.origin(names[0])) not in self._extended:
                self._extended.add(origin)
                waiting.append(origin)

    def origin(self, key: str) -> str:
        """Return the key that a mere reference refers to; any other key itself."""
        for prefix in _prefixes(key):
            node = self.written.get(prefix)
            if node is not None and REFERENCE.fullmatch(str(node.value).strip()):
                for name in _referred(node):
                    return self.origin(name + key[len(prefix) :])
        return key

    def kind(self, key: str, old: Any = "") -> Kind:
        """Return the kind of a key, from its name, its place and its former value."""
        if (by_place := self._kind_by_place(key)) is not None:
            return by_place
        if key in self._extended:
            return "extending"
        name = next((each for each in reversed(key.split(".")) if not each.isdigit()), "")
        if PATH.fullmatch(name):  # A path instead of null may switch on a part of the training.
            texts = isinstance(old, str) and isinstance(self.values.get(key, ""), str)
            return "neutral" if texts and old != ABSENT else "training"
        return "neutral" if PLACE.fullmatch(name) or EVALUATION.fullmatch(key) else "training"

    def _kind_by_place(self, key: str) -> Kind | None:
        """Return the kind of a key in a list of keys, a run option or an object."""
        for prefix in _prefixes(key):
            if prefix in self._listed:
                return self._listed[prefix]
        head = key.partition(".")[0]
        head = RENAMED[head][0] if head in RENAMED else head
        if head in METADATA:
            return "neutral" if METADATA[head].transient else METADATA[head].kind
        if head in LISTS or head in NAMES:
            return "neutral"
        for prefix in _prefixes(key):
            name = object_name(self.written[prefix]) if prefix in self.written else ""
            if RECORDING.search(name):
                return "neutral"
            if name and EXTENDING.search(name + key[len(prefix) :]):
                return "extending"
        return None

    def suffix(self, overridden: Mapping[str, Any]) -> str:
        """Return a suffix that tells folders of runs apart, such as "-lr=0.1-width=64".

        It has the training keys of `overridden`, former values by key, or a hash if it would have
        more than `MAX_SUFFIX` characters.
        """
        text = "".join(
            f"-{quote(key)}={quote(self._text(key), safe=',+')}"
            for key, old in sorted(overridden.items())
            if key != "seed" and self.kind(key, old) == "training"
        )
        if len(text) > MAX_SUFFIX:
            return f"-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return text

    def _text(self, key: str) -> str:
        """Return the present value of a key in one line."""
        node = find(self.resolved, key)
        if isinstance(node, ScalarNode) and tag(node) in PLAIN:
            return str(represent(_scalar(node)).value)
        return " ".join(dump(node).split())

    def changes(self, before: Settings) -> list[Change]:
        """Return the changes since an earlier start, in the order of the keys.

        A key that merely refers to a changed one, or is computed from a changed training key, is
        left out.
        """
        changed: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*before.values, *self.values}):
            pair = before.values.get(key, ABSENT), self.values.get(key, ABSENT)
            if not _same(*pair):
                changed[key] = pair

        def follows(key: str) -> bool:
            """Return True for a key at or below an unchanged reference."""
            nodes = ((before.written.get(each), self.written.get(each)) for each in _prefixes(key))
            return any(
                old is not None and new is not None and tag(new) in REFERENCES
                and (tag(old), old.value) == (tag(new), new.value)
                for old, new in nodes
            )  # fmt: skip

        def kind_of(key: str) -> Kind | None:
            """Return the kind of a changed key; None if it only follows a training key."""
            old, new = changed[key]
            own = before.kind(key, ABSENT) if new == ABSENT else self.kind(key, old)
            if not follows(key):
                return own
            names = map(self.origin, _referred(self.written.get(key)))
            causes = [name for name in names if name in changed]
            kinds = {kind_of(cause) for cause in causes}
            if kinds & {"training", None}:
                return None
            if own != "training":
                return own
            if kinds == {"neutral"}:
                return "neutral" if isinstance(new, str) else "training"
            growths = {_growth(*changed[cause]) for cause in causes}
            growth = _growth(old, new)
            is_total = growth and float(old).is_integer() and float(new).is_integer()
            return "extending" if is_total and growths == {growth} else "training"

        return [
            Change(key, *pair, kind)
            for key, pair in changed.items()
            if not (follows(key) and self.origin(key) != key) and (kind := kind_of(key)) is not None
        ]


def is_place(name: str) -> bool:
    """Return True for names of keys that set the place and manner of a run, not its result."""
    return bool(PATH.fullmatch(name) or PLACE.fullmatch(name))


def _values(root: Node) -> Iterator[tuple[str, Any]]:
    """Yield plain values, empty collections, and the tags of objects by key."""
    for key, node in paths(root):
        if tag(node) not in PLAIN:
            yield key, tag(node)
        elif not node.value or isinstance(node, ScalarNode):
            yield key, _scalar(node)


def _scalar(node: Node) -> Any:
    """Return the value of a scalar, or an empty collection; a date as its text."""
    return node.value if tag(node) == TIMESTAMP else plain(node)


def _same(old: Any, new: Any) -> bool:
    """Return True for equal values; 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(old, str) and isinstance(new, str) and old.startswith("repr: "):
        return old == new or new.startswith(f"{old}, ")  # Earlier versions recorded less.
    alike = isinstance(old, bool) == isinstance(new, bool)
    return alike and (old == new or repr(old) == repr(new) == "nan")


def _may_be_value(value: Any) -> bool:
    """Return True for a text that looks like a value of another type."""
    return isinstance(value, str) and value != ABSENT and not value.startswith(("!", "repr: "))


def _growth(old: Any, new: Any) -> int:
    """Return 1 for numbers that grow, -1 for numbers that shrink, 0 for anything else."""
    if not all(isinstance(each, (int, float)) for each in (old, new)):
        return 0
    return int(new > old) - int(new < old)


def _prefixes(key: str) -> list[str]:
    """Return "a", "a.b" and "a.b.c" for "a.b.c"."""
    return list(accumulate(key.split("."), "{}.{}".format))


def _referred(node: Node | None) -> list[str]:
    """Return the dotted keys that a node refers to."""
    if node is None or tag(node) not in REFERENCES:
        return []
    return [
        ".".join(step.strip() for _, step in STEP.findall(name))
        for name in REFERENCE.findall(str(node.value))
    ]
