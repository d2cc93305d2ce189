"""`quantis-appliance:HOST` the ID Quantique Quantis Appliance: a box on the network that gives random bytes over HTTPS.

GET https://HOST/api/2.0/streambytes?size=N answers with N raw bytes (libqrng, qrng-data-diode). It has no keys and no
price. Its certificate is often its own: then `ca_file=` names it, and the box proves that it holds the key to it;
nothing turns the check off.
"""

import re
from collections.abc import Mapping

from ..errors import BadParameter
from .api_key import ApiKey
from .http_client import parse_url
from .uri import SourceURI
from .web import WebDriver
from .web_request import Request, count_between


def parse_content_type(text: str) -> str:
    """`type/subtype`."""
    if not re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", text):
        raise ValueError("a content type, such as application/octet-stream")
    return text


class QuantisApplianceDriver(WebDriver):
    """`quantis-appliance:HOST[:PORT]`; parameters besides those of every web driver: `size=16384` bytes a request,
    `content_type=application/octet-stream` of an answer, which no document names."""

    scheme = "quantis-appliance"
    service = "Quantis Appliance"
    # Its owner is served as often as he asks: nothing is saved by a shorter start-up test.
    metered = False
    parameters = {
        **{name: parse for name, parse in WebDriver.parameters.items() if name != "key_file"},
        "size": count_between(512, 1 << 20),
        "content_type": parse_content_type,
    }

    @classmethod
    def base(cls, uri: SourceURI, url: str | None) -> str:
        if url is not None and not uri.rest:
            return url
        if url is not None or not re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?", uri.rest):
            raise BadParameter("quantis-appliance: names one host, as quantis-appliance:HOST[:PORT] or else by url=")
        return parse_url(f"https://{uri.rest}")

    @classmethod
    def headers(cls, key: ApiKey | None) -> dict[str, str]:
        return {}

    @classmethod
    def request(cls, values: Mapping[str, object]) -> Request:
        size = values.get("size", 16384)
        type_ = values.get("content_type", "application/octet-stream")
        return Request("GET", "/api/2.0/streambytes", size, {"size": size}, content_type=type_)

    def decode(self, body: bytes) -> bytes:
        return body
