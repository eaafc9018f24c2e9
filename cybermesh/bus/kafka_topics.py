"""Makes the topics that are missing, with the partitions, the retention and the record size that the bus needs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from cybermesh.bus.kafka_client import RECORD_MAX, KafkaOptions, TopicPlan, Troubles, patiently

_PART = "topics"


class KafkaTopics:
    """The topics that are known to be there."""

    def __init__(self, options: KafkaOptions, troubles: Troubles) -> None:
        self._options = options
        self._troubles = troubles
        self._known: set[str] = set()
        self._lock = asyncio.Lock()

    async def ensure(self, topics: Sequence[str]) -> None:
        """Return when these topics exist, as far as it is this client's business.

        Raises:
            BusError: a topic is missing and may not be made.
        """
        if self._options.topics is None or self._known.issuperset(topics):
            return
        async with self._lock:
            missing = [topic for topic in dict.fromkeys(topics) if topic not in self._known]
            if missing:
                plan = self._options.topics
                await patiently(lambda: self._make(missing, plan), self._options, self._troubles, _PART)
                self._known.update(missing)

    def forget(self, topic: str) -> None:
        """Look again before the next use: a broker said that the topic is not there."""
        self._known.discard(topic)

    async def _make(self, topics: Sequence[str], plan: TopicPlan) -> None:
        admin = AIOKafkaAdminClient(**self._options.connection())
        try:
            await admin.start()
            there = set(await admin.list_topics())
            missing = [_described(topic, plan) for topic in topics if topic not in there]
            if missing:
                for topic, code, text in (await admin.create_topics(missing)).topic_errors:
                    _check(topic, code, text)
        except AttributeError as error:
            # aiokafka 0.14 asks the controller without looking whether there is one, as while one is being elected.
            raise errors.LeaderNotAvailableError("the cluster has no controller at the moment") from error
        finally:
            await admin.close()


def _described(topic: str, plan: TopicPlan) -> NewTopic:
    settings = {"max.message.bytes": str(RECORD_MAX)}
    if topic in plan.retention_s:
        settings["retention.ms"] = str(plan.retention_s[topic] * 1000)
    # An empty table of replicas, because aiokafka otherwise takes -1 for a forgotten argument.
    return NewTopic(topic, plan.partitions, plan.replication_factor, {}, settings)


def _check(topic: str, code: int, text: str | None) -> None:
    kind = errors.for_code(code)
    if kind not in {errors.NoError, errors.TopicAlreadyExistsError}:
        raise kind(f"{topic}: {text}")
