"""One HTTPS client of one service: a thread with an event loop, so that a request can outlast a read and be broken off.

Verified TLS always; no redirects, which would carry the key elsewhere; no proxies or credentials from the environment;
no compression; nothing logged; the whole request bounded in time and the answer in size. The thread makes no request of
its own: it waits until a read wants one.
"""

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import logging
import ssl
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ..errors import BadParameter, SourceError
from .contract import DeviceLost, require

httpx = require("httpx", "web")

CLOSE_TIMEOUT_S = 2.0
_THREAD_NAME = "everett web"


def _not_ours(record: logging.LogRecord) -> bool:
    """False for what the HTTP libraries log in our threads: headers are among it, and the key is a header."""
    return not (record.threadName or "").startswith(_THREAD_NAME)


# Only our threads fall silent: other users of httpx in the process keep their logs.
for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy", "asyncio"):
    logging.getLogger(_name).addFilter(_not_ours)


@dataclass(frozen=True)
class Answer:
    """What came back: a status, three headers (empty where absent) and the whole body, not decoded."""

    status: int
    content_type: str
    retry_after: str
    location: str
    body: bytes = field(repr=False)


class Unanswered(Exception):
    """No whole answer came: connection, time-out, broken off, too long. The text says which, without secrets."""


def parse_url(text: str) -> str:
    """The address of a service: https, or http to this machine alone; no user, query or fragment."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or "@" in parts.netloc or parts.query or parts.fragment or parts.scheme not in ("https", "http"):
        raise ValueError("https://HOST[:PORT][/PATH] without a user, a query or a key")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("https, because a key over http can be read by everybody on the way")
    return text.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_context(base: str, ca_file: str | None) -> ssl.SSLContext:
    """A context that verifies certificate and host name; ca_file: trust this authority, and no other."""
    if ca_file is None:
        if urlsplit(base).scheme == "http":
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # has nothing to verify, and would trust nobody
        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise BadParameter(f"ca_file={ca_file} is no certificate file in PEM form: {error}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error of the HTTP library, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def untrusted(base: str, error: ssl.SSLCertVerificationError) -> SourceError:
    """What to say of a certificate that does not verify."""
    return SourceError(
        f"{base}: its certificate is not trusted ({error.verify_message}); nothing was sent. Check the host name and "
        "the clock; the certificate of an authority of your own is trusted by ca_file=FILE"
    )


class HttpClient:
    """Requests to `base`, one at a time, with `headers` on each of them; its repr and its errors never show headers."""

    def __init__(self, base: str, tls: ssl.SSLContext, headers: Mapping[str, str]):
        self.base = base
        self._http = httpx.AsyncClient(
            base_url=base,
            verify=tls,
            headers={"accept-encoding": "identity", "user-agent": "everett-cuda", **headers},
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=1),
        )
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._lock = threading.Lock()
        self._closed = False  # by its user
        self._ended = False  # the thread takes nothing more
        self._running: concurrent.futures.Future | None = None
        self._thread = threading.Thread(target=self._run, name=f"{_THREAD_NAME} {urlsplit(base).hostname}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"HttpClient({self.base!r})"

    @property
    def thread(self) -> threading.Thread:
        return self._thread

    def _run(self) -> None:
        loop = self._loop
        try:
            loop.run_until_complete(self._stop.wait())
        finally:
            with self._lock:
                self._ended = True
            loop.run_until_complete(self._break_off())
            loop.close()  # without waiting for a name lookup that is still in the resolver's hands

    async def _break_off(self) -> None:
        # The request alone is cancelled, and ends the tasks it began: those would leave work undone, with a warning.
        if self._running is not None:
            self._running.cancel()
        self._stop.set()
        await asyncio.sleep(0)
        # A thread that was killed between two steps of a task has forgotten that task, and would wait for ever.
        give_up_at = self._loop.time() + CLOSE_TIMEOUT_S / 2
        while (tasks := asyncio.all_tasks() - {asyncio.current_task()}) and self._loop.time() < give_up_at:
            await asyncio.wait(tasks, timeout=0.1)
        with contextlib.suppress(RuntimeError):  # requests under way, of such tasks
            await self._http.aclose()

    def start(self, work: Coroutine) -> concurrent.futures.Future:
        """Runs a coroutine in the thread. Cancelled by `close`; DeviceLost when closed, SourceError when it died."""
        with self._lock:
            if not (self._closed or self._ended):
                self._running = asyncio.run_coroutine_threadsafe(work, self._loop)
                return self._running
        work.close()
        raise self.ended()

    def ended(self) -> SourceError:
        """Why nothing more comes."""
        if self._closed:
            return DeviceLost(f"the client of {self.base} was closed")
        return SourceError(f"the thread that asks {self.base} has died; open the source again")

    async def ask(
        self, method: str, path: str, params: Mapping[str, object], body: object, limit_bytes: int, timeout_s: float
    ) -> Answer:
        """One request, answered within timeout_s by at most limit_bytes. params: the query; body: JSON unless None.

        Raises Unanswered, or SourceError for what another attempt will not mend (an untrusted certificate).
        """
        try:
            return await asyncio.wait_for(self._ask(method, path, params, body, limit_bytes), timeout_s)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise Unanswered(f"no whole answer within {timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            reason = next(filter(None, map(str, _chain(error))), type(error).__name__)
            doubt = next((e for e in _chain(error) if isinstance(e, ssl.SSLCertVerificationError)), None)
        if doubt is not None:
            raise untrusted(self.base, doubt)
        raise Unanswered(reason)

    async def _ask(self, method, path, params, body, limit_bytes) -> Answer:
        more = {} if body is None else {"json": body}
        async with self._http.stream(method, path, params=params or None, timeout=None, **more) as response:
            encoding = response.headers.get("content-encoding", "identity")
            if encoding != "identity":
                raise Unanswered(f"the answer is packed ({encoding}), which was not asked for")
            whole = bytearray()
            async for part in response.aiter_raw():
                whole += part
                if len(whole) > limit_bytes:
                    raise Unanswered(f"the answer is longer than the {limit_bytes} bytes a right one can have")
            get = response.headers.get
            return Answer(
                response.status_code, get("content-type", ""), get("retry-after", ""), get("location", ""), bytes(whole)
            )

    def close(self) -> None:
        """Breaks off what is under way and ends the thread. May be called twice, from any other thread."""
        with self._lock:
            was_closed, self._closed = self._closed, True
            if not (was_closed or self._ended):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CLOSE_TIMEOUT_S)
