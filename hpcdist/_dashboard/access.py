"""Who may see the page: those who know its address, and browsers that have come by it."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit


class Access:
    """The two secrets of a page: the token in its address, and the cookie it is exchanged for.

    Args:
        port: Where the page is served: a browser keeps one cookie for all ports of a host.
    """

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        self._name = f"hpcdist-{port}"
        self._cookie = secrets.token_urlsafe(24)

    def has_token(self, target: str) -> bool:
        """Tell whether an address has the token."""
        given = parse_qs(urlsplit(target).query).get("token", [""])[0]
        return hmac.compare_digest(given.encode(), self.token.encode())

    def has_cookie(self, headers: Mapping[str, str]) -> bool:
        """Tell whether a browser has come by the address before."""
        try:
            found = SimpleCookie(headers.get("Cookie", "")).get(self._name)
        except CookieError:
            return False
        given = "" if found is None else found.value
        return hmac.compare_digest(given.encode(), self._cookie.encode())

    @property
    def set_cookie(self) -> str:
        """The header's value that gives a browser its cookie."""
        return f"{self._name}={self._cookie}; Path=/; HttpOnly; SameSite=Strict"
