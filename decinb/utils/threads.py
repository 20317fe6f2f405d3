"""Use as many threads as pay off while others use the processor too.

PyTorch splits each operation of a network among all cores, and the threads wait for each other many hundred times a
call, spinning. Beside one busy process, one of them has to wait for its turn, and the others spin for nothing: on two
cores, a sweep was measured at a twentieth of its quiet rate, where one thread kept two thirds of it.

Two things are done about it. ``limit_spinning`` bounds the spinning before torch is loaded. ``adapt_threads`` times the
calls of a network, and changes the number of threads while it runs. The environment variable ``DECINB_FIXED_THREADS=1``
turns both off.
"""

import os
import sys
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

SWITCH = "DECINB_FIXED_THREADS"
SPINS = 30_000  # about 1 ms: less makes a quiet machine slower; more, a busy one until its threads are changed
SECONDS = 3.0  # at least, between two looks at another number of threads
MAX_COST_BELOW, MAX_COST_ABOVE = 0.01, 0.05  # of the time, for looks at fewer and at more threads
LOST = 0.25  # of a core: less is missing on a quiet machine
GAIN = 0.9  # of the time of a call: what must be left to change the number of threads


def limit_spinning() -> None:
    """Bound how long the threads of GNU OpenMP, which torch uses on Linux, spin before they sleep.

    Does nothing after torch is loaded, or if the environment sets ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY``.
    """
    if "torch" not in sys.modules and not ({SWITCH, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def adapt_threads(network: Any) -> None:
    """Let each call of a network on the CPU choose the number of threads, for this call and what follows it."""
    if SWITCH not in os.environ:
        network.register_forward_pre_hook(_before, with_kwargs=True)
        network.register_forward_hook(_after, with_kwargs=True)


def most_threads() -> int:
    """Return how many threads torch uses at most, even while it uses fewer."""
    chooser = _chooser()
    return chooser.numbers[-1] if chooser.get() == chooser.applied else chooser.get()


class ThreadChooser:
    """Choose between numbers of threads by timing calls.

    The numbers are all, one less, half, and one. All threads stay in use while the process gets all the processor time
    that it can use. Once it does not, a call is made with the next smaller number, after one to warm up where that
    number is new for such a call; it is kept if the call was faster. From a smaller number, a call with the next larger
    one is made every few seconds.

    Args:
        get, set: read and change the number of threads. A number set by anyone else is the most from then on.
        clock, cpu_clock: seconds, and seconds of processor time that all threads of the process have used.
    """

    def __init__(
        self,
        get: Callable[[], int],
        set: Callable[[int], None],
        clock: Callable[[], float] = perf_counter,
        cpu_clock: Callable[[], float] = process_time,
    ):
        self.get, self.set, self.clock, self.cpu_clock = get, set, clock, cpu_clock
        self.applied = 0
        self._restart(get())

    def _restart(self, most: int) -> None:
        self.numbers = sorted({1, max(1, most // 2), max(1, most - 1), most})
        self.threads = self.applied = most
        self.trial: int | None = None
        self.last: _Call | None = None
        self.warm: set[tuple[Hashable, int]] = set()
        self.next_look = 0.0
        self.upward = False

    def before(self, work: Hashable) -> None:
        """Set the number of threads for a call; calls with equal ``work`` take equally long."""
        if (now := self.get()) != self.applied:
            self._restart(now)
        if self.numbers == [1]:
            return
        if self.last is None or self.last.work != work:
            self.trial = None  # there is nothing to compare with
        elif self.trial is None and self._should_look():
            self.trial = self._neighbour()
        self._apply(self.trial or self.threads)
        self.started = self.clock(), self.cpu_clock()

    def after(self, work: Hashable) -> None:
        """Take the time of the call that ``before`` began."""
        if self.numbers == [1] or self.applied != (self.trial or self.threads):
            return
        seconds, cpu_seconds = self.clock() - self.started[0], self.cpu_clock() - self.started[1]
        is_warm = (work, self.applied) in self.warm
        self.warm.add((work, self.applied))
        if not is_warm:
            return
        if self.trial is None:
            self.last = _Call(work, seconds, self.applied - cpu_seconds / max(seconds, 1e-9))
        else:
            self._decide(work, seconds)

    def _should_look(self) -> bool:
        is_slowed = self.threads < self.numbers[-1] or self.last.lost > LOST
        return is_slowed and self.clock() >= self.next_look

    def _neighbour(self) -> int:
        """Return the next smaller or larger number, by turns where there are both."""
        place = self.numbers.index(self.threads)
        if place == 0 or (self.upward and place + 1 < len(self.numbers)):
            return self.numbers[place + 1]
        return self.numbers[place - 1]

    def _decide(self, work: Hashable, seconds: float) -> None:
        """Keep the number that was tried if it is faster, and plan the next look."""
        upward, wait = self.trial > self.threads, SECONDS
        if seconds < GAIN * self.last.seconds:
            self.threads, self.last = self.trial, _Call(work, seconds, 0.0)
            if self.threads not in (self.numbers[0], self.numbers[-1]):
                wait = 0.0  # go on in the same direction
        else:
            cost = max(0.0, seconds - self.last.seconds)
            wait = max(wait, cost / (MAX_COST_ABOVE if upward else MAX_COST_BELOW))
            upward = not upward
        self.upward, self.trial = upward, None
        self.next_look = self.clock() + wait
        self._apply(self.threads)

    def _apply(self, threads: int) -> None:
        if threads != self.applied:
            self.set(threads)
            self.applied = threads


@dataclass(frozen=True)
class _Call:
    """What a call did, the seconds it took, and the cores that its threads did not get."""

    work: Hashable
    seconds: float
    lost: float


_of_thread = threading.local()  # torch's number of threads belongs to the Python thread that sets it


def _chooser() -> ThreadChooser:
    if not hasattr(_of_thread, "chooser"):
        import torch  # here, so that importing decinb does not load it

        _of_thread.chooser = ThreadChooser(torch.get_num_threads, torch.set_num_threads)
    return _of_thread.chooser


def _work(network: Any, args: tuple, kwargs: dict[str, Any]) -> Hashable:
    values = [*args, *kwargs.values()]
    return id(network), *(tuple(value.shape) for value in values if hasattr(value, "shape"))


def _before(network: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if _is_on_cpu(network):
        _chooser().before(_work(network, args, kwargs))


def _after(network: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    if _is_on_cpu(network):
        _chooser().after(_work(network, args, kwargs))


def _is_on_cpu(network: Any) -> bool:
    return next(network.parameters()).device.type == "cpu"
