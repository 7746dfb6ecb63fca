"""The Checkpointer: saves, finds and restores the state of a run, for all its processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import distributed
from trainer.checkpoint import files, manifest, saving, state
from trainer.checkpoint.manifest import CHECKPOINT_NAME, BrokenCheckpoint, Checkpoint
from trainer.checkpoint.restoring import restore
from trainer.checkpoint.retention import Keep, ranked
from trainer.checkpoint.saving import Request
from trainer.checkpoint.together import everywhere, on_main


class Checkpointer:
    """Save, find and restore the state of a run.

    `folder` (or `checkpoints_dir`) is made at the first save. The `keep_last` newest checkpoints
    stay, and the best by each metric of `keep_best`, which maps names in `meta` to "min", "max", or
    ``{mode: min, n: 3}``. Checkpoints at an epoch's end and those within epochs are counted apart,
    so that neither push out the others.

    A recoverable is any object with `state_dict` and `load_state_dict`; one that has
    `local_state_dict` and `load_local_state_dict` as well has a part that differs per process.
    Every process calls every method that saves, restores or averages: rank 0 writes what is common,
    each rank its local part, and what fails on one of them fails on all.

    With `enabled` False every save does nothing (a debug run leaves no checkpoints).
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        keep_last: int = 1,
        keep_best: Mapping[str, Any] | None = None,
        recoverables: Mapping[str, Any] | None = None,
        *,
        checkpoints_dir: str | Path | None = None,
    ) -> None:
        if (folder is None) == (checkpoints_dir is None):
            raise ValueError("a Checkpointer needs a folder (also called checkpoints_dir), once")
        self.folder = Path(str(folder if folder is not None else checkpoints_dir))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoints cannot be saved in {self.folder}: it is not a folder")
        self.keep = Keep.parse(keep_last, keep_best)
        self.enabled = True
        self.recoverables: dict[str, Any] = {}
        self.add_recoverables(recoverables or {})
        self._held = False
        self._waiting: list[Request] = []
        self._broken: dict[str, str] = {}  # by name, with the reason: left alone from then on

    def add_recoverable(self, name: str, obj: Any) -> None:
        """Save and restore `obj` under `name` from now on."""
        if not state.NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a recoverable: it becomes a file name, made of letters, "
                "digits, - and _, and not beginning with rank-"
            )
        if not (hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")):
            raise ValueError(
                f"the recoverable {name!r} is a {type(obj).__name__}, which has no state_dict and "
                "load_state_dict"
            )
        self.recoverables[name] = obj

    def add_recoverables(self, recoverables: Mapping[str, Any]) -> None:
        """Add each of a mapping from names to objects."""
        for name, obj in recoverables.items():
            self.add_recoverable(name, obj)

    # Saving

    def save_checkpoint(
        self, meta: Mapping[str, Any] = {}, end_of_epoch: bool = True, name: str | None = None
    ) -> Checkpoint | None:
        """Save, and delete nothing; None while saves are held or disabled.

        With a `name` it stays until it is deleted by hand, or saved again under the same name.
        """
        return self._request(meta, end_of_epoch, name, None)

    def save_and_keep_only(
        self,
        meta: Mapping[str, Any] = {},
        end_of_epoch: bool = True,
        name: str | None = None,
        num_to_keep: int = 1,
        keep_recent: bool = True,
        max_keys: Iterable[str] = (),
        min_keys: Iterable[str] = (),
    ) -> Checkpoint | None:
        """Save, then delete what neither the constructor's rules nor these arguments keep.

        `num_to_keep` is how many stay of each: of the newest, and of the best by each key.
        """
        if num_to_keep < 1:
            raise ValueError(f"num_to_keep is {num_to_keep}; at least 1 checkpoint must be kept")
        last = num_to_keep if keep_recent else 0
        keep = self.keep.widened(last, min_keys, max_keys, num_to_keep)
        return self._request(meta, end_of_epoch, name, keep)

    def hold(self) -> None:
        """Let saves wait for `release`: now is no moment at which the state is whole."""
        self._held = True

    def release(self) -> list[Checkpoint]:
        """Do the saves that waited, with the state as it is now."""
        waiting, self._held, self._waiting = self._waiting, False, []
        return [self._save(request) for request in waiting]

    def drop_waiting(self) -> int:
        """Forget the saves that waited, and let later ones be done at once; how many there were."""
        waiting, self._held, self._waiting = self._waiting, False, []
        return len(waiting)

    def prepare(self) -> None:
        """Make the folder and remove what killed saves left; ValueError where it is not writable.

        A save begins with this. Called before the training, it tells of a bad folder in time.
        """
        on_main(self._prepare)

    def _prepare(self) -> None:
        files.make_folder(self.folder)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"checkpoints cannot be saved in {self.folder}: it is not writable")
        files.remove_stale(self.folder)

    def _request(
        self, meta: Mapping[str, Any], end_of_epoch: bool, name: str | None, keep: Keep | None
    ) -> Checkpoint | None:
        if name is not None and not (CHECKPOINT_NAME.fullmatch(name) and len(name) <= 80):
            raise ValueError(
                f"{name[:100]!r} cannot name a checkpoint: it becomes a folder's name, made of at "
                "most 80 letters, digits and _ . = , -"
            )
        request = Request(state.plain(meta), end_of_epoch, name, keep)
        if self._held and self.enabled:
            self._waiting.append(request)
        return self._save(request) if self.enabled and not self._held else None

    def _save(self, request: Request) -> Checkpoint:
        name, fields = on_main(self._draft, request)
        saved = saving.save(Checkpoint(self.folder / name, **fields), self.recoverables)
        on_main(self._delete_others, saved, request.keep)
        return saved

    def _draft(self, request: Request) -> tuple[str, dict[str, Any]]:
        self._prepare()
        number = 1 + max((each.number for each in self.list_checkpoints()), default=0)
        return saving.draft(self.folder, number, request)

    def _delete_others(self, saved: Checkpoint, keep: Keep | None) -> None:
        """Delete what `saved` replaces by its name, and what the rules do not keep of its kind."""
        others = [each for each in self.list_checkpoints() if each.name != saved.name]
        doomed = {each for each in others if saved.label and each.label == saved.label}
        if keep is not None:
            kind = [
                each
                for each in (saved, *others)
                if each.end_of_epoch == saved.end_of_epoch and not each.pinned
            ]
            doomed |= set(kind) - keep.chosen([each for each in kind if each not in doomed])
        for checkpoint in doomed:
            files.delete(checkpoint.path)

    # Finding

    def list_checkpoints(self) -> list[Checkpoint]:
        """All, newest first, by their manifests alone; a broken one is named in a warning."""
        found = []
        for entry in list(os.scandir(self.folder)) if self.folder.is_dir() else ():
            # A link is not followed: it would be a second name, or lead outside.
            fits = CHECKPOINT_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            if fits and entry.name not in self._broken:
                try:
                    found.append(manifest.read_manifest(Path(entry.path)))
                except BrokenCheckpoint as error:
                    if manifest.holds_files(Path(entry.path)):
                        self._set_aside(entry.name, error)
        return sorted(found, key=lambda each: (each.number, each.time), reverse=True)

    def find(
        self, min_key: str | None = None, max_key: str | None = None, n: int | None = 1
    ) -> list[Checkpoint]:
        """The `n` best by a metric, or the newest; None for all. Their files are not yet verified.

        Without a finite value of the metric a checkpoint is no candidate.
        """
        if min_key and max_key:
            raise ValueError(f"give min_key ({min_key!r}) or max_key ({max_key!r}), not both")
        found = self.list_checkpoints()
        key = min_key or max_key
        if key is None:
            return found[:n]
        best = ranked(found, key, "min" if min_key else "max")
        if found and not best:
            known = ", ".join(sorted(set().union(*(each.meta for each in found)))) or "nothing"
            warnings.warn(
                f"no checkpoint in {self.folder} has a finite {key!r}; they have {known}",
                stacklevel=2,
            )
        return best[:n]

    def find_checkpoint(
        self, max_key: str | None = None, min_key: str | None = None
    ) -> Checkpoint | None:
        """The best by a metric, or the newest; None when there is none."""
        return next(iter(self.find(min_key, max_key)), None)

    def find_checkpoints(
        self,
        max_key: str | None = None,
        min_key: str | None = None,
        max_num_checkpoints: int | None = None,
    ) -> list[Checkpoint]:
        """The best by a metric, or the newest, first; all of them unless a number is given."""
        return self.find(min_key, max_key, max_num_checkpoints)

    # Restoring

    def recover_if_possible(
        self, max_key: str | None = None, min_key: str | None = None
    ) -> Checkpoint | None:
        """Restore every recoverable from the newest checkpoint, or from the best by a metric.

        Everything is verified and read before anything is restored. A broken checkpoint is named in
        a warning and the next one is used. None when there is no checkpoint to use;
        BrokenCheckpoint when there are some and all are broken: a run must not start over unasked.
        """
        names = on_main(self._candidates, max_key, min_key)
        for name in names:
            try:
                return restore(self.folder / name, self.recoverables)
            except BrokenCheckpoint as error:
                self._set_aside(name, error)
        if names:
            raise self._all_broken()
        return None

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Restore every recoverable from this one; BrokenCheckpoint when it is not sound."""
        restore(checkpoint.path, self.recoverables)

    def read(self, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, Any]:
        """States by the names of their recoverables (default all), verified and on the CPU."""
        wanted = sorted(state.names(checkpoint)) if names is None else names
        return {name: state.load_state(checkpoint, name) for name in wanted}

    def average(
        self,
        checkpoints: Sequence[Checkpoint],
        name: str = "brain",
        path: Sequence[str] = ("modules",),
    ) -> Any:
        """The mean of what is at `path` in the state of `name`, over several checkpoints.

        Float tensors are averaged in float64 and cast back; everything else is the newest's. A
        broken checkpoint is named in a warning and left out.
        """
        newest_first = sorted(checkpoints, key=lambda each: each.number, reverse=True)
        sound = self._sound_parts(newest_first, name, path)
        _, newest = next(sound, (None, None))
        if newest is None:
            raise BrokenCheckpoint(f"no checkpoint to average in {self.folder} is sound")
        state.mean_into(newest, sound)
        return newest

    def _candidates(self, max_key: str | None, min_key: str | None) -> list[str]:
        files.remove_stale(self.folder)
        found = self.find(min_key, max_key, None)
        if self._broken and not found and not self.list_checkpoints():
            raise self._all_broken()
        return [each.name for each in found]

    def _all_broken(self) -> BrokenCheckpoint:
        return BrokenCheckpoint(
            f"every checkpoint in {self.folder} that could be used is broken: "
            f"{'; '.join(self._broken.values())}; move them away to start over"
        )

    def _sound_parts(
        self, checkpoints: Iterable[Checkpoint], name: str, path: Sequence[str]
    ) -> Iterator[tuple[Checkpoint, Any]]:
        for checkpoint in checkpoints:
            try:
                yield checkpoint, everywhere(state.load_part, checkpoint, name, path)
            except BrokenCheckpoint as error:
                self._set_aside(checkpoint.name, error)

    def _set_aside(self, name: str, error: BrokenCheckpoint) -> None:
        self._broken[name] = str(error)
        if distributed.is_main():
            warnings.warn(f"the checkpoint {name} is left out: {error}", stacklevel=3)
