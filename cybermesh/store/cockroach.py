"""CockroachDB speaks PostgreSQL's protocol; this is what SQLAlchemy must be told so that it believes it.

Only two things differ at connecting: the server's version text, and the codec for JSON types, which we do not use. Conflicts
come as SQLSTATE 40001 like on PostgreSQL, only more often.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg


class CockroachDialect(PGDialect_asyncpg):
    """PostgreSQL over asyncpg, with CockroachDB's version for that of the PostgreSQL it is compatible with."""

    supports_statement_cache = True

    def _get_server_version_info(self, connection: Any) -> tuple[int, ...]:
        return (13, 0)

    async def setup_asyncpg_json_codec(self, conn: Any) -> None:
        """Do nothing: the server lacks the type that would be asked for."""

    async def setup_asyncpg_jsonb_codec(self, conn: Any) -> None:
        """Do nothing: the server's own default serves, and no column has this type."""


def register_cockroach() -> None:
    """Make ``cockroachdb+asyncpg://`` known to SQLAlchemy; doing it again changes nothing."""
    registry.register("cockroachdb.asyncpg", __name__, CockroachDialect.__name__)
