"""Download the raw files of a data set.

    python -m prlhf.data fetch NAME [--out FOLDER]

The same command again verifies what is there by FOLDER/fetched.json (origin, size and SHA-256 of each file) and
downloads only what is missing or differs. Files that were placed by hand are kept.
"""

import json
import os
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import dataset_info, get_token, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.errors import HTTPError as HubHTTPError

from prlhf.data.fetch.download import NETWORK, download
from prlhf.data.files import sha256, write_json
from prlhf.data.sources import SOURCES, Source, raw_folder, source_name
from prlhf.errors import UserError, expanded

HUB_NETWORK = (HubHTTPError, EntryNotFoundError, ConnectionError, TimeoutError, RuntimeError)  # the last is hf_xet's
MEASURED = "{bytes} bytes of SHA-256 {sha256}"


@dataclass(frozen=True)
class RawFolder:
    """The folder of a data set's raw files. record: the content of its fetched.json, {"name", "files", "revision"?}."""

    name: str
    source: Source
    path: Path
    record: dict[str, Any]
    prepare: str  # the command that reads the files

    def measured(self, file: str) -> dict[str, Any]:
        """{"bytes", "sha256"} of a file."""
        return {"bytes": (self.path / file).stat().st_size, "sha256": sha256(self.path / file)}

    def remember(self, file: str, **origin: Any) -> None:
        """Write origin, size and checksum of a file to fetched.json."""
        entry = self.record["files"][file] = {**origin, **self.measured(file)}
        write_json(self.path / "fetched.json", self.record)
        state = "placed by hand, kept" if "placed_by_hand" in origin else f"new, {entry['bytes']:,} bytes"
        print(f"{file}: {state}")

    def keeps(self, file: str) -> bool:
        """Whether a file is there, and is as recorded or placed by hand (then it is recorded now). Prints what differs."""
        entry = self.record["files"].get(file)
        if not (self.path / file).is_file():
            if entry:
                print(f"{file}: recorded, but not there")
            return False
        if entry is None or "placed_by_hand" in entry:
            self.remember(file, placed_by_hand=True)
            return True
        found, expected = MEASURED.format_map(self.measured(file)), MEASURED.format_map(entry)
        if found != expected:
            print(f"{file}: found {found}, expected {expected}, as recorded")
        return found == expected

    def no_network(self, files: Iterable[str], reason: str) -> UserError:
        """The error where there is no connection: which files to put into the folder, and where they come from."""
        tree = f"{self.source.page}/tree/main"
        lines = "".join(f"\n  {file} from {self.source.urls.get(file, tree)}" for file in files)
        then = "this command again, which unpacks it" if self.source.unpack else self.prepare
        return UserError(
            f"{self.name}: {reason}\nOnce there is a connection, the same command downloads what is missing. "
            f"Without one, put into {self.path}:{lines}\nand run {then}"
        )


def run(name: str, out: str | None) -> None:
    """The command: download data set `name` to folder `out`, by default in the cache. UserError says what to do."""
    origin = source_name(name)
    source, default = SOURCES[origin], raw_folder(origin).resolve()
    path = expanded(out).resolve() if out else default
    print(f"{source.title}\npage: {source.page}\nlicence: {source.licence}")
    if source.needs:
        print(f"gated: {source.needs}")
    path.mkdir(parents=True, exist_ok=True)
    prepare = f"python -m prlhf.data prepare {name}" + ("" if path == default else f" --raw {shlex.quote(str(path))}")
    folder = RawFolder(origin, source, path, read_record(path / "fetched.json", origin), prepare)
    new = fetch_repository(folder) if source.repository else fetch_urls(folder)
    for archive in source.urls if source.unpack else ():
        new += unpack(folder, archive, fresh=archive in new)
    files = folder.record["files"]
    print(f"{path}: {len(files)} files, {len(new)} of them new ({', '.join(files)})\nnext: {prepare}")


def read_record(path: Path, name: str) -> dict[str, Any]:
    """The content of fetched.json. UserError where it is damaged or belongs to another data set."""
    if not path.exists():
        return {"name": name, "files": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, _ = record["name"], [MEASURED.format_map(entry) for entry in record["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged, expected the record of a download; delete it and run this again") from None
    if found != name:
        raise UserError(f"{path}: found the files of {found!r}, expected {name!r} or another folder (--out)")
    return record


def fetch_urls(folder: RawFolder) -> list[str]:
    """Download the files that are not kept; their names. UserError as of `download`, or where the network fails."""
    missing = [file for file in folder.source.urls if not folder.keeps(file)]
    for number, file in enumerate(missing):
        url = folder.source.urls[file]
        try:
            download(url, folder.path / file)
        except NETWORK as error:
            raise folder.no_network(missing[number:], f"{file} did not arrive from {url} ({error})") from None
        folder.remember(file, url=url)
    return missing


def unpack(folder: RawFolder, archive: str, fresh: bool) -> list[str]:
    """Unpack the members that match and are not kept, or all of them where the archive is `fresh`; their names.

    UserError: a damaged archive, a path that leads out of the folder, no match.
    """
    path, unpacked = folder.path / archive, []
    try:
        with zipfile.ZipFile(path) as opened:
            for member in wanted_members(opened, path, folder.source.unpack):
                file = PurePosixPath(member).name
                of_old_archive = fresh and "member" in folder.record["files"].get(file, {})
                if of_old_archive or not folder.keeps(file):
                    aside = folder.path / f"{file}.partial"
                    aside.write_bytes(opened.read(member))  # the member's checksum is verified
                    os.replace(aside, folder.path / file)
                    folder.remember(file, archive=archive, member=member)
                    unpacked.append(file)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{path}: not a whole zip archive ({error}); delete it and run this again") from None
    return unpacked


def wanted_members(opened: zipfile.ZipFile, path: Path, patterns: Iterable[str]) -> list[str]:
    """The members that match one of the patterns, but for macOS's shadow files. UserError as of `unpack`."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    for member in opened.infolist():
        inside = PurePosixPath(member.filename.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(f"{path}: found a member {member.filename!r}, expected paths within the folder")
        if any(inside.match(pattern) for pattern in patterns) and not inside.name.startswith("._"):
            first = wanted.setdefault(inside.name, member)
            if first.CRC != member.CRC:
                raise UserError(f"{path}: found {first.filename} and {member.filename}, expected one {inside.name}")
    if not wanted:
        raise UserError(f"{path}: found {', '.join(opened.namelist()[:5])} ..., expected {' or '.join(patterns)}")
    return [member.filename for member in wanted.values()]


def fetch_repository(folder: RawFolder) -> list[str]:
    """Download the files that are not kept, of the recorded revision or else the newest; their names.

    They arrive in `folder`.partial and move when all are there. UserError: no access, no such file, no connection.
    """
    source, record = folder.source, folder.record
    here = [path.name for path in folder.path.iterdir()]
    kept = {file for file in sorted({*matching(here, source.patterns), *record["files"]}) if folder.keeps(file)}
    if kept >= set(record["files"] if "revision" in record else source.patterns):
        return []
    wanted = [pattern for pattern in source.patterns if pattern not in kept]
    staging = folder.path.with_name(f"{folder.path.name}.partial")  # beside the folder, so that no reader finds it
    try:
        info = dataset_info(source.repository, revision=record.get("revision"))
        paths = [sibling.rfilename for sibling in info.siblings or ()]
        absent = [pattern for pattern in wanted if not matching(paths, [pattern])]
        if absent:
            raise UserError(f"{source.page}: found no {' and no '.join(absent)} at revision {info.sha}, expected some")
        by_name = {path.removeprefix("data/").replace("/", "-"): path for path in matching(paths, source.patterns)}
        missing = {file: path for file, path in by_name.items() if file not in kept}
        which = list(missing.values())
        # By revision: where a branch cannot be reached, the client would take what it has cached.
        snapshot_download(
            source.repository, repo_type="dataset", revision=info.sha, allow_patterns=which, local_dir=staging
        )
    except HUB_NETWORK as error:
        raise hub_error(folder, wanted, error) from None
    for file, path in missing.items():
        os.replace(staging / path, folder.path / file)
        folder.remember(file, repository=source.repository, revision=info.sha, path=path)
    record["revision"] = info.sha  # not before all files are there
    write_json(folder.path / "fetched.json", record)
    shutil.rmtree(staging, ignore_errors=True)
    return list(missing)


def matching(paths: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The paths that match one of the patterns; * also matches /."""
    return [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]


def hub_error(folder: RawFolder, files: list[str], error: Exception) -> UserError:
    """An error of the Hub's client, as what to do about it. A token that its message contains is left out."""
    source, token = folder.source, get_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):  # also the base of GatedRepoError
        found = "the token found (HF_TOKEN or a stored login) gives no access" if token else "no token was found"
        needs = f"needed: {source.needs}" if source.needs else f"expected a public data set; see {source.page}"
        refused = f"the Hub refused {source.repository} with status {status}"
        return UserError(f"{folder.name}: {refused}, and {found}; {needs}")
    reason = f"{source.repository} did not arrive from the Hub ({type(error).__name__}: {' '.join(str(error).split())})"
    if is_offline_mode():
        reason = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, which forbids the download; unset it"
    return folder.no_network(files, reason.replace(token, "<token>") if token else reason)
