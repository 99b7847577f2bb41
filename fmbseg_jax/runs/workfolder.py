"""The work folder of an experiment: what lies where, and whose config made it.

config.json  pseudo_labels/  features/  checkpoints/  metrics/  export/  predictions/  evaluation/
figures/
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from fmbseg_jax.config import Config, flatten
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import texts
from fmbseg_jax.io.appending import open_to_append
from fmbseg_jax.io.files import (
    exists,
    is_remote,
    naming,
    remove_abandoned,
    write_atomically,
    write_json,
)
from fmbseg_jax.runs.system import fcntl

# Changing these changes speed, memory, what is watched or kept, never what is labelled or learnt.
_FREE = {
    "label.device", "label.sam.points_per_batch", "features.batch_size", "features.threads",
    "train.log_every", "train.checkpoint_every", "train.images_per_pass", "train.keep",
    "train.export", "train.validate_on", "train.validate_every", "train.validate_images",
    "data.max_megapixels",
}  # fmt: skip


def make(workdir: epath.PathLike) -> epath.Path:
    """Makes the work folder, if it is not there."""
    exists(workdir)  # a store that cannot be asked
    try:
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make the work folder {workdir}: {error.strerror or error}."
        ) from None
    return epath.Path(workdir)


def local(folder: str, flag: str = "--workdir") -> Path:
    """The path of a folder that has to be on this machine."""
    if is_remote(folder):
        raise UserError(f"This program needs a {flag} on this machine, not {folder}.")
    return Path(folder)


def claim(
    workdir: epath.PathLike, config: Config, fields: tuple[str, ...], made: str
) -> epath.Path:
    """Makes the work folder, and records there the config fields that a stage depends on.

    Where the stage has already made something with other values it is refused: its results would be
    mixed. Where it has not, there is nothing to mix.

    Args:
      fields: sections and fields, such as ("data", "label", "models.clip").
      made: folder and names of what the stage makes: "pseudo_labels/*.tfrecord-*".

    Returns:
      The folder.
    """
    workdir = make(workdir)
    try:
        with _alone(workdir):
            _record(workdir, config, fields, *made.split("/"))
    except OSError as error:
        raise UserError(
            f"Cannot write to the work folder {workdir}: {error.strerror or error}."
        ) from None
    return workdir


@contextlib.contextmanager
def _alone(workdir: epath.Path) -> Iterator[None]:
    """Waits until no other run writes to config.json, which the stages share."""
    if is_remote(workdir):
        yield
        return
    lock = workdir / ".config.lock"  # `hold` may be holding the folder itself
    with open_to_append(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another program to let go of {lock} ...", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        remove_abandoned(Path(workdir), alone=False)
        yield


def _record(
    workdir: epath.Path, config: Config, fields: tuple[str, ...], stage: str, names: str
) -> None:
    path = workdir / "config.json"
    known = recorded(
        path,
        {str: {str: object}},
        "It has the config that each stage was made with. Put back a copy of it; or delete it, "
        f"if what is in {workdir} was made with this config.",
    )
    before = known.get(stage, {}) if holds(workdir / stage, names) else {}
    ours = {
        name: value
        for name, value in flatten(config).items()
        if any(name == field or name.startswith(f"{field}.") for field in fields)
    }
    changed = [
        f"{name}: {before[name]!r} there, {value!r} now"
        for name, value in ours.items()
        if name in before and not _same(before[name], value) and name not in _FREE
    ]
    if changed:
        raise UserError(
            f"{workdir / stage} was made with another config:\n  " + "\n  ".join(changed) + "\n"
            f"Set these fields back, delete {workdir / stage} to make it anew, or give the new "
            "experiment another --workdir."
        )
    new = json.dumps(known | {stage: ours}, indent=1) + "\n"
    write_atomically(path, new.encode())


def holds(folder: epath.Path, names: str) -> bool:
    """Whether a folder holds anything whose name matches a pattern."""
    found = folder.iterdir() if folder.is_dir() else ()
    return any(fnmatch.fnmatch(path.name, names) for path in found)


@contextlib.contextmanager
def hold(folder: epath.PathLike) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made, while the block runs.

    The operating system lets go of the lock when its holder ends, however that happens. What
    killed ones have left unfinished is removed.

    Raises:
      UserError: another run holds it; the message says which.
    """
    if is_remote(folder):
        make(folder)
        print(f"{folder} cannot be locked, being remote: start no second run into it.")
        yield
        return
    folder = Path(folder)
    with _lock_file(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().decode(errors="replace").strip() or "another run"
            raise UserError(
                f"{folder} is in use by {other}. Wait for it, stop it, or give another folder."
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{folder} cannot be locked ({error.strerror}): start no second run into it.")
        file.truncate(0)
        now = datetime.datetime.now().isoformat(" ", "seconds")
        program = " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]])
        holder = f"process {os.getpid()} on {socket.gethostname()} since {now} ({program})"
        with naming(folder / ".lock"):
            file.write(holder.encode(errors="backslashreplace"))
        remove_abandoned(folder)
        try:
            yield
        finally:
            remove_abandoned(folder)


def _lock_file(folder: Path) -> BinaryIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open_to_append(folder / ".lock")
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror or error}.") from None


def recorded(path: epath.Path | Path, form: Any, advice: str) -> dict[str, Any]:
    """What `remember` has written down; nothing where it has not yet.

    Args:
      form: what that has to be, as in `texts`.
      advice: what to do where it is not; the end of the message.
    """
    return texts.read_json(path, form, advice) if path.exists() else {}


def unless_changed(path: epath.Path | Path, advice: str) -> str:
    """What to do where a file that `remember` has written is damaged.

    Args:
      advice: what to do where the facts differ.
    """
    return (
        f"It says what {path.parent} was made from. Delete this file, if nothing of that has "
        f"changed since. If something has: {advice[0].lower()}{advice[1:]}"
    )


def remember(
    path: epath.Path | Path, facts: dict[str, Any], advice: str, *, fresh: bool = False
) -> None:
    """Writes down what the contents of a folder are made from; refuses other facts later.

    Args:
      path: the JSON file, in that folder.
      facts: JSON types only.
      advice: what to do where they differ; the end of the message.
      fresh: nothing has been made yet, so what is written there does not count.
    """
    if fresh or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)
        return
    before = recorded(path, dict, unless_changed(path, advice))
    changed = [
        f"{name}: {_difference(before.get(name), value)}"
        for name, value in facts.items()
        if before.get(name) != value
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise UserError(f"{path.parent} was made from something else:\n  {listed}\n{advice}")


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [str(key) for key in before | now if before.get(key) != now.get(key)]
        return f"others for {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
    if not isinstance(before, list) or not isinstance(now, list):
        return f"{before!r} there, {now!r} now"
    before, now = ([str(entry) for entry in entries] for entries in (before, now))
    parts, there, here = [], set(before), set(now)
    for verb, entries in (
        ("added", [entry for entry in now if entry not in there]),
        ("removed", [entry for entry in before if entry not in here]),
    ):
        if entries:
            more = ", ..." if len(entries) > 5 else ""
            parts.append(f"{len(entries)} {verb} ({', '.join(entries[:5])}{more})")
    return "; ".join(parts) or "in another order"


def _same(before: Any, now: Any) -> bool:
    """Equal, or two ways to write the path of one file."""
    if before == now:
        return True
    paths = [Path(value) for value in (before, now) if isinstance(value, str) and value]
    there = len(paths) == 2 and os.path.exists(paths[0])  # False of what can be no path, too
    return there and paths[0].resolve() == paths[1].resolve()
