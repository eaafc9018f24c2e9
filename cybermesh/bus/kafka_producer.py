"""Publishing to Kafka: one idempotent producer for the bus, replaced when it cannot go on.

Rules:

- acks=all and idempotence: a record is accepted when all replicas in sync have it, and the brokers sort out the producer's own
  repetitions. ``publish`` waits for as long as the brokers are away; it raises only what waiting does not mend;
- a batch that failed leaves a hole in the producer's sequence numbers, which the brokers refuse to jump over for ever: the
  producer is then replaced, and whoever had a record in it publishes it again with the new one. That may write a record twice,
  never lose one;
- nothing is written behind the caller's back: at most one record per waiting caller is in memory.
"""

from __future__ import annotations

import asyncio

from aiokafka import AIOKafkaProducer, errors

from cybermesh.bus import BusError, Published
from cybermesh.bus.kafka_client import LEAVE_S, RECORD_MAX, KafkaOptions, Troubles, explain, is_final, patiently
from cybermesh.bus.kafka_topics import KafkaTopics

BATCH_BYTES = 256 * 1024
STALL_S = 5.0
_PART = "publish"


class KafkaPublisher:
    """See the module; ``close`` ends it."""

    def __init__(self, options: KafkaOptions, topics: KafkaTopics, troubles: Troubles) -> None:
        self._options = options
        self._topics = topics
        self._troubles = troubles
        self._producer: AIOKafkaProducer | None = None
        self._lock = asyncio.Lock()
        self._is_closed = False
        self._waiting: set[asyncio.Timeout] = set()  # one for each caller: how ``close`` ends its wait

    async def publish(self, topic: str, key: bytes, value: bytes) -> Published:
        """Append a record; see ``bus.Bus.publish``."""
        self._check_open(topic)
        try:
            async with asyncio.timeout(None) as patience:
                self._waiting.add(patience)
                try:
                    return await self._publish(topic, key, value)
                finally:
                    self._waiting.discard(patience)
        except TimeoutError:
            raise _closed(topic) from None

    async def _publish(self, topic: str, key: bytes, value: bytes) -> Published:
        while True:
            await self._topics.ensure([topic])
            producer = await self._connected(topic)
            try:
                written = await self._send(producer, topic, key, value)
            except errors.KafkaTimeoutError as error:
                # No room in front of an absent broker, or nothing known of the topic; nothing was sent.
                self._troubles.note(_PART, f"{topic}: {explain(error)}")
            except (errors.KafkaError, OSError) as error:
                self._troubles.note(_PART, f"{topic}: {explain(error)}")
                if isinstance(error, errors.UnknownTopicOrPartitionError):
                    self._topics.forget(topic)
                await self._replace(producer)
                if is_final(error):
                    self._troubles.clear(_PART)
                    raise BusError(f"{topic}: {explain(error)}") from error
            else:
                self._troubles.clear(_PART)
                return written

    async def _send(self, producer: AIOKafkaProducer, topic: str, key: bytes, value: bytes) -> Published:
        accepted = await producer.send(topic, value=value, key=key)
        try:
            waited_s = 0.0
            while not (await asyncio.wait([accepted], timeout=STALL_S))[0]:
                waited_s += STALL_S
                self._troubles.note(_PART, f"{topic}: no broker has accepted a record for {waited_s:.0f} s")
            record = accepted.result()
        finally:
            accepted.cancel()
        return Published(record.topic, record.partition, record.offset)

    async def _connected(self, topic: str) -> AIOKafkaProducer:
        async with self._lock:
            self._check_open(topic)
            if self._producer is None:
                self._producer = await patiently(self._start, self._options, self._troubles, _PART)
            return self._producer

    async def _start(self) -> AIOKafkaProducer:
        compression = self._options.compression
        producer = AIOKafkaProducer(
            **self._options.connection(),
            acks="all",
            enable_idempotence=self._options.is_idempotent,
            compression_type=None if compression == "none" else compression,
            max_request_size=RECORD_MAX,
            max_batch_size=BATCH_BYTES,
            # Records that arrive while a request is on its way share the next one; waiting for company only adds delay.
            linger_ms=0,
        )
        try:
            await producer.start()
        except BaseException:  # supervisor: whatever it was, the half-open producer is closed
            await producer.stop()
            raise
        return producer

    async def _replace(self, producer: AIOKafkaProducer) -> None:
        async with self._lock:
            if self._producer is producer:
                self._producer = None
                await _abort(producer)

    async def close(self) -> None:
        """Refuse further records; what no broker has accepted by now is given back to its callers as ``BusError``."""
        self._is_closed = True
        for patience in self._waiting:
            patience.reschedule(asyncio.get_running_loop().time())
        async with self._lock:  # whoever holds it gives up now
            if self._producer is not None:
                await _abort(self._producer)
                self._producer = None

    def _check_open(self, topic: str) -> None:
        if self._is_closed:
            raise _closed(topic)


def _closed(topic: str) -> BusError:
    return BusError(f"{topic}: the bus is closed")


async def _abort(producer: AIOKafkaProducer) -> None:
    """Stop a producer without waiting for brokers that may never come back.

    ``stop`` would first wait until everything is accepted. Nobody needs that: whoever has a record in it still waits for the
    answer and gets it here.
    """
    producer._message_accumulator.fail_all(errors.ProducerClosed())  # noqa: SLF001 (aiokafka has no other way)
    try:
        async with asyncio.timeout(LEAVE_S):
            await producer.stop()
    except TimeoutError:
        await producer.client.close()
