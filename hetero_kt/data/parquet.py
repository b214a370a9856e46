"""Parquet files within bounds: regular files alone, as many rows and bytes as fit into memory, one kind of error."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hetero_kt import files
from hetero_kt.messages import first_line

ROWS = 2**27
"""Of the largest file that is read."""
BYTES = 2**35
"""Of the largest columns that are read into memory at once."""
_BATCH = 2**32
"""Bytes that a batch may have where all its rows repeat the column's whole content, as a dictionary lets them."""


def open_parquet(file: Path) -> pq.ParquetFile:
    """
    Raises:
        OSError: the file is missing, damaged, not a regular one, or too large.
    """
    files.open_regular(file).close()  # Arrow would wait for a FIFO
    with _one_error(file):
        found = pq.ParquetFile(file)
        rows, names = found.metadata.num_rows, found.schema_arrow.names
        if len(set(names)) < len(names):
            raise OSError(errno.EINVAL, "two of its columns have one name", str(file))
        if not 0 <= rows <= ROWS:
            raise OSError(errno.EFBIG, f"it states {rows:,} rows, more than the {ROWS:,} that are read", str(file))
        return found


def read_columns(file: Path, names: Sequence[str] | None = None, most: int = BYTES) -> pa.Table:
    """These columns of a file, or all, of at most `most` bytes.

    Raises:
        OSError: the file is missing, damaged, not a regular one, or too large.
    """
    parquet = open_parquet(file)
    batches, size = list[pa.RecordBatch](), 0
    for group in range(parquet.metadata.num_row_groups):
        for batch in iterate(file, parquet, group, names, rows=2**16):
            batches.append(batch)
            size += batch.nbytes
            if size > most:
                raise OSError(errno.EFBIG, f"it holds more than the {most:,} bytes that are read", str(file))
    with _one_error(file):
        schema = parquet.schema_arrow
        if names is not None:
            schema = pa.schema([schema.field(name) for name in names])
        return pa.Table.from_batches(batches, schema if not batches else None)


def iterate(
    file: Path, parquet: pq.ParquetFile, group: int, names: Sequence[str] | None, rows: int = 256
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, in batches of at most `rows`, fewer where they may be large.

    Raises:
        OSError: the file is damaged.
    """
    with _one_error(file):
        about = parquet.metadata.row_group(group)
        columns = [about.column(number) for number in range(about.num_columns)]
        largest = max((column.total_uncompressed_size for column in columns), default=0)
        found = parquet.iter_batches(max(1, min(rows, _BATCH // max(1, largest))), [group], columns=names)
    while True:
        with _one_error(file):
            batch = next(found, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _one_error(file: Path) -> Iterator[None]:
    """Whatever Arrow raises over a damaged file becomes an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno:
            raise
        raise OSError(errno.EIO, first_line(error), str(file)) from error
    except Exception as error:  # Arrow's own, and what its wrapping raises over damaged metadata
        raise OSError(errno.EIO, first_line(error), str(file)) from error
