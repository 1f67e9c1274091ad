from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from camcal.service.environment import SettingsError, read
from camcal.service.settings import load_settings

FIELDS = ("port", "api_key", "api_keys_file", "max_batch")


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    return read(environment, fields=FIELDS, secrets=("api_key",), guards=("api_key", "api_keys_file"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CAMCAL_APIKEY", "x", "unknown setting CAMCAL_APIKEY; did you mean CAMCAL_API_KEY?"),
        ("CAMCAL_API_KEYFILE", "x", "unknown setting CAMCAL_API_KEYFILE; did you mean CAMCAL_API_KEY_FILE?"),
        ("camcal_prot", "1", "unknown setting CAMCAL_PROT; did you mean CAMCAL_PORT?"),
        ("CAMCAL_MAXBATCH", "", "unknown setting CAMCAL_MAXBATCH; did you mean CAMCAL_MAX_BATCH?"),
        ("CAMCAL_XYZZY", "1", "unknown setting CAMCAL_XYZZY; see the list of settings in docs/reference/settings.md"),
        ("CAMCAL_API_KEY", "", "CAMCAL_API_KEY is empty; set a value or unset the variable"),
        ("CAMCAL_API_KEYS_FILE", "", "CAMCAL_API_KEYS_FILE is empty; set a value or unset the variable"),
        ("CAMCAL_API_KEY_FILE", "", "CAMCAL_API_KEY_FILE is empty; set a value or unset the variable"),
        ("CAMCAL_API_KEY_FILE", "/nope", "CAMCAL_API_KEY_FILE is '/nope': cannot read the file: No such file or"),
        ("CAMCAL_API_KEY_FILE", "/", "CAMCAL_API_KEY_FILE is '/': cannot read the file: Is a directory"),
    ],
)
def test_unknown_and_empty_variables_are_errors(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        secrets({name: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"\xff", "not UTF-8 text"),
        (b"x" * 5000, "larger than 4096 bytes"),
    ],
)
def test_invalid_secret_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        secrets({"CAMCAL_API_KEY_FILE": str(tmp_path / "key")})


def test_secret_file_without_trailing_newline(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the secret\r\n")
    assert secrets({"CAMCAL_API_KEY_FILE": str(tmp_path / "key")}) == {"api_key": "the secret"}
    with pytest.raises(SettingsError, match="CAMCAL_API_KEY and CAMCAL_API_KEY_FILE are both set"):
        secrets({"CAMCAL_API_KEY_FILE": str(tmp_path / "key"), "CAMCAL_API_KEY": "another"})


def test_variables_that_are_not_settings_are_ignored() -> None:
    kubernetes = {
        "CAMCAL_SERVICE_HOST": "10.0.0.1",
        "CAMCAL_SERVICE_PORT": "80",
        "CAMCAL_SERVICE_PORT_HTTP": "80",
        "CAMCAL_PORT_80_TCP": "tcp://10.0.0.1:80",
        "CAMCAL_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert secrets(kubernetes | {"CAMCAL_COMMIT": "abc", "CAMCAL_MAX_BATCH": "", "APIKEY": "", "PATH": "/bin"}) == {}


def test_load_settings_checks_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_APIKEY", "x")
    with pytest.raises(SettingsError, match="did you mean CAMCAL_API_KEY"):
        load_settings()
    monkeypatch.delenv("CAMCAL_APIKEY")
    monkeypatch.setenv("CAMCAL_ALLOWED_HOSTS", "")
    with pytest.raises(SettingsError, match="CAMCAL_ALLOWED_HOSTS is empty"):
        load_settings()
