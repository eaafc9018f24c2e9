"""A producer for campaigns, a process of its own: signs anomalies, publishes them, and writes down which ones were accepted.

Run as ``python -m tests.campaigns.producer KEY STATE BROKERS``. STATE is a directory: ``nonces`` as the ai role keeps them,
``accepted`` with the digest of each message whose publication the brokers have confirmed. The file is written after that and
never before, so that whatever is in it must end up in the ledger, however this process ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from pathlib import Path

from cybermesh import log
from cybermesh.bus.kafka import KafkaBus
from cybermesh.bus.kafka_client import KafkaOptions
from cybermesh.bus.topics import Topics
from cybermesh.envelope.nonces import NonceSource
from cybermesh.envelope.signing import AnomalyContent, Stamp, sign_anomaly
from cybermesh.keys import SigningKey
from cybermesh.keystore import FileCounters, load_key
from cybermesh.messages import Transaction, TxKind
from cybermesh.roles.clock import SystemClock
from cybermesh.wire import codec

AT_ONCE = 8
PAUSE_S = 0.25


async def produce(key: SigningKey, nonces: NonceSource, bus: KafkaBus, accepted: int, entity: str) -> None:
    """Publish one message after the other under one entity, until cancelled."""
    clock, topic = SystemClock(), Topics().ai_anomalies
    while True:
        now_ms = clock.wall_ms()
        content = AnomalyContent(str(uuid.uuid4()), "port_scan", entity, entity, 5, 0.9, "campaign", {"victim": "198.51.100.1"})
        raw = codec.encode(sign_anomaly(content, Stamp(key, now_ms // 1000, nonces.next(now_ms))))
        await bus.publish(topic, entity.encode(), raw)
        os.write(accepted, Transaction(TxKind.ANOMALY, raw).digest.hex().encode() + b"\n")
        await asyncio.sleep(PAUSE_S)


async def run(key: SigningKey, state: Path, brokers: str) -> None:
    """Publish under several entities at once until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    accepted = os.open(state / "accepted", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with FileCounters(state / "nonces") as counters:
        nonces = NonceSource(counters)
        async with KafkaBus(KafkaOptions((brokers,))) as bus, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(produce(key, nonces, bus, accepted, f"203.0.113.{number}"), name=f"entity {number}")
                for number in range(AT_ONCE)
            ]
            await stopped.wait()
            for task in tasks:
                task.cancel()
    os.close(accepted)


def main() -> None:
    """Do what the arguments say."""
    key_file, state, brokers = sys.argv[1:]
    log.configure(level="error")
    asyncio.run(run(load_key(Path(key_file)), Path(state), brokers))


if __name__ == "__main__":
    main()
