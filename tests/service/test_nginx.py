"""docker/nginx.conf, the example of a TLS proxy, with a real nginx in front of a real service."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import png
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import ROOT, process

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
BUNDLE = ROOT / "models/pretrained/cifar10-lt-if100"
NAME = "camcal.example.org"

pytestmark = pytest.mark.skipif(not (NGINX and shutil.which("openssl")), reason="needs nginx and openssl")


def certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{NAME}"]
    files = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run([*command, *files], check=True, capture_output=True)


@contextmanager
def proxy(folder: Path, url: str) -> Iterator[tuple[Path, Path]]:
    """Run the example with Unix sockets instead of its ports. Returns the sockets for TLS and plain HTTP."""
    certificate(folder)
    tls, plain = folder / "tls", folder / "plain"
    text = (ROOT / "docker/nginx.conf").read_text()
    for old, new in {
        "worker_processes auto;": "worker_processes 1; daemon off; error_log stderr;",
        "/run/nginx.pid": str(folder / "pid"),
        "/etc/ssl/camcal": str(folder),
        "127.0.0.1:8000": url.removeprefix("http://"),
        "listen 443 ssl": f"listen unix:{tls} ssl",
        "listen 80": f"listen unix:{plain}",
        "http {": "http {\n" + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in TEMPORARY),
    }.items():
        assert old in text
        text = text.replace(old, new)
    # Clients of a Unix socket have no address; use a fixed one instead.
    assert text.count("$remote_addr;") == 1
    text = text.replace("$remote_addr;", "203.0.113.7;")
    (folder / "nginx.conf").write_text(text + "\n")
    with subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")]) as child:
        try:
            end = time.monotonic() + 20
            while not (tls.exists() and plain.exists()):
                assert child.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            yield tls, plain
        finally:
            child.terminate()
            child.wait(10)


TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def test_nginx_example_serves_over_tls_and_forwards_addresses(tmp_path: Path) -> None:
    with (
        process(BUNDLE, CAMCAL_TRUSTED_PROXIES="127.0.0.1", CAMCAL_ADDRESS_RATE="0.1") as (_, url),
        proxy(tmp_path, url) as (tls, plain),
    ):
        verify = ssl.create_default_context(cafile=str(tmp_path / "fullchain.pem"))
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(tls), verify=verify), base_url=f"https://{NAME}"
        ) as client:

            def send(address: str) -> httpx.Response:
                return client.post("/predict", content=png(), headers=RAW | {"X-Forwarded-For": address}, timeout=30)

            first, second = send("198.51.100.1"), send("198.51.100.2")
            assert first.status_code == 200
            assert "max-age" in first.headers["strict-transport-security"]
            # Both count for the address that nginx forwards; the header of the client is ignored.
            assert (second.status_code, second.json()["type"]) == (429, "urn:camcal:error:rate-limited")
            assert client.get("/metrics").status_code == 404
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(plain)), base_url=f"http://{NAME}") as client:
            redirect = client.get("/model?x=1")
            assert (redirect.status_code, redirect.headers["location"]) == (308, f"https://{NAME}/model?x=1")
