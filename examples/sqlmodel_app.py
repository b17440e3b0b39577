"""Teams and their tickets, with SQLModel's models and typed session: `make example NAME=sqlmodel_app`.

The application needs this package and sqlmodel.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, Relationship, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from examples.quickstart import serve
from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

TicketsMiddleware, tickets_db = create_middleware_and_session_proxy(AsyncSession)
"""The pair's sessions have SQLModel's type, so `exec()` returns the type that `select()` names."""


class TeamBase(SQLModel):
    """The fields of a team that clients send."""

    name: str = Field(min_length=1, max_length=50, unique=True)


class Team(TeamBase, table=True):
    """A team; its tickets are loaded with it, because lazy loading is not possible under asyncio."""

    id: int | None = Field(default=None, primary_key=True)
    tickets: list["Ticket"] = Relationship(
        sa_relationship_kwargs={"lazy": "selectin", "order_by": "Ticket.id"}
    )


class TicketBase(SQLModel):
    """The fields of a ticket that clients send."""

    title: str = Field(min_length=1, max_length=200)


class Ticket(TicketBase, table=True):
    """A ticket of one team."""

    id: int | None = Field(default=None, primary_key=True)
    done: bool = False
    team_id: int = Field(foreign_key="team.id", index=True)


class ReadTicket(TicketBase):
    """The fields of a ticket that clients receive."""

    id: int
    done: bool


class ReadTeam(TeamBase):
    """The fields of a team that clients receive."""

    id: int
    tickets: list[ReadTicket]


router = APIRouter()


@router.post("/teams", status_code=201, response_model=ReadTeam)
async def found(new: TeamBase) -> Team:
    """Add a team, which is committed when the response starts."""
    team = Team(name=new.name)
    tickets_db.session.add(team)
    await tickets_db.session.flush()
    await tickets_db.session.refresh(team, ["id", "tickets"])
    return team


async def find_team(name: str) -> Team:
    """Return the team in the path, or answer 404."""
    team = (await tickets_db.session.exec(select(Team).where(Team.name == name))).one_or_none()
    if team is None:
        raise HTTPException(404, "no such team")
    return team


@router.get("/teams/{name}", response_model=ReadTeam)
async def read_team(name: str) -> Team:
    """Return a team with its tickets."""
    return await find_team(name)


@router.post("/teams/{name}/tickets", status_code=201, response_model=ReadTicket)
async def add_ticket(name: str, new: TicketBase) -> Ticket:
    """Add a ticket to a team."""
    team = await find_team(name)
    ticket = Ticket.model_validate(new, update={"team_id": team.id})
    tickets_db.session.add(ticket)
    await tickets_db.session.flush()
    return ticket


@router.get("/tickets", response_model=list[ReadTicket])
async def list_tickets(*, done: bool = False) -> Sequence[Ticket]:
    """Return the tickets that are done, or those that are not."""
    of_interest = select(Ticket).where(col(Ticket.done) == done).order_by(col(Ticket.id))
    return (await tickets_db.session.exec(of_interest)).all()


@router.post("/tickets/{number}/done", response_model=ReadTicket)
async def finish(number: int) -> Ticket:
    """Finish a ticket, or answer 409 if it is done; a response of 400 or above rolls back."""
    ticket = await tickets_db.session.get(Ticket, number, with_for_update=True)
    if ticket is None:
        raise HTTPException(404, "no such ticket")
    if ticket.done:
        raise HTTPException(409, "it is done already")
    ticket.done = True
    return ticket


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer 409 if a constraint is violated, at a statement or at COMMIT."""
    return JSONResponse({"detail": str(getattr(error, "orig", error))}, status_code=409)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Create missing tables; in production, migrations do this."""
    await tickets_db.create_all(SQLModel.metadata)
    yield


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    app = FastAPI(title="Tickets", lifespan=lifespan)
    app.add_middleware(TicketsMiddleware, db_url=db_url, commit_on_exit=True)
    app.include_router(router)
    app.add_exception_handler(IntegrityError, refuse)
    return app


GUIDE = """
Open  {url}/docs

Add a team, and a ticket for it.
  {post} '{{"name": "web"}}' {url}/teams
  {post} '{{"title": "a broken link"}}' {url}/teams/web/tickets
Read the team with its tickets.
  curl {url}/teams/web
Finish the ticket; the second time the response is a 409.
  curl -i -X POST {url}/tickets/1/done
  curl -i -X POST {url}/tickets/1/done
Add another team of that name: its constraint is violated, and the response is a 409.
  {post} '{{"name": "web"}}' {url}/teams
"""


if __name__ == "__main__":
    serve(create_app, GUIDE)
