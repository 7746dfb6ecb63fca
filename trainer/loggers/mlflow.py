"""Logger of MLflow, by default into a database in the run folder."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.loggers.files import file_with, finite
from trainer.loggers.protocol import Logger, RunInfo, require, series
from trainer.samples import wav_bytes

MAX_ITEMS = 100  # MLflow's limit of parameters in one call.
MAX_VALUE, MAX_NAME = 500, 250  # characters
# Seconds for an unreachable server; MLflow's own limits are minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class MlflowLogger(Logger):
    """Record a run in MLflow: numbers as metrics; pictures, sounds and texts as artifacts.

    Without a server, records go to the database `mlflow.db` in the run folder, and artifacts to
    `mlartifacts`: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows them. A resumed run
    continues the same run of MLflow. MLflow has no histograms.

    Args:
        tracking_uri: server or database; None for MLFLOW_TRACKING_URI, or the run folder.
        experiment: name of the experiment; None for MLFLOW_EXPERIMENT_NAME, or "cortex".
        tags: tags of the run, by name.
        artifacts: copy the report, hyperparams.yaml and the best checkpoint, too.

    Raises:
        ValueError: if MLflow is not installed, or an argument is wrong.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        tags: Mapping[str, Any] | None = None,
        artifacts: bool = True,
    ) -> None:
        require("mlflow", "mlflow")
        if not isinstance(tags, Mapping | None):
            raise ValueError(
                f"tags of an MlflowLogger must be a mapping from names to values; got {tags!r}"
            )
        self.tracking_uri, self.experiment = tracking_uri, experiment
        self.tags, self.artifacts = dict(tags or {}), artifacts
        self._entities: Any = None
        self._client: Any = None
        self._id = ""
        self._lacks_all = False  # True if a resumed run has begun a new run in MLflow.
        # Exception that was being handled when `fit` was called: no error of this run.
        self._handled: BaseException | None = None

    def open(self, run: RunInfo) -> None:
        """Begin the run in MLflow, or continue it."""
        self._handled = sys.exception()
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if self._client is None:
            if uri is None:
                require("sqlalchemy", "mlflow")
            for name, value in PATIENCE.items():
                os.environ.setdefault(name, value)
            # It also logs the tracebacks of raised errors.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            self._entities = importlib.import_module("mlflow.entities")
            database = run.folder.resolve() / "mlflow.db"
            if uri is None and database.exists():
                _move(database, (database.parent / "mlartifacts").as_uri())
            self._client = importlib.import_module("mlflow").MlflowClient(
                uri or f"sqlite:///{database}"
            )
        self._id = run.memory.read_text().strip() if run.memory.exists() else ""
        is_new = not (self._id and self._has(self._id))
        self._lacks_all = is_new and run.taken > 0
        if is_new:
            place = None if uri else (run.folder.resolve() / "mlartifacts").as_uri()
            tags = {name: str(value) for name, value in self.tags.items()}
            experiment = self._experiment_id(place)
            created = self._client.create_run(experiment, tags=tags, run_name=run.name)
            self._id = created.info.run_id
            run.memory.write_text(f"{self._id}\n")
        else:
            self._client.update_run(self._id, status="RUNNING", name=run.name)
        self._configure(run.config)

    def _has(self, id: str) -> bool:
        """Return True if MLflow has this run; its database may have been deleted or replaced."""
        try:
            self._client.get_run(id)
        except importlib.import_module("mlflow.exceptions").MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # For example, an unreachable server.
                raise
            return False
        return True

    def _experiment_id(self, artifacts: str | None) -> str:
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cortex"
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifacts))

    def _configure(self, config: Mapping[str, Any]) -> None:
        """Write the configuration as parameters, and changes in a resumed run as tags."""
        had = self._client.get_run(self._id).data.params
        values = {_name(key): str(value)[:MAX_VALUE] for key, value in config.items()}
        new = [self._entities.Param(key, value) for key, value in values.items() if key not in had]
        self._log("params", new)
        for key, value in values.items():
            if had.get(key, value) != value:  # MLflow's parameters cannot be changed.
                self._client.set_tag(self._id, f"resumed.{key}", value)

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Record the finite numbers, under names such as "valid/wer" and "train_step/loss"."""
        group, now = series(kind, values), int(time.time() * 1000)
        metrics = [
            self._entities.Metric(_name(f"{group}/{name}"), value, now, step)
            for name, value in finite(kind, values)
        ]
        self._log("metrics", metrics)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Record a picture, as the artifact figures/NAME/STEP.png."""
        self._file(f"figures/{name}", f"{step:08d}.png", png)

    def audio(self, name: str, samples: Tensor, rate: int, step: int) -> None:
        """Record a sound, as the artifact audio/NAME/STEP.wav."""
        self._file(f"audio/{name}", f"{step:08d}.wav", wav_bytes(samples, rate))

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text, as the artifact text/NAME/STEP.txt."""
        self._file(f"text/{name}", f"{step:08d}.txt", text.encode(errors="backslashreplace"))

    def artifact(self, name: str, path: Path) -> None:
        """Copy a file or a folder."""
        if not self.artifacts:
            return
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), _name(name))
        else:
            self._client.log_artifact(self._id, str(path))

    def recorded(self) -> Mapping[str, tuple[int, int]] | None:
        """Return an empty mapping if a resumed run has begun a new run in MLflow."""
        return {} if self._lacks_all else None

    def close(self) -> None:
        """End the run in MLflow as finished; after an exception, as failed or killed."""
        error = None if sys.exception() is self._handled else sys.exception()
        failed = "FAILED" if isinstance(error, Exception) else "KILLED"
        self._client.set_terminated(self._id, "FINISHED" if error is None else failed)

    def _log(self, kind: str, items: list[Any]) -> None:
        for start in range(0, len(items), MAX_ITEMS):
            self._client.log_batch(self._id, **{kind: items[start : start + MAX_ITEMS]})

    def _file(self, folder: str, name: str, content: bytes) -> None:
        """Record a file as an artifact."""
        with file_with(content, name) as path:
            self._client.log_artifact(self._id, path, _name(folder))


def _move(database: Path, artifacts: str) -> None:
    """Update the URI of artifacts in the database of a moved run folder."""
    with contextlib.closing(sqlite3.connect(database)) as base, base:
        places = "SELECT artifact_location FROM experiments WHERE artifact_location LIKE ?"
        for (old,) in base.execute(places, ["%/mlartifacts"]).fetchall():
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                base.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR {column} LIKE ?",
                    [artifacts, len(old) + 1, old, f"{old}/%"],
                )


def _name(text: str) -> str:
    """Return a name with `_` in place of characters that MLflow does not allow."""
    parts = (re.sub(r"[^\w. -]|^\.+$", "_", part, flags=re.ASCII) for part in text.split("/"))
    return "/".join(part for part in parts if part)[:MAX_NAME].rstrip("/")
