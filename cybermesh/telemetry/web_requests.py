"""What clear-text web traffic shows: requests, those that try to log in, those that carry an attack, and the answers' status.

The same reading serves packets (the beginning of a TCP payload) and access logs (the request line), so that a scan looks the
same from both. Patterns are few, well known and cannot be mistaken for what browsers send; each is linear in the text. Only the
first ``READ_MAX`` bytes of a request are looked at: request line and the usual headers.
"""

from __future__ import annotations

import enum
import re

import numpy as np
import numpy.typing as npt

from cybermesh.telemetry import packets
from cybermesh.telemetry.packets import PacketBatch

READ_MAX = 1024
_METHODS = (b"GET ", b"POST", b"HEAD", b"PUT ", b"DELE", b"OPTI", b"PATC", b"TRAC", b"PROP", b"CONN")
_WORDS = np.array([int.from_bytes(method) for method in _METHODS], np.uint32)
_RESPONSE = int.from_bytes(b"HTTP")
_STATUS_AT = 9  # "HTTP/1.1 404"
_UNAUTHORIZED, _FORBIDDEN = 401, 403


class Web(enum.IntFlag):
    """What one packet or line is."""

    REQUEST = 1
    LOGIN = 2  # sends something to a path named like a login form
    EXPLOIT = 4
    ERROR = 8  # an answer with a status of 400 or more
    REFUSED = 16  # 401 or 403


_LOGIN = re.compile(
    rb"(?:POST|PUT) [^ ?]{0,200}?(?:log[-_]?[io]n|sign[-_]?in|authenticate|xmlrpc\.php)",
    re.IGNORECASE,
)
_EXPLOIT = re.compile(
    rb"jndi(?::|%3a)(?:ldap|rmi|dns|iiop|corba|nds)|\$\{(?:lower|upper|env|sys|::)"  # CVE-2021-44228
    rb"|\(\) ?\{ ?[:_]?;? ?\}"  # CVE-2014-6271
    rb"|(?:\.\.(?:/|\\|%2f|%5c|%252f)){2}|%2e%2e(?:/|%2f|%5c)|\.\.%c0%af|%c0%ae"  # path traversal
    rb"|/etc/(?:passwd|shadow)|%2fetc%2fpasswd|/proc/self/environ|boot\.ini|win\.ini"
    rb"|<script|%3cscript|javascript:alert|onerror(?:=|%3d)alert"
    rb"|union(?:\+|%20|/\*\*/)+(?:all(?:\+|%20|/\*\*/)+)?select|information_schema|(?:'|%27)(?:\+|%20)*or(?:\+|%20)+(?:'|%27)?1"
    rb"|waitfor(?:\+|%20)delay|xp_cmdshell|benchmark\(|pg_sleep\(|sleep\(\d"
    rb"|php://(?:input|filter)|allow_url_include|auto_prepend_file|phpinfo\(\)|eval-stdin\.php|base64_decode\("
    rb"|passthru|system\(|shell_exec|cmd\.exe|/bin/(?:ba)?sh|(?:;|%3b|\||%7c)(?:\+|%20)*(?:wget|curl|nc|id|whoami)(?:\+|%20)"
    rb"|java\.lang\.(?:runtime|processbuilder)|_memberaccess|class\.module\.classloader"
    rb"|/\.env\b|/\.git/(?:config|head)|/\.aws/credentials|/\.htpasswd"
    rb"|user-agent: [^\r\n]{0,100}(?:nikto|sqlmap|nuclei|gobuster|dirbuster|wpscan|masscan|zgrab|hydra)",
    re.IGNORECASE,
)


def request_mark(text: bytes) -> int:
    """Return ``Web`` of a request's beginning."""
    text = text[:READ_MAX]
    mark = Web.REQUEST
    if _LOGIN.match(text):
        mark |= Web.LOGIN
    if _EXPLOIT.search(text):
        mark |= Web.EXPLOIT
    return int(mark)


def web_marks(batch: PacketBatch) -> npt.NDArray[np.uint8]:
    """Return ``Web`` of each packet's payload, uint8[n], 0 where it begins neither a request nor an answer."""
    marks = np.zeros(len(batch), np.uint8)
    rows = np.nonzero((batch.klass == packets.TCP) & (batch.payload_captured >= _STATUS_AT + 3) & (batch.payload_at >= 0))[0]
    if len(rows) == 0:
        return marks
    at = batch.payload_at[rows]
    words = np.ascontiguousarray(batch.data[at[:, None] + np.arange(4)]).view(">u4").reshape(-1)
    for row in rows[np.isin(words, _WORDS)].tolist():
        start = int(batch.payload_at[row])
        marks[row] = request_mark(batch.data[start : start + min(READ_MAX, int(batch.payload_captured[row]))].tobytes())
    answers = rows[words == _RESPONSE]
    if len(answers):
        digits = batch.data[batch.payload_at[answers][:, None] + np.arange(_STATUS_AT, _STATUS_AT + 3)].astype(np.int64) - 0x30
        is_number = ((digits >= 0) & (digits <= 9)).all(axis=1)
        status = np.where(is_number, digits @ np.array([100, 10, 1]), 0)
        refused = (status == _UNAUTHORIZED) | (status == _FORBIDDEN)
        marks[answers] = np.where(status >= 400, int(Web.ERROR), 0) | np.where(refused, int(Web.REFUSED), 0)
    return marks
