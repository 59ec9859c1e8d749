"""Files to Arrow tables: CSV in its dialects, Parquet, JSON lines, and folders of them.

Knows what a file is and how its columns are called, not what they mean: `files.py` does.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from afterclick.serving.errors import AfterclickError, ConfigError, ContractError

CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter", ".item")
"""The last two are RecBole's."""

DELIMITERS = ((",", "\t", ";"), ("::",), ("|",), (" ",))
"""The first group that the first line has any of counts, and in it the one that it has most of.
Two colons are MovieLens'; blanks and bars stand inside the values of the others.
"""

HEADER_BYTES_MAX = 1 << 16
"""A longer header is cut where the delimiter is looked for."""

BLOCK_BYTES = 16 << 20
"""One JSON line must fit in a block; items carry texts up to 64 KiB."""


def parts_of(path: Path) -> list[Path]:
    """The file itself, or of a folder all files in it and below, by name: as Spark writes a table.

    Names that begin with `_` or `.` are left out, as Spark means them.

    Raises:
        ConfigError: nothing is there, or a folder holds no file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder")
    inner = ((part, part.relative_to(path).parts) for part in sorted(path.rglob("*")))
    found = [
        part
        for part, names in inner
        if part.is_file() and not any(name.startswith(("_", ".")) for name in names)
    ]
    if not found:
        raise ConfigError(f"{path}: the folder holds no file")
    return found


def kind_of(path: Path) -> str:
    """`csv`, `parquet` or `json`, by the file's name.

    Raises:
        ConfigError: by its name it is none of them.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".zst", ".lz4"):
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in CSV_SUFFIXES:
        return "csv"
    if last in (".parquet", ".pq"):
        return "parquet"
    if last in (".jsonl", ".ndjson", ".json"):
        return "json"
    raise ConfigError(
        f"{path}: expected a file named {', '.join('*' + suffix for suffix in CSV_SUFFIXES)}, "
        "*.jsonl (each also .gz) or *.parquet"
    )


def names_of(path: Path) -> list[str]:
    """Column names, read from the head of the file.

    Raises:
        ConfigError: the file's kind is not known.
        ContractError: it cannot be read.
    """
    kind = kind_of(path)
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(path).names)
        if kind == "json":
            return list(_read_json(path).schema.names)
        import pyarrow.csv as pacsv

        with pacsv.open_csv(str(path), **_csv_options(path, None)) as reader:
            return [name for name in reader.schema.names if name]
    except (pa.ArrowInvalid, OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def read_table(path: Path, columns: Sequence[str], header: Sequence[str] = ()) -> pa.Table:
    """The columns asked for; those of CSV files are text.

    Args:
        path: one file.
        columns: names that `names_of`, or `header`, has; one may be asked for twice.
        header: all columns of a CSV file that has no header.

    Raises:
        ConfigError: the file's kind is not known, or has its header itself.
        ContractError: the file cannot be read.
    """
    kind, columns = kind_of(path), list(dict.fromkeys(columns))
    if header and kind != "csv":
        raise ConfigError(f"{path}: --columns is for CSV files without a header, this is {kind}")
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path, columns=columns, partitioning=None).combine_chunks()
        if kind == "json":
            return _read_json(path).select(columns).combine_chunks()
        import pyarrow.csv as pacsv

        return pacsv.read_csv(str(path), **_csv_options(path, columns, header)).combine_chunks()
    except (pa.ArrowInvalid, OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _read_json(path: Path) -> pa.Table:
    import pyarrow.json as pajson

    return pajson.read_json(str(path), read_options=pajson.ReadOptions(block_size=BLOCK_BYTES))


def _delimiter(path: Path) -> str:
    """What stands between the columns of the first line; a comma where it has one column."""
    with pa.input_stream(str(path), compression="detect") as stream:  # noqa: TID251 - no reader
        line = stream.read(HEADER_BYTES_MAX).partition(b"\n")[0].decode(errors="replace").strip()
    for group in DELIMITERS:
        most = max(group, key=line.count)
        if most in line:
            return most
    return ","


def _csv_options(
    path: Path, columns: Sequence[str] | None, header: Sequence[str] = ()
) -> dict[str, Any]:
    """All columns as text: a type guessed from the first block fails on the second.

    Arrow's delimiter is one letter: between two colons stands an empty column more.
    """
    import pyarrow.csv as pacsv

    delimiter = _delimiter(path)
    names = list(header)
    if delimiter == "::":
        delimiter = ":"
        names = list(itertools.chain.from_iterable(("", name) for name in names))[1:]
    chosen = {} if columns is None else {"include_columns": list(columns)}
    return {
        "read_options": pacsv.ReadOptions(column_names=names),
        "parse_options": pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": pacsv.ConvertOptions(
            column_types=dict.fromkeys(columns or (), pa.string()), **chosen
        ),
    }


def _unreadable(path: Path, error: Exception) -> AfterclickError:
    kind = kind_of(path)
    expected = ", one object a line" if kind == "json" else ""
    return ContractError(f"{path}: cannot be read as {kind}{expected}: {error}", reason="file")
