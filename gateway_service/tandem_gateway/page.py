"""The chat page, and the headers that keep it to itself: its own script and style, requests to its own server."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

PAGE = Path(__file__).parent / "page.html"


def read_page() -> Response:
    """The page as it is in the package."""
    page = PAGE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(page, "script"),
        "style-src": _hash(page, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # Text can't become HTML, as nothing can assign to innerHTML.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Response(page, media_type="text/html", headers=headers)


def _hash(page: str, tag: str) -> str:
    """What a policy names the page's one script or style by."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
