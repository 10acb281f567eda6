"""Passwords taken out of text, wherever an address may have brought one in."""

import re
from typing import Any

_HIDDEN = "***"
#: Between `://` and the last @ before a slash: who, and perhaps the password.
_USERINFO = re.compile(r"(?<=://)[^/\s'\"<>@]*(?:@[^/\s'\"<>@]*)*(?=@)")
_WORDS = "signature|sig|token|password|passwd|pwd|secret|credential|accesskey(?:id)?|access_key|api_?key"
#: What stands behind such a word in a query (presigned addresses) or in a connection string.
_QUERY = re.compile(rf"(?i)(?<=[?&;])((?:[\w.-]*-)?(?:{_WORDS})=)[^&;\s'\"<>]+")


def redact(text: str) -> str:
    """The text with *** for user, password and secret parameters of every address in it."""
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\1{_HIDDEN}", _USERINFO.sub(_HIDDEN, text))


class Redacting:
    """A stream to print to, without what `redact` hides. All else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
