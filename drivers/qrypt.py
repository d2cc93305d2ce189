"""`qrypt:` Qrypt Entropy as a Service: quantum random bytes from an account's allotment, with a token.

One request gives `size` KiB, each as one string of base64; at most 512 KiB a request and 30 requests in 10 s
(docs.qrypt.com/eaas). The allotment counts bytes and not requests, so the default request is not the largest: what a
source has fetched and not used when it closes is destroyed.
"""

import base64
from collections.abc import Mapping

from .api_key import ApiKey
from .web import WebDriver
from .web_request import Request, count_between, expect, json_object, list_of

_PIECE = 1024


class QryptDriver(WebDriver):
    """Parameter besides those of every web driver: `size=16`, in KiB a request. `cost_usd` is taken as 0."""

    scheme = "qrypt"
    service = "Qrypt Entropy"
    endpoint = "https://api-eus.qrypt.com"
    key_variable = "EVERETT_QRYPT_TOKEN"
    keys_from = "https://portal.qrypt.com"
    parameters = {**WebDriver.parameters, "size": count_between(1, 512)}
    refusals = {
        401: "the token is missing, wrong or expired; get a new one",
        403: "the allotment of the account is used up; ask the provider for more",
        429: "too many requests (30 in 10 s are allowed)",
        503: "the service has no entropy to give now",
    }

    @classmethod
    def request(cls, values: Mapping[str, object]) -> Request:
        size = values.get("size", 16)
        return Request("GET", "/api/v1/quantum-entropy", size * _PIECE, {"size": size})

    @classmethod
    def headers(cls, key: ApiKey) -> dict[str, str]:
        return {"authorization": f"Bearer {key.reveal()}", "accept": "application/json"}

    def decode(self, body: bytes) -> bytes:
        answer, size = json_object(body), self._request.params["size"]
        expect(answer, "size", size)
        pieces = []
        for text in list_of(answer, "random", size):
            try:
                piece = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
            except ValueError:
                piece = b""
            if len(piece) != _PIECE:
                raise ValueError(f"a piece is not {_PIECE} bytes in base64")
            pieces.append(piece)
        return b"".join(pieces)
