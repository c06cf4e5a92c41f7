"""One file over HTTP, with the standard library. It arrives whole or not at all."""

import os
import shutil
import ssl
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from tqdm import tqdm

from prlhf.errors import UserError

TIMEOUT = 30.0  # seconds without a byte
PAUSES = (0.5, 2.0, 5.0)  # seconds before each further attempt
MAY_PASS = {408, 425, 429, 500, 502, 503, 504}  # statuses worth a further attempt
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(url: str, target: Path) -> None:
    """Download a file. After an interruption it is tried again, from the start.

    UserError: a status that will not pass, or a redirect to anything but http and https. The network error of the last
    attempt (one of NETWORK) is raised as it is.
    """
    for pause in (*PAUSES, None):
        try:
            return attempt(url, target)
        except NETWORK as error:
            if isinstance(error, HTTPError) and (error.code not in MAY_PASS or pause is None):
                found = f"status {error.code} ({error.reason})"
                raise UserError(f"{target.name}: found {found} at {url}, expected the file") from None
            if pause is None:
                raise
            print(f"{target.name}: did not arrive ({error}), next attempt in {pause:g} s")
        time.sleep(pause)


def attempt(url: str, target: Path) -> None:
    """One attempt, by way of `target`.partial. ConnectionError where fewer bytes arrive than the server announced."""
    partial = target.with_name(target.name + ".partial")
    request = urllib.request.Request(url, headers={"User-Agent": "prlhf"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if not response.url.startswith(("http:", "https:")):
            raise UserError(f"{target.name}: {url} redirects to {response.url}, expected http or https")
        size = int(response.headers["Content-Length"] or 0)  # 0: the server does not say
        try:
            bar = tqdm.wrapattr(response, "read", total=size or None, desc=target.name, disable=None)
            with bar as body, open(partial, "wb") as file:
                shutil.copyfileobj(body, file)
            found = partial.stat().st_size
            if size and found != size:
                raise ConnectionError(f"found {found:,} bytes, expected {size:,}")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
