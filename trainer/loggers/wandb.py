"""Logger of Weights & Biases, online or offline."""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import logging
import netrc
import os
import re
import secrets
import struct
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from trainer.loggers.files import file_with, finite
from trainer.loggers.marks import Place, Places
from trainer.loggers.protocol import Logger, RunInfo, require, series
from trainer.samples import wav_bytes

MODES = ("online", "offline", "disabled")
BINS = 64  # of a histogram
REACH_SECONDS = 10.0  # for an answer of the server
# Seconds. A run waits long neither for a missing network nor for uploads at its end. A killed run
# loses at most a second of the records for W&B's own process; it sends them again.
SETTINGS = {
    "silent": True,
    "console": "off",
    "init_timeout": 60.0,
    "finish_timeout": 600.0,
    "x_transaction_log_flush_interval": 1.0,
}
# W&B's files have LevelDB's log format: blocks of records, which may be split.
BLOCK, HEADER, FULL, LAST = 32768, struct.Struct("<IHB"), 1, 4

logger = logging.getLogger("trainer")


class _Session:
    """An open run of W&B in this process; ends with the last logger that uses it.

    At the end of the process W&B ends its runs itself, as failed if the process failed.
    """

    def __init__(self, run: Any, rows: int) -> None:
        self.run = run
        self.rows = max(rows, int(run.step or 0))  # Number of records of the run in W&B.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        weakref.finalize(self, _finish, run).atexit = False


def _finish(run: Any) -> None:
    """End a run; W&B may have ended its own process before, for example if a server refused it."""
    try:
        run.finish()
    except Exception as error:
        logger.warning("W&B cannot end the run %s (%s: %s)", run.id, type(error).__name__, error)


class WandbLogger(Logger):
    """Record a run in Weights & Biases; without credentials or network, in files to upload later.

    The files are in the folder `wandb` of the run; `wandb sync` uploads them. A resumed run
    continues the same run of W&B. Charts are over `step`, the number of optimizer steps; W&B's own
    step counts records, since W&B drops a record whose step does not rise. The run stays open
    between `fit` and `evaluate`, and W&B ends it with the process.

    Args:
        project: project; None for WANDB_PROJECT, or W&B's default.
        entity: user or team; None for WANDB_ENTITY, or W&B's default.
        tags: words to find the run by.
        group: name of a group of runs.
        notes: description of the run.
        mode: "online", "offline" or "disabled"; None for WANDB_MODE, or online with credentials.
        artifacts: upload the report, hyperparams.yaml and the best checkpoint.

    Raises:
        ValueError: if the package wandb is not installed, or an argument is wrong.
    """

    _sessions: ClassVar[weakref.WeakValueDictionary[str, _Session]] = weakref.WeakValueDictionary()
    _ids: ClassVar[set[str]] = set()  # Ids of all runs of this process.

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        tags: Iterable[str] = (),
        group: str | None = None,
        notes: str | None = None,
        mode: str | None = None,
        artifacts: bool = True,
    ) -> None:
        require("wandb", "log")
        if mode not in (None, *MODES):
            raise ValueError(
                f"mode of a WandbLogger must be one of {', '.join(MODES)}; got {mode!r}"
            )
        if isinstance(tags, str):
            raise ValueError(f"tags of a WandbLogger must be a list of texts; got {tags!r}")
        self.mode, self.artifacts = mode, artifacts
        self._given = {
            "project": project, "entity": entity, "tags": [*tags] or None, "group": group,
            "notes": notes,
        }  # fmt: skip
        self._package: Any = None
        self._session: _Session
        self._recorded: dict[str, Place] | None = None

    def open(self, run: RunInfo) -> None:
        """Begin the run in W&B, or continue it."""
        self._package = importlib.import_module("wandb")
        known = run.memory.read_text().strip() if run.memory.exists() else ""
        id = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if not known:  # Rewriting a known one on a full disk could lose it.
            run.memory.write_text(f"{id}\n")
        self._recorded = None
        if id not in self._sessions:
            rows = run.taken
            try:
                if id not in self._ids:  # In this process W&B has lost nothing.
                    rows = max(rows, self._read(run.folder / "wandb", id))
            except Exception as error:  # For example, the format of another version.
                self._recorded = None
                logger.warning(
                    "W&B's files of this run cannot be read (%s: %s): records of the last second "
                    "before it was killed may be missing", type(error).__name__, error,
                )  # fmt: skip
            self._sessions[id] = self._session = _Session(self._init(run, id), rows)
            self._ids.add(id)
        self._session = self._sessions[id]
        self._session.run.config.update(dict(run.config), allow_val_change=True)

    def _read(self, folder: Path, id: str) -> int:
        """Read the records of earlier processes; return the number of rows."""
        rows, places = 0, Places()
        for path in sorted(folder.glob(f"*run-*-{id}/run-{id}.wandb")):
            self._recorded = places.last
            for row in history(path):
                rows = max(rows, int(row.get("_step", 0)) + 1)
                step = row.get("step")
                if isinstance(step, int):
                    kinds = ((name.partition("/")[0], name) for name in row)
                    for each in {name if kind in KINDS else kind for kind, name in kinds}:
                        places.add(each, step)
        return rows

    def _init(self, run: RunInfo, id: str) -> Any:
        """Start W&B, offline if it cannot be reached."""
        package, folder = self._package, run.folder / "wandb"
        known = getattr(package.Settings, "model_fields", SETTINGS)
        options = {
            **self._given, "dir": str(run.folder), "id": id, "name": run.name, "resume": "allow",
            "reinit": "create_new",
            "settings": package.Settings(**{k: v for k, v in SETTINGS.items() if k in known}),
        }  # fmt: skip
        mode = self.mode or os.environ.get("WANDB_MODE")
        later = f"the run is recorded in {folder}, which wandb sync uploads"
        if mode not in (None, "online"):
            return package.init(mode=mode, **options)
        settings = package.setup().settings
        if not _has_credentials(settings):
            logger.warning("W&B has no credentials: %s; wandb login stores them", later)
            return package.init(mode="offline", **options)
        tried = False
        try:
            _reach(settings.base_url)
            tried = True
            started = package.init(mode=mode, **options)
        except Exception as error:
            why = " ".join(str(error).split())
            logger.warning("W&B cannot be reached (%s): %s", why, later)
            if tried:  # Its process keeps the identifier of the failed start.
                package.teardown()
            return package.init(mode="offline", **options)
        if started.url:
            logger.info("W&B records the run at %s", started.url)
        return started

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Record the finite numbers, under names such as "valid/wer" and "train_step/loss"."""
        group = series(kind, values)
        self._log({f"{group}/{name}": value for name, value in finite(kind, values)}, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Record the distribution of the finite values."""
        known = values[values.isfinite()].float()
        if len(known):
            counts, edges = torch.histogram(known, BINS)
            bars = (counts.tolist(), edges.tolist())
            media = self._package.Histogram(np_histogram=bars)
            self._log({f"histograms/{name}": media}, step)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Record a picture."""
        with file_with(png, "picture.png") as path:
            self._log({f"figures/{name}": self._package.Image(path)}, step)

    def audio(self, name: str, samples: Tensor, rate: int, step: int) -> None:
        """Record a sound."""
        with file_with(wav_bytes(samples, rate), "sound.wav") as path:
            self._log({f"audio/{name}": self._package.Audio(path, sample_rate=rate)}, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text."""
        page = f"<pre>{html.escape(text)}</pre>"
        self._log({f"text/{name}": self._package.Html(page, inject=False)}, step)

    def artifact(self, name: str, path: Path) -> None:
        """Upload a file or a folder as a version of an artifact of the run."""
        if not self.artifacts:
            return
        label = re.sub(r"[^\w.-]", "_", f"{name}-{self._session.run.id}", flags=re.ASCII)[-128:]
        kind = "model" if name == "checkpoint" else "file"
        artifact = self._package.Artifact(label, type=kind)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                artifact.add_file(str(file), name=str(file.relative_to(path.parent)))
        self._session.run.log_artifact(artifact)

    def recorded(self) -> Mapping[str, tuple[int, int]] | None:
        """Return the last step of each series in W&B's files of this run."""
        return self._recorded

    def _log(self, row: dict[str, Any], step: int) -> None:
        session = self._session
        session.run.log({**row, "step": step}, step=session.rows, commit=True)
        session.rows += 1


KINDS = ("histograms", "figures", "audio", "text")  # Prefixes of series other than numbers.


def _reach(address: str) -> None:
    """Raise OSError at once for an unreachable server; W&B itself would try for a minute."""
    with contextlib.suppress(urllib.error.HTTPError):  # The server has answered.
        urllib.request.urlopen(address, timeout=REACH_SECONDS).close()


def _has_credentials(settings: Any) -> bool:
    """Return True if W&B finds a key without asking for one."""
    given = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if getattr(settings, "api_key", None) or any(os.environ.get(name) for name in given):
        return True
    host = urlsplit(settings.base_url).hostname or ""
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in map(os.path.expanduser, names):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of W&B, which may be incomplete after a kill."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    for data in log_records(path.read_bytes()):
        items = record.FromString(data).history.item
        if items:
            yield {
                item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                for item in items
            }


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the complete records of a file's content, in LevelDB's log format."""
    place, parts = 7, b""
    while place + HEADER.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:
            place += left
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size + length
        if place > len(data):
            return
        parts += data[place - length : place]
        if kind in (FULL, LAST):
            yield parts
            parts = b""
