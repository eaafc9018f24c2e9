"""Alembic's entry: it runs the migrations on the connection that ``store.migrate`` hands over."""

from __future__ import annotations

from alembic import context

from cybermesh.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
