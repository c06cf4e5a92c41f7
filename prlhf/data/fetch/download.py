"""One file by HTTP, with the standard library: resumed where it was interrupted, and of the size that was announced.

What has arrived lies in NAME.partial, and beside it, in NAME.partial.origin, of which file it is (URL and ETag).
"""

import json
import os
import re
import ssl
import time
import urllib.request
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from tqdm import tqdm

from prlhf.errors import UserError

TIMEOUT = 30.0  # seconds without a byte
PAUSES = (0.5, 2.0, 5.0)  # seconds before each further attempt at an interrupted transfer
MAY_PASS = {408, 425, 429, 500, 502, 503, 504}  # statuses worth a further attempt
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(url: str, target: Path) -> None:
    """Download by way of `target`.partial, which the next attempt or call goes on with.

    UserError: a status that will not pass, a redirect to anything but http and https, more bytes than announced. Where
    the last attempt is interrupted, its error (one of NETWORK).
    """
    for pause in (*PAUSES, None):
        try:
            return attempt(url, target)
        except HTTPError as error:
            error.close()
            if error.code not in MAY_PASS or pause is None:
                found = f"status {error.code} ({error.reason})"
                raise UserError(f"{target.name}: found {found} at {url}, expected the file") from None
        except NETWORK as error:
            if pause is None:
                raise
            print(f"{target.name}: did not arrive ({cause(error)}), next attempt in {pause:g} s")
        time.sleep(pause)


def cause(error: Exception) -> str:
    """What an error of the network says, without urllib's words around it."""
    return str(getattr(error, "reason", error)) or type(error).__name__


def attempt(url: str, target: Path) -> None:
    """One attempt of `download`. ConnectionError where it ends before the announced size, if one is announced."""
    partial, state = target.with_name(target.name + ".partial"), target.with_name(target.name + ".partial.origin")
    offset, headers = resumable(url, partial, state)
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not offset:
            raise
        state.unlink()
        if error.headers.get("Content-Range") != f"bytes */{offset}":
            raise ConnectionError(f"found another file than the one of which {offset:,} bytes are here") from None
        os.replace(partial, target)  # only this was missing
        return
    with response:
        if not re.match("https?:", response.url):
            raise UserError(f"{target.name}: {url} redirects to {response.url}, expected http or https")
        total = response.headers.get("Content-Length")
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != offset or validator(response.headers) not in ("", headers.get("If-Range")):
                state.unlink(missing_ok=True)
                raise ConnectionError(f"found bytes other than those from {offset:,} on that were asked for")
            total = span[2]
        else:
            offset = 0  # the whole file, asked for or not
        size = int(total) if total else None
        bar = tqdm(total=size, initial=offset, desc=target.name, unit="B", unit_scale=True, disable=None)
        with bar, open(partial, "ab" if offset else "wb") as file:
            if not offset:
                state.write_text(json.dumps({"url": url, "validator": validator(response.headers)}), encoding="utf-8")
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    found = partial.stat().st_size
    if size is not None and found < size:
        raise ConnectionError(f"found {found:,} bytes, expected {size:,}")
    state.unlink()
    if size is not None and found > size:
        partial.unlink()
        raise UserError(f"{target.name}: found {found:,} bytes at {url}, expected {size:,}; none were kept")
    os.replace(partial, target)


def resumable(url: str, partial: Path, state: Path) -> tuple[int, dict[str, str]]:
    """How many bytes of `url` are in `partial`, and headers that ask for the rest, or for all if the file has changed."""
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
        offset = partial.stat().st_size if known["url"] == url and known["validator"] else 0
    except (OSError, ValueError, KeyError, TypeError):
        offset = 0
    headers = {"Range": f"bytes={offset}-", "If-Range": known["validator"]} if offset else {}
    return offset, {"User-Agent": "prlhf", **headers}


def validator(headers: Message) -> str:
    """What If-Range can name: a strong ETag, else Last-Modified, else nothing."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")
