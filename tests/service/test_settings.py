from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from camcal.service.settings import DEFAULT_BUNDLE, ENVELOPE_BYTES, SettingsError, load_settings
from tests.service.conftest import KEY


def test_defaults() -> None:
    settings = load_settings()
    assert settings.bundle == DEFAULT_BUNDLE
    assert (settings.host, settings.port, settings.max_batch, settings.api_key) == ("127.0.0.1", 8000, None, None)


def test_environment_and_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_PORT", "9000")
    monkeypatch.setenv("CAMCAL_TIMEOUT_S", "2.5")
    monkeypatch.setenv("CAMCAL_API_KEY", KEY)
    settings = load_settings(port=9001, host=None)
    assert (settings.port, settings.host, settings.timeout_s) == (9001, "127.0.0.1", 2.5)
    assert settings.api_key == SecretStr(KEY)
    assert KEY not in repr(settings)


def test_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_DECODE_THREADS", "")
    assert load_settings().decode_threads is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CAMCAL_PORT", "abc", "CAMCAL_PORT is 'abc': it should be a valid integer"),
        ("CAMCAL_PORT", "70000", "CAMCAL_PORT is '70000': it should be less than or equal to 65535"),
        ("CAMCAL_DEVICE", "tpu", "CAMCAL_DEVICE is 'tpu': it should be 'auto', 'cpu' or 'cuda'"),
        ("CAMCAL_MAX_BATCH", "0", "CAMCAL_MAX_BATCH is '0': it should be greater than or equal to 1"),
        ("CAMCAL_ROOT_PATH", "vision", "CAMCAL_ROOT_PATH is 'vision': it should be a path"),
        ("CAMCAL_ROOT_PATH", "/vision/", "CAMCAL_ROOT_PATH is '/vision/': it should be a path"),
        ("CAMCAL_TRUSTED_PROXIES", "proxy", "CAMCAL_TRUSTED_PROXIES is 'proxy': it should be addresses and networks"),
        ("CAMCAL_PORT", "tcp://10.0.0.1:80", "CAMCAL_PORT is 'tcp://10.0.0.1:80': it should be a valid integer"),
        ("CAMCAL_API_KEY", "schlüssel-0123456", "CAMCAL_API_KEY: it should be printable ASCII without spaces"),
        ("CAMCAL_API_KEY", "fifteen-letters", "CAMCAL_API_KEY: it should have at least 16 characters, 8 of them"),
        ("CAMCAL_API_KEY", "a" * 40, "CAMCAL_API_KEY: it should have at least 16 characters, 8 of them different"),
        ("CAMCAL_API_KEY", "changemechangeme", "CAMCAL_API_KEY: it should have at least 16 characters, 8 of them"),
        ("CAMCAL_API_KEYS_FILE", "/nope", "CAMCAL_API_KEYS_FILE is '/nope': cannot read the file: No such file"),
        ("CAMCAL_CORS_ORIGINS", "app.example.org", "CAMCAL_CORS_ORIGINS is 'app.example.org': it should be origins"),
        ("CAMCAL_CORS_ORIGINS", "https://a.org/x", "CAMCAL_CORS_ORIGINS is 'https://a.org/x': it should be origins"),
        ("CAMCAL_CORS_ORIGINS", "*,https://a.org", "CAMCAL_CORS_ORIGINS is '*,https://a.org': it should be origins"),
        ("CAMCAL_ALLOWED_HOSTS", "a.org:80", "CAMCAL_ALLOWED_HOSTS is 'a.org:80': it should be host names without"),
        ("CAMCAL_ALLOWED_HOSTS", " , ", "CAMCAL_ALLOWED_HOSTS is ' , ': it should be host names without ports"),
        ("CAMCAL_METRICS_NEED_KEY", "true", "CAMCAL_METRICS_NEED_KEY is true, but there are no API keys"),
        ("CAMCAL_METRICS_PORT", "8000", "CAMCAL_METRICS_PORT and CAMCAL_PORT are both 8000"),
    ],
)
def test_bad_value_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_lists_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_CORS_ORIGINS", "https://a.org, http://localhost:3000")
    monkeypatch.setenv("CAMCAL_ALLOWED_HOSTS", "API.example.org,*.example.com,[::1]")
    settings = load_settings()
    assert settings.cors_origins == ("https://a.org", "http://localhost:3000")
    assert settings.allowed_hosts == ("api.example.org", "*.example.com", "[::1]")


def test_key_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("CAMCAL_API_KEY_FILE", str(tmp_path / "key"))
    assert load_settings().api_key == SecretStr(KEY)
    (tmp_path / "key").write_text("weak")
    with pytest.raises(SettingsError, match="^CAMCAL_API_KEY: it should have at least 16") as caught:
        load_settings()
    assert "weak" not in str(caught.value)


def test_invalid_key_is_not_shown() -> None:
    with pytest.raises(SettingsError, match="^CAMCAL_API_KEY: it should") as caught:
        load_settings(api_key=[12345])
    assert "12345" not in str(caught.value)


def test_workers_share_the_bytes_of_the_queue() -> None:
    settings = load_settings(queue_bytes=2**28, max_bytes=20_000_000)
    assert [settings.queue_bytes_of(workers) for workers in (1, 2, 4)] == [2**28, 2**27, 2**26]
    image = 20_000_000 + ENVELOPE_BYTES
    assert image <= settings.queue_bytes_of(16) * settings.client_share < image + 1  # always room for one image
    assert load_settings(queue_bytes=1000).queue_bytes_of(2) == 1000
