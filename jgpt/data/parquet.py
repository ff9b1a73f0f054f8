"""Read a column of strings of a .parquet file, in bounded memory.

In the data path: `corpus.py` makes documents of the values.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from jgpt.data.remote import TextFile
from jgpt.errors import UserError

ROWS = 256  # at a time


def text_column(file: TextFile, name: str) -> Iterator[tuple[Iterable[bytes | None], int]]:
    """Yield the values of a column, some rows at a time (None for null), with the number of rows in the whole file.

    Raises UserError without pyarrow and for a column that holds no strings, and OSError for a damaged file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{file} needs pyarrow, which is not installed. Run: pip install pyarrow") from error
    try:
        with file.open("rb") as raw, parquet.ParquetFile(raw) as table:
            schema = table.schema_arrow
            kind = schema.field(name).type if name in schema.names else None
            if kind is None or not _is_text(kind):
                have = ", ".join(f"{column.name} ({column.type})" for column in schema)
                raise UserError(
                    f"{file} has no text in the column {name!r}: it has {have}. "
                    "A column of strings is needed. Set data.text_field to its name."
                )
            for batch in table.iter_batches(batch_size=ROWS, columns=[name]):
                column = batch.column(0)
                if isinstance(column, pyarrow.DictionaryArray):
                    column = column.dictionary_decode()
                column = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                yield (value.as_py() for value in column), table.metadata.num_rows
    except pyarrow.ArrowInvalid as error:
        raise OSError(f"it is not a complete Parquet file ({error})") from error


def _is_text(kind: Any) -> bool:
    """Return whether a pyarrow type is a string, also one that is stored as a dictionary or a view."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    views = [pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []
    return kind in (pyarrow.string(), pyarrow.large_string(), *views)
