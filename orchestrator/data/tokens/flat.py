"""Files that are one long sequence of ids: nanoGPT's and llm.c's .bin, OLMo's and NumPy's .npy.

llm.c: dev/data/data_common.py (256 int32 of header: magic, version, tokens); nanoGPT: data/openwebtext/prepare.py
(uint16 without a header); OLMo: the ids alone, in spite of the name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from orchestrator.data.plain_files import regular_size
from orchestrator.data.tokens.token_reader import TokenRow, TokenSpec, integers, map_ids, split_flat
from orchestrator.errors import DataError

_LLMC_HEADER_BYTES = 256 * 4
_LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # magic, version -> type of the ids
_NPY_MAGIC = b"\x93NUMPY"


def read_nanogpt(files: tuple[Path, ...], spec: TokenSpec) -> Iterator[TokenRow]:
    """Yield the documents of a .bin without a header, which end with `spec.eos_id`.

    Args:
        files: paths, in order.
        spec: how ids are to be read.
    """
    for file in files:
        yield from split_flat(map_ids(file, spec.raw_dtype), spec.eos_id, str(file))


def read_llmc(files: tuple[Path, ...], spec: TokenSpec) -> Iterator[TokenRow]:
    """Yield the documents of a .bin of llm.c, each of which begins with `spec.eos_id`.

    Args:
        files: paths, in order.
        spec: how ids are to be read.
    """
    for file in files:
        size = regular_size(file)
        head = file.open("rb").read(12) if size >= _LLMC_HEADER_BYTES else b""
        magic, version, count = struct.unpack("<iii", head) if len(head) == 12 else (0, 0, 0)
        if (magic, version) not in _LLMC:
            kinds = ", ".join(f"magic {known} version {number}" for known, number in _LLMC)
            raise DataError(
                f"this is no token file of llm.c that is read: {file}",
                got=f"magic {magic}, version {version}, {size:,} bytes",
                allowed=kinds,
            )
        dtype = np.dtype(_LLMC[magic, version])
        yield from split_flat(map_ids(file, dtype, _LLMC_HEADER_BYTES, count), spec.eos_id, str(file))


def read_numpy(files: tuple[Path, ...], spec: TokenSpec) -> Iterator[TokenRow]:
    """Yield the documents of a .npy, with NumPy's header or without; the rows of an array of two dimensions.

    Args:
        files: paths, in order.
        spec: how ids are to be read.
    """
    for file in files:
        with file.open("rb") as stream:
            has_header = stream.read(len(_NPY_MAGIC)) == _NPY_MAGIC
        if not has_header:
            yield from split_flat(map_ids(file, spec.raw_dtype), spec.eos_id, str(file))
            continue
        array = _with_header(file)
        if array.ndim == 2:
            for number, row in enumerate(array):
                yield TokenRow(row, f"{file}, row {number:,}", row.nbytes)
        else:
            yield from split_flat(integers(array, str(file)), spec.eos_id, str(file))


def _with_header(file: Path) -> np.ndarray:
    """Map the array; nothing of it is unpickled."""
    try:
        with file.open("rb") as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            offset = stream.tell()
    except (ValueError, OSError) as error:
        raise DataError(f"the header of the array is damaged: {file}", got=str(error)[:200]) from error
    if dtype.kind not in "iu" or len(shape) not in (1, 2) or (fortran and len(shape) > 1):
        raise DataError(
            f"the array does not hold token ids: {file}",
            got=f"{dtype} of shape {list(shape)}",
            allowed="whole numbers in one dimension, or in rows",
        )
    return map_ids(file, dtype, offset, int(np.prod(shape, dtype=object))).reshape(shape)
