"""Keep the adapters that requests need in memory: load them on demand, drop the least recently used."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.injection.remove import delete_adapter
from lightning_peft.core.names import listed, nearest
from lightning_peft.formats.directory.files import CONFIG, WEIGHTS, read_header
from lightning_peft.formats.directory.replace import complete_replacement
from lightning_peft.formats.load import load_adapter
from lightning_peft.serving.errors import RequestError

__all__ = ["AdapterFolder", "AdapterPool", "Loaded"]

_LOG = logging.getLogger(__name__)

#: the version of an adapter's files: (inode, size, modification time in ns) of each
Version = tuple[tuple[int, int, int], ...]


class AdapterFolder:
    """A folder whose subfolders are adapter directories. The name of an adapter is the name of its subfolder.

    A name that a client sends is only compared with the names in the folder; no path is made from it. Subfolders that
    are symbolic links are ignored with a warning, because they may lead out of the folder.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if it does not exist, or it is an adapter directory itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_dir():
            raise FileNotFoundError(f"--adapters {path}: there is no such folder")
        if (self.path / CONFIG).is_file():
            raise FileNotFoundError(f"--adapters {path} is an adapter itself: pass the folder that contains it")
        # Names found so far: listing 1000 adapters in each request would take longer than a small model.
        self._known: set[str] = set()
        if links := sorted(p.name for p in self.path.iterdir() if p.is_symlink() and (p / CONFIG).is_file()):
            _LOG.warning(
                "symbolic links to adapters are not served: %s; copy the adapters into %s", listed(links), self.path
            )

    def names(self) -> list[str]:
        """Return the names of all adapters, sorted."""
        inside = self._subfolders()
        for folder in inside:
            complete_replacement(folder)  # if the process that replaced its files was killed
        return sorted(folder.name for folder in inside if (folder / CONFIG).is_file())

    def _subfolders(self) -> list[Path]:
        return [p for p in self.path.iterdir() if not p.name.startswith(".") and p.is_dir() and not p.is_symlink()]

    def find(self, name: str) -> tuple[Path, Version]:
        """Return the folder of an adapter and the version of its files.

        Raises:
            RequestError: 404, if there is no adapter of that name.
        """
        seen = name in self._known
        for last in (False, True):
            if name not in self._known:
                self._known = set(self.names())
            folder = self.path / name if name in self._known else None
            if folder is not None and not folder.is_symlink() and (version := _version(folder)) is not None:
                return folder, version
            if last or not (seen or any(subfolder.name == name for subfolder in self._subfolders())):
                break  # a name that never existed does not delay the requests of others
            self._known.discard(name)
            time.sleep(0.05)  # while an adapter is replaced, its configuration is absent for a moment
        near = nearest(name[:100], sorted(self._known), n=1)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise RequestError(404, f"there is no adapter {name[:100]!r}{hint}")


def _version(folder: Path) -> Version | None:
    try:
        found = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        return None
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in found)


@dataclass
class Loaded:
    """An adapter in memory.

    Attributes:
        name: its name for clients.
        internal: its name in the model. Every load gets a new name, so that a new version of the files can be loaded
            while requests still use the old one.
        version: the version of the files that it was loaded from.
        nbytes: the memory that it takes.
        users: how many running requests use it.
    """

    name: str
    internal: str
    version: Version
    nbytes: int
    users: int = 0


class AdapterPool:
    """The adapters of a folder that are loaded on a model. Not thread-safe: one thread owns the model.

    Args:
        model: the base model; adapters are loaded onto it, frozen.
        folder: the adapters.
        max_bytes: how much memory adapters may take; None sets no limit. Adapters in use are never dropped.
        before_change: called before an adapter is loaded or deleted, to exit contexts such as ``lp.rows``.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: AdapterFolder,
        max_bytes: int | None = None,
        before_change: Callable[[], object] = lambda: None,
    ) -> None:
        self.model, self.folder, self.max_bytes, self._before_change = model, folder, max_bytes, before_change
        self._current: OrderedDict[str, Loaded] = OrderedDict()  # in order of use, the least recently used first
        self._outdated: list[Loaded] = []  # adapters that are still in use, although their files have changed
        self._refused: dict[str, tuple[Version, RequestError]] = {}
        self._counter = itertools.count()

    def __len__(self) -> int:
        return len(self._current) + len(self._outdated)

    @property
    def nbytes(self) -> int:
        """The memory that all loaded adapters take."""
        return sum(loaded.nbytes for loaded in (*self._current.values(), *self._outdated))

    def acquire(self, name: str) -> Loaded:
        """Return an adapter with the current content of its files, loaded if needed; :meth:`release` it after use.

        Raises:
            RequestError: 404, if there is none of that name; 500, if its files are invalid; 503, if it does not fit
                into memory together with the adapters in use.
        """
        folder, version = self.folder.find(name)
        loaded = self._current.get(name)
        if loaded is not None and loaded.version != version:
            self._retire(self._current.pop(name))
            loaded = None
        if loaded is None:
            loaded = self._current[name] = self._load(name, folder, version)
        self._current.move_to_end(name)
        loaded.users += 1
        return loaded

    def release(self, loaded: Loaded) -> None:
        """Tell the pool that a request no longer uses an adapter."""
        loaded.users -= 1
        if loaded.users == 0 and loaded in self._outdated:
            self._outdated.remove(loaded)
            self._delete(loaded)

    def _load(self, name: str, folder: Path, version: Version) -> Loaded:
        before = self._refused.get(name)
        if before is not None and before[0] == version:
            raise before[1]
        internal = f"served-{next(self._counter)}"
        self._before_change()
        try:
            self._make_room(name, sum(tensor.numel * 4 for tensor in read_header(folder)[0].values()))
            load_adapter(self.model, folder, internal)
        except RequestError:
            raise
        except Exception as error:
            if _version(folder) != version:  # its files were being replaced while they were read
                return self._load(name, *self.folder.find(name))
            _LOG.warning("adapter %r cannot be loaded: %s", name, error)
            refusal = RequestError(500, f"adapter {name!r} cannot be loaded: the server's log says why")
            self._refused[name] = version, refusal
            raise refusal from error
        self._refused.pop(name, None)
        return Loaded(name, internal, version, _nbytes(self.model, internal))

    def _make_room(self, name: str, expected: int) -> None:
        if self.max_bytes is None:
            return
        if expected > self.max_bytes:
            raise RequestError(500, f"adapter {name!r} needs more memory than all adapters may take (--max_memory)")
        for other in [loaded for loaded in self._current.values() if not loaded.users]:
            if self.nbytes + expected <= self.max_bytes:
                return
            self._retire(self._current.pop(other.name))
        if self.nbytes + expected > self.max_bytes:
            raise RequestError(503, "all memory for adapters is taken by adapters in use: try again", retry_after=1)

    def _retire(self, loaded: Loaded) -> None:
        if loaded.users:
            self._outdated.append(loaded)
        else:
            self._delete(loaded)

    def _delete(self, loaded: Loaded) -> None:
        self._before_change()
        delete_adapter(self.model, loaded.internal)


def _nbytes(model: nn.Module, name: str) -> int:
    adapters = [stack[name] for stack in stacks(model).values() if name in stack]
    return sum(t.nbytes for a in adapters for t in itertools.chain(a.parameters(), a.buffers()))
