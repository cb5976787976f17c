"""SIGINT, SIGTERM and SIGHUP during a training: the step ends, the state is saved, the message says how to continue."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
NOTICE = b"\nanomem: finishing this step, then saving; once more to stop at once\n"


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training; the text says what was saved and how to continue.

    Args:
        signal: its number.
        sentence: what was saved and how to continue.

    Example:
        >>> try:
        ...     train(config)
        ... except Interrupted as stop:
        ...     print(stop)  # "stopped at step 40 of stage1; `anomem train --resume runs/mine` continues from there"
    """

    def __init__(self, signal: int, sentence: str = "") -> None:
        super().__init__(sentence)
        self.signal = signal


class Request:
    """Whether a signal has asked the stage to stop."""

    signal: int | None = None


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """A signal raises `Interrupted`, also those that would end the process."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled_by(stop):
        yield


@contextmanager
def stopping_after_the_step() -> Iterator[Request]:
    """The first signal is noted, for the caller to look at after each step; the second raises `Interrupted`.

    Raises:
        Interrupted: when the block ends after a signal, also if it ends in a RuntimeError: a worker that reads images
            may have received the same signal.
    """
    request = Request()

    def note(number: int, _: FrameType | None) -> None:
        if request.signal is not None:
            raise Interrupted(number)
        request.signal = number
        # Not `print`: the signal may have interrupted one.
        if os.environ.get("RANK", "0") == "0":  # the first process of torchrun's speaks
            with contextlib.suppress(OSError):
                os.write(2, NOTICE)

    with _handled_by(note):
        try:
            yield request
        except RuntimeError as error:
            if request.signal is None:
                raise
            raise Interrupted(request.signal) from error
    if request.signal is not None:
        raise Interrupted(request.signal)


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Install a handler, in the main thread only: elsewhere Python allows none. Ignored signals stay so (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def of_this_process(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            handler(number, frame)
        elif number == signal.SIGTERM:  # a forked worker; the other signals reach its parent too, which ends it
            os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, of_this_process)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
