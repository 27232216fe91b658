"""How every command ends: with a sentence where it cannot go on, and on Ctrl-C with another and exit code 130.

A script imports this before anything else, since the rest takes seconds: from then on Ctrl-C is answered.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

STOPPED = 130  # what a shell says of a program that Ctrl-C ended
_sentence = "Stopped before anything was done: the same command begins again."


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """While libraries are imported, where an exception may be taken for something else."""
    _say()
    os._exit(STOPPED)


def _end_again(number: int, frame: FrameType | None) -> NoReturn:
    """The second time."""
    _say()
    os._exit(STOPPED)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """The first time, what is half-written is cleared away. Interrupted in that, a program may hang (Python 3.11)."""
    signal.signal(signal.SIGINT, _end_again)
    raise KeyboardInterrupt


def _leave_to_parent() -> None:
    """A terminal sends Ctrl-C to workers as well. It is their parent's to answer, who ends them; or ends at the second
    one without a look at them, unless it answers in its own way, as training does."""
    answer: Any = signal.SIG_IGN
    if signal.getsignal(signal.SIGINT) is _interrupt:
        answer = lambda *_: signal.signal(signal.SIGINT, lambda *_: os._exit(STOPPED))  # noqa: E731
    signal.signal(signal.SIGINT, answer)


# Where a shell has a job ignore Ctrl-C, in the background, it stays ignored.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    if multiprocessing.parent_process() is None:
        signal.signal(signal.SIGINT, _end_at_once)
        os.register_at_fork(after_in_child=_leave_to_parent)
    else:
        _leave_to_parent()


def run_command(main: Callable[[], int | None], stopped: str, *errors: type[Exception]) -> None:
    """Runs a command, the whole of a program.

    Args:
        main: Does it all, and returns the exit code, None for 0.
        stopped: What is said after Ctrl-C: what is kept, and what the same command does next.
        errors: Those whose text is one sentence that says what is wrong; any other is a bug, with its traceback.

    Raises:
        SystemExit: It was stopped, or did not do everything that was asked for.
    """
    global _sentence  # noqa: PLW0603  # a program has one command, and a signal handler takes no arguments
    _sentence = f"Stopped: {stopped}"
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        if code := main():
            sys.exit(code)
    except errors as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        _say()
        sys.exit(STOPPED)


def _say() -> None:
    """Says it once, whatever the number of ranks: a launcher tells each process which one it is."""
    global _sentence  # noqa: PLW0603
    if _sentence and int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0) == 0:
        os.write(2, f"\n{_sentence}\n".encode())  # ^C stands in the line, or a progress bar that nothing closed
    _sentence = ""


__all__ = ["STOPPED", "run_command"]
