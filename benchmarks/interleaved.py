"""Interleaved measurement of several implementations, each in its own process, so that noise affects all of them."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from data_prep.common.command_line import UserError
from eval.common.devices import peak_memory

Workload = Callable[[], float | None]  # runs once; may return its seconds, which are otherwise measured
Setup = Callable[[], Workload]  # loads and compiles what a workload needs


def run_interleaved(
    setups: dict[str, Setup], rounds: int, variables: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, tuple[list[float], int]]:
    """Measures workloads in turn, each once per round, and returns the seconds and the peak memory in bytes of each.

    Args:
        setups: by name of the implementation; picklable, as each is called in a process of its own. The first run of
            each workload is a warm-up and is not measured.
        variables: by the same names, environment variables of the process; others are as here.

    Raises:
        UserError: if one fails; its process has printed the error.
    """
    context = get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    results: dict[str, tuple[list[float], int]] = {name: ([], 0) for name in setups}
    try:
        for name, setup in setups.items():
            connections[name], remote = context.Pipe()
            processes.append(context.Process(target=_serve, args=(remote, setup)))
            with _environment((variables or {}).get(name, {})):
                processes[-1].start()
            remote.close()
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


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, setup: Setup) -> None:
    workload, cuda = setup(), torch.cuda.is_available()
    while connection.recv():
        started = time.perf_counter()
        seconds = workload()
        if cuda:
            torch.cuda.synchronize()
        seconds = seconds or time.perf_counter() - started
        connection.send((seconds, peak_memory(torch.device("cuda" if cuda else "cpu"))))
        if cuda:
            torch.cuda.empty_cache()  # frees memory for the other processes


def spread(values: list[float], form: str) -> str:
    """Formats `MEDIAN (MIN to MAX)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
