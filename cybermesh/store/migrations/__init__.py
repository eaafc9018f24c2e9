"""Alembic's scripts; they ship inside the package, because the embedded database migrates itself."""
