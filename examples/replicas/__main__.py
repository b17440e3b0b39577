"""Start a primary, a hot standby and the application; Ctrl-C stops them and removes their data.

It needs the development requirements, which include PostgreSQL as a wheel.
"""

import os
import signal
from contextlib import suppress

import uvicorn

from examples.quickstart import POST, listen
from examples.replicas.app import create_app
from tests.support.replication import PROGRAMS, hot_standby, primary_server

GUIDE = """
Open  {url}/docs

Write; X-Position in the response is the position in the primary's log.
  {post} '{{"text": "first"}}' {url}/notes
Read from the standby.
  curl {url}/notes/1
Pause replay on the standby, and write.
  {psql} -p {standby} -c 'SELECT pg_wal_replay_pause()'
  {post} '{{"text": "second"}}' {url}/notes
The standby does not have the note yet: 404. With its X-Position instead of 0/0, the primary serves it.
  curl {url}/notes/2
  curl -H 'X-Position: 0/0' {url}/notes/2
Kill the primary, promote the standby, and write again; repeat the last command if it is answered 503.
  kill -QUIT {pid}
  {psql} -p {standby} -c 'SELECT pg_promote()'
  {post} '{{"text": "third"}}' {url}/notes

Ctrl-C stops the program and removes the servers.
"""


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    port = int(os.environ.get("PORT", "8000"))
    with primary_server() as primary, hot_standby(primary) as standby, listen(port) as listener:
        hosts = f"postgresql+asyncpg://postgres@/postgres?host={primary.host}&host={standby.host}"
        app = create_app(
            f"{hosts}&target_session_attrs=read-write", f"{hosts}&target_session_attrs=prefer-standby"
        )
        guide = GUIDE.format(
            url=f"http://127.0.0.1:{listener.getsockname()[1]}",
            post=POST,
            psql=f"{PROGRAMS / 'psql'} -h 127.0.0.1 -U postgres",
            standby=standby.port,
            pid=primary.pid,
        )
        print(guide, flush=True)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app)).run(sockets=[listener])


if __name__ == "__main__":
    main()
