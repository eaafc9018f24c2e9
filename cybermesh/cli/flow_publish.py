"""``cybermesh flows --to kafka``: flows as messages of ``telemetry.features.v1``, for the ai roles that share the topic.

The key is the sensor, so that its flows stay in order and one detector sees all of them. Reading waits while messages are not
acknowledged yet; the command ends when every one is, and says how many were if it fails before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from cybermesh.bus import Bus, BusError
from cybermesh.cli import output
from cybermesh.cli.flows import FlowTarget, Run, is_live
from cybermesh.config import ConfigError, load
from cybermesh.messages import FlowFeatures
from cybermesh.roles.open_bus import open_bus
from cybermesh.telemetry.flow_messages import to_messages
from cybermesh.telemetry.flows import FlowBatch
from cybermesh.wire import codec
from cybermesh.wire.unsigned import FLOWS_MAX

IN_FLIGHT_MAX = 8  # messages of at most a megabyte
ACKNOWLEDGED_WITHIN_S = 30.0  # or the bus is given up; a role would wait, a command should end


def publish(run: Run, to: FlowTarget, sensor: str, config: Path | None) -> None:
    """Publish the run's flows to the topic of the settings, on the bus ``to``.

    Raises:
        ConfigError: The settings are not usable, or the topic is switched off.
        CommandError: The bus failed.
    """
    settings = load(config, environ={**os.environ, "CYBERMESH_BUS__KIND": to.value}).settings
    topic = settings.topics.telemetry_features
    if not topic:
        raise ConfigError("topics.telemetry_features: is switched off; give it a name")
    publisher = Publisher(topic, sensor or socket.gethostname(), settings.telemetry.batch_size)

    async def run_all() -> None:
        async with open_bus(settings) as bus:
            if all(map(is_live, run.inputs)):  # these end soon when they are told to; a pipe may not
                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(number, run.stopped.set)
            await publisher.publish_all(run.flows(), bus)

    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what fails is told below, once
    try:
        asyncio.run(run_all())
    except* BusError as errors:
        reason = errors.exceptions[0]
        raise output.CommandError(
            f"{topic}: {reason}; {publisher.flows:,} flows were acknowledged before; look at kafka.brokers and try again"
        ) from reason
    output.note(f"{publisher.flows:,} flows in {publisher.messages:,} messages acknowledged by {topic}")


class Publisher:
    """Publishes flows and counts what was acknowledged."""

    def __init__(self, topic: str, sensor: str, batch_size: int) -> None:
        self.flows = 0
        self.messages = 0
        self._topic, self._sensor = topic, sensor
        self._most = min(batch_size, FLOWS_MAX)

    async def publish_all(self, batches: Iterator[FlowBatch], bus: Bus) -> None:
        """Publish all flows in their order; return when the last is acknowledged.

        Raises:
            ExceptionGroup: Of ``BusError``.
        """
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            messages = list(to_messages(batch, self._sensor, self._most))
            for at in range(0, len(messages), IN_FLIGHT_MAX):
                async with asyncio.TaskGroup() as group:
                    for message in messages[at : at + IN_FLIGHT_MAX]:
                        group.create_task(self._publish(message, bus), name="publish flows")

    async def _publish(self, message: FlowFeatures, bus: Bus) -> None:
        try:
            async with asyncio.timeout(ACKNOWLEDGED_WITHIN_S):
                await bus.publish(self._topic, self._sensor.encode(), codec.encode(message))
        except TimeoutError as error:
            raise BusError(f"nothing was acknowledged within {ACKNOWLEDGED_WITHIN_S:.0f} s") from error
        self.flows += message.count
        self.messages += 1
