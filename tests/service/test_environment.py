from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from camcal.service.environment import SettingsError, read
from camcal.service.settings import load_settings

FIELDS = ("port", "api_key", "api_keys_file", "max_batch")


def found(environment: Mapping[str, str]) -> dict[str, str]:
    return read(environment, fields=FIELDS, secrets=("api_key",), guards=("api_key", "api_keys_file"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CAMCAL_APIKEY", "x", "CAMCAL_APIKEY is not a setting; did you mean CAMCAL_API_KEY?"),
        ("CAMCAL_API_KEYFILE", "x", "CAMCAL_API_KEYFILE is not a setting; did you mean CAMCAL_API_KEY_FILE?"),
        ("camcal_prot", "1", "CAMCAL_PROT is not a setting; did you mean CAMCAL_PORT?"),
        ("CAMCAL_MAXBATCH", "", "CAMCAL_MAXBATCH is not a setting; did you mean CAMCAL_MAX_BATCH?"),
        ("CAMCAL_XYZZY", "1", "CAMCAL_XYZZY is not a setting; unset it; docs/serving.md lists the settings"),
        ("CAMCAL_API_KEY", "", "CAMCAL_API_KEY is empty; give it a value, or unset it to do without"),
        ("CAMCAL_API_KEYS_FILE", "", "CAMCAL_API_KEYS_FILE is empty; give it a value, or unset it to do without"),
        ("CAMCAL_API_KEY_FILE", "", "CAMCAL_API_KEY_FILE is empty; give it a value, or unset it to do without"),
        ("CAMCAL_API_KEY_FILE", "/nope", "CAMCAL_API_KEY_FILE is '/nope', which cannot be read: No such file or"),
        ("CAMCAL_API_KEY_FILE", "/", "CAMCAL_API_KEY_FILE is '/', which cannot be read: Is a directory"),
    ],
)
def test_what_leaves_a_door_open_by_mistake_is_an_error(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        found({name: value})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "an empty file"), (b" \n", "an empty file"), (b"\xff", "not a text file"), (b"x" * 5000, "more than 4096")],
)
def test_file_that_holds_no_secret(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        found({"CAMCAL_API_KEY_FILE": str(tmp_path / "key")})


def test_secret_is_that_of_the_file_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the secret\r\n")
    assert found({"CAMCAL_API_KEY_FILE": str(tmp_path / "key")}) == {"api_key": "the secret"}
    with pytest.raises(SettingsError, match="CAMCAL_API_KEY and CAMCAL_API_KEY_FILE are both set"):
        found({"CAMCAL_API_KEY_FILE": str(tmp_path / "key"), "CAMCAL_API_KEY": "another"})


def test_others_are_left_alone() -> None:
    kubernetes = {
        "CAMCAL_SERVICE_HOST": "10.0.0.1",
        "CAMCAL_SERVICE_PORT": "80",
        "CAMCAL_SERVICE_PORT_HTTP": "80",
        "CAMCAL_PORT_80_TCP": "tcp://10.0.0.1:80",
        "CAMCAL_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert found(kubernetes | {"CAMCAL_COMMIT": "abc", "CAMCAL_MAX_BATCH": "", "APIKEY": "", "PATH": "/bin"}) == {}


def test_settings_check_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_APIKEY", "x")
    with pytest.raises(SettingsError, match="did you mean CAMCAL_API_KEY"):
        load_settings()
    monkeypatch.delenv("CAMCAL_APIKEY")
    monkeypatch.setenv("CAMCAL_ALLOWED_HOSTS", "")
    with pytest.raises(SettingsError, match="CAMCAL_ALLOWED_HOSTS is empty"):
        load_settings()
