"""Talks to vLLM servers from one thread of its own, and sees when one of them is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import aiohttp

from lit_stepwise.errors import EngineError

Result = TypeVar("Result")

_HEALTH_EVERY_SECONDS = 1.0
_BACKOFF_SECONDS = (0.1, 1.0)  # first and longest
_FAULTS = (aiohttp.ClientError, OSError, asyncio.TimeoutError)


class LostError(Exception):
    """A server does not answer."""

    def __init__(self, reason: str, since: float) -> None:
        """Remember since when, by the clock of the loop."""
        super().__init__(reason)
        self.since = since


class RefusedError(Exception):
    """A server answered with an HTTP error."""

    def __init__(self, path: str, status: int, text: str) -> None:
        """Remember the status."""
        super().__init__(f"HTTP {status} to {path.partition('?')[0]}: {text[:500]}")
        self.status = status


class Server:
    """One server as this process sees it. For the loop's thread only."""

    def __init__(self, url: str, reconnect_seconds: float, health_seconds: float) -> None:
        """Connect when there is something to say.

        Args:
            url: ``http://host:port``, or ``unix:/path/of/a/socket``.
            reconnect_seconds: After which a server that shows no sign of life is lost.
            health_seconds: The same for the engine behind a server that does answer.
        """
        self.url = url
        self.num_open = 0
        """Calls that wait for an answer."""
        self.failing_since: float | None = None
        """By the clock of the loop; None while it answers."""
        self.failed_at = 0.0
        """The last time that it did not; 0 while it answers."""
        self.failure = ""
        """What was first seen of it."""
        self._reconnect_seconds = reconnect_seconds
        self._health_seconds = health_seconds
        self._session = _session(url)
        self._watch: asyncio.Task[None] | None = None

    async def call(self, path: str, body: Any = None, get: bool = False) -> Any:
        """The answer, if there comes one: raises ``LostError`` when the server is lost meanwhile, else waits."""
        self.num_open += 1
        watch = self._watch = self._watch or asyncio.create_task(self._attend())
        answer = asyncio.create_task(self._exchange(path, body, get))
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                watch.result()
            return await answer
        finally:
            self.num_open -= 1
            if watch is self._watch and (self.num_open == 0 or watch.done()):
                self._watch = None
                await _cancel(watch)
            await _cancel(answer)

    async def check(self) -> None:
        """Raise ``LostError`` or ``RefusedError`` unless it serves."""
        await self._exchange("/health", None, True, self._reconnect_seconds)

    async def version(self) -> str:
        """Label of the weights it has. Comes from the engine itself, which answers between two steps."""
        answer = await self._exchange("/weight_info", None, True, self._reconnect_seconds)
        try:
            return str(answer["weight_version"])
        except (KeyError, TypeError) as error:
            raise RefusedError("/weight_info", 200, str(answer)) from error

    def fail(self, error: Exception, since: float) -> None:
        """Note that it does not answer."""
        if self.failing_since is None:
            self.failing_since, self.failure = since, str(error)
        self.failed_at = asyncio.get_running_loop().time()

    def recover(self) -> None:
        """Note that it does."""
        self.failing_since, self.failed_at = None, 0.0

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _exchange(self, path: str, body: Any, get: bool, seconds: float | None = None) -> Any:
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=seconds, connect=self._reconnect_seconds)
        try:
            async with self._session.request("GET" if get else "POST", path, json=body, timeout=timeout) as response:
                if response.status != 200:
                    raise RefusedError(path, response.status, await response.text())
                return await response.json() if response.content_type == "application/json" else None
        except ValueError as error:
            raise RefusedError(path, 200, f"no JSON: {error}") from error
        except _FAULTS as error:
            raise LostError(f"{type(error).__name__} {error}".strip(), loop.time()) from error

    async def _attend(self) -> None:
        """Look at it from time to time; ends by ``LostError`` alone."""
        loop = asyncio.get_running_loop()
        alive = began = loop.time()
        engine = asyncio.create_task(self._exchange("/weight_info", None, True))
        try:
            while True:
                await asyncio.sleep(_HEALTH_EVERY_SECONDS)
                try:
                    await self.check()
                    alive = loop.time()
                except RefusedError as error:
                    raise LostError(str(error), alive) from error
                except LostError as error:
                    if loop.time() - alive > self._reconnect_seconds:
                        raise LostError(f"no sign of life: {error}", alive) from error
                if engine.done():
                    with suppress(LostError, RefusedError):
                        engine.result()
                    began, engine = loop.time(), asyncio.create_task(self._exchange("/weight_info", None, True))
                elif loop.time() - began > self._health_seconds:
                    raise LostError(f"its engine has not answered for {self._health_seconds:g} seconds", began)
        finally:
            await _cancel(engine)


class Servers:
    """Servers that hold the same weights. Its methods are for the caller's thread, the coroutines for its own."""

    def __init__(self, urls: Sequence[str], reconnect_seconds: float, health_seconds: float, first: int = 0) -> None:
        """Start the thread.

        Args:
            urls: As ``Server`` takes them.
            reconnect_seconds: As for ``Server``; a request is tried again for as long.
            health_seconds: As for ``Server``.
            first: Which of equally busy servers comes first, so that ranks do not all choose the same.
        """
        self._reconnect_seconds = reconnect_seconds
        self._first = first
        self._sessions: dict[str, Server] = {}
        self.token = ""
        """What the labels of our own weights begin with; empty: the servers have what they were started with."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()
        self._servers = self.run(self._connect(urls, health_seconds))

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """What it comes to, in the loop's thread."""
        return self.start(coroutine).result()

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """The same without waiting."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, path: str, bodies: Any = None, get: bool = False) -> list[Any]:
        """Call all servers at once; their answers. ``bodies``: one for all, or a list of one for each.

        Raises ``EngineError`` when one does not answer, or answers with an error.
        """
        return self.run(self._call(path, bodies, get))

    def all_serve(self) -> bool:
        """Whether each of them is up."""
        return self.run(self._all_serve())

    def check_versions(self) -> None:
        """Raise ``EngineError`` unless all have the weights that they are meant to have."""
        self.run(self._check_versions())

    def forget_sessions(self) -> None:
        """Let the next request of each session go to the server that is the least busy."""
        self._sessions.clear()

    def close(self) -> None:
        """Give up what is open and end the thread. Idempotent."""
        if not self._loop.is_closed():
            self.run(self._disconnect())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def generate(self, session: str, body: Any) -> Any:
        """What a server sampled for a request, on whichever it takes. Raises ``EngineError`` when none does."""
        loop = asyncio.get_running_loop()
        pause, longest = _BACKOFF_SECONDS
        refused_since: float | None = None
        while True:
            server = self._choose(session)
            try:
                if server.failing_since is not None:
                    await self._check_version(server)
                    server.recover()
                answer = await server.call("/inference/v1/generate", body)
                if not _aborted(answer):
                    return answer
                error: Exception = LostError("it aborted the request, as it does when it shuts down", loop.time())
            except (LostError, RefusedError) as fault:
                error = fault
            server.fail(error, error.since if isinstance(error, LostError) else loop.time())
            if isinstance(error, RefusedError):
                refused_since = refused_since or loop.time()
                if error.status < 500 or loop.time() - refused_since > self._reconnect_seconds:
                    raise EngineError(f"{server.url} refused a request: {error}") from error
            self._expect_any()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def _choose(self, session: str) -> Server:
        chosen = self._sessions.get(session) if session else None
        if chosen is None or chosen.failing_since is not None:
            count = len(self._servers)
            order = [self._servers[(self._first + index) % count] for index in range(count)]
            chosen = min(order, key=lambda server: (server.failed_at, server.num_open))
            self._sessions[session] = chosen
        return chosen

    def _expect_any(self) -> None:
        """Raise ``EngineError`` when no server has been reached for ``reconnect_seconds``."""
        now = asyncio.get_running_loop().time()
        since = [now if server.failing_since is None else server.failing_since for server in self._servers]
        if now - max(since) > self._reconnect_seconds:
            failures = "; ".join(f"{server.url}: {server.failure}" for server in self._servers)
            raise EngineError(f"no server was reached for reconnect_seconds={self._reconnect_seconds:g}: {failures}")

    async def _call(self, path: str, bodies: Any, get: bool) -> list[Any]:
        each = bodies if isinstance(bodies, list) else [bodies] * len(self._servers)
        calls = [self._called(server, path, body, get) for server, body in zip(self._servers, each, strict=True)]
        return await asyncio.gather(*calls)

    async def _called(self, server: Server, path: str, body: Any, get: bool) -> Any:
        try:
            return await server.call(path, body, get)
        except (LostError, RefusedError) as error:
            raise EngineError(f"{server.url} failed: {error}") from error

    async def _all_serve(self) -> bool:
        try:
            await asyncio.gather(*(server.check() for server in self._servers))
        except (LostError, RefusedError):
            return False
        return True

    async def _check_versions(self) -> None:
        """Each may fail to answer for a while."""
        deadline = asyncio.get_running_loop().time() + self._reconnect_seconds
        for server in self._servers:
            while True:
                try:
                    await self._check_version(server)
                    break
                except (LostError, RefusedError) as error:
                    if asyncio.get_running_loop().time() > deadline:
                        raise EngineError(f"{server.url} failed: {error}") from error
                    await asyncio.sleep(_BACKOFF_SECONDS[0])

    async def _check_version(self, server: Server) -> None:
        label = await server.version()
        if not label.startswith(self.token) or (not self.token and label != "default"):
            raise EngineError(
                f"{server.url} has the weights {label!r}, which are not those it was given: it was started anew, or "
                "another trainer uses it"
            )

    async def _connect(self, urls: Sequence[str], health_seconds: float) -> list[Server]:
        return [Server(url, self._reconnect_seconds, health_seconds) for url in urls]

    async def _disconnect(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            await _cancel(task)
        for server in self._servers:
            await server.close()


def _session(url: str) -> aiohttp.ClientSession:
    # a connection of its own for every call: one that is kept may be closed by the server at the moment it is used
    if url.startswith("unix:"):
        unix = aiohttp.UnixConnector(url.removeprefix("unix:"), limit=0, force_close=True)
        return aiohttp.ClientSession("http://localhost", connector=unix)
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0, force_close=True))


def _aborted(answer: Any) -> bool:
    try:
        return bool(answer["choices"][0]["finish_reason"] == "abort")
    except (KeyError, IndexError, TypeError):
        return False


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
