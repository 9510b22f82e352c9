"""A web page that classifies a video or what a camera sees, and shows why.

    python -m stf_jax.app --workdir=runs/demo

--workdir may be an exported model.safetensors too. The page is for this machine alone, unless
--host says otherwise. Videos are worked on one at a time, in a process of its own that is ended
when it takes longer than --timeout; nothing of them is kept. Ctrl-C ends the program.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import functools
import ipaddress
import itertools
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from pebble import ProcessExpired, ProcessPool

from stf_jax import host, startup
from stf_jax.video import VideoFault

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: the web app needs a library that is not there ({error}): make install")

if TYPE_CHECKING:
    from stf_jax.analysis import Analyst

TEMPLATES = Path(__file__).parent / "templates"

# An upload of which nothing came for so long is given up, seconds.
_SILENCE = 20.0

# How often somebody who waits is told what is going on, seconds.
_PULSE = 0.25

_LONGEST_NAME = 120

# What the page may do: nothing that does not come from here.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; media-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class Allowance:
    """What one video may cost, and how many may wait.

    Args:
      max_megabytes: of a file, 10^6 bytes.
      max_seconds: of a video.
      timeout: of the work on one, seconds.
      max_waiting: videos beside the one that is worked on; those still on their way count.

    Raises:
      ValueError: nothing would be allowed (names the flag).
    """

    max_megabytes: float
    max_seconds: float
    timeout: float
    max_waiting: int

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("max_megabytes", "max_seconds", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name):g}")
        if self.max_waiting < 0:
            raise ValueError(f"--max_waiting must be 0 at least, got {self.max_waiting}")

    @property
    def max_bytes(self) -> int:
        """Of a file."""
        return int(1e6 * self.max_megabytes)


class Refused(Exception):
    """What is not done, in words for who asked.

    Args:
      status: of HTTP.
      message: why, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# --- in the process that works -------------------------------------------------------------------


def _begin_worker(parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    startup.keep_programs()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent was killed, rather than never."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _analyst(source: str, max_seconds: float) -> "Analyst":
    from stf_jax.analysis import Analyst

    return Analyst.load(source, max_seconds)


def _prepare(source: str, max_seconds: float) -> dict[str, Any]:
    """Loads and compiles; returns what the page says of the network."""
    analyst = _analyst(source, max_seconds)
    analyst.start_up()
    startup.note_programs()
    predictor = analyst.predictor
    return {"classes": predictor.class_names, "warning": predictor.warning}


def _analyse(source: str, max_seconds: float, file: str, name: str, why: bool) -> dict[str, Any]:
    return _analyst(source, max_seconds).analyse(Path(file), name, why=why)


# --- the line in which videos wait ---------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Ticket:
    """A video that somebody sent.

    Attributes:
      file: where it lies until it has been worked on.
      name: what it is called.
      why: whether it is to be explained too.
      begun: whether its turn has come.
    """

    file: Path
    name: str
    why: bool
    begun: bool = False


class Desk:
    """Where videos are worked on, one at a time, by a process that holds the network.

    Args:
      source: the run's folder or exported file.
      allowance: what a video may cost.

    Attributes:
      facts: what the process said of its network; None until it was loaded for the first time.
    """

    def __init__(self, source: str, allowance: Allowance) -> None:
        self.source, self.allowance = source, allowance
        self.facts: dict[str, Any] | None = None
        self._line: list[Ticket] = []
        self._ready = asyncio.Event()
        self._turn = asyncio.Lock()
        self._pool: ProcessPool | None = None

    async def open(self) -> None:
        """Starts the process and has it load the network.

        Raises:
          OSError, ValueError, ImportError: as `stf_jax.load`.
          RuntimeError: the process died of it.
        """
        self._ready.clear()
        self._pool = self._pool or ProcessPool(
            1,
            context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(os.getpid(),),
        )
        arguments = self.source, self.allowance.max_seconds
        try:
            with _deaf_to_interrupts():
                future = self._pool.schedule(_prepare, args=arguments)
            self.facts = await asyncio.wrap_future(future)
        except (ProcessExpired, BrokenProcessPool) as error:
            raise RuntimeError(
                f"the process that loads {self.source} ended by itself ({error}); is there memory "
                "enough?"
            ) from error
        self._ready.set()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    @contextlib.contextmanager
    def place(self, ticket: Ticket) -> Iterator[None]:
        """A place in the line.

        Raises:
          Refused: there is none.
        """
        if len(self._line) > self.allowance.max_waiting:
            raise Refused(
                503, f"{len(self._line)} videos are in the line already: try again in a moment."
            )
        self._line.append(ticket)
        try:
            yield
        finally:
            self._line.remove(ticket)

    def state(self, ticket: Ticket) -> dict[str, Any]:
        """What is going on with a video that waits."""
        if not self._ready.is_set():
            return {"state": "loading"}
        if ticket.begun:
            return {"state": "working"}
        return {"state": "waiting", "ahead": self._line.index(ticket)}

    async def analyse(self, ticket: Ticket) -> dict[str, Any]:
        """Waits for a video's turn, and for what comes of it.

        Raises:
          Refused: it is no usable video, or took too long (says so by its name).
        """
        async with self._turn:
            await self._ready.wait()
            ticket.begun = True
            return await self._work(ticket)

    async def _work(self, ticket: Ticket) -> dict[str, Any]:
        assert self._pool is not None, "open() comes first"
        arguments = self.source, self.allowance.max_seconds, str(ticket.file)
        future = self._pool.schedule(
            _analyse, args=(*arguments, ticket.name, ticket.why), timeout=self.allowance.timeout
        )
        try:
            return await asyncio.wrap_future(future)
        except VideoFault as fault:
            raise Refused(422, str(fault)) from fault
        except TimeoutError as error:
            self._reopen()
            raise Refused(
                422,
                f"{ticket.name!r}: the work on it took longer than {self.allowance.timeout:g} s "
                "and was ended. Cut the video into shorter ones, or start the app with a longer "
                "--timeout.",
            ) from error
        except ProcessExpired as crash:
            self._reopen()
            raise Refused(
                422,
                f"{ticket.name!r}: the process that read it crashed (exit code {crash.exitcode}). "
                "The file is probably damaged; convert it, or send another one.",
            ) from crash

    def _reopen(self) -> None:
        """The process has been replaced by a new one, which knows nothing yet."""
        self._ready.clear()
        self._opening = asyncio.create_task(self.open())


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Threads that start here, and their processes, never hear of Ctrl-C: this one ends them."""
    resource_tracker.ensure_running()  # started later, it would open their ears again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- the server ----------------------------------------------------------------------------------


class OwnPagesOnly:
    """Refuses what other web pages make a browser ask, and tells browsers what a page may do.

    A page of another site may send requests here, and one whose name is made to point here (DNS
    rebinding) may read the answers: its Host or Origin gives it away.

    Args:
      app: what answers otherwise.
      bound: the host that the server was told to listen at.
    """

    def __init__(self, app: ASGIApp, bound: str) -> None:
        self._app, self._local = app, is_loopback(bound)
        self._names = {"localhost", bound.lower()}
        if not self._local:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        wrong = self._wrong(headers.get("host", ""), headers.get("origin"))
        if wrong:
            await JSONResponse({"message": wrong}, 403)(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)

    def _wrong(self, host_header: str, origin: str | None) -> str:
        try:
            name = urllib.parse.urlsplit(f"//{host_header}").hostname or ""
        except ValueError:
            name = ""
        # No name stands for an address but itself.
        if name not in self._names and not (
            is_loopback(name) if self._local else _is_address(name)
        ):
            return f"This server is not {host_header!r}: use the address that it printed."
        if origin is not None and urllib.parse.urlsplit(origin).netloc != host_header:
            return f"Requests of other pages ({origin}) are refused: use this server's own page."
        return ""


def is_loopback(name: str) -> bool:
    """Whether an address reaches this machine only.

    Example:
      >>> [is_loopback(name) for name in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "a.org")]
      [True, True, True, False, False]
    """
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Site:
    """The page and what it asks for.

    Args:
      desk: where videos are worked on.
      folder: for files while they are needed.
    """

    def __init__(self, desk: Desk, folder: Path) -> None:
        self._desk, self._folder = desk, folder
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()

    def application(self, bound: str) -> ASGIApp:
        """What a server runs that listens at the host `bound`."""
        routes = [
            Route("/", self._page),
            Route("/app.css", self._style),
            Route("/app.js", self._script),
            Route("/about", self._about),
            Route("/videos", self._video, methods=["POST"]),
        ]
        return OwnPagesOnly(
            Starlette(routes=routes, exception_handlers={Exception: _say_fault}), bound
        )

    async def _page(self, request: Request) -> Response:
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        )
        page = environment.get_template("app.html.jinja")
        return HTMLResponse(page.render(source=self._desk.source, limits=self._desk.allowance))

    async def _style(self, request: Request) -> Response:
        parts = [(TEMPLATES / name).read_text("utf-8") for name in ("report.css", "app.css")]
        return Response("\n".join(parts), media_type="text/css")

    async def _script(self, request: Request) -> Response:
        return Response((TEMPLATES / "app.js").read_text("utf-8"), media_type="text/javascript")

    async def _about(self, request: Request) -> Response:
        return JSONResponse(self._desk.facts or {})

    async def _video(self, request: Request) -> Response:
        """Takes a video as the request's body; answers with lines of JSON: states, then a result.

        The query has 'name', what to call it, and 'why', 1 or 0.
        """
        name = plain_name(request.query_params.get("name", ""))
        why = request.query_params.get("why", "1") != "0"
        ticket = Ticket(self._folder / f"{next(self._numbers)}", name, why)
        with contextlib.ExitStack() as stack:
            try:
                self._check_size(name, int(request.headers.get("content-length", "0")))
                stack.enter_context(self._desk.place(ticket))
                stack.callback(ticket.file.unlink, missing_ok=True)
                await self._store(request, ticket)
            except Refused as refusal:
                return JSONResponse({"message": str(refusal)}, refusal.status)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            kept = stack.pop_all()
        task = asyncio.create_task(self._desk.analyse(ticket))
        task.add_done_callback(lambda _: kept.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return StreamingResponse(self._told(ticket, task), media_type="application/x-ndjson")

    def _check_size(self, name: str, size: int) -> None:
        if size > self._desk.allowance.max_bytes:
            raise Refused(
                413,
                f"{name!r}: larger than {self._desk.allowance.max_megabytes:g} MB. Cut the video "
                "into shorter ones, or start the app with a larger --max_megabytes.",
            )

    async def _store(self, request: Request, ticket: Ticket) -> None:
        """Writes the body to the ticket's file, as long as it keeps coming and is not too large."""
        size, chunks = 0, request.stream()
        try:
            with open(ticket.file, "xb") as file:
                while chunk := await asyncio.wait_for(anext(chunks, None), _SILENCE):
                    size += len(chunk)
                    self._check_size(ticket.name, size)
                    file.write(chunk)
        except TimeoutError as error:
            silence = f"nothing more of it came for {_SILENCE:g} s"
            raise Refused(408, f"{ticket.name!r}: {silence}; send it again.") from error
        except OSError as error:
            reason = f"it could not be stored on the server ({error.strerror})"
            raise Refused(507, f"{ticket.name!r}: {reason}.") from error

    async def _told(self, ticket: Ticket, task: "asyncio.Task[Any]") -> AsyncIterator[bytes]:
        """What is going on, whenever that changes, and what came of it."""
        said: dict[str, Any] = {}
        try:
            while not task.done():
                if (state := self._desk.state(ticket)) != said:
                    said = state
                    yield _line(state)
                await asyncio.wait({task}, timeout=_PULSE)
            yield _line(_outcome(task))
        finally:
            if not ticket.begun:  # who waited has gone; work that has begun comes to its end soon
                task.cancel()


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _outcome(task: "asyncio.Task[Any]") -> dict[str, Any]:
    try:
        return {"state": "done", **task.result()}
    except Refused as refusal:
        return {"state": "failed", "message": str(refusal)}
    except Exception:
        logging.exception("a video could not be analysed")
        return {"state": "failed", "message": _UNFORESEEN}


_UNFORESEEN = "Something went wrong that should not have; the terminal of the app says what."


async def _say_fault(request: Request, error: Exception) -> Response:
    return JSONResponse({"message": _UNFORESEEN}, 500)


def plain_name(name: str) -> str:
    """What a file is called: the last part of its path, without what cannot be printed.

    Example:
      >>> plain_name("../../etc/a.avi"), plain_name(""), plain_name("C:" + chr(92) + "b.avi")
      ('a.avi', 'video', 'b.avi')
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:_LONGEST_NAME] or "video"


# --- the program ---------------------------------------------------------------------------------


def listen(name: str, port: int) -> socket.socket:
    """Opens the socket.

    Raises:
      OSError: it cannot be (says what to do).
    """
    try:
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.socket(family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(
            f"--host={name} is no address of this machine ({error.strerror}); the default, "
            "127.0.0.1, is for this machine alone"
        ) from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((name, port))
        opened.listen(64)  # or another program could bind it too
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            advice = (
                f"end what uses it, or choose another: --port={port + 1}, or 0 for any free one"
            )
            raise OSError(f"port {port} of {name} is in use: {advice}") from error
        raise OSError(f"cannot listen at --host={name} --port={port}: {error.strerror}") from error
    return opened


async def serve(desk: Desk, site: ASGIApp, opened: socket.socket) -> str:
    """Serves until a signal comes, or the network cannot be loaded; returns why it cannot."""
    server = uvicorn.Server(
        uvicorn.Config(
            site,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            # Uvicorn's own configuration would close every handler that there is, absl's with the
            # stream that it writes to.
            log_config=None,
            log_level="critical",
            server_header=False,
            timeout_graceful_shutdown=0,
        )
    )

    async def load() -> str:
        begun = time.monotonic()
        try:
            await desk.open()
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            server.should_exit = True
            return str(error)
        except Exception as error:
            # Nobody waits for this task: it would be a page that loads for ever.
            logging.exception("the network could not be loaded")
            server.should_exit = True
            return f"{desk.source} could not be loaded ({error!r})"
        print(f"loaded and compiled in {time.monotonic() - begun:.1f} s", flush=True)
        return ""

    loading = asyncio.create_task(load())
    try:
        await server.serve(sockets=[opened])
    finally:
        loading.cancel()
    return loading.result() if loading.done() and not loading.cancelled() else ""


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stf_jax.app",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, help="folder of the run, or an exported model.safetensors")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=7860, help="0 takes any free one (default: %(default)s)")
    add("--max_megabytes", type=float, default=200.0, help="of a file (default: %(default)g)")
    add("--max_seconds", type=float, default=60.0, help="of a video (default: %(default)g)")
    add(
        "--timeout", type=float, default=120.0, help="seconds of work on one (default: %(default)g)"
    )
    add("--max_waiting", type=int, default=4, help="videos that may wait (default: %(default)s)")
    options = parser.parse_args(argv)
    if not 0 <= options.port <= 65535:
        parser.error(f"--port must be in [0, 65535], got {options.port}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page; returns the exit code."""
    options = _options(argv)
    names = ("max_megabytes", "max_seconds", "timeout", "max_waiting")
    try:
        allowance = Allowance(**{name: getattr(options, name) for name in names})
        opened = listen(options.host, options.port)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not is_loopback(options.host):
        print(
            f"warning: --host={options.host} lets everybody who reaches this machine send it "
            "videos; there is no password, and nothing is encrypted. Browsers give the camera "
            "to pages at localhost or of HTTPS only.",
            file=sys.stderr,
        )
    shown = f"[{options.host}]" if ":" in options.host else options.host
    print(f"http://{shown}:{opened.getsockname()[1]} (Ctrl-C ends it); loading {options.workdir}")
    sys.stdout.flush()
    # As Ctrl-C does, it ends the process that works and removes the videos.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    desk = Desk(options.workdir, allowance)
    try:
        with opened, tempfile.TemporaryDirectory(prefix="stf_jax_app_") as folder:
            site = Site(desk, Path(folder)).application(options.host)
            failure = asyncio.run(serve(desk, site, opened))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        desk.close()
    if failure:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failure))


if __name__ == "__main__":
    host.use_huge_pages()
    sys.exit(main())
