"""Keep with each epoch what proofs of later epochs carry of its beginning."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade(op: Operations) -> None:
    """Add the column; the first epoch needs none."""
    op.add_column("epochs", sa.Column("step", sa.LargeBinary(), nullable=True))
