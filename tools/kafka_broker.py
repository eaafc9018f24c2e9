"""A development broker: Apache Kafka 4 from its Maven artefacts, one KRaft node on free ports of the loopback interface.

``run`` keeps it in the foreground (``make kafka``); ``start`` and ``stop`` keep it in the background; ``fetch`` only fills the
cache. The tests use ``fetch``/``cached`` and ``Broker``.

Rules:

- the jars are fetched once with Maven's own settings, checked against tools/kafka/jars.sha256, and kept outside the repository:
  in $CYBERMESH_CACHE_DIR, else in ~/.cache/cybermesh;
- a broker's directory holds its data, certificates and log; started again on the same directory it is the same broker, with the
  same ports and records;
- it listens without protection, with TLS, with TLS that requires a client certificate, and with SASL over TLS, on 127.0.0.1
  only. The passwords are made for each directory. It is for development: one node, no replication;
- ports are below those that the system gives to outgoing connections, or one of these could take a port while the
  broker is down.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from tools.kafka_certificates import HOST, make_certificates

PINNED = Path(__file__).resolve().parent / "kafka"
START_S = 60.0
STOP_S = 30.0
POLL_S = 0.05
STARTED = "Kafka Server started"
# Small and quick to start: it serves tests, not traffic.
JAVA_OPTIONS = ("-Xms96m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true")
LOG_OPTIONS = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
)


class BrokerError(Exception):
    """A part is missing, or the broker did not start; the text says which and what to do."""


@dataclass(frozen=True)
class Access:
    """How clients reach the broker; paths are files."""

    plain: str
    tls: str
    mtls: str
    sasl: str
    controller: str
    username: str
    password: str
    ca_file: str
    cert_file: str
    key_file: str


# The class path


def cache_dir() -> Path:
    """Return where the jars of this version are, or would be."""
    root = os.environ.get("CYBERMESH_CACHE_DIR")
    version = hashlib.sha256((PINNED / "jars.sha256").read_bytes()).hexdigest()[:12]
    return (Path(root) if root else Path.home() / ".cache" / "cybermesh") / f"kafka-{version}"


def _pinned_jars() -> dict[str, str]:
    """Return the file names of the class path with their digests."""
    lines = (PINNED / "jars.sha256").read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def _require(command: str, package: str) -> str:
    found = shutil.which(command)
    if found is None:
        raise BrokerError(f"{command} is not installed; install {package}")
    return found


def cached() -> Path:
    """Return the directory of the jars.

    Raises:
        BrokerError: Java is missing, or the jars were not fetched yet.
    """
    _require("java", "a Java 17 runtime")
    directory = cache_dir()
    if not directory.is_dir():
        raise BrokerError("the broker's jars are not in the cache; run `make kafka` once")
    return directory


def fetch() -> Path:
    """Return the directory of the jars, after fetching them with Maven if need be.

    Raises:
        BrokerError: Java or Maven is missing, Maven failed, or a file is not the pinned one.
    """
    _require("java", "a Java 17 runtime")
    directory = cache_dir()
    if directory.is_dir():
        return directory
    maven = _require("mvn", "maven")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _alone(directory.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        if directory.is_dir():
            return directory  # fetched by another process while this one waited
        jars = Path(scratch) / "jars"
        command = [maven, "-B", "-q", "-C", "-f", str(PINNED / "pom.xml"), "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        done = subprocess.run(  # noqa: S603 (the command is ours)
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0:
            raise BrokerError(f"Maven could not fetch the broker: {done.stdout.strip()[-500:]}")
        _check(jars)
        jars.rename(directory)
    return directory


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is inside: Maven's own store of files is not made for two at once."""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _check(jars: Path) -> None:
    pinned = _pinned_jars()
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in jars.iterdir()}
    wrong = sorted(name for name in pinned.keys() | found.keys() if pinned.get(name) != found.get(name))
    if wrong:
        raise BrokerError(f"fetched files differ from tools/kafka/jars.sha256: {', '.join(wrong)}")


# The broker


def free_ports(count: int) -> list[int]:
    """Return ports that are free now; they are held together while they are chosen, so they differ.

    Raises:
        BrokerError: there are not so many.
    """
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    candidates = range(max(10_000, first_outgoing - 20_000), first_outgoing)
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in random.SystemRandom().sample(candidates, len(candidates)):
            one = held.enter_context(socket.socket())
            try:
                one.bind((HOST, port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise BrokerError(f"no {count} ports are free from {candidates.start} to {candidates.stop}")


def properties(directory: Path, access: Access) -> str:
    """Return the broker's configuration."""
    listeners = f"PLAIN://{access.plain},TLS://{access.tls},MTLS://{access.mtls},SASL://{access.sasl}"
    login = "org.apache.kafka.common.security"
    user = f'username="{access.username}" password="{access.password}"'
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{access.controller}",
        "listeners": f"{listeners},CONTROLLER://{access.controller}",
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "PLAIN:PLAINTEXT,TLS:SSL,MTLS:SSL,SASL:SASL_SSL,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAIN",
        "controller.listener.names": "CONTROLLER",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(directory / "server.store"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(directory / "ca.pem"),
        "listener.name.tls.ssl.client.auth": "none",
        "listener.name.mtls.ssl.client.auth": "required",
        "listener.name.sasl.sasl.enabled.mechanisms": "SCRAM-SHA-512,SCRAM-SHA-256,PLAIN",
        "listener.name.sasl.scram-sha-512.sasl.jaas.config": f"{login}.scram.ScramLoginModule required;",
        "listener.name.sasl.scram-sha-256.sasl.jaas.config": f"{login}.scram.ScramLoginModule required;",
        "listener.name.sasl.plain.sasl.jaas.config": (
            f'{login}.plain.PlainLoginModule required {user} user_{access.username}="{access.password}";'
        ),
        "log.dirs": str(directory / "data"),
        "auto.create.topics.enable": "false",
        "num.partitions": "8",
        "default.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        # A broker that was killed is taken back as soon as its old session has run out.
        "broker.session.timeout.ms": "1000",
        "broker.heartbeat.interval.ms": "200",
        "group.min.session.timeout.ms": "1000",
        "log.cleaner.dedupe.buffer.size": "4194304",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())


class Broker:
    """One broker on a directory; as a context manager it is started and stopped.

    Args:
        directory: Its data, certificates, configuration and log; made when it is not there.
        jars: From ``fetch`` or ``cached``.
    """

    def __init__(self, directory: Path, jars: Path) -> None:
        self.directory = directory.resolve()
        self._jars = jars
        self._process: subprocess.Popen[bytes] | None = None
        self.access = self._prepare()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The process' number while it runs."""
        return self._process.pid if self._process else None

    @property
    def log(self) -> Path:
        """The file that the broker writes its warnings and errors to."""
        return self.directory / "broker.log"

    def _prepare(self) -> Access:
        """Make ports, passwords, certificates and storage, once for a directory."""
        made = self.directory / "access.json"
        if made.exists():
            try:
                return Access(**json.loads(made.read_text(encoding="utf-8")))
            except (TypeError, ValueError) as error:
                raise BrokerError(f"{made} is not of this version; remove {self.directory} to begin anew") from error
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_certificates(self.directory)
        store = self.directory / "server.store"
        store.touch(mode=0o600)
        store.write_bytes((self.directory / "server.key").read_bytes() + (self.directory / "server.pem").read_bytes())
        plain, tls, mtls, sasl, controller = (f"{HOST}:{port}" for port in free_ports(5))
        access = Access(
            plain=plain,
            tls=tls,
            mtls=mtls,
            sasl=sasl,
            controller=controller,
            username="cybermesh",
            password=secrets.token_hex(16),
            ca_file=str(self.directory / "ca.pem"),
            cert_file=str(self.directory / "client.pem"),
            key_file=str(self.directory / "client.key"),
        )
        (self.directory / "server.properties").write_text(properties(self.directory, access), encoding="utf-8")
        self._format(access)
        made.touch(mode=0o600)
        made.write_text(json.dumps(asdict(access), indent=1), encoding="utf-8")
        return access

    def _java(self, main: str, *arguments: str) -> list[str]:
        return ["java", *JAVA_OPTIONS, *LOG_OPTIONS, "-cp", f"{self._jars}/*", main, *arguments]

    def _format(self, access: Access) -> None:
        configuration = str(self.directory / "server.properties")
        cluster = secrets.token_urlsafe(16)
        command = self._java("kafka.tools.StorageTool", "format", "-t", cluster, "-c", configuration)
        for mechanism in ("SCRAM-SHA-512", "SCRAM-SHA-256"):
            command += ["--add-scram", f"{mechanism}=[name={access.username},password={access.password}]"]
        done = subprocess.run(  # noqa: S603 (the command is ours)
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0:
            raise BrokerError(f"the broker's storage could not be formatted: {done.stdout.strip()[-500:]}")

    def start(self) -> None:
        """Start the broker and return when it serves clients.

        Raises:
            BrokerError: it ended, or was not ready within a minute.
        """
        assert self._process is None, "the broker runs already"
        with self.log.open("ab") as log:
            written = log.tell()
            command = self._java("kafka.Kafka", str(self.directory / "server.properties"))
            # In a session of its own, so that Ctrl-C in the terminal reaches this tool, which then stops it in order.
            self._process = subprocess.Popen(  # noqa: S603 (the command is ours)
                command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_until_ready(written)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, written: int) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + START_S
        while STARTED.encode() not in self._logged(written):
            if self._process.poll() is not None:
                raise BrokerError(f"the broker ended with {self._process.returncode}: {self._tail(written)}")
            if time.monotonic() > deadline_s:
                raise BrokerError(f"the broker was not ready after {START_S:.0f} s: {self._tail(written)}")
            time.sleep(POLL_S)

    def _logged(self, written: int) -> bytes:
        with self.log.open("rb") as log:
            log.seek(written)
            return log.read()

    def _tail(self, written: int) -> str:
        return self._logged(written).decode(errors="replace").strip()[-800:]

    def stop(self) -> None:
        """Stop the broker in order; kill it when it does not end."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End the broker as a loss of power would end its process (SIGKILL)."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def detach(self) -> int:
        """Leave the broker running without this object; return its process number."""
        assert self._process is not None
        pid, self._process = self._process.pid, None
        return pid


# The command line


def describe(access: Access) -> str:
    """Return how clients reach the broker, for people."""
    sasl = f"SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN, user {access.username}, password {access.password}"
    lines = (
        f"plain         {access.plain}",
        f"TLS           {access.tls}",
        f"mutual TLS    {access.mtls}",
        f"SASL and TLS  {access.sasl}  {sasl}",
        f"certificates  {access.ca_file}, for a client {access.cert_file} and {access.key_file}",
        f"try           CYBERMESH_BUS__KIND=kafka KAFKA_BROKERS={access.plain}",
    )
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(directory: Path) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    with Broker(directory, fetch()) as broker:
        _say(describe(broker.access))
        _say("Ctrl-C stops the broker.")
        try:
            signal.pause()
        except KeyboardInterrupt:
            _say("stopping")


def _start(directory: Path) -> None:
    broker = Broker(directory, fetch())
    broker.start()
    (directory / "broker.pid").write_text(f"{broker.detach()}\n", encoding="ascii")
    _say(describe(broker.access))


def _stop(directory: Path) -> None:
    file = directory / "broker.pid"
    if not file.exists():
        raise BrokerError(f"{file} is not there: no broker was started on this directory")
    pid = int(file.read_text(encoding="ascii"))
    deadline_s = time.monotonic() + STOP_S
    while _is_broker(pid, directory):
        os.kill(pid, signal.SIGTERM if time.monotonic() < deadline_s else signal.SIGKILL)
        time.sleep(0.2)
    file.unlink()


def _is_broker(pid: int, directory: Path) -> bool:
    """Return whether this process is still the broker of the directory, and not another one that got its number."""
    try:
        return str(directory / "server.properties").encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="A development broker: Apache Kafka 4, one node, on 127.0.0.1.")
    parser.add_argument("action", choices=("run", "start", "stop", "fetch"))
    parser.add_argument("--dir", type=Path, default=cache_dir().parent / "kafka-broker", help="the broker's data (%(default)s)")
    arguments = parser.parse_args()
    directory = arguments.dir.resolve()
    try:
        if arguments.action == "fetch":
            _say(str(fetch()))
        else:
            {"run": _run, "start": _start, "stop": _stop}[arguments.action](directory)
    except BrokerError as error:
        sys.stderr.write(f"kafka: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
