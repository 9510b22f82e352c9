"""Several processes, on one machine or many, that train one run together: they meet, agree and end.

JAX divides the arithmetic among them (`parallel`). Here is the rest: process 0 alone decides and
writes while the others wait to be told, and when one process fails, is stopped or dies, all of
them end with a message instead of waiting for it for ever. With one process nothing here does
anything.
"""

import atexit
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from stf_jax import progress
from stf_jax.native_errors import AGAIN, START

Found = TypeVar("Found")

# A process that does not answer for so long, seconds, is dead. What ends while its machine lives is
# noticed at once: the system closes its connections.
SILENCE = 30
# A process that is told to end finishes the checkpoint that it is writing if that takes less; any
# longer, and jaxlib would miss the one that told it.
_GRACE = SILENCE - 5.0

# What jaxlib calls the end of another process.
_LOST = re.compile(r"gloo|nccl|coordination|socket closed|connection (reset|closed)", re.IGNORECASE)


class Interrupted(InterruptedError):
    """The run was asked to stop; `signum` says by which signal.

    Args:
      signum: the number of the signal.
      everywhere: whether all processes know already, and have saved.
    """

    def __init__(self, signum: int, *, everywhere: bool):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.everywhere = signum, everywhere


class _Company:
    """This process among the others, over the key-value store that process 0 keeps for them."""

    def __init__(self, client: Any, process: int, processes: int):
        self.process, self.processes = process, processes
        self._client = client
        self._told = 0
        self._over = threading.Event()
        self._writing = threading.RLock()
        self.heard = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True, name="end of others")
        self._listener.start()

    def tell(self, key: str, value: Any) -> None:
        self._client.key_value_set(f"stf/{key}", json.dumps(value))

    def wait_for(self, key: str, seconds: float = float("inf")) -> Any:
        """Returns what is told under a key; in short waits, between which signals are handled."""
        end = time.monotonic() + seconds
        while True:
            try:
                return json.loads(self._client.blocking_key_value_get(f"stf/{key}", 500))
            except RuntimeError as error:
                late = time.monotonic() > end or self._over.is_set()
                if "DEADLINE_EXCEEDED" not in str(error) or late:
                    raise

    def next_key(self) -> str:
        """The same in every process: all of them ask in the same order."""
        self._told += 1
        return f"told/{self._told}"

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        with self._writing:
            yield

    def end_all(self, code: int, message: str) -> None:
        """Tells the others that this process ends, and waits a little until they have heard."""
        try:
            self.tell("end", [self.process, code, message])
        except RuntimeError:
            if self.heard.wait(2):  # another was first; what it said is printed already
                self.rest()
            return
        end = time.monotonic() + 5
        for other in set(range(self.processes)) - {self.process}:
            try:
                self.wait_for(f"heard/{other}", end - time.monotonic())
            except RuntimeError:
                continue  # dead
        time.sleep(0.5)  # for those to be gone who would miss process 0's store

    def rest(self) -> NoReturn:
        """Leaves the end of this process to the thread that listens."""
        while True:
            time.sleep(1)

    def part(self) -> None:
        """Waits until all have done their work; then the connections may be closed."""
        import jax

        self.tell(f"done/{self.process}", True)
        for other in range(self.processes):
            self.wait_for(f"done/{other}")
        self._over.set()
        # Python cannot end while a thread waits in native code: C++ would call it a crash.
        self._listener.join()
        jax.distributed.shutdown()

    def _listen(self) -> None:
        try:
            process, code, message = self.wait_for("end")
        except RuntimeError:
            return  # process 0 is gone, or all is done: others say so
        if process == self.process or self._over.is_set():
            return
        self.heard.set()
        print(f"\nprocess {process} of this run ended: {message}", file=sys.stderr, flush=True)
        # A checkpoint that is being written is worth more than a quick end.
        self._writing.acquire(timeout=_GRACE)
        try:
            self.tell(f"heard/{self.process}", True)
        except RuntimeError:
            _end(code)  # process 0 has not waited
        if not self.process:
            time.sleep(0.5)  # the one that failed leaves before its store does
        _end(code)


_company: _Company | None = None


def leads() -> bool:
    """Whether this process is the one that writes: process 0, or the only one."""
    return _company is None or _company.process == 0


def from_first(find: Callable[[], Found]) -> Found:
    """What process 0 finds, in every process; all of them must ask.

    Args:
      find: called in process 0 only; returns what JSON can say. What it raises ends all processes.
    """
    if _company is None:
        return find()
    key = _company.next_key()
    if _company.process == 0:
        _company.tell(key, find())
    return _company.wait_for(key)


def after_first(work: Callable[[], Found]) -> Found:
    """Does something in process 0 and, when it is done there, in the others too."""
    done: list[Found] = []
    from_first(lambda: done.append(work()))
    return done[0] if done else work()


def check_same(what: str, find: Callable[[], Any]) -> None:
    """Makes sure that something is in this process as it is in process 0.

    Args:
      what: its name, for the message.
      find: returns what JSON can say; not called where there is only one process.

    Raises:
      ValueError: it is not.
    """
    if _company is None:
        return
    value = json.loads(json.dumps(find()))
    first = from_first(lambda: value)
    if first != value:
        raise ValueError(
            f"{what} differs between the processes of this run: all of them need the same command "
            f"and must see the same files. Process 0 has {first}, this one has {value}"
        )


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is inside is finished before this process ends on account of another."""
    if _company is None:
        yield
        return
    with _company.undisturbed():
        yield


@contextmanager
def joined(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool
) -> Iterator[None]:
    """Joins the other processes of a run, if it has others; must precede any use of a device.

    Args:
      coordinator: 'host:port' of process 0, or None for a run of one process.
      processes: how many there are.
      process: the number of this one, from 0.
      detect: read all three from the environment instead (SLURM, Open MPI, Kubernetes).

    Raises:
      ValueError: the arguments do not fit each other.
      RuntimeError: the others do not come, or one of them has ended.
      Interrupted: by SIGTERM or SIGINT.
    """
    global _company
    if not _asked(coordinator, processes, process, detect):
        yield
        return
    _company = _meet(coordinator, processes, process, detect)
    if _company.process:
        progress.silence()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        yield
        _company.part()
    except Interrupted as stopped:
        if stopped.everywhere:
            _company.part()
        else:
            _company.end_all(128 + stopped.signum, str(stopped))
            atexit.register(_end, 128 + stopped.signum)
        raise
    except BaseException as error:
        _fail(_company, error)


def _asked(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool
) -> bool:
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and (detect or not all(given)):
        raise ValueError(
            "--coordinator, --processes and --process are given together; --distributed alone, "
            "where SLURM or Open MPI says them"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"--process: got {process}, allowed: 0 to {processes - 1} (--processes)")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator: got {coordinator!r}, expected host:port")
    return detect or any(given)


def _meet(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool
) -> _Company:
    if coordinator is not None and process == 0:
        _check_port(int(coordinator.rpartition(":")[2]))
    import jax
    from jax._src import distributed  # its store has no public name; orbax uses it likewise

    logging.getLogger("jax").setLevel(logging.WARNING)  # it tells of every address
    # JAX's own would take SIGTERM from us, and knows nothing of SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=START,
            heartbeat_timeout_seconds=SILENCE,
        )
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ValueError) and detect:
            raise ValueError(
                "--distributed: neither SLURM nor Open MPI nor Kubernetes has started this process "
                f"({error}) Start it through them, such as `srun python -m stf_jax.main ...`, or "
                "use --coordinator, --processes and --process"
            ) from error
        atexit.register(_end, 1)  # JAX would say goodbye to those whom it has not met
        where = coordinator or "found by --distributed"
        raise RuntimeError(
            f"the processes of this run did not meet (coordinator {where}): {error}. Start all of "
            f"them within {START} s, with a port of process 0's machine that is free and that the "
            "others reach"
        ) from error
    state = distributed.global_state
    return _Company(state.client, state.process_id, state.num_processes)


def _check_port(port: int) -> None:
    """On a port that is in use jaxlib 0.10.2 breaks down without a word."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RuntimeError(
                f"--coordinator: port {port} of this machine cannot be used ({error.strerror}). "
                "Choose another, the same for all processes"
            ) from None


def _stop(number: int, _: Any) -> None:
    """Outside of the training loop, which has its own handlers, a signal ends all at once."""
    raise Interrupted(number, everywhere=False)


def _fail(company: _Company, error: BaseException) -> NoReturn:
    """Ends all processes because of an error in this one, which may be the end of another."""
    lost = isinstance(error, ValueError | RuntimeError) and _LOST.search(str(error))
    if company.heard.wait(2 if lost else 0):
        company.rest()
    if isinstance(error, SystemExit):
        code, message = 1, f"it was left with {error.code}"
    elif lost:
        reason = str(error).splitlines()[0]
        code, message = 1, f"a process of this run has ended ({reason}). {AGAIN}"
    else:
        code, message = 1, str(error) or type(error).__name__
    company.end_all(code, message)
    # JAX would say goodbye to processes that are gone, and wait for their answer.
    atexit.register(_end, code)
    if lost:
        raise RuntimeError(message) from error
    raise error


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
