"""The page that the server shows: one file without anything from elsewhere."""

import base64
import hashlib
import re
from pathlib import Path

_PAGE = Path(__file__).with_name("page.html")


def read() -> tuple[bytes, dict[str, str]]:
    """The page and its headers, which let its own script and style run and nothing else."""
    text = _PAGE.read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hash(text, 'script')}",
        f"style-src {_hash(text, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "content-security-policy": "; ".join(policy),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
    }
    return text.encode(), headers


def _hash(text: str, element: str) -> str:
    (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
