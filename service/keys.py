"""API keys: who may call which routes, and how often."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

log = logging.getLogger("camcal")

Group = Literal["predict", "cam", "model", "v2", "metrics"]
GROUPS: tuple[Group, ...] = get_args(Group)
USUAL: tuple[Group, ...] = ("predict", "cam", "model", "v2")  # the routes of a key that names none

MAIN = "default"  # the name of CAMCAL_API_KEY
MIN_LENGTH, MIN_DIFFERENT = 16, 8  # characters of a key that somebody thought of
MAX_FILE_BYTES = 2**20
WATCH_S = 1.0

# What `new_key` makes: 256 random bits. No other key of a file is accepted, so none of them can be guessed, and a plain
# SHA-256 is as good as a slow or salted hash. It also makes the check of a key one hash and one look into a dictionary,
# however many there are; how long that look takes tells of hashes alone, and a hash opens nothing.
_GENERATED = re.compile(r"camcal_[A-Za-z0-9_-]{43}")

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ApiKey:
    """Whose key it is, the groups of routes it opens, and the requests a second it may send, if these are limited."""

    name: str
    routes: frozenset[Group]
    rate: float | None = None


class _Entry(BaseModel):
    """A line of the file. Several hashes are several keys of one name, as while one replaces another."""

    model_config = ConfigDict(extra="forbid")

    sha256: _Hash | Annotated[list[_Hash], Field(min_length=1)]
    routes: Annotated[list[Group], Field(min_length=1)] = list(USUAL)
    rate: float | None = Field(None, gt=0, le=1e6)

    @property
    def hashes(self) -> list[str]:
        return [self.sha256] if isinstance(self.sha256, str) else self.sha256


_FILE = TypeAdapter(dict[_Name, _Entry])


def new_key(name: str, routes: Iterable[str] = USUAL, rate: float | None = None) -> tuple[str, str]:
    """A new key, and the line for the keys file that lets it in.

    Raises:
        ValueError: if the name, a route or the rate is not valid.
    """
    key = f"camcal_{secrets.token_urlsafe(32)}"
    entry = {"sha256": _hash(key).hex(), "routes": list(routes)} | ({} if rate is None else {"rate": rate})
    _parse({name: entry})
    # Lists, numbers and such strings are written alike in JSON and TOML.
    return (
        key,
        f"{name} = {{ {', '.join(f'{word} = {orjson.dumps(value).decode()}' for word, value in entry.items())} }}",
    )


def check_strength(key: str) -> None:
    """Raises ValueError unless `key`, which may be made up by hand, fits into a header and is not too easy to guess."""
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("Input should have no spaces and only ASCII characters: clients send others in two ways")
    if len(key) < MIN_LENGTH or len(set(key)) < MIN_DIFFERENT:
        raise ValueError(
            f"Input should have at least {MIN_LENGTH} characters, {MIN_DIFFERENT} of them different; "
            "`openssl rand -base64 24` prints such a key"
        )


def read_keys(path: Path) -> dict[bytes, ApiKey]:
    """The keys of the file `path`, by their hashes.

    Raises:
        ValueError: in one sentence, if there is no such file, or not every line of it is valid.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"the file has more than {MAX_FILE_BYTES} bytes")
    try:
        return _parse(tomllib.loads(content.decode()))
    except UnicodeDecodeError:
        raise ValueError("the file is not text in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"the file is not valid TOML: {error}") from None


def _parse(entries: dict[str, object]) -> dict[bytes, ApiKey]:
    if not entries:
        raise ValueError("the file holds no key; `camcal key new NAME` prints a line for it")
    if MAIN in entries:
        raise ValueError(f"{MAIN!r} is the name of CAMCAL_API_KEY; choose another")
    try:
        parsed = _FILE.validate_python(entries)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise ValueError(f"{where} is not valid: {first['msg']}") from None
    keys: dict[bytes, ApiKey] = {}
    for name, entry in parsed.items():
        for digest in map(bytes.fromhex, entry.hashes):
            if digest in keys:
                raise ValueError(f"{name} and {keys[digest].name} have the same sha256")
            keys[digest] = ApiKey(name, frozenset(entry.routes), entry.rate)
    return keys


class Keyring:
    """The keys that are valid now. Without `main` and `path` there are none, and none is needed.

    Args:
        main: the key that opens all routes.
        path: the file of the others, which is read again when it changes.

    Raises:
        ValueError: as `read_keys`.
    """

    def __init__(self, main: str | None = None, path: Path | None = None):
        self._main = None if main is None else _hash(main)
        self._path = path
        self._stamp = self._look()
        self._keys = {} if path is None else read_keys(path)

    def __bool__(self) -> bool:
        return self._main is not None or self._path is not None

    def find(self, given: str) -> ApiKey | None:
        """Whose key `given` is."""
        digest = _hash(given)
        if digest == self._main:
            return ApiKey(MAIN, frozenset(GROUPS))
        key = self._keys.get(digest)
        return key if key is not None and _GENERATED.fullmatch(given) else None

    def refresh(self) -> None:
        """Read the file again if it has changed. One that cannot be used changes nothing but the log."""
        stamp = self._look()
        if self._path is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except ValueError as error:
            log.error("API keys were not read again, those before stay valid: %s: %s", self._path, error)
            return
        names = dict.fromkeys(key.name for key in self._keys.values())
        log.info("API keys were read again: %s", ", ".join(names))

    async def watch(self) -> None:
        """Read the file again whenever it has changed."""
        while self._path is not None:
            await asyncio.sleep(WATCH_S)
            await asyncio.to_thread(self.refresh)

    def _look(self) -> tuple[int, int, int] | None:
        """Changes with the file, also where it is a link that another takes the place of."""
        try:
            found = os.stat(self._path) if self._path is not None else None
        except OSError:
            return None
        return found and (found.st_ino, found.st_size, found.st_mtime_ns)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
