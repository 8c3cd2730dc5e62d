"""A loop of one's own that another thread interrupts: whatever it waits for ends, also what it begins later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from milkglass.transports.own_loop import OwnLoop


@pytest.fixture
def own() -> Iterator[OwnLoop]:
    loop = OwnLoop()
    yield loop
    loop.close()


async def _told(answer: str) -> str:
    await asyncio.sleep(0)
    return answer


def test_what_waits_ends_when_another_thread_interrupts(own: OwnLoop) -> None:
    timer = threading.Timer(0.1, own.interrupt)
    timer.start()
    with pytest.raises(InterruptedError):
        own.finish(asyncio.sleep(60))
    timer.join()


def test_an_interrupt_while_nothing_runs_is_not_forgotten_until_it_is_given_up(own: OwnLoop) -> None:
    own.interrupt()
    for _ in range(2):
        with pytest.raises(InterruptedError):
            own.finish(_told("never"))
    own.give_up()
    assert own.finish(_told("again")) == "again"
