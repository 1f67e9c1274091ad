"""The settings of the service, read from `CAMCAL_*` environment variables."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from camcal.models import bundle as bundle_module
from camcal.models.bundle import MAX_MODEL_BYTES
from camcal.service import environment
from camcal.service.address import parse_proxies
from camcal.service.environment import PREFIX as PREFIX
from camcal.service.environment import SettingsError as SettingsError
from camcal.service.environment import variable
from camcal.service.keys import check_strength, read_keys

DEFAULT_BUNDLE = Path(bundle_module.__file__).parent / "pretrained" / "caltech100"

PATIENT = 64  # requests that may wait for any time: a few dozen clients do not overload a slow model
MAX_WORKERS = 64  # one character of a heatmap's id names its worker
ENVELOPE_BYTES = 64 * 2**10  # room in a form for everything but the image

Device = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["text", "json"]

# These settings restrict access. An empty value is an error: it would silently lift the restriction.
GUARDS = ("api_key", "api_keys_file", "allowed_hosts")

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")


class Settings(BaseSettings):
    """Settings of the server. The field `x` is the environment variable `CAMCAL_X`; an empty variable is unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    bundle: Path = Field(DEFAULT_BUNDLE, description="Folder of the bundle to serve.")
    watch: bool = Field(False, description="Reload the bundle when files in its folder change.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free port.")
    uds: Path | None = Field(None, description="Unix socket to listen on, instead of host and port.")
    root_path: str = Field("", description="URL prefix stripped by the reverse proxy, such as /vision.")
    trusted_proxies: str = Field(
        "", description="Proxies whose X-Forwarded-For is trusted: addresses, networks (10.0.0.0/8,::1), or `unix`."
    )
    api_key: SecretStr | None = Field(
        None, description="API key for all routes that need one, at least 16 characters. By default no key is needed."
    )
    api_keys_file: Path | None = Field(None, description="TOML file of named API keys; reloaded when it changes.")
    key_attempts: int = Field(
        10, ge=0, description="Wrong API keys per address before further attempts are delayed; 0 for no limit."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="CORS: origins of web pages that may call the API, separated by commas; `*` for all."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Accepted Host headers, separated by commas, such as `*.example.org`; by default all."
    )
    metrics_need_key: bool = Field(False, description="Require an API key with the route group `metrics` for /metrics.")
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="Separate port for /metrics; the main port then has no /metrics."
    )
    access_log: bool = Field(False, description="Log one JSON line per request to standard error.")
    log_format: LogFormat = Field("text", description="`json` makes every line on standard error a JSON object.")
    otel: bool = Field(
        False, description="Send OpenTelemetry traces to OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra `otel`."
    )

    workers: int = Field(1, ge=1, le=MAX_WORKERS, description="Worker processes; they share the CPUs.")
    device: Device = Field(
        "auto", description="`cpu`, `cuda` (fails without CUDA), or `auto`: CUDA with a logged fallback to the CPU."
    )
    sessions: int = Field(1, ge=1, le=64, description="Copies of the model that share one queue, each on its own GPU.")
    load_timeout_s: float = Field(
        25.0, gt=0, le=3600, description="Timeout for testing a bundle in a separate process before it is served."
    )
    load_bytes: int = Field(2 * 2**30, ge=2**26, description="Memory limit of the process that tests a bundle.")
    max_model_bytes: int = Field(MAX_MODEL_BYTES, ge=1, description="Maximum size of a bundle's model file.")
    max_batch: int | None = Field(
        None, ge=1, le=1024, description="Maximum batch size; by default 32 on a GPU, 8 on a CPU."
    )
    intra_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads for inference; by default one per CPU."
    )
    decode_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads that decode images; by default one per CPU."
    )

    decode_bytes: int = Field(
        512 * 2**20, ge=1, description="Memory for decoding ordinary images, shared by the decoding threads."
    )
    large_bytes: int = Field(
        512 * 2**20, ge=1, description="Memory for one large image in the separate decoding process, else 413."
    )
    decode_cpu_s: float = Field(2.0, gt=0, le=3600, description="Maximum CPU time to decode one image, else 413.")

    queue_limit: int = Field(256, ge=1, description="Maximum number of requests in the queue, else 429.")
    queue_s: float = Field(
        0.5, gt=0, description=f"Maximum expected wait in the queue once {PATIENT} requests are waiting, else 429."
    )
    queue_bytes: int = Field(256 * 2**20, ge=1, description="Maximum bytes of request bodies in memory, else 429.")
    client_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="Maximum share of the queue per client address; shrinks under load. 1 turns it off.",
    )
    address_rate: float | None = Field(
        None, gt=0, le=1e6, description="Rate limit per client address, in requests per second, else 429; default none."
    )
    key_rate: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Rate limit per API key that has none of its own, in requests per second, else 429.",
    )
    rate_burst_s: float = Field(
        2.0, gt=0, le=3600, description="Burst of the rate limits: this many seconds' worth of requests at once."
    )
    timeout_s: float = Field(
        10.0, gt=0, le=3600, description="Maximum wait of a complete request for the model, else 504."
    )
    body_timeout_s: float = Field(30.0, gt=0, le=3600, description="Maximum time to receive a request body, else 408.")
    min_body_rate: int = Field(
        16 * 2**10,
        ge=0,
        description="Minimum upload rate of bodies above 64 KiB, in bytes per second, else 408; 0 for no limit.",
    )
    head_timeout_s: float = Field(
        10.0, gt=0, le=3600, description="Maximum time to receive the request headers, else 408."
    )
    keep_alive_s: int = Field(65, ge=1, le=3600, description="Timeout of idle keep-alive connections.")
    drain_s: float = Field(
        5.0, ge=0, le=3600, description="Time after SIGTERM during which the server reports not ready but still serves."
    )

    max_bytes: int = Field(20_000_000, ge=1, description="Maximum size of an image file, else 413.")
    max_images: int = Field(64, ge=1, le=4096, description="Maximum number of images in one request, else 400.")
    max_body_bytes: int = Field(
        64 * 2**20, ge=1, description="Maximum body size of a request with several images, else 413."
    )
    max_pixels: int = Field(50_000_000, ge=1, description="Maximum width × height of an image, else 413.")

    cam_ttl_s: float = Field(600.0, gt=0, le=31_536_000, description="Lifetime of a heatmap.")
    cam_max_bytes: int = Field(
        48 * 2**20, ge=1, description="Memory for stored heatmaps; the oldest are evicted first."
    )

    @field_validator("root_path")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        if not re.fullmatch("(/[A-Za-z0-9._~-]+)*", path):
            raise ValueError("Input should be a path of letters, digits and ._~- that starts with /, such as /vision")
        return path

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, text: str) -> str:
        try:
            parse_proxies(text)
        except ValueError as error:
            expected = "Input should be addresses and networks separated by commas, such as 10.0.0.0/8,::1"
            raise ValueError(f"{expected}; {error}") from None
        return text

    @field_validator("api_key")
    @classmethod
    def _is_strong(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None:
            check_strength(key.get_secret_value())
        return key

    @field_validator("api_keys_file")
    @classmethod
    def _holds_keys(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_keys(path)
        return path

    @field_validator("cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if origins != ("*",) and not all(map(_ORIGIN.fullmatch, origins)):
            raise ValueError("Input should be origins such as https://app.example.org, without a path, or `*` alone")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_HOST.fullmatch, hosts)):
            raise ValueError("Input should be host names without ports, such as api.example.org or *.example.org")
        return tuple(host.lower() for host in hosts)

    @model_validator(mode="after")
    def _has_a_key_for_metrics(self) -> Self:
        if self.metrics_need_key and not self.has_keys:
            raise ValueError("CAMCAL_METRICS_NEED_KEY is true, but there are no API keys: set CAMCAL_API_KEYS_FILE")
        if self.metrics_port is not None and self.metrics_port == self.port:
            raise ValueError(f"CAMCAL_METRICS_PORT and CAMCAL_PORT are both {self.port}; choose another port")
        return self

    @property
    def has_keys(self) -> bool:
        """Whether requests need an API key."""
        return self.api_key is not None or self.api_keys_file is not None

    @property
    def answer_s(self) -> float:
        """The maximum duration of a request in seconds, from the first byte of its body to the response."""
        return self.body_timeout_s + self.timeout_s + 5

    @property
    def images_limit(self) -> int:
        """Maximum number of images in one request; more could never fit into the queue."""
        return min(self.max_images, max(1, int(self.queue_limit * self.client_share)))

    def queue_bytes_of(self, workers: int) -> int:
        """The queue bytes of each of `workers` workers: an equal part, but at least room for one image."""
        image = math.ceil((self.max_bytes + ENVELOPE_BYTES) / self.client_share)
        return max(1, self.queue_bytes // workers, min(self.queue_bytes, image))


# The settings that may also come from a file, CAMCAL_X_FILE.
SECRETS = tuple(name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation))


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from the environment. `overrides` that are not None take precedence.

    Raises:
        SettingsError: for the first variable that is unknown or invalid, with the accepted values.
    """
    options = {name: value for name, value in overrides.items() if value is not None}
    secrets = environment.read(os.environ, fields=Settings.model_fields, secrets=SECRETS, guards=GUARDS)
    try:
        return Settings(**{**secrets, **options})
    except ValidationError as error:
        raise SettingsError(_message(error)) from None


def _message(error: ValidationError) -> str:
    """The first error, without the value of a secret."""
    first = error.errors()[0]
    message = sentence(first["msg"])
    if not first["loc"]:
        return message
    field, value = str(first["loc"][0]), str(first["input"])
    if field == "port" and value.startswith("tcp://"):
        message += (
            "; Kubernetes sets this variable for a Service named camcal: "
            "set enableServiceLinks: false in the pod, or set CAMCAL_PORT yourself"
        )
    return f"{variable(field)}: {message}" if field in SECRETS else f"{variable(field)} is {value!r}: {message}"


def sentence(message: str) -> str:
    """Reword a pydantic message for our sentences: `Input should be ...` becomes `it should be ...`."""
    message = message.removeprefix("Value error, ")
    return "it" + message.removeprefix("Input") if message.startswith("Input ") else message
