"""Reads ahead in a thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, of which a thread reads up to `count` before they are asked for; its error is raised in its turn.

    The thread is a daemon: nobody waits for a network that does not answer once the program ends.
    """
    found: queue.SimpleQueue[object] = queue.SimpleQueue()
    room, closed = threading.Semaphore(count), threading.Event()

    def read() -> None:
        try:
            for item in items:
                found.put(item)
                room.acquire()
                if closed.is_set():
                    return
            found.put(_END)
        except BaseException as error:
            found.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (item := found.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        room.release()
