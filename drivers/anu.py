"""`anu:` ANU Quantum Numbers, vacuum noise measured at the Australian National University: a paid service with a key.

The new service (api.quantumnumbers.anu.edu.au, header x-api-key) only. The old one (qrng.anu.edu.au) has no keys, gives
one answer a minute, and says so in a page of text with status 200.

One request gives `length` values of a `type`; hex16 with size 10 and length 1024 is the most that clients are known to
ask for, 20,480 bytes. Where the facts were read: the documentation page and the clients sbalian/quantum-random 1666812
and api-evangelist/anu; the price and the limits of the service are not published, so they are parameters.
"""

import re
from collections.abc import Mapping

from ..errors import BadParameter
from .api_key import ApiKey
from .web import WebDriver
from .web_request import Request, count_between, expect, json_object, list_of, one_of

# Bytes of one value; of the hexadecimal types, of one unit of `size`.
_VALUE_BYTES = {"uint8": 1, "uint16": 2, "hex8": 1, "hex16": 2}


class AnuDriver(WebDriver):
    """Parameters besides those of every web driver: `type=hex16` (or hex8, uint8, uint16), `size=10` (of the
    hexadecimal types), `length=1024`. `cost_usd` is taken as 0.005 a request."""

    scheme = "anu"
    service = "ANU Quantum Numbers"
    endpoint = "https://api.quantumnumbers.anu.edu.au"
    key_variable = "EVERETT_ANU_KEY"
    keys_from = "https://quantumnumbers.anu.edu.au"
    cost_usd = 5000
    parameters = {
        **WebDriver.parameters,
        "type": one_of(*_VALUE_BYTES),
        "size": count_between(1, 10),
        "length": count_between(1, 1024),
    }
    refusals = {
        403: "the key is missing or wrong (the service answers 403 to both); check it",
        429: "too many requests, or the quota of the key is used up",
    }

    @classmethod
    def request(cls, values: Mapping[str, object]) -> Request:
        type_, length = values.get("type", "hex16"), values.get("length", 1024)
        params = {"length": length, "type": type_}
        if type_.startswith("hex"):
            params["size"] = values.get("size", 10)
        elif "size" in values:
            raise BadParameter(f"anu: size= goes with the hexadecimal types only, not with type={type_}")
        return Request("GET", "/", length * _VALUE_BYTES[type_] * params.get("size", 1), params)

    @classmethod
    def headers(cls, key: ApiKey) -> dict[str, str]:
        return {"x-api-key": key.reveal()}

    def decode(self, body: bytes) -> bytes:
        answer, asked = json_object(body), self._request.params
        if answer.get("success") is not True:
            raise ValueError("it does not say success: true")
        expect(answer, "type", asked["type"])
        expect(answer, "length", asked["length"], str(asked["length"]))  # a string in some clients' records
        values, width = list_of(answer, "data", asked["length"]), _VALUE_BYTES[asked["type"]]
        if "size" in asked:
            expect(answer, "size", asked["size"], str(asked["size"]))
            digits = re.compile(f"[0-9a-fA-F]{{{2 * width * asked['size']}}}")
            if not all(isinstance(v, str) and digits.fullmatch(v) for v in values):
                raise ValueError("a value is not of the hexadecimal digits asked for")
            return bytes.fromhex("".join(values))
        if not all(type(v) is int and 0 <= v < 256**width for v in values):
            raise ValueError(f"a value is no {asked['type']}")
        return b"".join(v.to_bytes(width, "big") for v in values)
