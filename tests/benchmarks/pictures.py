"""`make pictures`: every picture of docs/images that the service draws, made anew from the shipped bundle.

The gallery of heatmaps is not among them: `make heatmap-gallery` draws it from a run.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from camcal.service.command.offline import predict_files
from camcal.service.engine.decoding import Limits
from camcal.service.engine.session import load_sessions
from camcal.service.heatmaps.legend import PAPER
from camcal.service.heatmaps.sheet import sheet
from camcal.service.http.app import create_app
from camcal.service.settings import Settings
from tests.service.browser import Tab, browser, find_chromium
from tests.service.test_live import running

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
SAMPLES = ROOT / "service" / "http" / "page" / "samples"
SAMPLE = "metronome"  # one that the network takes for another class until it is calibrated
PHOTOGRAPHS = ("leopards", "rooster", "platypus")  # in docs/images, each with its heatmap beside it in README
GAP = 12  # px
WIDTH = 1200  # px


def main(bundle: Path) -> None:
    """Draw all of them from the bundle in a folder."""
    if (chromium := find_chromium()) is None:
        sys.exit("no Chromium or Chrome found: apt-get install chromium, or set CHROMIUM to an executable")
    settings = Settings(bundle=bundle)
    sessions = load_sessions(settings)
    sample = SAMPLES / f"{SAMPLE}.jpg"
    limits = Limits(max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
    (grid,) = predict_files(sessions[0], [sample], top_k=2, prior="balanced", limits=limits, draw=sheet)
    assert grid.heatmap is not None
    _save(Image.open(io.BytesIO(grid.heatmap)), "heatmap-grid")
    with running(create_app(settings, *sessions)) as url, tempfile.TemporaryDirectory() as profile:
        with httpx.Client(base_url=url) as client:
            _views(client, sample)
            for name in PHOTOGRAPHS:
                drawn = _cam(client, _predict(client, IMAGES / f"{name}.jpg"), size=320, format="jpeg")
                (IMAGES / f"{name}-heatmap.jpg").write_bytes(drawn)
        with browser(chromium, Path(profile)) as tab:
            _page(tab, f"{url}/")


def _predict(client: httpx.Client, photo: Path) -> dict[str, Any]:
    """The prediction for a photograph, in words too."""
    answer: dict[str, Any] = (
        client.post("/predict", content=photo.read_bytes(), headers={"Content-Type": "image/jpeg"})
        .raise_for_status()
        .json()
    )
    for row in answer["predictions"][:2]:
        shares = f"{row['probability']:.1%} -> {row['calibrated_probability']:.1%}"
        print(f"{photo.name}: {row['label']} ({row['group']}, {row['train_count']} training images) {shares}")
    return answer


def _cam(client: httpx.Client, answer: dict[str, Any], **options: Any) -> bytes:
    return client.get(answer["cam"]["url"], params=options).raise_for_status().content


def _views(client: httpx.Client, photo: Path) -> None:
    """Four views of one prediction side by side."""
    answer = _predict(client, photo)
    runner_up = answer["predictions"][1]["label"]
    views: list[dict[str, Any]] = [
        {},
        {"signed": True},
        {"versus": runner_up},
        {"class": runner_up, "scale": "image", "colormap": "magma"},
    ]
    drawn = [Image.open(io.BytesIO(_cam(client, answer, legend=True, size=420, **view))) for view in views]
    width, height = (max(sides) for sides in zip(*(view.size for view in drawn), strict=True))
    canvas = Image.new("RGB", (GAP + len(drawn) * (width + GAP), height + 2 * GAP), PAPER)
    for place, view in enumerate(drawn):
        canvas.paste(view, (GAP + place * (width + GAP), GAP))
    _save(canvas, "heatmap-views")


def _page(tab: Tab, url: str) -> None:
    """The page with the sample, in light, in dark and on a phone."""
    for name, width, height, dark in (
        ("desktop", 1200, 820, False),
        ("dark", 1200, 820, True),
        ("phone", 390, 844, False),
    ):
        tab.dark(dark)
        tab.open(url, width, height)
        tab.wait("document.querySelector('#samples button') !== null")
        tab.click(f"#samples button:has(img[src$='{SAMPLE}.jpg'])")
        tab.wait("document.querySelector('#heatmap').naturalWidth > 0 && !document.querySelector('#result').hidden")
        tab.run("document.activeElement.blur()")
        tab.run("new Promise((done) => setTimeout(done, 1000))")  # the bars have grown
        tab.run("window.scrollTo(0, 0)")
        _save(Image.open(io.BytesIO(tab.screenshot())), f"page-{name}")


def _save(picture: Image.Image, name: str) -> None:
    """As docs/images/NAME.webp, at most `WIDTH` wide."""
    picture = picture.convert("RGB")
    picture.thumbnail((WIDTH, picture.height), Image.Resampling.LANCZOS)
    picture.save(IMAGES / f"{name}.webp", quality=90, method=6)
    print(f"written to docs/images/{name}.webp")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
