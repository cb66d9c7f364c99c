"""Reading ahead: the same items, the error in its turn, and a thread that ends."""

import threading

import pytest

from data_prep.sharding.writer import read_ahead


def test_items_come_in_order_and_no_more_than_asked_for_are_read():
    taken, enough = [], threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            if number == 3:
                enough.set()
            yield number

    ahead = read_ahead(items(), 3)
    assert next(ahead) == 0
    assert enough.wait(10) and len(taken) <= 5  # the first one, three ahead of it, and one that waits for room
    assert list(ahead) == list(range(1, 100))


def test_an_error_comes_after_what_was_read_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    ahead = read_ahead(items(), 8)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(ahead)


def test_the_thread_ends_with_its_reader():
    def items():
        while True:
            yield threading.current_thread()

    ahead = read_ahead(items(), 2)
    thread = next(ahead)
    assert thread.daemon and thread is not threading.current_thread()
    ahead.close()
    thread.join(10)
    assert not thread.is_alive()
