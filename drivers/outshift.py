"""`outshift:` Cisco Outshift QRNG, vacuum noise (arXiv 2506.05627): a free key gives about 100,000 bits a day.

One request gives `blocks` numbers of `bits_per_block` bits, written in the `format`. "encoding": "raw" is asked for,
because the other encoding wraps the decimal text, and not the bytes, in base64. A key expires; 401 or 403 then.

The limits (10,000 bits a block, 1,000 blocks, the daily quota) are those that clients write down; nothing of them is
published. So the default request is of the shape that clients use: 16 bits, 1,000 times, 2,000 bytes.
"""

import re
from collections.abc import Mapping

from .api_key import ApiKey
from .web import WebDriver
from .web_request import Request, count_between, expect, json_object, list_of, one_of

_BITS_PER_DIGIT = {"hexadecimal": 4, "binary": 1}
_DIGITS = {"hexadecimal": re.compile("[0-9a-fA-F]+"), "binary": re.compile("[01]+")}


def parse_bits(text: str) -> int:
    """Whole bytes of bits."""
    bits = count_between(8, 10_000)(text)
    if bits % 8:
        raise ValueError("a multiple of 8")
    return bits


class OutshiftDriver(WebDriver):
    """Parameters besides those of every web driver: `format=hexadecimal` (or binary), `bits_per_block=16`,
    `blocks=1000`. `cost_usd` is taken as 0: a quota, no price."""

    scheme = "outshift"
    service = "Cisco Outshift QRNG"
    endpoint = "https://api.qrng.outshift.com"
    key_variable = "EVERETT_OUTSHIFT_KEY"
    keys_from = "https://qrng.outshift.com"
    parameters = {
        **WebDriver.parameters,
        "format": one_of(*_BITS_PER_DIGIT),
        "bits_per_block": parse_bits,
        "blocks": count_between(1, 1000),
    }
    refusals = {
        401: "the key is missing, wrong or expired (keys of this service expire); get a new one",
        403: "the key is missing, wrong or expired (keys of this service expire); get a new one",
        429: "the quota of the key is used up (about 100,000 bits a day)",
    }

    @classmethod
    def request(cls, values: Mapping[str, object]) -> Request:
        bits, blocks = values.get("bits_per_block", 16), values.get("blocks", 1000)
        body = {
            "encoding": "raw",
            "format": values.get("format", "hexadecimal"),
            "bits_per_block": bits,
            "number_of_blocks": blocks,
        }
        return Request("POST", "/api/v1/random_numbers", blocks * bits // 8, {}, body)

    @classmethod
    def headers(cls, key: ApiKey) -> dict[str, str]:
        return {"x-id-api-key": key.reveal()}

    def decode(self, body: bytes) -> bytes:
        answer, asked = json_object(body), self._request.body
        format_, bits = asked["format"], asked["bits_per_block"]
        expect(answer, "encoding", "raw")
        digits, most = _DIGITS[format_], bits // _BITS_PER_DIGIT[format_]
        numbers = []
        for block in list_of(answer, "random_numbers", asked["number_of_blocks"]):
            text = block.get(format_) if isinstance(block, dict) else None
            # Numbers, not strings of digits: one that begins with zeros may be written shorter.
            if not (isinstance(text, str) and len(text) <= most and digits.fullmatch(text)):
                raise ValueError(f"a block is no {format_} number of {bits} bits")
            numbers.append(int(text, 2 ** _BITS_PER_DIGIT[format_]).to_bytes(bits // 8, "big"))
        return b"".join(numbers)
