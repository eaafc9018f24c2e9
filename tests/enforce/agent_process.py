"""An agent in a process of its own, to be killed: run on a host's namespace, told what to do by lines of JSON.

The committee says yes to whatever it is shown; everything after the proof is the real thing, kernel and database included.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from cybermesh.enforce.acks import Place
from cybermesh.enforce.backends import Backend
from cybermesh.enforce.decisions import Mode, Proven
from cybermesh.enforce.enforcer import Enforcer, Ports
from cybermesh.enforce.guard import Protected
from cybermesh.enforce.reconcile import Plan
from cybermesh.enforce.rules import Element, make
from cybermesh.enforce.state import FILE_NAME, State
from cybermesh.messages import Ack, PolicyUpdate
from cybermesh.policy import parse
from cybermesh.roles.firewall import open_backend
from cybermesh.wire import codec

SO_RCVBUFFORCE = 33  # linux/socket.h; Python does not name it
ROOT = Path(__file__).resolve().parents[2]


class Agent:
    """The other end: starts the process, sends it events, kills it."""

    def __init__(self, namespace: str, folder: Path, backend: str, tick_s: float = 0.1, reconcile_s: float = 1_000) -> None:
        words = ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.enforce.agent_process"]
        words += [str(folder), backend, str(tick_s), str(reconcile_s)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def __enter__(self) -> Self:
        assert self._line()["open"]
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            # What was not sent any more cannot be.
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def kill(self) -> None:
        """Give it no time for anything."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def send(self, policy_id: str, seq: int, target: dict[str, Any], **words: Any) -> None:
        """Have it handle an event, and expect that it is applied."""
        assert self.ask(policy_id=policy_id, seq=seq, target=target, **words) == {"result": "applied", "code": ""}

    def ask(self, **words: Any) -> dict[str, Any]:
        """Send one line, return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return self._line()

    def churn(self, updates: int, at_once: int, watched: str, port: int) -> Answer:
        """Have it change its rules all the time; the answer says which datagrams of ``watched`` it received."""
        assert self.ask(churn=updates, at_once=at_once, watched=watched, port=port) == {"listening": True}
        assert self._process.stdout is not None
        return Answer(self._process.stdout.fileno(), self._line)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the agent process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclasses.dataclass
class Answer:
    """An answer that comes later, in two lines: when the updates are done, and when the last datagram is there."""

    _fileno: int
    _line: Callable[[], dict[str, Any]]

    def done(self) -> bool:
        return bool(select.select([self._fileno], [], [], 0)[0])

    def result(self) -> dict[str, Any]:
        return self._line() | self._line()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def event(policy_id: str, seq: int, target: dict[str, Any], ttl_s: int = 60, **words: Any) -> PolicyUpdate:
    """Return an event that ``prove`` will believe."""
    kind = words.pop("kind", "drop")
    action = words.pop("action", "add")
    rule_type = "rate_limit" if kind == "rate_limit" else "block"
    rule = parse(
        {
            "policy_id": policy_id,
            "rule_type": rule_type,
            "action": kind,
            "target": target,
            "guardrails": {"ttl_seconds": ttl_s, **words},
        }
    ).to_json()
    return PolicyUpdate(
        policy_id=policy_id,
        action=action,
        rule_type=rule_type,
        rule_data=rule,
        rule_hash=hashlib.sha256(rule).digest(),
        requires_ack=True,
        rollback_policy_id="",
        timestamp=0,
        effective_height=1,
        expiration_height=0,
        producer_id=bytes(32),
        signature=bytes(64),
        pubkey=bytes(32),
        decision_seq=seq,
        expires_at_ms=now_ms() + 1_000 * ttl_s,
    )


def prove(update: PolicyUpdate) -> Proven:
    return Proven(
        update.policy_id, update.action, update.rule_hash, update.expires_at_ms, update.decision_seq, 0, 1, now_ms(), "qc"
    )  # type: ignore[arg-type]


def seal(ack: Ack) -> bytes:
    return codec.encode(dataclasses.replace(ack, nonce=bytes(16), producer_id=bytes(32), pubkey=bytes(32), signature=bytes(64)))


def compose(folder: Path, backend: Backend, state: State | None = None, sealing: Callable[[Ack], bytes] = seal) -> Enforcer:
    kept = state or State(folder / FILE_NAME, Mode.ENFORCE)
    return Enforcer(kept, backend, Ports(prove, sealing, Protected, now_ms), Place("edge", "agent"))


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


async def serve(folder: Path, backend: Backend, tick_s: float, reconcile_s: float) -> None:
    enforcer = compose(folder, backend)
    await enforcer.open()
    say(open=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(enforcer.run(tick_s, reconcile_s), name="run")
        group.create_task(enforcer.listen(), name="listen")
        while line := await asyncio.to_thread(sys.stdin.readline):
            words = json.loads(line)
            if "churn" in words:
                # As the enforcer does: calls to a backend never overlap.
                async with enforcer._lock:
                    await churn(backend, plans(words["churn"], words["at_once"]), words["watched"], words["port"])
            elif "status" in words:
                say(**enforcer.status())
            else:
                (outcome,) = await enforcer.handle([event(**words)])
                say(result=outcome.result, code=outcome.code)


def plans(updates: int, at_once: int) -> Iterator[Plan | list[Element]]:
    """Yield edits, and every now and then a rebuild, that change ``updates`` elements in all; never the watched address."""
    spec = {
        "policy_id": "p",
        "rule_type": "block",
        "action": "drop",
        "target": {"ips": [f"203.0.113.{n}" for n in range(at_once)]},
        "guardrails": {"ttl_seconds": 60},
    }
    parsed = parse(spec)

    def fresh() -> list[Element]:
        return [rule.element for rule in make(parsed, parsed.networks(), now_ms() + 60_000)]

    kept: list[Element] = []
    for number in itertools.count():
        if updates <= 0:
            return
        if number % 25 == 24:
            kept = fresh()
            yield kept
            updates -= len(kept)
        elif kept:
            updates -= len(kept)
            kept, gone = [], kept
            yield Plan(removes=tuple(gone))
        else:
            kept = fresh()
            updates -= len(kept)
            yield Plan(adds=tuple(kept))


async def churn(backend: Backend, steps: Iterator[Plan | list[Element]], watched: str, port: int) -> None:
    """Change rules while a thread counts the datagrams of a host that no rule names."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listening.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
    listening.bind(("0.0.0.0", port))
    seen: list[int] = []

    def receive() -> None:
        while (datagram := listening.recvfrom(16)) and datagram[0] != b"end":
            if datagram[1][0] == watched:
                seen.append(struct.unpack("!I", datagram[0])[0])

    thread = threading.Thread(target=receive)
    thread.start()
    say(listening=True)
    done = 0
    for step in steps:
        if isinstance(step, Plan):
            await backend.apply(step, now_ms())
            done += step.drift
        else:
            await backend.rebuild(step, now_ms())
            done += len(step)
    say(updates=done)
    await asyncio.to_thread(thread.join)
    listening.close()
    last = max(seen, default=-1)
    say(lost=sorted(set(range(last + 1)) - set(seen)), last=last)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), open_backend(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
