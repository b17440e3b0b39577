"""Books and orders."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables of books and orders."""
    op.create_table(
        "book",
        sa.Column("isbn", sa.String(13), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("cents", sa.Integer(), nullable=False),
        sa.Column("stock", sa.Integer(), nullable=False),
        sa.CheckConstraint("cents > 0", name=op.f("ck_book_price")),
        sa.CheckConstraint("stock >= 0", name=op.f("ck_book_stock")),
        sa.PrimaryKeyConstraint("isbn", name=op.f("pk_book")),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("customer", sa.String(254), nullable=False),
        sa.Column("idempotency_key", sa.Uuid(), nullable=False),
        sa.Column("placed_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orders")),
        sa.UniqueConstraint("customer", "idempotency_key", name=op.f("uq_orders_customer_idempotency_key")),
    )
    op.create_table(
        "order_line",
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("isbn", sa.String(13), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("cents", sa.Integer(), nullable=False),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_order_line_quantity")),
        sa.ForeignKeyConstraint(["isbn"], ["book.isbn"], name=op.f("fk_order_line_isbn")),
        sa.ForeignKeyConstraint(["order_id"], ["orders.id"], name=op.f("fk_order_line_order_id")),
        sa.PrimaryKeyConstraint("order_id", "isbn", name=op.f("pk_order_line")),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("order_line")
    op.drop_table("orders")
    op.drop_table("book")
