"""What ``cybermesh bench`` measures, each in a process of its own: meter a capture, by our meter or by NFStream.

Run as ``python -m cybermesh.cli.bench_worker METER CAPTURE TIMES``; prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import closing
from pathlib import Path


def meter_once(path: str, workers: int) -> tuple[int, int]:
    """Meter a capture into flows with their 79 features, as ``cybermesh flows`` does, and drop them.

    Returns:
        Packets read and flows.
    """
    from cybermesh.cli.flows import RETAINED_FLOWS
    from cybermesh.telemetry import metering
    from cybermesh.telemetry.packets import PacketBatch

    how = metering.compiled(workers)
    meter, flows = how.new_meter(retain=RETAINED_FLOWS), 0
    with closing(how.open_source(path)) as source:
        for batch in source.batches():
            assert isinstance(batch, PacketBatch)
            flows += len(meter.add(batch))
        flows += sum(len(rest) for rest in meter.drain(8_192))
        return source.counters.packets, flows


def nfstream_once(path: str) -> tuple[int, int]:
    """Do the same with NFStream: statistics on, dissection off, one meter, payload lengths."""
    library = importlib.import_module("nfstream")
    packets = flows = 0
    streamer = library.NFStreamer(source=path, statistical_analysis=True, n_dissections=0, n_meters=1, accounting_mode=3)
    for flow in streamer:
        packets += flow.bidirectional_packets
        flows += 1
    return packets, flows


def main(what: str, path: str, times: int) -> None:
    """Meter ``path`` several times and print how long each took."""
    seconds, cpu_seconds, packets, flows = [], [], 0, 0
    for _ in range(times):
        began, used = time.perf_counter(), _cpu_seconds()
        packets, flows = nfstream_once(path) if what == "nfstream" else meter_once(path, int(what))
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(_cpu_seconds() - used)
    told = {"seconds": seconds, "cpu_seconds": cpu_seconds, "packets": packets, "flows": flows, "peak_rss_mb": peak_rss_mb()}
    sys.stdout.write(json.dumps(told) + "\n")


def _cpu_seconds() -> float:
    """Return the processor time of this process and of those it has started and waited for (NFStream meters in one)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_rss_mb() -> float:
    """Return this process's peak; ``getrusage`` would count what its parent had when it started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
