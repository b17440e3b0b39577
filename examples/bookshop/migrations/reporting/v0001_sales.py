"""Sales."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table of sales."""
    op.create_table(
        "sale",
        sa.Column("order_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("isbn", sa.String(13), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("cents", sa.Integer(), nullable=False),
        sa.Column("sold_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("order_id", "isbn", name=op.f("pk_sale")),
    )
    op.create_index(op.f("ix_sale_sold_at"), "sale", ["sold_at"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("sale")
