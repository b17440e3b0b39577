"""Instructions a request, by the processor's own counter: hardly any noise, and no word about time.

The counter is Linux's `perf_event_open`, which needs no program. Where the kernel, a container or a virtual
machine does not give it, the rows are left out, and the reason is told.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from attrs import frozen

from benchmarks.contenders import BARE
from benchmarks.measuring import Plan, Row, in_turn, plain
from benchmarks.sites import Site, Stand

ROUNDS = 5
UNIT = "1,000 instructions"
_SYSCALL = {"x86_64": 298, "aarch64": 241}
_HARDWARE, _INSTRUCTIONS, _NO_KERNEL_NO_HYPERVISOR = 0, 1, 0b1100000
_ATTRIBUTES_SIZE = 64
_KINDS = (
    ("A", "untouched request", "/untouched", 400),
    ("B", "session taken, no SQL", "/taken", 200),
    ("D", "one SELECT on PostgreSQL", "/selected", 100),
    ("E", "one INSERT and COMMIT on PostgreSQL", "/inserted", 60),
)


@frozen
class Counter:
    """Counts what the calling thread does outside the kernel."""

    descriptor: int

    def read(self) -> int:
        """Return the instructions so far."""
        return int.from_bytes(os.read(self.descriptor, 8), "little")


@contextmanager
def counter() -> Generator[Counter]:
    """Open the counter; raises OSError where there is none."""
    number = _SYSCALL.get(platform.machine()) if platform.system() == "Linux" else None
    if number is None:
        message = f"no counter is known for {platform.system()} on {platform.machine()}"
        raise OSError(message)
    attributes = struct.pack(
        "IIQQQQQ", _HARDWARE, _ATTRIBUTES_SIZE, _INSTRUCTIONS, 0, 0, 0, _NO_KERNEL_NO_HYPERVISOR
    ).ljust(_ATTRIBUTES_SIZE, b"\0")
    this_thread, any_processor, no_group, no_flags = 0, -1, -1, 0
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(
        number, attributes, this_thread, any_processor, no_group, no_flags
    )
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"perf_event_open: {os.strerror(code)}")
    try:
        yield Counter(descriptor)
    finally:
        os.close(descriptor)


async def instructions(stand: Stand, plan: Plan) -> list[Row]:
    """Thousands of instructions of one request, the bare application's included."""
    rows: list[Row] = []
    with counter() as cpu:
        for key, what, path, usual in _KINDS:
            sites = stand.sites if key in "AB" else stand.with_session
            samples = await in_turn(
                {
                    name: partial(
                        _count, cpu, site, "/untouched" if name == BARE else path, plan.times(usual)
                    )
                    for name, site in sites.items()
                },
                min(ROUNDS, plan.rounds),
            )
            rows.append(
                Row(
                    key=key,
                    what=what,
                    unit=UNIT,
                    framework=stand.framework,
                    figures=plain(samples),
                )
            )
    return rows


async def _count(cpu: Counter, site: Site, path: str, times: int) -> float:
    for _ in range(times):
        await site.get(path)
    before = cpu.read()
    for _ in range(times):
        await site.get(path)
    return (cpu.read() - before) / times / 1e3
