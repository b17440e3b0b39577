"""The page about replicas is true: its programs run on a primary and a standby, a silent host before them."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.support.commands import replay
from tests.support.pages import Block, blocks
from tests.support.replication import PAGE, Server, hot_standby, on_servers, primary_server

SILENCE_BEGINS = "HOSTS = ["
"""What the page's program for silent hosts begins with; the ones before it would wait for such a host."""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """A primary and its standby."""
    with primary_server() as primary, hot_standby(primary) as standby:
        yield primary, standby


@pytest.fixture
def silence(servers: tuple[Server, Server]) -> Iterator[Server]:
    """A port of this machine that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield Server(servers[0].data, silent.getsockname()[1])


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program in which the page's blocks run in turn."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def executed() -> Iterator[Block]:
    """Return the page's programs, and its commands."""
    return (block for block in blocks(PAGE) if block.language in {"python", "console"})


def test_page_does_what_it_says(servers: tuple[Server, Server], silence: Server, module: ModuleType) -> None:
    """The page's Python runs from top to bottom, and each curl command gets the answer shown."""
    kinds: list[str] = []
    for block in executed():
        if block.language == "python":
            hosts = (silence, servers[0]) if SILENCE_BEGINS in block.text else servers
            source = "\n" * (block.line - 1) + on_servers(block.text, *hosts)
            exec(compile(source, str(PAGE), "exec"), vars(module))  # noqa: S102  # that is the test
        else:
            asyncio.run(replay(block, vars(module)["app"]))
        kinds.append(block.language)
    assert kinds.count("python") == 6
    assert kinds.count("console") == 1
