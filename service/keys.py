"""API keys: the routes that each key may call, and its rate limit."""

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
DEFAULT_GROUPS: tuple[Group, ...] = ("predict", "cam", "model", "v2")  # of a key without `routes`

MAIN = "default"  # the name of CAMCAL_API_KEY
MIN_LENGTH, MIN_DIFFERENT = 16, 8  # characters of CAMCAL_API_KEY, which may be made up by hand
MAX_FILE_BYTES = 2**20
WATCH_S = 1.0

# The format of `new_key`: 256 random bits. The keys file accepts no other format, so no key can be guessed, and a plain
# SHA-256 is as good as a slow or salted hash. Checking a key takes one hash and one dictionary lookup, with any number
# of keys. The duration of the lookup reveals something about hashes only, and a hash grants no access.
_GENERATED = re.compile(r"camcal_[A-Za-z0-9_-]{43}")

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ApiKey:
    """The name of a key, the route groups that it may call, and its rate limit in requests per second, if any."""

    name: str
    routes: frozenset[Group]
    rate: float | None = None


class _Entry(BaseModel):
    """One line of the keys file. Several hashes mean several valid keys, for example during a key rotation."""

    model_config = ConfigDict(extra="forbid")

    sha256: _Hash | Annotated[list[_Hash], Field(min_length=1)]
    routes: Annotated[list[Group], Field(min_length=1)] = list(DEFAULT_GROUPS)
    rate: float | None = Field(None, gt=0, le=1e6)

    @property
    def hashes(self) -> list[str]:
        return [self.sha256] if isinstance(self.sha256, str) else self.sha256


_FILE = TypeAdapter(dict[_Name, _Entry])


def new_key(name: str, routes: Iterable[str] = DEFAULT_GROUPS, rate: float | None = None) -> tuple[str, str]:
    """Generate a key, and its line for the keys file.

    Raises:
        ValueError: if the name, a route group or the rate is invalid.
    """
    key = f"camcal_{secrets.token_urlsafe(32)}"
    entry = {"sha256": _hash(key).hex(), "routes": list(routes)} | ({} if rate is None else {"rate": rate})
    _parse({name: entry})
    # JSON and TOML have the same syntax for these lists, numbers and strings.
    return (
        key,
        f"{name} = {{ {', '.join(f'{word} = {orjson.dumps(value).decode()}' for word, value in entry.items())} }}",
    )


def check_strength(key: str) -> None:
    """Raises ValueError unless `key`, which may be made up by hand, is valid in a header and not too easy to guess."""
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("Input should be printable ASCII without spaces: clients disagree on how to encode the rest")
    if len(key) < MIN_LENGTH or len(set(key)) < MIN_DIFFERENT:
        raise ValueError(
            f"Input should have at least {MIN_LENGTH} characters, {MIN_DIFFERENT} of them different; "
            "generate one with `openssl rand -base64 24`"
        )


def read_keys(path: Path) -> dict[bytes, ApiKey]:
    """The keys of the file at `path`, by hash.

    Raises:
        ValueError: if the file does not exist or any line is invalid. The message is one sentence.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"the file is larger than {MAX_FILE_BYTES} bytes")
    try:
        return _parse(tomllib.loads(content.decode()))
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"the file is not valid TOML: {error}") from None


def _parse(entries: dict[str, object]) -> dict[bytes, ApiKey]:
    if not entries:
        raise ValueError("the file contains no keys; `camcal key new NAME` generates one")
    if MAIN in entries:
        raise ValueError(f"the name {MAIN!r} is reserved for CAMCAL_API_KEY; choose another")
    try:
        parsed = _FILE.validate_python(entries)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise ValueError(f"{where} is invalid: {first['msg']}") from None
    keys: dict[bytes, ApiKey] = {}
    for name, entry in parsed.items():
        for digest in map(bytes.fromhex, entry.hashes):
            if digest in keys:
                raise ValueError(f"{name} and {keys[digest].name} have the same sha256")
            keys[digest] = ApiKey(name, frozenset(entry.routes), entry.rate)
    return keys


class Keyring:
    """The currently valid keys. Without `main` and `path`, requests need no key.

    Args:
        main: the key that may call all routes.
        path: the file of all other keys; it is reloaded when it changes.

    Raises:
        ValueError: as `read_keys`.
    """

    def __init__(self, main: str | None = None, path: Path | None = None):
        self._main = None if main is None else _hash(main)
        self._path = path
        self._stamp = self._file_stamp()
        self._keys = {} if path is None else read_keys(path)

    def __bool__(self) -> bool:
        return self._main is not None or self._path is not None

    def find(self, key: str) -> ApiKey | None:
        """The entry of `key`, or None if it is not valid."""
        digest = _hash(key)
        if digest == self._main:
            return ApiKey(MAIN, frozenset(GROUPS))
        return self._keys.get(digest) if _GENERATED.fullmatch(key) else None

    def refresh(self) -> None:
        """Reload the file if it has changed. If it is invalid, log an error and keep the previous keys."""
        stamp = self._file_stamp()
        if self._path is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except ValueError as error:
            log.error("cannot reload the API keys, the previous ones stay valid: %s: %s", self._path, error)
            return
        names = dict.fromkeys(key.name for key in self._keys.values())
        log.info("reloaded the API keys: %s", ", ".join(names))

    async def watch(self) -> None:
        """Reload the file whenever it changes."""
        while self._path is not None:
            await asyncio.sleep(WATCH_S)
            await asyncio.to_thread(self.refresh)

    def _file_stamp(self) -> tuple[int, int, int] | None:
        """Inode, size and modification time. They also change when the path is a symbolic link that is replaced."""
        try:
            status = os.stat(self._path) if self._path is not None else None
        except OSError:
            return None
        return status and (status.st_ino, status.st_size, status.st_mtime_ns)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
