"""Download the raw files of a data set.

    python -m prlhf.data fetch NAME [--out FOLDER]

The same command again goes on with what was interrupted, verifies what is there by FOLDER/fetched.json (origin, size
and SHA-256 of each file) and downloads only what is missing or differs. Files that were placed by hand are kept.
"""

import json
import os
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import dataset_info, get_token, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.errors import HTTPError as HubHTTPError

from prlhf.data.fetch.download import NETWORK, cause, download
from prlhf.data.files import sha256, write_json
from prlhf.data.sources import SOURCES, Source, raw_folder, source_name
from prlhf.errors import UserError

HUB_NETWORK = (HubHTTPError, EntryNotFoundError, ConnectionError, TimeoutError, RuntimeError)  # the last is hf_xet's


def run(name: str, out: str | None) -> None:
    """The command: the files of data set `name` in folder `out`, by default in the cache. UserError says what to do."""
    asked, name = name, source_name(name)
    source = SOURCES[name]
    folder = (Path(out).expanduser() if out else raw_folder(name)).resolve()
    print(f"{source.title}\npage: {source.page}\nlicence: {source.licence}")
    if source.needs:
        print(f"gated: {source.needs}")
    folder.mkdir(parents=True, exist_ok=True)
    record = read_record(folder, name)
    new = (fetch_repository if source.repository else fetch_urls)(name, source, folder, record)
    for archive in source.urls if source.unpack else ():
        new += unpack(folder, archive, source.unpack, record, fresh=archive in new)
    print(f"{folder}: {len(record['files'])} files, {len(new)} of them new ({', '.join(record['files'])})")
    print(f"next: {prepare_command(asked, folder)}")


def prepare_command(name: str, folder: Path) -> str:
    """How to go on with the files in `folder`."""
    here = "" if folder == raw_folder(source_name(name)).resolve() else f" --raw {shlex.quote(str(folder))}"
    return f"python -m prlhf.data prepare {name}{here}"


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """What fetched.json tells of the folder. UserError where it is damaged or tells of another data set."""
    path = folder / "fetched.json"
    if not path.exists():
        return {"name": name, "files": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, _ = record["name"], [entry.get("bytes") for entry in record["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged, expected the record of a download; delete it and run this again") from None
    if found != name:
        raise UserError(f"{path}: found the files of {found!r}, expected {name!r} or another folder (--out)")
    return record


def remember(folder: Path, record: dict[str, Any], file: str, **origin: Any) -> None:
    """Write origin, size and checksum of a file to fetched.json."""
    record["files"][file] = {**origin, **size_and_checksum(folder / file)}
    write_json(folder / "fetched.json", record)


def size_and_checksum(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def is_kept(folder: Path, record: dict[str, Any], file: str) -> bool:
    """Whether a file is there, and as recorded or placed by hand; the latter is recorded, and what is not so is told."""
    entry = record["files"].get(file)
    if not (folder / file).is_file():
        if entry:
            print(f"{file}: recorded, but not there")
        return False
    if entry is None or "placed_by_hand" in entry:
        print(f"{file}: placed by hand, kept")
        remember(folder, record, file, placed_by_hand=True)
        return True
    found = size_and_checksum(folder / file)
    same = all(entry.get(key) == value for key, value in found.items())
    if not same:
        print(
            f"{file}: found {found['bytes']} bytes of SHA-256 {found['sha256']}, "
            f"expected {entry.get('bytes')} bytes of SHA-256 {entry.get('sha256')}, as recorded"
        )
    return same


def no_network(name: str, source: Source, folder: Path, files: Iterable[str], reason: str) -> UserError:
    """The error where there is no connection: which files, from where, to put into which folder."""
    lines = "".join(f"\n  {file} from {source.urls.get(file, f'{source.page}/tree/main')}" for file in files)
    then = "run this command again, which unpacks it" if source.unpack else f"run {prepare_command(name, folder)}"
    return UserError(
        f"{name}: {reason}\nOnce there is a connection, the same command goes on from here. "
        f"Without one, put into {folder}:{lines}\nand {then}"
    )


def fetch_urls(name: str, source: Source, folder: Path, record: dict[str, Any]) -> list[str]:
    """Download the files that are not kept; their names. UserError as of `download`, or where the network fails."""
    missing = [file for file in source.urls if not is_kept(folder, record, file)]
    for number, file in enumerate(missing):
        url = source.urls[file]
        try:
            download(url, folder / file)
        except NETWORK as error:
            reason = f"{file} did not arrive from {url} ({cause(error)})"
            raise no_network(name, source, folder, missing[number:], reason) from None
        remember(folder, record, file, url=url)
        print(f"{file}: downloaded, {record['files'][file]['bytes']:,} bytes")
    return missing


def unpack(folder: Path, archive: str, patterns: Iterable[str], record: dict[str, Any], fresh: bool) -> list[str]:
    """Unpack the members that match, without their own folders, where they are not kept or the archive is `fresh`.

    Returns their names. UserError: a damaged archive, a path that leads out of the folder, no match, two of one name.
    """
    unpacked = []
    try:
        with zipfile.ZipFile(folder / archive) as opened:
            for file, member in wanted_members(opened, folder / archive, patterns).items():
                if not (fresh and "member" in record["files"].get(file, {})) and is_kept(folder, record, file):
                    continue
                aside = folder / f"{file}.partial"
                with opened.open(member) as packed, open(aside, "wb") as copy:
                    shutil.copyfileobj(packed, copy)  # at its end the member's checksum is verified
                os.replace(aside, folder / file)
                remember(folder, record, file, archive=archive, member=member.filename)
                unpacked.append(file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(
            f"{folder / archive}: not a whole zip archive ({error}); delete it and run this again"
        ) from None
    return unpacked


def wanted_members(opened: zipfile.ZipFile, path: Path, patterns: Iterable[str]) -> dict[str, zipfile.ZipInfo]:
    """The members that match one of the patterns, by their last name. UserError as of `unpack`."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    for member in opened.infolist():
        inside = PurePosixPath(member.filename.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(
                f"{path}: found a member {member.filename!r}, expected paths within the folder; none were unpacked"
            )
        if any(inside.match(pattern) for pattern in patterns) and not inside.name.startswith("._"):  # macOS's shadows
            first = wanted.setdefault(inside.name, member)
            if (first.CRC, first.file_size) != (member.CRC, member.file_size):
                raise UserError(f"{path}: found {first.filename} and {member.filename}, expected one {inside.name}")
    if not wanted:
        raise UserError(f"{path}: found {', '.join(opened.namelist()[:5])} ..., expected {' or '.join(patterns)}")
    return wanted


def fetch_repository(name: str, source: Source, folder: Path, record: dict[str, Any]) -> list[str]:
    """Download the files that are not kept, of the recorded revision or else the newest; their names.

    They arrive in `folder`.partial and move when all are there. UserError: no access, no such file, no connection.
    """
    here = {path.name for path in folder.iterdir() if matches(path.name, source)}
    kept = {file for file in sorted(here | set(record["files"])) if is_kept(folder, record, file)}
    if kept >= set(record["files"] if "revision" in record else source.patterns):
        return []
    staging = folder.with_name(f"{folder.name}.partial")  # not below the folder, where a reader would find it
    try:
        info = dataset_info(source.repository, revision=record.get("revision"))
        paths = [sibling.rfilename for sibling in info.siblings or () if matches(sibling.rfilename, source)]
        absent = [p for p in source.patterns if p not in kept and not any(fnmatchcase(path, p) for path in paths)]
        if absent:
            raise UserError(f"{source.page}: found no {' and no '.join(absent)} at revision {info.sha}, expected some")
        missing = {path.removeprefix("data/").replace("/", "-"): path for path in paths}
        missing = {file: path for file, path in missing.items() if file not in kept}
        if missing:  # by its revision: without access to a branch, the client is content with what is there
            wanted = list(missing.values())
            snapshot_download(
                source.repository, repo_type="dataset", revision=info.sha, allow_patterns=wanted, local_dir=staging
            )
    except HUB_NETWORK as error:
        raise hub_error(name, source, folder, [p for p in source.patterns if p not in kept], error) from None
    for file, path in missing.items():
        os.replace(staging / path, folder / file)
        remember(folder, record, file, repository=source.repository, revision=info.sha, path=path)
        print(f"{file}: downloaded, {record['files'][file]['bytes']:,} bytes")
    write_json(folder / "fetched.json", {**record, "revision": info.sha})  # not before all are there
    shutil.rmtree(staging, ignore_errors=True)
    return list(missing)


def matches(path: str, source: Source) -> bool:
    """Whether a path in the Hub's repository, or a file's name here, is one of the data set's."""
    return any(fnmatchcase(path, pattern) for pattern in source.patterns)


def hub_error(name: str, source: Source, folder: Path, files: list[str], error: Exception) -> UserError:
    """What the Hub's client met, as what to do about it. The token, should the client's message hold it, is left out."""
    token = get_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):  # also the base of GatedRepoError
        found = (
            "the token that was found (HF_TOKEN or a stored login) gives no access" if token else "no token was found"
        )
        needs = f"needed: {source.needs}" if source.needs else f"expected a public data set; see {source.page}"
        return UserError(f"{name}: the Hub refused {source.repository} with status {status}, and {found}; {needs}")
    said = " ".join(str(error).split())
    reason = f"{source.repository} did not arrive from the Hub ({type(error).__name__}: {said})"
    if is_offline_mode():
        reason = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, which forbids the download; unset it"
    return no_network(name, source, folder, files, reason.replace(token, "<token>") if token else reason)
