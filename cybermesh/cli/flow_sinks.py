"""Where ``cybermesh flows`` writes: text, Parquet. Flows go out as they come; memory does not grow with their number."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

from cybermesh.cli import flow_rows, output
from cybermesh.telemetry.features import NAMES, UNITS
from cybermesh.telemetry.flows import FlowBatch

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 16_384  # flows; 11 MB of numbers
_SLICE = 4096  # flows formatted at once
_FRACTIONS = re.compile(r".*(_mean|_std|_var|_avg|_s|ratio)|subflow_.*")  # features that need not be whole numbers


class FlowSink(Protocol):
    """Takes flows; ``close`` ends the output so that what was written can be read."""

    def write(self, flows: FlowBatch) -> None:
        """Write flows, perhaps later."""
        ...

    def close(self) -> None:
        """Write what is kept back."""
        ...


class TextSink:
    """CSV or JSON lines."""

    def __init__(self, out: BinaryIO, header: bytes, rows: Callable[[FlowBatch], bytes]) -> None:
        self._out, self._rows = out, rows
        out.write(header)

    def write(self, flows: FlowBatch) -> None:
        """Write a line for each flow."""
        self._out.writelines(self._rows(flows.take(slice(at, at + _SLICE))) for at in range(0, len(flows), _SLICE))

    def close(self) -> None:
        """Hand everything to the system."""
        self._out.flush()


class ParquetSink:
    """Parquet with typed columns: whole numbers as such, unknown features null; row groups of ``ROW_GROUP`` flows."""

    def __init__(self, out: BinaryIO) -> None:
        """Begin a file.

        Raises:
            CommandError: pyarrow is not installed.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise output.CommandError(
                "--format parquet needs pyarrow: pip install 'cybermesh[parquet]', or use --format csv", 2
            ) from error
        self._arrow = pyarrow
        self._schema = _schema(pyarrow)
        self._writer = parquet.ParquetWriter(out, self._schema, compression="zstd")
        self._kept: list[pa.RecordBatch] = []
        self._count = 0

    def write(self, flows: FlowBatch) -> None:
        """Keep flows until they fill a row group."""
        for at in range(0, len(flows), ROW_GROUP):
            part = flows.take(slice(at, at + ROW_GROUP))
            self._kept.append(self._columns(part))
            self._count += len(part)
            if self._count >= ROW_GROUP:
                self._write_group()

    def close(self) -> None:
        """Write the last row group and the footer."""
        if self._count:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        table = self._arrow.Table.from_batches(self._kept, self._schema)
        self._writer.write_table(table, row_group_size=2 * ROW_GROUP)
        self._kept, self._count = [], 0

    def _columns(self, flows: FlowBatch) -> pa.RecordBatch:
        columns: list[object] = list(zip(*flow_rows.identifiers(flows), strict=True))
        columns[-1] = flows.single_packet
        for number, name in enumerate(NAMES):
            values = flows.features[:, number]
            if name not in _FRACTIONAL:
                values = np.rint(values).astype(np.int64)
            unknown = None if flows.known[number] else np.ones(len(flows), np.bool_)
            columns.append(self._arrow.array(values, mask=unknown))
        arrays = [
            column if isinstance(column, self._arrow.Array) else self._arrow.array(column, type=field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        return self._arrow.RecordBatch.from_arrays(arrays, schema=self._schema)


_FRACTIONAL = frozenset(name for name in NAMES if _FRACTIONS.fullmatch(name))


def _schema(arrow: ModuleType) -> pa.Schema:
    """Return names, types and units of the columns; the names are those of the CSV."""
    kinds = {
        "flow_id": arrow.string(),
        "src_ip": arrow.string(),
        "dst_ip": arrow.string(),
        "start_us": arrow.int64(),
        "end_us": arrow.int64(),
        "ip_protocol": arrow.uint8(),
        "icmp_type": arrow.uint8(),
        "icmp_code": arrow.uint8(),
        "end_reason": arrow.dictionary(arrow.int8(), arrow.string()),
        "single_packet": arrow.bool_(),
    }
    named = [arrow.field(name, kinds[name], nullable=False) for name in flow_rows.IDENTIFIERS]
    numbers = [
        arrow.field(name, arrow.float64() if name in _FRACTIONAL else arrow.int64(), metadata={"unit": UNITS[name]})
        for name in NAMES
    ]
    return arrow.schema([*named, *numbers])
