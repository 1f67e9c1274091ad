from __future__ import annotations

import os
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from camcal.service.keys import ApiKey, Keyring, check_strength, new_key, read_keys
from tests.service.conftest import KEY

HASH = "ab" * 32


def keys_file(folder: Path, *lines: str) -> Path:
    """Write a keys file, atomically replacing the previous one, as an editor does."""
    new = folder / "new"
    new.write_text("\n".join(lines) + "\n")
    return new.rename(folder / "keys.toml")


def test_new_key_has_the_routes_of_its_line(tmp_path: Path) -> None:
    key, line = new_key("mobile", ["predict", "cam"], 20.5)
    other, another_line = new_key("scraper", ["metrics"])
    assert key != other and key not in line and sha256(key.encode()).hexdigest() in line
    assert tomllib.loads(line)["mobile"]["rate"] == 20.5
    keys = Keyring(path=keys_file(tmp_path, "# comment", line, another_line))
    assert keys.find(key) == ApiKey("mobile", frozenset({"predict", "cam"}), 20.5)
    assert keys.find(other) == ApiKey("scraper", frozenset({"metrics"}))
    for wrong in ("", key[:-1], key + "x", key.upper(), HASH):
        assert keys.find(wrong) is None


def test_two_keys_of_one_name(tmp_path: Path) -> None:
    old, new = "camcal_" + "a" * 43, "camcal_" + "b" * 43
    hashes = [sha256(key.encode()).hexdigest() for key in (old, new)]
    keys = Keyring(path=keys_file(tmp_path, f"mobile = {{ sha256 = {hashes} }}"))
    for key in (old, new):
        assert keys.find(key) == ApiKey("mobile", frozenset({"predict", "cam", "model", "v2"}))


def test_weak_key_in_the_file_is_not_accepted(tmp_path: Path) -> None:
    weak = "correct-horse-battery-staple"
    keys = Keyring(path=keys_file(tmp_path, f'mobile = {{ sha256 = "{sha256(weak.encode()).hexdigest()}" }}'))
    assert keys.find(weak) is None


def test_main_key_opens_everything() -> None:
    keys = Keyring(KEY)
    assert keys and not Keyring()
    key = keys.find(KEY)
    assert key is not None and key.name == "default" and key.routes == {"predict", "cam", "model", "v2", "metrics"}
    assert keys.find(KEY + "x") is None


@pytest.mark.parametrize("key", [KEY, "openssl/rand+64==", "~" * 9 + "!#$%&()*"])
def test_strong_enough(key: str) -> None:
    check_strength(key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file contains no keys; `camcal key new NAME` generates one"),
        ("mobile", "the file is not valid TOML: "),
        ("a = 1", "a is invalid: "),
        ("a = {}", "a.sha256 is invalid: Field required"),
        ('a = { sha256 = "abc" }', "a.sha256"),
        (f'a = {{ sha256 = "{HASH}", route = ["cam"] }}', "a.route is invalid: Extra inputs are not permitted"),
        (f'a = {{ sha256 = "{HASH}", routes = ["cams"] }}', "a.routes.0 is invalid: Input should be 'predict', "),
        (f'a = {{ sha256 = "{HASH}", routes = [] }}', "a.routes is invalid: "),
        (f'a = {{ sha256 = "{HASH}", rate = 0 }}', "a.rate is invalid: Input should be greater than 0"),
        (f'a = {{ sha256 = "{HASH}", rate = nan }}', "a.rate is invalid: "),
        (f'"a b" = {{ sha256 = "{HASH}" }}', "a b is invalid: "),
        (f'a = {{ sha256 = "{HASH}" }}\na = {{ sha256 = "{HASH}" }}', "the file is not valid TOML: Cannot overwrite"),
        (f'a = {{ sha256 = "{HASH}" }}\nb = {{ sha256 = "{HASH}" }}', "b and a have the same sha256"),
        (f'default = {{ sha256 = "{HASH}" }}', "the name 'default' is reserved for CAMCAL_API_KEY; choose another"),
        ("a = " + "[" * 10_000, "the file is not valid TOML: "),
        ("#" * (2**20 + 1), "the file is larger than 1048576 bytes"),
    ],
)
def test_invalid_file(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_keys(keys_file(tmp_path, content))
    assert str(caught.value).startswith(message)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="the file is not UTF-8 text"):
        read_keys(tmp_path / "keys.toml")
    with pytest.raises(ValueError, match="cannot read the file: No such file"):
        Keyring(path=tmp_path / "none")


def test_rotation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (old, old_line), (new, new_line) = new_key("mobile"), new_key("mobile", ["cam"])
    keys = Keyring(path=keys_file(tmp_path, old_line))
    keys.refresh()
    assert caplog.messages == []
    keys_file(tmp_path, new_line)
    keys.refresh()
    assert keys.find(old) is None
    assert keys.find(new) == ApiKey("mobile", frozenset({"cam"}))
    assert caplog.messages == ["reloaded the API keys: mobile"]


@pytest.mark.parametrize("content", ["", "mobile = {", None])
def test_invalid_file_keeps_the_keys_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    key, line = new_key("mobile")
    path = keys_file(tmp_path, line)
    keys = Keyring(path=path)
    if content is None:
        path.unlink()
    else:
        keys_file(tmp_path, content)
    for _ in range(3):
        keys.refresh()
    assert keys.find(key) is not None
    (message,) = caplog.messages
    assert message.startswith(f"cannot reload the API keys, the previous ones stay valid: {path}: ")
    key, line = new_key("mobile")
    keys_file(tmp_path, line)
    keys.refresh()
    assert keys.find(key) is not None


def test_replaced_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (old, old_line), (new, new_line) = new_key("mobile"), new_key("mobile")
    keys_file(tmp_path / "one", old_line), keys_file(tmp_path / "two", new_line)
    link = tmp_path / "current"
    link.symlink_to("one")
    keys = Keyring(path=link / "keys.toml")
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", link)
    keys.refresh()
    assert keys.find(new) is not None and keys.find(old) is None
