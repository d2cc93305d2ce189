"""What the drivers of web services share: one request at a time, paid before it is sent, decoded exactly or dropped.

A response counts only if everything about it is as the service documents it: status, content type, the service's own
success mark, the exact number of values. Anything else drops the whole response, for a service that throttles may
answer with status 200 and a page of text. Nothing is ever put in its place.

A service answers when it likes, so requests are made in a thread (http_client.py); a read that finds none answered
within its time-out returns 0 and the request goes on. A request is made only when a read wants bytes, and at most one
response is held. Failures are told apart by whether another attempt can mend them:

    refused (401, 403, other 4xx, a redirect)        the source ends with an error that says what to change
    put off (408, 425, 429, 5xx)                     asked again, after Retry-After or a growing wait; nothing was lost
    lost (time-out, broken off, odd in any respect)  TransportError, then asked again in the same way
    served before                                    DeviceFault: a health alarm

When the wait would outlast the patience of the reader (or Retry-After says so), the source ends with the last reason.
"""

import asyncio
import concurrent.futures
import re
import socket
import ssl
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import urlsplit

from ..errors import BadParameter, SourceError
from .api_key import ApiKey, read_key, refuse_key_in_uri
from .contract import DeviceFault, Driver, Finding, TransportError
from .http_client import Answer, HttpClient, Unanswered, parse_url, tls_context, untrusted
from .patience import Patience
from .responses import Response, ResponseLog
from .spend import Account, account_id, parse_usd
from .uri import SourceURI
from .web_request import Request, parse_path

REQUEST_TIMEOUT_S = 8.0
MIN_RESPONSE_BYTES = 512  # one unit of the health tests

_PUT_OFF = {408, 425, 429, *range(500, 600)}


class WebDriver(Driver):
    """A service on the web. A subclass says where it is, how it is asked, and how its answer is decoded.

    parameters: `key_file=FILE` holds the key (else the environment variable `key_variable`); `budget_usd=` is the most
    that this key may ever cost; `cost_usd=` what one request costs; `url=` asks another address, such as a proxy of
    your own; `ca_file=` trusts one authority in place of the public ones.
    """

    parameters = {
        "key_file": parse_path, "budget_usd": parse_usd, "cost_usd": parse_usd, "url": parse_url, "ca_file": parse_path,
    }  # fmt: skip
    kind = "quantum-remote"
    conditioned = True
    metered = True

    service: ClassVar[str]
    endpoint: ClassVar[str]
    key_variable: ClassVar[str] = ""  # a service without one has no key
    keys_from: ClassVar[str] = ""
    cost_usd: ClassVar[int] = 0  # micro-dollars a request
    refusals: ClassVar[Mapping[int, str]] = {}  # what a status means to this service, and what to do

    def __init__(self, base: str, request: Request, values: Mapping[str, object], key: ApiKey | None):
        host = urlsplit(base).hostname
        self.name = f"{self.service} at {host}"
        self.min_entropy = self.claim(values)
        self.chunk_bytes = request.n_bytes
        self._request = request
        self._cost = values.get("cost_usd", self.cost_usd)
        self._budget = values.get("budget_usd", 0)
        self._held = memoryview(b"")  # what was answered and not yet read
        self._pending: concurrent.futures.Future | None = None
        self._log: ResponseLog | None = None
        self._repeats = 0
        self._patience = Patience()
        tls = tls_context(base, values.get("ca_file"))
        self._account = Account(self.scheme, self._account_id(base, key))
        self.serial = f"key {self._account.id}" if key else host
        try:
            self._account.affords(self._cost, self._budget)
            self._log = ResponseLog(self._account.responses_path)
            self._client = HttpClient(base, tls, self.headers(key))
        except BaseException:
            self._give_back()
            raise
        self._show("nothing asked yet")

    # --- what a subclass says ---------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def request(cls, values: Mapping[str, object]) -> Request:
        """The request that parsed parameters ask for; BadParameter when they do not go together."""

    @classmethod
    @abstractmethod
    def headers(cls, key: ApiKey | None) -> dict[str, str]:
        """The headers of a request; one of them carries the key, of a service that has keys."""

    @abstractmethod
    def decode(self, body: bytes) -> bytes:
        """The random bytes of a body that is exactly what was asked for; else ValueError, which shows nothing of it."""

    # --- opening ----------------------------------------------------------------------------------------------------

    @classmethod
    def _plan(cls, uri: SourceURI) -> tuple[str, Request, dict[str, object]]:
        """(base address, request, parsed parameters); BadParameter, which never repeats a key."""
        refuse_key_in_uri(uri.text, cls.scheme, cls.key_variable)
        values = uri.parameters(cls.parameters)
        request = cls.request(values)
        if request.n_bytes < MIN_RESPONSE_BYTES:
            raise BadParameter(
                f"{cls.scheme}: a response would have {request.n_bytes} bytes; ask for at least {MIN_RESPONSE_BYTES}"
            )
        return cls.base(uri, values.get("url")), request, values

    @classmethod
    def base(cls, uri: SourceURI, url: str | None) -> str:
        """The address that is asked: `url=`, where it is given."""
        if uri.rest:  # not repeated: it may be a key
            raise BadParameter(f"{cls.scheme}: takes parameters only, such as {cls.scheme}:?budget_usd=1")
        return url or cls.endpoint

    @classmethod
    def _key(cls, values: Mapping[str, object]) -> ApiKey | None:
        if not cls.key_variable:
            return None
        return read_key(cls.scheme, cls.key_variable, values.get("key_file"), cls.keys_from)

    @classmethod
    def _account_id(cls, base: str, key: ApiKey | None) -> str:
        """Of the key, whatever address it is used at; of the host where a service has no keys."""
        return account_id(cls.scheme, key.reveal() if key else urlsplit(base).netloc)

    @classmethod
    def open(cls, uri: SourceURI) -> "WebDriver":
        base, request, values = cls._plan(uri)
        return cls(base, request, values, cls._key(values))

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        """Parameters, key, other clients, budget, and address, in that order. No request is sent: it costs nothing."""
        found = []
        step = "parameters"
        try:
            base, request, values = cls._plan(uri)
            found.append(Finding(step, "ok", f"{request.method} {base}, {request.n_bytes} bytes a request"))
            step = "key"
            key = cls._key(values)
            found.append(Finding(step, "ok", f"found: {key}" if key else "none is needed"))
            step = "other clients"
            account = Account(cls.scheme, cls._account_id(base, key))
            try:
                found.append(Finding(step, "ok", f"none; responses of this key are logged in {account.responses_path}"))
                step = "budget"
                budget = values.get("budget_usd", 0)
                account.affords(values.get("cost_usd", cls.cost_usd), budget)
                found.append(Finding(step, "ok", account.meter(budget)))
            finally:
                account.close()
            step = "address"
            found.append(Finding(step, "ok", _reach(base, values.get("ca_file"))))
        except SourceError as error:
            return [*found, Finding(step, "fail", str(error))]
        who = "the provider has seen these bits, and the health tests see total failure only"
        return [*found, Finding("kind", "note", f"{cls.kind}: {who}")]

    # --- reading ----------------------------------------------------------------------------------------------------

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        if not self._held:
            if self._pending is None:
                self._pending = self._client.start(self._fetch())
            concurrent.futures.wait([self._pending], timeout_s)
            if not self._pending.done():
                if not self._client.thread.is_alive():
                    raise self._client.ended()
                return 0
            answered, self._pending = self._pending, None
            try:
                self._held = memoryview(answered.result())
            except (concurrent.futures.CancelledError, SystemExit):  # closed, or the thread was killed
                raise self._client.ended() from None
        n = min(len(buffer), len(self._held))
        buffer[:n] = self._held[:n]
        self._held[:n] = bytes(n)
        self._held = self._held[n:]
        return n

    async def _fetch(self) -> bytearray:
        """One response, decoded and new; raises as `readinto`."""
        try:
            return await self._response()
        except (TransportError, DeviceFault):
            raise  # another request may still be made, and says so itself
        except SourceError as error:
            self._show(f"ended: {error}")
            raise

    async def _response(self) -> bytearray:
        """Asks, and asks again while the service puts it off."""
        request = self._request
        while True:
            await asyncio.sleep(self._patience.wait_s())
            self._account.book(self._cost, self._budget)
            self._show("waiting for an answer")
            try:
                answer = await self._client.ask(
                    request.method, request.path, request.params, request.body,
                    limit_bytes=65536 + 8 * request.n_bytes, timeout_s=REQUEST_TIMEOUT_S,
                )  # fmt: skip
                if answer.status in _PUT_OFF:
                    self._failed(self._words(answer.status), answer.retry_after)
                    continue
                self._refuse(answer)
                data = self._decoded(answer)
            except (Unanswered, ValueError) as error:
                self._failed(str(error))
                raise TransportError(f"{self.name}: {error}; its response was dropped") from None
            self._patience.succeeded()
            self._admit(data)
            self._show("ok")
            return bytearray(data)

    def _words(self, status: int) -> str:
        otherwise = "the service fails" if status >= 500 else "the request is refused"
        return f"status {status}: {self.refusals.get(status) or _MEANINGS.get(status) or otherwise}"

    def _refuse(self, answer: Answer) -> None:
        """SourceError for an answer that another attempt would not change."""
        if 300 <= answer.status < 400:
            host = re.match(r"https?://([\w.-]+)", answer.location)
            raise SourceError(
                f"{self.name}: status {answer.status} sends the request to {host[1] if host else 'another place'}; it is "
                "not followed, because the key would go there too. If the service has moved, name its address by url="
            )
        if 400 <= answer.status < 500:
            raise SourceError(f"{self.name}: {self._words(answer.status)}")

    def _decoded(self, answer: Answer) -> bytes:
        """The bytes of a response; ValueError when anything about it is odd."""
        if answer.status != 200:
            raise ValueError(f"odd response: status {answer.status}")
        found = answer.content_type.partition(";")[0].strip().lower()
        if found != self._request.content_type:
            raise ValueError(
                f"odd response: {found[:40] or 'no content type'} instead of {self._request.content_type} (a service "
                "that throttles may answer so)"
            )
        try:
            data = self.decode(answer.body)
        except ValueError as error:
            raise ValueError(f"odd response: {error}") from None
        if len(data) != self._request.n_bytes:
            raise ValueError(f"odd response: {len(data)} bytes instead of {self._request.n_bytes}")
        return data

    def _admit(self, data: bytes) -> None:
        """Logs a response before it is used; DeviceFault when the service has served it before."""
        before = self._log.add(data)
        if before is None:
            return
        self._repeats += 1
        text = f"duplicate response: the {len(data)} bytes of {self.service} were served before, at {before}"
        self._show(text)
        raise DeviceFault(f"{text}; they were dropped. Ask the provider", status=self._repeats, expected=0)

    def _failed(self, reason: str, retry_after: str = "") -> None:
        """Sets the wait before the next attempt; SourceError when there is no patience left for it."""
        try:
            wait_s = self._patience.failed(reason, retry_after)
        except SourceError as error:
            raise SourceError(f"{self.name}: {error}") from None
        self._show(f"next request in {wait_s:.1f} s, after {reason}")

    def _show(self, state: str) -> None:
        repeated = f"{self._repeats} REPEATED" if self._repeats else "none repeated"
        self.details = {
            "spend": self._account.meter(self._budget),
            "requests": state,
            "responses": f"{len(self._log)} logged, {repeated}",
        }

    def responses_from(self, start: int) -> list[Response]:
        return self._log.added[start:]

    # --- closing ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._client.close()
        self._give_back()

    def _give_back(self) -> None:
        if self._log is not None:
            self._log.close()
        self._account.close()


_MEANINGS = {
    400: "the request is not understood; check the parameters",
    401: "the key is missing, wrong or expired; get a new one",
    403: "the key is not allowed this; check it and what it may use",
    404: "nothing is served at this address; check url=",
    408: "the service gave up waiting",
    429: "too many requests, or the quota of the key is used up",
    503: "the service is not available now",
}


def _reach(base: str, ca_file: str | None) -> str:
    """Connects to a service, verifies its certificate and hangs up; SourceError when that fails."""
    parts = urlsplit(base)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname, port), REQUEST_TIMEOUT_S) as plain:
            if parts.scheme == "http":
                return f"{parts.netloc} answers, without TLS, on this machine"
            with tls_context(base, ca_file).wrap_socket(plain, server_hostname=parts.hostname) as wrapped:
                return f"{parts.netloc} answers, {wrapped.version()}, certificate verified"
    except ssl.SSLCertVerificationError as error:
        raise untrusted(base, error) from None
    except OSError as error:
        raise SourceError(f"{parts.netloc} cannot be reached: {error}; check the network and any firewall") from None
