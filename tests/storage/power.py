"""A disk that loses its power: what of a folder may be left, given what was written and what was synced.

``Disk`` wraps the calls of the system with which a log is written: it does them, and remembers them. ``left`` makes a
folder that may be found after the power went: what was not synced is there, partly there or lost, in the data of
files and in the names of the folder.
"""

import os
import random
from pathlib import Path

CALLS = ("open", "close", "pwritev", "pwrite", "fsync", "fdatasync", "ftruncate", "replace", "unlink")


class File:
    """The data of one file: what it was since it was last synced, the oldest first."""

    def __init__(self):
        self.versions = [b""]

    def sync(self):
        del self.versions[:-1]

    def left(self):
        """Return data that may be left: what it was at some moment, the next write perhaps half done."""
        number = random.randrange(len(self.versions))
        data, longer = self.versions[number], self.versions[min(number + 1, len(self.versions) - 1)]
        if len(longer) <= len(data):
            return data
        part = random.randrange(len(data), len(longer) + 1)
        # The size may be on the disk before all of the data is.
        return longer[:part].ljust(random.choice([part, len(longer)]), b"\0")


class Disk:
    """A folder as its disk sees it, while this is entered."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.syncs = 0
        self.at_call = lambda: None
        """What a test does after each call."""
        self._names, self._safe_names, self._pending = {}, {}, []
        self._descriptors = {}
        self._real = {name: getattr(os, name) for name in CALLS}

    def __enter__(self):
        for name in CALLS:
            setattr(os, name, self._watched(getattr(self, f"_{name}")))
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)

    def left(self, folder):
        """Make a folder that may be left. Names reach the disk in their order, as far as they do."""
        names = self._safe_names
        for changed in self._pending[: random.randrange(len(self._pending) + 1)]:
            names = _with(names, changed)
        Path(folder).mkdir()
        for name, file in names.items():
            (Path(folder) / name).write_bytes(file.left())

    def _watched(self, call):
        def watched(*arguments, **options):
            done = call(*arguments, **options)
            self.at_call()
            return done

        return watched

    def _name(self, path, directory=None):
        if directory is not None:
            return path if self._descriptors.get(directory) == "folder" and path != "." else None
        path = Path(os.fsdecode(path))
        return path.name if path.parent == self.folder else None

    def _change_names(self, changed):
        self._names = _with(self._names, changed)
        self._pending.append(changed)

    def _open(self, path, flags, *rest, **options):
        descriptor = self._real["open"](path, flags, *rest, **options)
        name = self._name(path, options.get("dir_fd"))
        self._descriptors[descriptor] = "folder" if Path(os.fsdecode(path)) == self.folder else None
        if name is not None:
            if name not in self._names:
                self._change_names({name: File()})
            elif flags & os.O_TRUNC:
                self._names[name].versions.append(b"")
            self._descriptors[descriptor] = self._names[name]
        return descriptor

    def _close(self, descriptor):
        self._descriptors.pop(descriptor, None)
        self._real["close"](descriptor)

    def _write(self, call, descriptor, *arguments):
        done = self._real[call](descriptor, *arguments)
        file = self._descriptors.get(descriptor)
        if isinstance(file, File):
            file.versions.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())
        return done

    def _pwritev(self, *arguments):
        return self._write("pwritev", *arguments)

    def _pwrite(self, *arguments):
        return self._write("pwrite", *arguments)

    def _ftruncate(self, *arguments):
        return self._write("ftruncate", *arguments)

    def _fsync(self, descriptor):
        self.syncs += 1
        file = self._descriptors.get(descriptor)
        if file == "folder":
            self._safe_names, self._pending = self._names, []
        elif file is not None:
            file.sync()

    def _fdatasync(self, descriptor):
        self._fsync(descriptor)

    def _replace(self, source, target, *, src_dir_fd=None, dst_dir_fd=None):
        self._real["replace"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        before, after = self._name(source, src_dir_fd), self._name(target, dst_dir_fd)
        self._change_names({after: self._names[before], before: None})

    def _unlink(self, path, *rest, **options):
        self._real["unlink"](path, *rest, **options)
        name = self._name(path, options.get("dir_fd"))
        if name is not None:
            self._change_names({name: None})


def _with(names, changed):
    return {name: file for name, file in {**names, **changed}.items() if file is not None}


class AtOnce:
    """A thread that has done everything before its starter goes on."""

    def __init__(self, target, args=(), daemon=None):
        self._run = lambda: target(*args)

    def is_alive(self):
        return False

    def start(self):
        self._do()

    def join(self):
        pass

    def _do(self):
        run, self._run = self._run, lambda: None
        run()


class AtLast(AtOnce):
    """A thread that does nothing before somebody waits for it."""

    def start(self):
        pass

    def join(self):
        self._do()
