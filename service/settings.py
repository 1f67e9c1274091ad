"""Every setting of the service, read from `CAMCAL_*` environment variables."""

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

MAX_WORKERS = 64  # the id of a heatmap names its worker by one character
ENVELOPE_BYTES = 64 * 2**10  # what a form may hold beside its image

Device = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["text", "json"]

# An empty one of these is an error: it would open a door that was meant to be shut.
GUARDS = ("api_key", "api_keys_file", "allowed_hosts")

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")


class Settings(BaseSettings):
    """What an operator may choose. Every field `x` is the environment variable `CAMCAL_X`; an empty one is unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    bundle: Path = Field(DEFAULT_BUNDLE, description="Folder of the bundle to serve.")
    watch: bool = Field(False, description="Reload the bundle whenever the files of its folder change.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    uds: Path | None = Field(None, description="Unix socket to listen on, in place of host and port.")
    root_path: str = Field("", description="Path that a proxy takes away before it asks here: /vision.")
    trusted_proxies: str = Field(
        "", description="Addresses and networks whose X-Forwarded-For is believed: 10.0.0.0/8,::1; or `unix`."
    )
    api_key: SecretStr | None = Field(
        None, description="API key for all routes that need one; at least 16 characters. None by default."
    )
    api_keys_file: Path | None = Field(None, description="TOML file of named API keys; read again when it changes.")
    key_attempts: int = Field(10, ge=0, description="Wrong API keys an address may send before it has to wait; 0: any.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins of other web pages that may call the API, separated by commas; `*` for all."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Accepted Host headers, separated by commas, such as `*.example.org`; by default any."
    )
    metrics_need_key: bool = Field(False, description="/metrics needs a key with the route group `metrics`.")
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="Port for /metrics alone; the other port then has none."
    )
    access_log: bool = Field(False, description="One JSON line per request on standard error.")
    log_format: LogFormat = Field("text", description="`json`: every line on standard error is a JSON object.")
    otel: bool = Field(False, description="Send traces to OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra `otel`.")

    workers: int = Field(1, ge=1, le=MAX_WORKERS, description="Processes that serve; each has its share of the CPUs.")
    device: Device = Field("auto", description="`cuda` fails without CUDA; `auto` falls back to the CPU and says so.")
    sessions: int = Field(1, ge=1, le=64, description="Copies of the model behind the queue, each on its own GPU.")
    load_timeout_s: float = Field(
        25.0, gt=0, le=3600, description="Longest time that a trial of a bundle in a process of its own may take."
    )
    load_bytes: int = Field(2 * 2**30, ge=2**26, description="Memory that the trial of a bundle may take.")
    max_model_bytes: int = Field(MAX_MODEL_BYTES, ge=1, description="Largest model file of a bundle.")
    max_batch: int | None = Field(None, ge=1, le=1024, description="Images in one run; by default 32, 8 on a CPU.")
    intra_threads: int | None = Field(None, ge=1, le=1024, description="CPUs that the model may use; by default all.")
    decode_threads: int | None = Field(None, ge=1, le=1024, description="Threads that decode; by default one per CPU.")

    decode_bytes: int = Field(
        512 * 2**20, ge=1, description="Memory for decoding ordinary images, shared by the threads that decode."
    )
    large_bytes: int = Field(
        512 * 2**20, ge=1, description="Memory for one larger image, decoded by a process of its own; more: 413."
    )
    decode_cpu_s: float = Field(2.0, gt=0, le=3600, description="CPU time for decoding one image; more: 413.")

    queue_limit: int = Field(256, ge=1, description="Requests that may wait; one more is answered 429.")
    queue_s: float = Field(0.5, gt=0, description="With 64 requests waiting: longest expected wait, else 429.")
    queue_bytes: int = Field(256 * 2**20, ge=1, description="Bytes of request bodies held at once; more: 429.")
    client_share: float = Field(
        0.75, gt=0, le=1, description="Largest share of the queue for one address; less, the more others hold. 1: all."
    )
    address_rate: float | None = Field(
        None, gt=0, le=1e6, description="Requests a second that one address may send; more: 429. By default any."
    )
    key_rate: float | None = Field(
        None, gt=0, le=1e6, description="Requests a second for each API key without a rate of its own; more: 429."
    )
    rate_burst_s: float = Field(
        2.0, gt=0, le=3600, description="Seconds of its rate that an idle address or key may use at once."
    )
    timeout_s: float = Field(10.0, gt=0, le=3600, description="Longest wait of a complete request for the model: 504.")
    body_timeout_s: float = Field(30.0, gt=0, le=3600, description="Longest time a request body may take: 408.")
    min_body_rate: int = Field(
        16 * 2**10, ge=0, description="Bytes a second at which a body above 64 KiB has to come, else 408; 0: any."
    )
    head_timeout_s: float = Field(10.0, gt=0, le=3600, description="Longest time a request's headers may take: 408.")
    keep_alive_s: int = Field(65, ge=1, le=3600, description="How long an idle connection stays open.")
    drain_s: float = Field(5.0, ge=0, le=3600, description="After SIGTERM: time to go on serving while not ready.")

    max_bytes: int = Field(20_000_000, ge=1, description="Largest image file.")
    max_images: int = Field(64, ge=1, le=4096, description="Images in one request that carries several.")
    max_body_bytes: int = Field(64 * 2**20, ge=1, description="Body of such a request.")
    max_pixels: int = Field(50_000_000, ge=1, description="Largest image, width times height.")

    cam_ttl_s: float = Field(600.0, gt=0, le=31_536_000, description="Life of a heatmap.")
    cam_max_bytes: int = Field(48 * 2**20, ge=1, description="Memory for heatmaps; the oldest leave first.")

    @field_validator("root_path")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        if not re.fullmatch("(/[A-Za-z0-9._~-]+)*", path):
            raise ValueError("Input should be a path of letters, digits and ._~- that begins with /, such as /vision")
        return path

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, text: str) -> str:
        try:
            parse_proxies(text)
        except ValueError as error:
            listed = "Input should be addresses and networks separated by commas, such as 10.0.0.0/8,::1"
            raise ValueError(f"{listed}; {error}") from None
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
    def _split(cls, given: object) -> object:
        return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given

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
            raise ValueError("Input should be host names without a port, such as api.example.org or *.example.org")
        return tuple(host.lower() for host in hosts)

    @model_validator(mode="after")
    def _has_a_key_for_metrics(self) -> Self:
        if self.metrics_need_key and not self.has_keys:
            raise ValueError("CAMCAL_METRICS_NEED_KEY is true, but there is no key: set CAMCAL_API_KEYS_FILE")
        if self.metrics_port is not None and self.metrics_port == self.port:
            raise ValueError(f"CAMCAL_METRICS_PORT is {self.port}, as CAMCAL_PORT is; choose another")
        return self

    @property
    def has_keys(self) -> bool:
        """Whether requests need an API key."""
        return self.api_key is not None or self.api_keys_file is not None

    @property
    def answer_s(self) -> float:
        """The longest that a request may take, from the first byte of its body to its answer."""
        return self.body_timeout_s + self.timeout_s + 5

    @property
    def images_limit(self) -> int:
        """Images in one request: a request that could never fit into the queue is refused for its size."""
        return min(self.max_images, max(1, int(self.queue_limit * self.client_share)))

    def queue_bytes_of(self, workers: int) -> int:
        """The queue's bytes for one of `workers`: an equal part, or room for one image if that is more."""
        image = math.ceil((self.max_bytes + ENVELOPE_BYTES) / self.client_share)
        return max(1, self.queue_bytes // workers, min(self.queue_bytes, image))


# Those that CAMCAL_X_FILE may bring.
SECRETS = tuple(name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation))


def load_settings(**overrides: Any) -> Settings:
    """The settings from the environment; `overrides` that are not None win.

    Raises:
        SettingsError: naming the first variable that is misspelt or whose value cannot be used, and what is accepted.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    secrets = environment.read(os.environ, fields=Settings.model_fields, secrets=SECRETS, guards=GUARDS)
    try:
        return Settings(**{**secrets, **given})
    except ValidationError as error:
        raise SettingsError(_said(error)) from None


def _said(error: ValidationError) -> str:
    """The first fault, without the value of a secret."""
    first = error.errors()[0]
    message = sentence(first["msg"])
    if not first["loc"]:
        return message
    field, value = str(first["loc"][0]), str(first["input"])
    if field == "port" and value.startswith("tcp://"):
        message += (
            "; Kubernetes sets it for a Service named camcal: set enableServiceLinks: false in the pod, or CAMCAL_PORT"
        )
    return f"{variable(field)}: {message}" if field in SECRETS else f"{variable(field)} is {value!r}: {message}"


def sentence(message: str) -> str:
    """A pydantic message in the tone of ours: `Input should be ...` becomes `it should be ...`."""
    message = message.removeprefix("Value error, ")
    return "it" + message.removeprefix("Input") if message.startswith("Input ") else message
