"""Folders in object stores (s3://, gs://) that local folders are copies of.

A run in a store works in a local copy of its folder. What `autodet.atomic` writes there is put into the store first, so
the store has the truth; what is read there and missing is fetched. Which folders are copies, and of what, stands in the
environment variable `COPIED`, which processes on other machines are given by Ray.

obstore and not pyarrow, whose file systems cannot create an object only where there is none, nor replace one only where
it is still the same: a lease needs both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

COPIED = "AUTODET_COPIED"  # JSON: folder → its URL
SCHEMES = ("s3", "gs")
RETRY_SECONDS = 60
CONNECT_SECONDS = 10
REQUEST_SECONDS = 600  # of gigabytes
SHORT_SECONDS = 8  # of a write on a condition, repeats included: an event must not arrive after the lease has lapsed


class StoreError(OSError):
    """An object store that cannot be used, or refuses."""


class Changed(StoreError):  # noqa: N818 - the name is the state it reports
    """An object is there already, or is not what it was expected to be."""


@dataclass(frozen=True)
class Version:
    """Which content an object has: S3 tells by the tag, Google's store by the generation."""

    tag: str | None
    generation: str | None


@dataclass(frozen=True)
class Stored:
    """An object below a folder. name: relative to that; size in bytes; tag: of its version."""

    name: str
    size: int
    tag: str | None


@dataclass(frozen=True)
class Place:
    """A place in a store. url: of the folder that is copied; key: of the object in it, empty for the folder itself."""

    url: str
    key: str

    def __str__(self) -> str:
        return f"{self.url}/{self.key}".rstrip("/")

    def read(self) -> tuple[bytes, Version] | None:
        """The object's content and version; None where there is none."""
        import obstore

        with _errors(self):
            try:
                result = obstore.get(_store(self.url), self.key)
                return bytes(result.bytes()), _version(result.meta)
            except FileNotFoundError:
                _check_bucket(self)
                return None

    def version(self) -> Version | None:
        """The object's version; None where there is none."""
        import obstore

        with _errors(self):
            try:
                return _version(obstore.head(_store(self.url), self.key))
            except FileNotFoundError:
                return None

    def write(self, data: bytes, instead_of: Version | None = None, new: bool = False) -> Version:
        """Write the object; its version. new: only where there is none; instead_of: only in place of that version.

        Raises Changed where that is not so.
        """
        import obstore

        mode: Any = "create" if new else "overwrite"
        if instead_of is not None:
            known = {"e_tag": instead_of.tag, "version": instead_of.generation}
            mode = {name: value for name, value in known.items() if value is not None}
        on_condition = mode != "overwrite"
        whole = False if on_condition else None  # in parts nothing can be made conditional
        try:
            with _errors(self):
                store = _store(self.url, brief=on_condition)
                return _version(obstore.put(store, self.key, data, mode=mode, use_multipart=whole))
        except Changed:
            found = self.read()
            if found is None or found[0] != data:
                raise
            return found[1]  # written by this very call, whose first answer was lost

    def remove(self) -> None:
        """Remove the object, or all objects of a folder; nothing where there is none."""
        import obstore

        with _errors(self):
            if names := [found.name for found in self.files()]:
                obstore.delete(_store(self.url), [f"{self.key}/{name}".lstrip("/") for name in names])
            elif self.version() is not None:
                obstore.delete(_store(self.url), self.key)

    def files(self) -> list[Stored]:
        """Every object below this folder, but for the empty ones by which some programs mark folders."""
        import obstore

        above = f"{self.key}/" if self.key else ""
        with _errors(self):
            metas = [meta for batch in obstore.list(_store(self.url), prefix=self.key or None) for meta in batch]
        found = [Stored(str(meta["path"]).removeprefix(above), int(meta["size"]), meta["e_tag"]) for meta in metas]
        folders = {""} | {str(parent) for each in found for parent in PurePosixPath(each.name).parents}
        return [each for each in found if each.size or each.name not in folders]


def is_url(text: str) -> bool:
    """Whether a text names a place in a store."""
    return "://" in text


def declare_copy(folder: Path, url: str) -> None:
    """Let a folder be the copy of a URL in this process and in those it starts. ValueError for another kind of URL."""
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        raise ValueError(f"{scheme}://…@…: keys do not belong into a URL, which is recorded; give them as variables.")
    if scheme not in SCHEMES or not rest.strip("/"):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"{url}: expected a folder in an object store ({known}…), or a path.")
    os.environ[COPIED] = json.dumps(copies() | {str(folder): url.rstrip("/")})


def copies() -> dict[str, str]:
    """Folder → URL of all copies."""
    found: dict[str, str] = _parsed(os.environ.get(COPIED, "{}"))
    return dict(found)


def copy_of(url: str) -> Path | None:
    """Where a place is in a folder that is a copy already; None where it is in none."""
    for folder, copied in copies().items():
        if f"{url}/".startswith(f"{copied}/"):
            return Path(folder + url[len(copied) :])
    return None


def place_of(path: Path) -> Place | None:
    """The place whose copy a path is; None for any other path."""
    if COPIED not in os.environ:
        return None
    absolute = Path(os.path.abspath(path))
    for folder, url in copies().items():
        if absolute.is_relative_to(folder):
            key = absolute.relative_to(folder).as_posix()
            return Place(url, "" if key == "." else key)
    return None


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    return json.loads(text)


def named(path: Path) -> str:
    """What a person calls a path: its URL where it is a copy."""
    return str(place_of(path) or path)


def _version(meta: Mapping[str, Any]) -> Version:
    return Version(meta.get("e_tag"), meta.get("version"))


@lru_cache(maxsize=8)
def _store(url: str, brief: bool = False) -> Any:
    """brief: a request that may not take longer than ``SHORT_SECONDS``."""
    seconds = SHORT_SECONDS if brief else RETRY_SECONDS
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise StoreError(f"{url}: object stores need the package obstore: pip install obstore.") from error
    # A store on the user's own machines may speak HTTP: its address says so.
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return from_url(
        url,
        client_options={
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "timeout": timedelta(seconds=SHORT_SECONDS if brief else REQUEST_SECONDS),
            "allow_http": plain,
        },
        retry_config={"max_retries": 6, "retry_timeout": timedelta(seconds=seconds)},
    )


def _check_bucket(place: Place) -> None:
    """FileNotFoundError where not the object but its bucket is missing."""
    import obstore

    next(iter(obstore.list(_store(place.url), prefix=place.key)), None)


@contextmanager
def _errors(place: Place) -> Iterator[None]:
    """A store's errors in our words; its own, which go on for pages, by their first line."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
        raise Changed(f"{place} was written by another process.") from error
    except (exceptions.BaseError, FileNotFoundError) as error:
        raise StoreError(f"{place}: {_explained(error)}") from error


def _explained(error: BaseException) -> str:
    """What is wrong, in our words: the store's own go on for pages, and are of one kind for a list that is refused."""
    from obstore import exceptions

    line = str(error).splitlines()[0][:300]
    status = re.search(r"status code: (\d+)", line)
    code = status[1] if status else ""
    if isinstance(error, FileNotFoundError) or code == "404":
        return "there is no such bucket. Create it, or correct its name."
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError) or code in ("401", "403"):
        return (
            f"not permitted ({line}). Reading, writing, listing and deleting are needed: check the machine's role, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS."
        )
    return f"the store cannot be used ({line}). Check its address and the network, then resume."
