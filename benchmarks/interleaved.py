"""Contenders that take turns, each in a process of its own, so that what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from data_prep.common.command_line import UserError
from eval.common.devices import peak_memory

Turn = Callable[[], float | None]  # does its work, and may say itself how many seconds of it count


def contest(contenders: dict[str, Callable[[], Turn]], rounds: int) -> dict[str, tuple[list[float], int]]:
    """The seconds of each contender's turns, one a round, and its peak memory in bytes.

    Args:
        contenders: what makes a contender, to be called in its own process (and so picklable). A first turn, in which
            things are compiled and allocated, is not counted.

    Raises:
        UserError: where one has failed; its own error is on the screen.
    """
    context = get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    results: dict[str, tuple[list[float], int]] = {name: ([], 0) for name in contenders}
    try:
        for name, make in contenders.items():
            connections[name], other = context.Pipe()
            processes.append(context.Process(target=_contend, args=(other, make)))
            processes[-1].start()
            other.close()
            connections[name].send(True)
            connections[name].recv()
        for _ in range(rounds):
            for name, connection in connections.items():
                connection.send(True)
                seconds, memory = connection.recv()
                results[name] = ([*results[name][0], seconds], memory)
    except (EOFError, ConnectionError) as error:
        raise UserError(f"{name!r} has failed; its own error is above") from error
    finally:
        for connection, process in zip(connections.values(), processes, strict=True):
            if process.is_alive():
                connection.send(False)
            process.join()
    return results


def _contend(connection: Connection, make: Callable[[], Turn]) -> None:
    turn, cuda = make(), torch.cuda.is_available()
    while connection.recv():
        started = time.perf_counter()
        seconds = turn()
        if cuda:
            torch.cuda.synchronize()
        seconds = seconds or time.perf_counter() - started
        connection.send((seconds, peak_memory(torch.device("cuda" if cuda else "cpu"))))
        if cuda:
            torch.cuda.empty_cache()  # for the others' turns


def spread(values: list[float], form: str) -> str:
    """`MEDIAN (LEAST to MOST)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
