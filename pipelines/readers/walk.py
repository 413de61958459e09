"""All files below a folder, in the order of their names' bytes; folders seen before are not read.

A folder's status tells whether anything was added, removed, renamed or put in another's place in it
since it was listed: its times change with each of these (POSIX), and the later one, of the last
change of status, can't be set. What happens inside a file doesn't show there: see `listing.py`.
"""

import os
import stat
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.readers.names import Names, ends_of, shown
from pipelines.readers.scan import Clock

# Files that lie beside images and are none. All others are judged by their content.
SIDECARS = (
    *(b".txt", b".csv", b".tsv", b".json", b".jsonl", b".xml", b".yaml", b".yml", b".md"),
    *(b".npy", b".npz", b".pt", b".pth", b".pkl", b".mat", b".h5", b".parquet", b".htm", b".html"),
    *(b".py", b".sh", b".log", b".ini", b".db", b".md5", b".sha256"),
)
# A folder that changed this shortly before it was listed may change again without another time:
# file systems count in ticks, of two seconds at most (FAT). It is listed again at the next start.
SETTLED_NS = 2_000_000_000
FOLDER_COLUMNS = ("inode", "modified", "changed", "begin", "end", "next", "left_out")


@dataclass(frozen=True)
class Folders:
    """The folders of a walk, in its order, a column each; the first is the root."""

    names: Names  # from the root, with a slash behind; of the root: empty
    inode: np.ndarray  # int64, as the next two; -1: list it again whatever they say
    modified: np.ndarray  # ns
    changed: np.ndarray  # ns
    begin: np.ndarray  # int64, the first row in it and below
    end: np.ndarray  # the row behind the last
    next: np.ndarray  # int64, the number of the folder behind it and all below it
    left_out: np.ndarray  # int64, hidden files and sidecars in it

    def __len__(self) -> int:
        return len(self.inode)

    def columns(self) -> dict[str, np.ndarray]:
        """All but the names."""
        numbers = (self.inode, self.modified, self.changed, self.begin, self.end, self.next)
        return dict(zip(FOLDER_COLUMNS, (*numbers, self.left_out), strict=True))

    def below(self, number: int) -> Iterator[int]:
        """The folders that lie directly in one."""
        child = number + 1
        while child < self.next[number]:
            yield child
            child = int(self.next[child])

    def is_as_it_was(self, number: int, status: os.stat_result) -> bool:
        return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns) == (
            self.inode[number],
            self.modified[number],
            self.changed[number],
        )


@dataclass(frozen=True)
class Walk:
    """What was found."""

    names: Names  # of files, from the root
    # int64 [rows], each file's row in the former walk if its folder was not listed again, or -1;
    # None: nothing has changed.
    former: np.ndarray | None
    folders: Folders
    loops: tuple[bytes, ...]  # links to a folder that they lie in


def walk(
    root: bytes,
    clock: Clock,
    seen: tuple[Names, Folders] | None = None,
    again: frozenset[bytes] = frozenset(),
) -> Walk:
    """All files under `root`, links followed.

    Args:
        root: absolute path of the folder.
        clock: tells when progress is due.
        seen: a former walk's names and folders.
        again: folders to be listed whatever their status, named as in `Folders`.

    Raises:
        ValueError: a folder can't be read; names it.
    """
    return _Walk(root, clock, seen, again).run()


def cannot_read(where: str, error: OSError) -> str:
    return f"data.root: cannot read the folder {where} as user {os.geteuid()}: {error.strerror}"


@dataclass(frozen=True)
class _Rows:
    """Rows of the former walk, as they are."""

    begin: int
    end: int


@dataclass(frozen=True)
class _Files:
    """Files of a folder that was listed now."""

    text: bytes
    lengths: np.ndarray  # int64


@dataclass(frozen=True)
class _Folder:
    """A folder to be entered."""

    name: bytes
    status: os.stat_result
    former: int | None  # its number in the former walk


_Step = _Rows | _Files | _Folder


class _Walk:
    def __init__(
        self,
        root: bytes,
        clock: Clock,
        seen: tuple[Names, Folders] | None,
        again: frozenset[bytes],
    ):
        self.root, self.clock, self.seen, self.again = root, clock, seen, again
        self.began = time.time_ns()
        self.pieces: list[_Rows | _Files] = []
        self.rows = 0
        self.loops: list[bytes] = []
        # The columns of Folders.
        self.folder_names = bytearray()
        self.lengths = array("q")
        self.inode, self.modified, self.changed = array("q"), array("q"), array("q")
        self.begin, self.end, self.next = array("q"), array("q"), array("q")
        self.left_out = array("q")

    def run(self) -> Walk:
        status = self._status(b"")
        if status is None:
            raise ValueError(f"data.root: {shown(self.root)} is no folder any more")
        first = self._enter(_Folder(b"", status, None if self.seen is None else 0))
        # What is still to be visited in the folders from the root to where the walk is, their
        # numbers, and which folders they are.
        pending, numbers, above = [first], [0], [(status.st_dev, status.st_ino)]
        while pending:
            step = next(pending[-1], None)
            if step is None:
                number = numbers.pop()
                self.end[number], self.next[number] = self.rows, len(self.inode)
                pending.pop()
                above.pop()
            elif not isinstance(step, _Folder):
                self._add(step)
            elif (step.status.st_dev, step.status.st_ino) in above:
                self.loops.append(step.name[:-1])
                self.inode[numbers[-1]] = -1  # where a link leads may change and not show
            else:
                numbers.append(len(self.inode))
                above.append((step.status.st_dev, step.status.st_ino))
                pending.append(self._enter(step))
        return self._found()

    def _add(self, piece: _Rows | _Files) -> None:
        last = self.pieces[-1] if self.pieces else None
        if isinstance(piece, _Files):
            self.rows += len(piece.lengths)
            self.pieces.append(piece)
            if self.clock.is_due():
                self.clock.say(f"data: listed {self.rows:,} files")
            return
        self.rows += piece.end - piece.begin
        if isinstance(last, _Rows) and last.end == piece.begin:
            self.pieces[-1] = _Rows(last.begin, piece.end)
        else:
            self.pieces.append(piece)

    def _enter(self, folder: _Folder) -> Iterator[_Step]:
        """Begins a folder's line in the table; gives what lies in it, in order."""
        status, former = folder.status, folder.former
        # Before it is listed: what changes meanwhile shows at the next start.
        settled = max(status.st_ctime_ns, status.st_mtime_ns) < self.began - SETTLED_NS
        self.folder_names += folder.name
        self.lengths.append(len(folder.name))
        self.inode.append(status.st_ino if settled else -1)
        self.modified.append(status.st_mtime_ns)
        self.changed.append(status.st_ctime_ns)
        self.begin.append(self.rows)
        self.end.append(self.rows)
        self.next.append(0)
        if (
            self.seen is not None
            and former is not None
            and folder.name not in self.again
            and self.seen[1].is_as_it_was(former, status)
        ):
            known = self.seen[1]
            children = [
                (child, known.names[child], self._status(known.names[child]))
                for child in known.below(former)
            ]
            # A link to a folder may lead elsewhere by now: then its status tells.
            inside = [_Folder(name, its, child) for child, name, its in children if its is not None]
            if len(inside) == len(children):
                self.left_out.append(int(known.left_out[former]))
                return self._as_it_was(former, inside)
        files, inside, left_out, is_sure = self._listed(folder)
        self.left_out.append(left_out)
        if not is_sure:
            self.inode[-1] = -1
        return _in_order(folder.name, files, inside)

    def _as_it_was(self, number: int, inside: list[_Folder]) -> Iterator[_Step]:
        assert self.seen is not None
        folders = self.seen[1]
        position = int(folders.begin[number])
        for child in inside:
            assert child.former is not None
            begin, end = int(folders.begin[child.former]), int(folders.end[child.former])
            if begin > position:
                yield _Rows(position, begin)
            yield child
            position = end
        if folders.end[number] > position:
            yield _Rows(position, int(folders.end[number]))

    def _listed(self, folder: _Folder) -> tuple[list[bytes], list[_Folder], int, bool]:
        """Files and folders in it, sorted; how many entries were left out; is its status sure.

        That is, whether it will tell of every change: not of what a link leads to that leads
        nowhere now, or was left out.
        """
        files: list[bytes] = []
        folders: list[bytes] = []
        left_out, is_sure = 0, True
        try:
            with os.scandir(os.path.join(self.root, folder.name)) as entries:
                for count, entry in enumerate(entries, 1):
                    if count % 1000 == 0 and self.clock.is_due():
                        self.clock.say(f"data: listed {self.rows + count:,} files")
                    name = entry.name
                    if name.startswith(b"."):
                        left_out += 1
                        continue
                    kind = _kind(entry)
                    if kind == stat.S_IFDIR:
                        folders.append(name + b"/")
                    # a link that leads nowhere is bad: opening it will say why
                    elif kind in (stat.S_IFREG, None) and not name.lower().endswith(SIDECARS):
                        files.append(name)
                        is_sure &= kind is not None
                    else:  # a sidecar, a socket, a pipe
                        left_out += 1
                        is_sure &= not entry.is_symlink()
        except OSError as error:
            where = shown(os.path.join(self.root, folder.name))
            raise ValueError(cannot_read(where, error)) from None
        files.sort()
        folders.sort()
        known = self._known(folder.former)
        inside = []
        for name in folders:
            whole = folder.name + name
            try:
                status = os.stat(os.path.join(self.root, whole))
            except OSError as error:
                where = shown(os.path.join(self.root, whole))
                raise ValueError(cannot_read(where, error)) from None
            inside.append(_Folder(whole, status, known.get(whole)))
        return files, inside, left_out, is_sure

    def _known(self, number: int | None) -> dict[bytes, int]:
        """The folders that lay directly in one, by name."""
        if self.seen is None or number is None:
            return {}
        folders = self.seen[1]
        return {folders.names[child]: child for child in folders.below(number)}

    def _status(self, name: bytes) -> os.stat_result | None:
        """Of a folder; None: it is none, or is not there."""
        where = os.path.join(self.root, name)
        try:
            status = os.stat(where)
        except OSError:
            return None
        return status if stat.S_ISDIR(status.st_mode) else None

    def _found(self) -> Walk:
        text = np.frombuffer(bytes(self.folder_names), np.uint8)
        folders = Folders(
            names=Names(text, ends_of(np.frombuffer(self.lengths, np.int64))),
            inode=np.frombuffer(self.inode, np.int64),
            modified=np.frombuffer(self.modified, np.int64),
            changed=np.frombuffer(self.changed, np.int64),
            begin=np.frombuffer(self.begin, np.int64),
            end=np.frombuffer(self.end, np.int64),
            next=np.frombuffer(self.next, np.int64),
            left_out=np.frombuffer(self.left_out, np.int64),
        )
        loops = tuple(self.loops)
        if self.seen is not None:
            names = self.seen[0]
            if self.rows == len(names) and self.pieces == [_Rows(0, self.rows)]:
                return Walk(names, None, folders, loops)
        return Walk(*self._joined(), folders, loops)

    def _joined(self) -> tuple[Names, np.ndarray]:
        texts: list[np.ndarray] = [np.empty(0, np.uint8)]
        lengths: list[np.ndarray] = [np.empty(0, np.int64)]
        former = np.full(self.rows, -1, np.int64)
        row = 0
        for piece in self.pieces:
            if isinstance(piece, _Rows):
                assert self.seen is not None
                names, begin, end = self.seen[0], piece.begin, piece.end
                texts.append(names.text[names.ends[begin] : names.ends[end]])
                lengths.append(np.diff(names.ends[begin : end + 1]))
                former[row : row + end - begin] = np.arange(begin, end)
            else:
                texts.append(np.frombuffer(piece.text, np.uint8))
                lengths.append(piece.lengths)
            row += len(lengths[-1])
        self.pieces.clear()
        return Names(np.concatenate(texts), ends_of(np.concatenate(lengths))), former


def _kind(entry: os.DirEntry[bytes]) -> int | None:
    """The file type of an entry, links followed; None: it leads nowhere.

    Without asking the file system again, but for links: most directories tell types.
    """
    if not entry.is_symlink():
        if entry.is_file(follow_symlinks=False):
            return stat.S_IFREG
        if entry.is_dir(follow_symlinks=False):
            return stat.S_IFDIR
    try:
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError:
        return None


def _in_order(folder: bytes, files: list[bytes], inside: Iterable[_Folder]) -> Iterator[_Step]:
    """The slash behind folders' names makes this the order of whole names: "a.b" before "a/b"."""
    position = 0
    for child in inside:
        place = bisect_left(files, child.name[len(folder) :], position)
        if place > position:
            yield _some(folder, files[position:place])
        yield child
        position = place
    if len(files) > position:
        yield _some(folder, files[position:] if position else files)


def _some(folder: bytes, files: list[bytes]) -> _Files:
    lengths = np.fromiter(map(len, files), np.int64, len(files)) + len(folder)
    return _Files(folder.join([b"", *files]), lengths)
