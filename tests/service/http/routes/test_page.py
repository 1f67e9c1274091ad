"""The web page in a real browser, against a real server."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from camcal.models.bundle import MANIFEST_FILE, Bundle
from camcal.service.engine.session import Session
from camcal.service.http.app import create_app
from camcal.service.settings import Settings
from tests.service.browser import Tab
from tests.service.conftest import KEY, encoded, picture, png
from tests.service.test_live import running, wait_for

SHOWN = "document.querySelector('#heatmap').naturalWidth > 0 && !document.querySelector('#result').hidden"
NAMES = "[...document.querySelectorAll('#classes .name')].map((name) => name.innerText)"


@pytest.fixture(scope="module")
def sampled(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model, with three of its classes called like the samples."""
    folder = tmp_path_factory.mktemp("sampled") / "bundle"
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for k, name in enumerate(("Leopards", "ketch", "metronome")):
        manifest["classes"][k]["name"] = name
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return Bundle.load(folder)


def serve(session: Session, **settings: Any) -> Any:
    chosen = Settings(bundle=session.bundle.path, max_batch=session.max_batch, **settings)
    return running(create_app(chosen, session))


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with serve(session) as url:
        yield f"{url}/"


def shown(tab: Tab, url: str, photo: Path, **window: int) -> None:
    """Open the page and drop a photograph on it."""
    tab.open(url, **window)
    tab.drop("#drop", photo)
    tab.wait(SHOWN)


def list_classes(tab: Tab, count: int) -> None:
    """Ask for so many classes, and wait for them and their heatmap."""
    tab.set("#top-k", str(count))
    tab.wait(f"document.querySelectorAll('#classes li').length == {count}")
    tab.wait("!document.querySelector('#result').hasAttribute('aria-busy')")


def test_dropped_image_gets_bars_and_a_heatmap(tab: Tab, url: str, photo: Path, bundle: Bundle) -> None:
    shown(tab, url, photo)
    assert len(tab.run(NAMES)) == 5
    best = tab.run(NAMES)[0]
    info = next(info for info in bundle.manifest.classes if info.name == best)
    first = tab.text("#classes li")
    assert info.group in first
    assert f"{info.train_count} training images" in first
    assert first.count("%") == 2
    assert tab.text("#status").startswith(f"photo.png, 300 × 200 px: {best}, ")
    assert tab.run("document.querySelector('#heatmap').alt") == f"Heatmap of {best}"
    assert f"Evidence for {best}. All positions sum to its calibrated score" in tab.text("#caption")
    width = tab.wait("parseFloat(document.querySelector('#classes b.calibrated i').style.width)")
    assert 0 < width <= 100
    assert tab.run("getComputedStyle(document.querySelector('#classes b.calibrated i')).width") != "0px"
    assert tab.run("document.querySelectorAll('#classes [aria-pressed=true]').length") == 1
    assert tab.run("document.querySelector('#error').hidden")


def picture_of(tab: Tab, place: int = 0) -> str:
    """The heatmap's address once the class at `place` is on show."""
    name = tab.run(NAMES)[place]
    tab.wait(f"document.querySelector('#heatmap').alt == 'Heatmap of {name}'")
    return str(tab.run("document.querySelector('#heatmap').src"))


def test_class_is_switched_by_pointer_click_and_keyboard(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    best = picture_of(tab)
    tab.hover("#classes li:nth-child(3) button")
    assert picture_of(tab, 2) != best
    tab.hover("header")
    assert picture_of(tab) == best  # looking was not choosing
    tab.click("#classes li:nth-child(3) button")
    tab.hover("header")
    picture_of(tab, 2)
    assert tab.run("document.querySelector('#classes [aria-pressed=true] .name').innerText") == tab.run(NAMES)[2]
    tab.run("document.querySelector('#classes li:nth-child(4) button').focus()")
    picture_of(tab, 3)
    tab.press("Tab")
    picture_of(tab, 4)
    tab.press("Enter")
    tab.run("document.activeElement.blur()")
    picture_of(tab, 4)


def test_view_follows_the_controls(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    seen = [picture_of(tab)]

    def changed() -> None:
        source = "document.querySelector('#heatmap').src"
        tab.wait(f"!{json.dumps(seen)}.includes({source})")
        seen.append(tab.run(source))

    tab.click("input[value=plain]")
    changed()
    assert "its plain score" in tab.text("#caption")
    tab.set("#colormap", "magma")
    changed()
    tab.run("document.querySelector('#alpha').focus()")
    tab.press("ArrowRight")
    changed()
    assert tab.text("#alpha-value") == "65 %"
    tab.click("#common")
    changed()
    tab.set("#versus", tab.run("document.querySelector('#versus').options[2].value"))
    changed()
    assert f"compared with {tab.run(NAMES)[1]}" in tab.text("#caption")
    link = tab.run("document.querySelector('#open').href")
    for part in ("calibrated=false", "colormap=magma", "alpha=0.65", "scale=image", "versus=", "legend=true"):
        assert part in link
    status = tab.run(f"fetch({json.dumps(link)}).then((response) => response.headers.get('content-type'))")
    assert status == "image/png"


def test_prior_and_number_of_classes_ask_again(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    link = "new URL(document.querySelector('#open').href).pathname"
    before = tab.run(link)
    tab.set("#prior", "train")
    tab.wait(f"{link} != {json.dumps(before)}")
    assert tab.text("#curl").endswith("/predict?top_k=5&prior=train'")
    list_classes(tab, 3)


def test_the_class_that_was_chosen_stays_under_another_prior(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    list_classes(tab, 10)
    link = "new URL(document.querySelector('#open').href)"
    pressed = "document.querySelector('#classes button[aria-pressed=true] .name').innerText"
    name, before = tab.run(f"{NAMES}[4]"), tab.run(f"{link}.pathname")
    tab.run("document.querySelectorAll('#classes button')[4].click()")
    tab.set("#prior", "train")
    tab.wait(f"{link}.pathname != {json.dumps(before)}")
    assert tab.run(pressed) == name
    before = tab.run(f"{link}.pathname")
    tab.drop("#drop", photo)  # as a new image: its best
    tab.wait(f"{link}.pathname != {json.dumps(before)}")
    assert tab.run(pressed) == tab.run(f"{NAMES}[0]")


REFUSED = """(() => {
    const real = fetch;
    window.fetch = (path, ...rest) => !window.open429 && path.startsWith('predict')
        ? Promise.resolve(new Response('{"error": {"message": "Too busy."}}', {status: 429})) : real(path, ...rest);
})()"""


def test_an_answer_stays_when_the_next_is_refused(chromium: Tab, url: str, photo: Path) -> None:
    tab = chromium
    shown(tab, url, photo)
    tab.run(REFUSED)
    tab.set("#top-k", "3")
    tab.wait("!document.querySelector('#error').hidden")
    choices = "[document.querySelector('#prior').value, document.querySelector('#top-k').value]"
    assert tab.run(SHOWN) and tab.run(choices) == ["balanced", "5"]  # what is on show was asked for so
    assert tab.text("#curl").endswith("/predict?top_k=5'")
    tab.run("window.open429 = true")
    list_classes(tab, 3)
    assert tab.run("document.querySelector('#error').hidden")


def test_contrasts_have_red_and_blue_unless_other_colours_are_chosen(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    caption, link = "document.querySelector('#caption').innerText", "document.querySelector('#open').href"
    tab.set("#versus", tab.run("document.querySelector('#versus').options[2].value"))
    tab.wait(f"{caption}.includes('compared with')")
    first, second = tab.run(NAMES)[:2]
    assert f"for {first} (red) compared with {second} (blue)" in tab.text("#caption")
    assert "colormap" not in tab.run(link)
    tab.set("#colormap", "magma")
    tab.wait(f"{caption}.includes('for {first} compared with')")
    assert "colormap=magma" in tab.run(link)


def test_what_a_prior_weighs_on_is_said(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    assert "prior" not in tab.text("#caption")
    tab.set("#prior", "train")
    tab.wait(
        "document.querySelector('#caption').innerText.includes('The class prior changes probabilities, not scores.')"
    )


def test_contrast_stays_as_long_as_its_class_is_offered(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    list_classes(tab, 10)
    worst = tab.run("document.querySelector('#versus').options[10].value")
    versus = "document.querySelector('#versus').value"
    link = "new URL(document.querySelector('#open').href)"
    tab.set("#versus", worst)
    tab.wait(f"{link}.searchParams.get('versus') == {worst}")
    before = tab.run(f"{link}.pathname")
    tab.set("#prior", "train")
    tab.wait(f"{link}.pathname != {json.dumps(before)}")
    assert (tab.run(versus), tab.run(f"{link}.searchParams.get('versus')")) == (worst, worst)
    tab.set("#prior", "balanced")
    list_classes(tab, 3)
    assert tab.run(versus) == ""


def test_chosen_and_pasted_images(tab: Tab, url: str, photo: Path) -> None:
    tab.open(url)
    tab.choose("#file", photo)
    tab.wait(SHOWN)
    tab.open(url)
    tab.run(
        "(async () => { const canvas = new OffscreenCanvas(20, 10); canvas.getContext('2d').fillRect(2, 2, 9, 5);"
        " const image = new File([await canvas.convertToBlob()], '', {type: 'image/png'});"
        " const data = new DataTransfer(); data.items.add(image);"
        " dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})); })()"
    )
    tab.wait(SHOWN)
    assert tab.text("#status").startswith("The pasted image, 20 × 10 px: ")


def test_bad_files_are_explained(chromium: Tab, url: str, photo: Path, tmp_path: Path) -> None:
    tab = chromium
    notes, cut = tmp_path / "notes.txt", tmp_path / "cut.jpg"
    notes.write_text("no image")
    cut.write_bytes(encoded(picture(), "JPEG")[:400])
    shown(tab, url, photo)
    for file, said in (
        (notes, "Unsupported format: the file begins with the bytes 6e 6f"),
        (cut, "Image cannot be decoded: the image is damaged or truncated"),
        (tmp_path, f"{tmp_path.name} is a folder"),
    ):
        tab.drop("#drop", file)
        tab.wait(f"document.querySelector('#error').innerText.includes({json.dumps(said)})")
    tab.drop("#drop", photo)
    tab.wait(SHOWN)
    assert tab.run("document.querySelector('#error').hidden")


def test_service_that_has_gone_is_explained(chromium: Tab, session: Session, photo: Path) -> None:
    with serve(session) as url:
        chromium.open(f"{url}/")
    chromium.drop("#drop", photo)
    chromium.wait("document.querySelector('#error').innerText == 'The service cannot be reached.'")


def _tenths(value: float) -> Decimal:
    """As the browser rounds: 6.25 is 6.3 there, and 6.2 for Python's formats."""
    return Decimal(value).quantize(Decimal("0.1"), ROUND_HALF_UP)


def test_card_of_the_model(tab: Tab, url: str, bundle: Bundle) -> None:
    tab.open(url)
    tab.wait("!document.querySelector('#model').hidden")
    text = tab.text("#model")
    assert f"{bundle.manifest.name} {bundle.manifest.version}: 10 classes" in text
    for step in ("trained", "calibrated"):
        figures = bundle.manifest.figures[step]
        assert f"{_tenths(100 * figures['groups']['few'])}\u00a0%" in text
        assert f"ECE {_tenths(100 * figures['ece'])}\u00a0%" in text
    report = json.loads((bundle.path / "report.json").read_text())
    few = report["by_predicted_group"]["calibrated"]["few"]
    rows = "[...document.querySelectorAll('tr')].map((row) => row.innerText)"
    row = tab.run(f"{rows}.find((words) => words.startsWith('few\\t'))")
    assert re.findall(r"[\d.]+", row) == [str(_tenths(100 * few[name])) for name in ("share", "confidence", "accuracy")]
    bins = [sum(b["accuracy"] is not None for b in report["reliability"][s]) for s in ("trained", "calibrated")]
    assert tab.run("document.querySelectorAll('svg.chart rect.gap').length") == sum(bins)
    tab.click("summary")
    tab.wait("document.querySelectorAll('details tbody tr').length == 10")
    tab.set("details input", "ZE")
    tab.wait("document.querySelectorAll('details tbody tr').length == 1")
    assert tab.run("document.querySelector('#samples').hidden")  # digits are none of theirs


def test_curl_line_is_copied(tab: Tab, url: str) -> None:
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"], origin=url)
    tab.open(url)
    tab.wait("!document.querySelector('#model').hidden")
    assert tab.wait("document.querySelector('#curl').innerText") == f"curl -F image=@photo.jpg '{url}predict?top_k=5'"
    tab.click("#copy")
    tab.wait("['Copied', 'Selected'].includes(document.querySelector('#copy').innerText)")


def test_samples_are_offered_to_a_model_that_knows_them(tab: Tab, sampled: Bundle) -> None:
    with serve(Session(sampled, device="cpu", threads=1)) as url:
        tab.open(f"{url}/")
        tab.wait("document.querySelectorAll('#samples button').length == 3")
        tab.wait("[...document.querySelectorAll('#samples img')].every((image) => image.naturalWidth > 0)")
        tab.click("#samples li:nth-child(2) button")
        tab.wait(SHOWN)
        assert tab.text("#status").startswith("ketch.jpg, ")
        tab.open("about:blank")  # before the server goes


SLOW_SAMPLES = """(() => {
    const real = fetch;
    window.fetch = async (path, ...rest) => {
        if (path.startsWith('samples/')) await new Promise((done) => setTimeout(done, 600));
        return real(path, ...rest).finally(() => { (window.fetched ??= []).push(path); });
    };
})()"""


def test_a_slow_sample_does_not_replace_what_was_dropped_since(tab: Tab, sampled: Bundle, photo: Path) -> None:
    with serve(Session(sampled, device="cpu", threads=1)) as url:
        tab.open(f"{url}/")
        tab.wait("document.querySelectorAll('#samples button').length == 3")
        tab.run(SLOW_SAMPLES)
        tab.click("#samples li:nth-child(2) button")
        tab.drop("#drop", photo)
        tab.wait(SHOWN)
        tab.wait("window.fetched?.includes('samples/ketch.jpg')")
        time.sleep(0.3)
        assert tab.text("#status").startswith("photo.png, ")
        tab.open("about:blank")


def test_a_heatmap_whose_life_is_over_is_made_again(chromium: Tab, session: Session, photo: Path) -> None:
    with serve(session, cam_ttl_s=1.5) as url:
        shown(chromium, f"{url}/", photo)
        picture_of(chromium)
        before = chromium.run("document.querySelector('#open').href")
        wait_for(lambda: httpx.get(before).status_code == 404)
        chromium.set("#colormap", "magma")
        chromium.click("#classes li:nth-child(3) button")
        chromium.wait(f"!document.querySelector('#open').href.startsWith({json.dumps(before.partition('?')[0])})")
        picture_of(chromium, 2)
        pressed = "document.querySelector('#classes [aria-pressed=true] .name').innerText"
        assert chromium.run(pressed) == chromium.run(NAMES)[2]
        chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        before = chromium.run("document.querySelector('#open').href")
        wait_for(lambda: httpx.get(before).status_code == 404)
        chromium.run("document.querySelector('#classes li:nth-child(4) button').focus()")
        chromium.set("#colormap", "viridis")
        chromium.wait(f"!document.querySelector('#open').href.startsWith({json.dumps(before.partition('?')[0])})")
        picture_of(chromium, 3)  # of the class that has the focus, as before
        assert chromium.run("document.activeElement.querySelector('.name').innerText") == chromium.run(NAMES)[3]
        assert chromium.run(pressed) == chromium.run(NAMES)[2]
        chromium.open("about:blank")


SLOW_ANSWERS = """(() => {
    const real = fetch;
    window.fetch = async (path, ...rest) => {
        const slow = path.startsWith('predict') ? 600 : window.slow;
        if (slow) await new Promise((done) => setTimeout(done, slow));
        return real(path, ...rest);
    };
})()"""


def test_a_class_chosen_while_heatmaps_are_made_again_stays(chromium: Tab, session: Session, photo: Path) -> None:
    with serve(session, cam_ttl_s=1.5) as url:
        shown(chromium, f"{url}/", photo)
        picture_of(chromium)
        before = chromium.run("document.querySelector('#open').href")
        wait_for(lambda: httpx.get(before).status_code == 404)
        chromium.run(SLOW_ANSWERS)
        chromium.set("#colormap", "magma")
        chromium.wait("document.querySelector('#result').hasAttribute('aria-busy')")
        chromium.run("window.slow = 2000")  # the answer comes before it is known that this heatmap has gone too
        chromium.click("#classes li:nth-child(3) button")
        chromium.wait("!document.querySelector('#result').hasAttribute('aria-busy')")
        assert chromium.run("document.querySelector('#classes li:nth-child(3) button').ariaPressed") == "true"
        chromium.open("about:blank")


FAILING = """(() => {
    const real = fetch;
    window.fetch = (path, ...rest) => window.failing ? Promise.reject(new TypeError('gone')) : real(path, ...rest);
    window.failing = true;
})()"""


def test_a_heatmap_that_fails_leaves_no_other_in_its_place(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    picture_of(tab)
    tab.run(FAILING)
    tab.set("#colormap", "magma")
    tab.wait("document.querySelector('#caption').innerText == 'The service cannot be reached.'")
    assert not tab.run("document.querySelector('#heatmap').hasAttribute('src')")
    assert tab.run("document.querySelector('#open').hidden")
    tab.run("window.failing = false")
    tab.click("#classes li:nth-child(2) button")
    picture_of(tab, 1)
    assert "positions sum to its calibrated score" in tab.text("#caption")
    assert not tab.run("document.querySelector('#open').hidden")


def test_key_is_asked_for(chromium: Tab, session: Session, photo: Path) -> None:
    with serve(session, api_key=KEY) as url:
        chromium.open(f"{url}/")
        chromium.wait("!document.querySelector('#key-label').hidden")
        assert "send the API key" in chromium.text("#error")
        chromium.set("#key", KEY)
        chromium.wait("!document.querySelector('#model').hidden")
        chromium.drop("#drop", photo)
        chromium.wait(SHOWN)
        assert "-H 'X-API-Key: …'" in chromium.text("#curl")
        chromium.run("window.open = (url) => { window.opened = url; }")
        for link in ("#open", "a[href=model]"):  # following a link sends no key
            chromium.run("window.opened = null")
            chromium.click(link)
            assert str(chromium.wait("window.opened")).startswith("blob:")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_accessible_and_within_the_window(tab: Tab, url: str, photo: Path, width: int, dark: bool) -> None:
    tab.dark(dark)
    shown(tab, url, photo, width=width)
    tab.wait("!document.querySelector('#model').hidden")
    tab.run("(() => { document.querySelector('details').open = true; })()")
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.call("Page.setBypassCSP", enabled=True)  # of what the test itself brings in
    try:
        shown(tab, url, photo, width=width)
        tab.run("(() => { document.querySelector('details').open = true; })()")
        tab.wait("document.querySelectorAll('details tbody tr').length == 10")
        tab.wait("document.getAnimations().length == 0")
        tab.run((files("axe_core_python") / "axe.min.js").read_text() + "; 0")
        found = tab.run("axe.run().then((result) => result.violations)")
    finally:
        tab.call("Page.setBypassCSP", enabled=False)
        tab.dark(False)
    assert [(rule["id"], rule["impact"], [node["html"] for node in rule["nodes"]]) for rule in found] == []


def test_narrow_windows_have_the_order_of_the_keyboard_and_cover_no_focus(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo, width=360, height=740)
    inputs = "[...document.querySelectorAll('#result select, #result button, #result input, #result a')]"
    bottoms = tab.run(f"{inputs}.map((e) => e.getBoundingClientRect().bottom)")
    assert all(later > earlier - 30 for earlier, later in pairwise(bottoms))  # two may stand side by side
    uncovered = (
        f"{inputs}.reverse().every((e) => {{ e.focus(); const box = e.getBoundingClientRect();"
        " return box.top >= document.querySelector('figure').getBoundingClientRect().bottom - 1; })"
    )
    assert tab.run(uncovered)
    shown(tab, url, photo)
    assert tab.run("document.querySelector('#side').contains(document.querySelector('#view'))")


def test_controls_stay_in_a_low_window_below_a_portrait(tab: Tab, url: str, tmp_path: Path) -> None:
    portrait = tmp_path / "portrait.png"
    portrait.write_bytes(png(7, (200, 300)))
    shown(tab, url, portrait, height=720)
    list_classes(tab, 10)
    tab.run("document.querySelector('#answers').scrollIntoView()")
    for control in ("#alpha", "#open"):
        box = tab.run(f"document.querySelector('{control}').getBoundingClientRect().toJSON()")
        assert box["top"] > 0
        assert box["bottom"] <= 720
    assert tab.run("document.querySelector('#heatmap').height") > 300


def test_in_a_very_low_window_all_that_has_the_focus_is_seen(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo, width=844, height=390)
    seen = (
        "[...document.querySelectorAll('#result select, #result button, #result input, #result a')].every((e) =>"
        " { e.focus(); const box = e.getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight; })"
    )
    assert tab.run(seen)


def test_everything_is_reached_by_keyboard(tab: Tab, url: str, photo: Path) -> None:
    shown(tab, url, photo)
    tab.run("(() => { document.activeElement.blur(); scrollTo(0, 0); })()")
    reached = []
    for _ in range(30):
        tab.press("Tab")
        reached.append(
            tab.run("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        )
    for name in ("file", "score", "alpha", "colormap", "versus", "common", "open", "prior", "top-k", "copy"):
        assert name in reached
    assert reached.count("BUTTON") >= 5  # the classes
