"""A place for files that others read while we write: a folder, or an fsspec URL (s3://…, gs://…).

Every write is whole or not there: in a folder by rename, in an object store because an object
appears
when its upload ends. Knows nothing of what the files hold.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from afterclick.serving.address import without_user
from afterclick.serving.errors import UnavailableError


class Place:
    """Files under one root, by names relative to it.

    Args:
        root: a folder, which need not be there yet, or an fsspec URL.

    Raises:
        UnavailableError: from every method: the place does not answer, or the disk refuses.
    """

    def __init__(self, root: str) -> None:
        self.root = without_user(root)
        """As messages show it: a URL may hold a password."""
        self.is_remote = "://" in root
        self.folder = Path(root)
        """Of a local place."""
        self.remote: Any = None
        """fsspec's file system of a URL."""
        if self.is_remote:
            import fsspec  # only URLs need it

            self.remote, path = fsspec.core.url_to_fs(root)
            self.remote_root = PurePosixPath(path)

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none of that name."""
        try:
            if self.is_remote:
                data: bytes = self.remote.cat_file(self.path(name))
                return data
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._away(error) from error

    def replace(self, name: str, data: bytes) -> None:
        """Write a file, in the place of one of that name; nobody ever sees half of it."""
        try:
            if self.is_remote:
                self.remote.pipe_file(self.path(name), data)
                return
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(path).chmod(0o644)
            Path(path).replace(target)
            _sync(target.parent)
        except Exception as error:
            raise self._away(error) from error

    def names(self, pattern: str) -> list[str]:
        """Names that fit a glob, sorted; hidden ones, such as halves of a write, are left out."""
        try:
            if self.is_remote:
                found = self.remote.glob(self.path(pattern))
                paths = [PurePosixPath("/", path) for path in found]
                root = PurePosixPath("/", self.remote_root)
            else:
                paths = [PurePosixPath(path) for path in self.folder.glob(pattern)]
                root = PurePosixPath(self.folder)
        except Exception as error:
            raise self._away(error) from error
        found = [path.relative_to(root) for path in paths]
        return sorted(
            str(path) for path in found if not any(part.startswith(".") for part in path.parts)
        )

    def remove_folder(self, name: str, *, first: str) -> None:
        """Remove a folder; `first` is the file without which nobody takes it for whole."""
        try:
            if self.is_remote:
                self.remote.rm_file(self.path(f"{name}/{first}"))
                self.remote.rm(self.path(name), recursive=True)
                return
            hidden = self.folder / f".removed-{name}"
            (self.folder / name).rename(hidden)
            shutil.rmtree(hidden)
        except Exception as error:
            raise self._away(error) from error

    def remove_halves(self, pattern: str) -> None:
        """Drop what writers that were killed left behind; only under `lock`."""
        if self.is_remote:
            return
        for path in self.folder.glob(pattern):
            if path.name.startswith("."):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """One holder at a time on one file system; object stores have no such lock.

        Yields:
            Whether we hold it; False only without `wait`.
        """
        if self.is_remote:
            yield True
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def path(self, name: str) -> str:
        """A name as the file system of a URL wants it."""
        return str(self.remote_root / name)

    def _away(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"{self.root}: {error!r}")


def _sync(folder: Path) -> None:
    """Make a rename outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
