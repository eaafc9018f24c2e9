"""The real servers of the lab: web, ssh, DNS and FTP, each with its own configuration in the lab's directory.

No account of the machine is used or changed. Every ssh password fails, because only root may log in and only by the lab's key;
every FTP login fails, because there is no local login. Logs stay in the server's directory.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.lab.network import DOMAIN, Lab, LabError, wait_until

SERVER = "server"
NEEDED = ("sshd", "ssh", "ssh-keygen", "nginx", "dnsmasq")

# Names and sizes in bytes of what the web server serves.
PAGES = {
    "index.html": 6_400,
    "news.html": 11_000,
    "style.css": 9_000,
    "app.js": 38_000,
    "logo.svg": 3_200,
    "photo.jpg": 64_000,
    "update.bin": 600_000,
}

_LISTEN = "0A"
_STAMP = """\
import datetime, sys
for line in sys.stdin:
    print(datetime.datetime.now(datetime.timezone.utc).isoformat(), "server sshd[22]:", line, end="")
"""


def serve(lab: Lab) -> None:
    """Start web, ssh and DNS on the server and return when all of them answer."""
    for start in (serve_web, serve_ssh, serve_dns):
        start(lab)


def serve_web(lab: Lab) -> None:
    """nginx on port 80, IPv4 and IPv6."""
    home = lab[SERVER].directory / "web"
    root = home / "pages"
    root.mkdir(parents=True)
    for name, size in PAGES.items():
        (root / name).write_text(_filler(name, size))
    folders = "".join(f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (home / "nginx.conf").write_text(
        "daemon off; worker_processes 1; user www-data;\n"
        f"pid {home}/nginx.pid; error_log {home}/error.log;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log {home}/access.log combined; {folders} server_tokens off; keepalive_timeout 5;\n"
        "  default_type application/octet-stream;\n"
        f"  server {{ listen 80; listen [::]:80; server_name www.{DOMAIN}; root {root};\n"
        "    location = /login { return 200 'wrong name or password'; } } }\n"
    )
    command = ["nginx", "-e", str(home / "error.log"), "-p", str(home), "-c", str(home / "nginx.conf")]
    _start(lab, "web", command, lambda pid: _is_bound(pid, "tcp", 80, _LISTEN))


def serve_ssh(lab: Lab) -> None:
    """sshd on port 22; ``ssh_command`` makes the one login that succeeds."""
    home = lab[SERVER].directory / "ssh"
    home.mkdir()
    for name in ("host_key", "login_key"):
        _generate_key(home / name)
    (home / "authorized_keys").write_text((home / "login_key.pub").read_text())
    host_key = " ".join((home / "host_key.pub").read_text().split()[:2])
    (home / "known_hosts").write_text("".join(f"{address} {host_key}\n" for address in lab[SERVER].addresses))
    options = [
        "Port 22",
        f"HostKey {home}/host_key",
        f"AuthorizedKeysFile {home}/authorized_keys",
        f"PidFile {home}/sshd.pid",
        "AllowUsers root",
        "PermitRootLogin prohibit-password",
        "PasswordAuthentication yes",
        "KbdInteractiveAuthentication no",
        "UsePAM no",
        "StrictModes no",  # the lab's directory is below one that everybody may write
        "UseDNS no",
        "PrintMotd no",
        "LogLevel VERBOSE",
        "MaxStartups 50",
    ]
    (home / "sshd_config").write_text("\n".join(options) + "\n")
    # OpenSSH 9.8 and later shut out a guesser by themselves, which would end the attack before it can be seen.
    with (home / "sshd_config").open("a") as config:
        if not _refuses(lab, home / "sshd_config", "PerSourcePenalties no"):
            config.write("PerSourcePenalties no\n")
    sshd = _path(lab, "sshd")  # sshd re-executes itself and insists on an absolute path
    # There is no syslog daemon in a namespace: what sshd says is stamped as one would.
    (home / "stamp.py").write_text(_STAMP)
    command = f"{sshd} -D -e -f {home}/sshd_config 2>&1 | {sys.executable} -u {home}/stamp.py >> {home}/auth.log"
    _start(lab, "ssh", ["sh", "-c", command], lambda pid: _is_bound(pid, "tcp", 22, _LISTEN))


def logs(lab: Lab) -> dict[str, Path]:
    """The logs of the services that keep one, by the name that Debian gives them; absent ones are left out."""
    home = lab[SERVER].directory
    known = {"auth.log": home / "ssh" / "auth.log", "access.log": home / "web" / "access.log"}
    return {name: path for name, path in known.items() if path.exists()}


def ssh_command(lab: Lab, remote: str) -> list[str]:
    """The command by which a client runs ``remote`` on the server with the lab's key."""
    home = lab[SERVER].directory / "ssh"
    options = ["IdentitiesOnly=yes", "BatchMode=yes", "StrictHostKeyChecking=yes", f"UserKnownHostsFile={home}/known_hosts"]
    flags = [part for option in options for part in ("-o", option)]
    return ["ssh", "-F", "none", "-i", str(home / "login_key"), *flags, f"root@{lab[SERVER].ipv4}", remote]


def serve_dns(lab: Lab) -> None:
    """dnsmasq on port 53 with the lab's zone, knowing no other server."""
    home = lab[SERVER].directory / "dns"
    home.mkdir()
    addresses = ",".join(lab[SERVER].addresses)
    records = [f"host-record={name}.{DOMAIN},{addresses}" for name in ("www", "ns", "git", "shop")]
    records += [f"host-record=h{number}.{DOMAIN},10.77.1.{number}" for number in range(100, 130)]
    records += [f"mx-host={DOMAIN},www.{DOMAIN},10", f"txt-record={DOMAIN},v=spf1 -all"]
    plain = [
        "no-resolv",
        "no-hosts",
        "no-daemon",
        "bind-interfaces",
        "user=root",
        "pid-file=",
        f"local=/{DOMAIN}/",
    ]
    listen = [f"listen-address={address}" for address in lab[SERVER].addresses]
    (home / "dnsmasq.conf").write_text("\n".join([*plain, *listen, *records, "local-ttl=300"]) + "\n")
    _start(lab, "dns", ["dnsmasq", f"--conf-file={home}/dnsmasq.conf"], lambda pid: _is_bound(pid, "udp", 53, None))


def serve_ftp(lab: Lab) -> None:
    """vsftpd on port 21; every login fails."""
    home = lab[SERVER].directory / "ftp"
    (home / "empty").mkdir(parents=True)
    options = ["listen=YES", "background=NO", "anonymous_enable=NO", "local_enable=YES", "pam_service_name=lab-no-such-service"]
    options += [f"secure_chroot_dir={home}/empty", "xferlog_enable=NO", "max_login_fails=3", "delay_failed_login=0"]
    (home / "vsftpd.conf").write_text("\n".join(options) + "\n")
    _start(lab, "ftp", ["vsftpd", str(home / "vsftpd.conf")], lambda pid: _is_bound(pid, "tcp", 21, _LISTEN))


def _start(lab: Lab, name: str, command: list[str], is_ready: Callable[[int], bool]) -> None:
    path = lab[SERVER].directory / f"{name}.log"
    with path.open("wb") as log:
        process = lab.start(SERVER, command, log=log)

    def ready_or_dead() -> bool:
        return process.poll() is not None or is_ready(process.pid)

    wait_until(ready_or_dead, f"{name} server to listen")
    if process.poll() is not None:
        raise LabError(f"{command[0]} ended at once: {path.read_text(errors='replace').strip()}")


def _is_bound(pid: int, protocol: str, port: int, state: str | None) -> bool:
    """Is the port bound in the namespace of process ``pid``? Read from /proc, so that no probe is among the packets."""
    for table in (protocol, f"{protocol}6"):
        try:
            rows = Path("/proc", str(pid), "net", table).read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for row in rows:
            fields = row.split()
            if int(fields[1].rpartition(":")[2], 16) == port and state in {None, fields[3]}:
                return True
    return False


def _filler(name: str, size: int) -> str:
    # Hexadecimal text that is the same in every run and can contain no name of the machine.
    blocks = (hashlib.sha256(f"{name}/{number}".encode()).hexdigest() for number in range(size // 64 + 1))
    return "".join(blocks)[:size]


def _generate_key(path: Path) -> None:
    # -C "": the default comment is user@machine.
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True, timeout=10)


def _refuses(lab: Lab, config: Path, option: str) -> bool:
    command = [_path(lab, "sshd"), "-t", "-f", str(config), "-o", option]
    return lab.run(SERVER, command, timeout_s=10, ok=(0, 1, 255)).returncode != 0


def _path(lab: Lab, tool: str) -> str:
    return lab.run(SERVER, ["sh", "-c", f"command -v {tool}"], timeout_s=5).stdout.strip()
