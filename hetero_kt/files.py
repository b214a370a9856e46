"""Files that appear whole or not at all, also when the machine stops, and reads that neither hang nor fill the memory.

A rename alone survives a kill of the process. It does not survive a machine that stops: the new name may reach the disk
before the content does. So content and folder are synchronised around every rename that a later start relies on.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import xxhash

_BLOCK = 2**20
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)
"""What file systems answer that do not synchronise a folder."""


# --- writing ---


def write_whole(path: Path, content: str | bytes | Callable[[Path], object], part: Path | None = None) -> None:
    """Write `path` in one go: a kill, or a machine that stops, leaves the old file or the new one.

    The content is written to `part` beside it, synchronised and renamed. The mode follows the umask, also where
    the writer chooses another one. A failure removes the unfinished file.

    Args:
        content: a text (UTF-8), bytes, or a function that writes the file whose path it is given.
        part: the unfinished file, `<path>.part` unless given. Processes that write the same file at once need others.

    Raises:
        OSError: the file cannot be written.
    """
    part = part or path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # left by a kill; a link left there must not be followed
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as stream:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            if not callable(content):
                stream.write(content.encode() if isinstance(content, str) else content)
        if callable(content):
            content(part)
            part.chmod(mode)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_named(path: str | Path, content: str | bytes) -> None:
    """Write the file that a user has named: in one go, through a link to what it points to, and into a device or a pipe
    that stands there. Folders on the way to it are made.

    Raises:
        OSError: it cannot be written, or nobody reads from the pipe.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _takes_bytes(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # a pipe without a reader is not waited on
            os.set_blocking(descriptor, True)
            with open(descriptor, "wb") as stream:
                stream.write(data)
        else:
            real = Path(os.path.realpath(path))
            write_whole(real, data, real.with_name(f".{real.name}.{os.getpid()}.part"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _takes_bytes(path: Path) -> bool:
    """Whether there is a device or a pipe, or another process's file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    special = stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode)
    return special or path.parts[:2] in (("/", "dev"), ("/", "proc"))


def publish_folder(part: Path, folder: Path) -> None:
    """Rename the finished folder `part` to `folder`, in place of an older one, which is removed.

    All files in it are synchronised first and get the mode that the umask gives.

    Raises:
        OSError: it cannot be renamed.
    """
    sync_folder(part)
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(part, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have the disk hold a folder with all that is in it; its files get the mode that the umask gave the folder.

    Raises:
        OSError: a file cannot be synchronised.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(place, name)
            file.chmod(mode)
            sync(file)
        sync(Path(place))


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names, before anything that follows.

    Raises:
        OSError: the file cannot be synchronised. File systems that do not synchronise folders are passed over.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


# --- reading ---


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file (links are followed) to read its bytes. FIFOs and devices are not waited on.

    Raises:
        OSError: there is no such file, or it is none of the regular ones.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, "rb")


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: there is no such file, it is none of the regular ones, or it is larger.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {most:,} that are read", str(path))
        content = stream.read(size + 1)
    if len(content) > size:
        raise OSError(errno.EBUSY, "it grows while it is read", str(path))
    return content


def checksum(path: str | Path) -> str:
    """A regular file's XXH3, in hexadecimal. It finds what a disk or an editor has done and no forger, at several GB/s.

    Raises:
        OSError: the file cannot be read.
    """
    state = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open_regular(path) as stream:
        while count := stream.readinto(block):
            state.update(block[:count])
    return state.hexdigest()
