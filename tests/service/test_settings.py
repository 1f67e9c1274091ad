from __future__ import annotations

import pytest
from pydantic import SecretStr

from service.multipart import ENVELOPE_BYTES
from service.settings import DEFAULT_BUNDLE, SettingsError, load_settings


def test_defaults() -> None:
    settings = load_settings()
    assert settings.bundle == DEFAULT_BUNDLE
    assert (settings.host, settings.port, settings.max_batch, settings.api_key) == ("127.0.0.1", 8000, None, None)


def test_environment_and_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_PORT", "9000")
    monkeypatch.setenv("CAMCAL_TIMEOUT_S", "2.5")
    monkeypatch.setenv("CAMCAL_API_KEY", "s3cret")
    settings = load_settings(port=9001, host=None)
    assert (settings.port, settings.host, settings.timeout_s) == (9001, "127.0.0.1", 2.5)
    assert settings.api_key == SecretStr("s3cret")
    assert "s3cret" not in repr(settings)


def test_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMCAL_DECODE_THREADS", "")
    assert load_settings().decode_threads is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CAMCAL_PORT", "abc", "CAMCAL_PORT is 'abc': it should be a valid integer"),
        ("CAMCAL_PORT", "70000", "CAMCAL_PORT is '70000': it should be less than or equal to 65535"),
        ("CAMCAL_DEVICE", "tpu", "CAMCAL_DEVICE is 'tpu': it should be 'auto', 'cpu' or 'cuda'"),
        ("CAMCAL_MAX_BATCH", "0", "CAMCAL_MAX_BATCH is '0': it should be greater than or equal to 1"),
        ("CAMCAL_ROOT_PATH", "vision", "CAMCAL_ROOT_PATH is 'vision': it should be a path"),
        ("CAMCAL_ROOT_PATH", "/vision/", "CAMCAL_ROOT_PATH is '/vision/': it should be a path"),
        ("CAMCAL_TRUSTED_PROXIES", "proxy", "CAMCAL_TRUSTED_PROXIES is 'proxy': it should be addresses and networks"),
        ("CAMCAL_API_KEY", "schlüssel", "CAMCAL_API_KEY: it should have no spaces and only ASCII characters"),
    ],
)
def test_bad_value_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_unusable_key_is_not_shown() -> None:
    with pytest.raises(SettingsError, match="^CAMCAL_API_KEY: it should") as caught:
        load_settings(api_key=[12345])
    assert "12345" not in str(caught.value)


def test_workers_share_the_bytes_of_the_queue() -> None:
    settings = load_settings(queue_bytes=2**28, max_bytes=20_000_000)
    assert [settings.queue_bytes_of(workers) for workers in (1, 2, 4)] == [2**28, 2**27, 2**26]
    image = 20_000_000 + ENVELOPE_BYTES
    assert image <= settings.queue_bytes_of(16) * settings.client_share < image + 1  # one image always has room
    assert load_settings(queue_bytes=1000).queue_bytes_of(2) == 1000
