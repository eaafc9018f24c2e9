"""What ``cybermesh bench live`` measures: packets from one network namespace through the kernel's ring into flows in another.

Two processes, a sender and a receiver, in namespaces that are made for it and removed again; nothing of this host's network is
touched. Run as ``python -m cybermesh.cli.bench_live send INTERFACE CAPTURE RATE`` or ``… receive INTERFACE`` inside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cybermesh.cli import output

_QUIET_BATCHES = 20  # empty batches (of 0.1 s) after packets: the sender is done
_FIRST_WITHIN_S = 120.0  # the receiver may have to compile; the sender has to find its frames
_ENDS = ("near", "far")


def receive(interface: str) -> dict[str, float]:
    """Meter what comes in until nothing does for two seconds; say ``ready`` on stdout when capturing has begun."""
    from cybermesh.telemetry import metering
    from cybermesh.telemetry.packets import PacketBatch

    how = metering.compiled()
    meter, flows, quiet, largest = how.new_meter(), 0, 0, 0
    first_us = last_us = 0
    with contextlib.closing(how.open_source(f"live:{interface}")) as source:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        cpu, began = time.process_time(), time.monotonic()
        busy = cpu
        for batch in source.batches():
            assert isinstance(batch, PacketBatch)
            flows += len(meter.add(batch))
            largest = max(largest, len(batch))
            if len(batch):
                first_us, last_us, quiet = first_us or int(batch.ts_us[0]), int(batch.ts_us[-1]), 0
                busy = time.process_time()
            elif last_us:
                quiet += 1
            if quiet >= _QUIET_BATCHES or (not last_us and time.monotonic() - began > _FIRST_WITHIN_S):
                break
        flows += sum(len(rest) for rest in meter.drain(8_192))
        return {
            "received_packets": source.counters.packets,
            "kernel_drops": source.counters.lost,
            "received_packets_per_s": round(source.counters.packets / max((last_us - first_us) / 1e6, 1e-6)),
            "receiver_packets_per_cpu_s": round(source.counters.packets / max(busy - cpu, 1e-6)),
            "flows": flows,
            "largest_batch": largest,
            "receiver_peak_rss_mb": _peak_rss_mb(),
        }


def send(interface: str, capture: str, packets_per_s: float) -> dict[str, float]:
    """Send a capture's frames."""
    from cybermesh.cli import bench_sender

    sent = bench_sender.send(interface, bench_sender.load(Path(capture)), packets_per_s)
    dropped = int(Path(f"/sys/class/net/{interface}/statistics/tx_dropped").read_text())
    return {
        "sent_packets": sent.frames,
        "sent_packets_per_s": round(sent.frames / sent.seconds),
        "sender_packets_per_cpu_s": round(sent.frames / sent.cpu_seconds),
        "sender_refused": sent.refused,
        "sender_dropped": dropped,
    }


def check_allowed() -> None:
    """Check that namespaces can be made.

    Raises:
        CommandError: Not root, or no ``ip``.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise output.CommandError("bench live makes network namespaces: it needs root and the program ip (package iproute2)")


def measure(capture: Path, packets_per_s: float) -> dict[str, float]:
    """Send a capture through a virtual link and meter it at the other end.

    Raises:
        CommandError: A step failed.
    """
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(_link())
        receiver = subprocess.Popen(_inside(near, "receive", "near"), stdout=subprocess.PIPE, text=True)  # noqa: S603
        stack.callback(_end, receiver)
        assert receiver.stdout is not None
        if receiver.stdout.readline() != "ready\n":
            raise output.CommandError("capturing did not begin; the reason is above")
        sending = _inside(far, "send", "far", str(capture), str(packets_per_s))
        sender = subprocess.run(sending, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own module
        received = receiver.stdout.readline() if sender.returncode == 0 else ""
    if not received:
        raise output.CommandError(f"{'receiving' if sender.returncode == 0 else 'sending'} failed; the reason is above")
    result: dict[str, float] = json.loads(sender.stdout) | json.loads(received)
    return result


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that is still there, and close its output."""
    with process:
        process.kill()


@contextlib.contextmanager
def _link() -> Iterator[tuple[str, str]]:
    """Make two namespaces with a virtual link between them that carries nothing else; remove them whatever happens."""
    near, far = (f"cybermesh-bench-{os.getpid()}-{end}" for end in _ENDS)
    made: list[str] = []
    try:
        for name in (near, far):
            _ip("netns", "add", name)
            made.append(name)
            # No router solicitations and no duplicate address detection among our frames.
            _ip("netns", "exec", name, "sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6 || true")
        _ip("link", "add", "near", "netns", near, "type", "veth", "peer", "name", "far", "netns", far)
        _ip("-n", near, "link", "set", "near", "up")
        _ip("-n", far, "link", "set", "far", "up")
        yield near, far
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)  # noqa: S603, S607


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if done.returncode != 0:
        raise output.CommandError(f"ip {' '.join(words)}: {done.stderr.strip() or 'failed'}")


def _inside(namespace: str, *words: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, sys.executable, "-m", "cybermesh.cli.bench_live", *words]


def _peak_rss_mb() -> float:
    from cybermesh.cli.bench_worker import peak_rss_mb

    return round(peak_rss_mb())


def main(what: str, interface: str, *rest: Any) -> None:
    """Do one half of the measurement and print what came of it as a line of JSON."""
    told = receive(interface) if what == "receive" else send(interface, rest[0], float(rest[1]))
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
