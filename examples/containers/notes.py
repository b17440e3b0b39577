"""A service that receives its session and unit, and does not depend on the container or the request."""

from attrs import frozen
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fastapi_async_sqlalchemy import UnitOfWork, create_middleware_and_session_proxy

NotesMiddleware, db = create_middleware_and_session_proxy(AsyncSession)
announced: list[str] = []


class Base(DeclarativeBase):
    """The tables."""


class Note(Base):
    """A note."""

    __tablename__ = "note"

    text: Mapped[str] = mapped_column(primary_key=True)


@frozen
class Notes:
    """Writes notes, and announces each one once it is committed."""

    session: AsyncSession
    unit: UnitOfWork[AsyncSession]

    async def write(self, text: str) -> None:
        """Add a note without committing it."""
        self.session.add(Note(text=text))
        self.unit.on_commit(lambda: announced.append(text))

    async def read(self) -> list[str]:
        """Return all notes."""
        return list(await self.session.scalars(select(Note.text).order_by(Note.text)))
