"""`GET /cam/{id}`, good and bad, through HTTP."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from camcal.models.bundle import Bundle
from camcal.service.engine.session import Session
from camcal.service.heatmaps.colormaps import COLORMAPS, DEFAULT
from camcal.service.heatmaps.heatmap import fit, levels, positive_scale
from camcal.service.heatmaps.legend import MIN_SIZE
from camcal.service.http.app import create_app
from camcal.service.settings import Settings
from camcal.training import pipeline
from camcal.training.run import RunFolder
from tests.service.conftest import ClientFactory, TestClient, encoded, picture, png
from tests.service.engine.test_session import changed
from tests.service.http.routes.test_predict import RAW, problem
from tests.service.test_live import wait_for


def predict(
    client: TestClient,
    query: str = "",
    seed: int = 0,
    size: tuple[int, int] = (60, 40),
    kind: tuple[str, str] = ("PNG", "RGB"),
) -> dict[str, Any]:
    data = encoded(picture(seed, size, kind[1]), kind[0])
    body: dict[str, Any] = client.post(f"/predict?{query}", content=data, headers=RAW).json()
    return body


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("prior", ["balanced", "train"])
def test_contributions_sum_to_the_served_score(
    client: TestClient, bundle: Bundle, prior: str, calibrated: bool
) -> None:
    for seed in range(4):
        body = predict(client, f"top_k=10&prior={prior}", seed)
        for prediction in body["predictions"]:
            params = {"class": prediction["class_id"], "calibrated": calibrated, "format": "json"}
            found = client.get(body["cam"]["url"], params=params).json()
            served = prediction["calibrated_logit" if calibrated else "logit"]
            contributions = np.array(found["contributions"])
            assert contributions.shape == bundle.manifest.grid
            # A score near 0 is a difference of large contributions: then their size is the scale.
            assert contributions.sum() == pytest.approx(served, rel=1e-4, abs=1e-5 * np.abs(contributions).sum())
            assert found["sum"] == pytest.approx(contributions.sum(), rel=1e-6, abs=1e-6)
            assert found["score"] == served
            assert (found["class_id"], found["label"]) == (prediction["class_id"], prediction["label"])
            assert found["calibrated"] is calibrated


def test_train_prior_has_the_maps_of_its_own_classes(client: TestClient) -> None:
    for seed in range(8):
        body = predict(client, "top_k=1&prior=train", seed)
        found = client.get(body["cam"]["url"], params={"format": "json"}).json()
        assert found["class_id"] == body["predictions"][0]["class_id"]
        assert found["score"] == body["predictions"][0]["calibrated_logit"]


def test_npy_holds_the_same(client: TestClient) -> None:
    body = predict(client)
    response = client.get(body["cam"]["url"], params={"format": "npy"})
    assert response.headers["content-type"] == "application/octet-stream"
    numbers = client.get(body["cam"]["url"], params={"format": "json"}).json()["contributions"]
    np.testing.assert_array_equal(np.load(io.BytesIO(response.content)), np.array(numbers, dtype=np.float32))


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("query", ["", "overlay=false&colormap=viridis", "alpha=0&colormap=gray", "calibrated=false"])
def test_pictures(client: TestClient, format: str, query: str) -> None:
    body = predict(client, size=(90, 60))
    response = client.get(f"{body['cam']['url']}?size=128&format={format}&{query}")
    assert response.headers["content-type"] == f"image/{format}"
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == (format.upper(), (128, 128))
        image.load()


def test_class_by_index_or_label(client: TestClient) -> None:
    body = predict(client)
    last = body["predictions"][-1]
    for wanted in (last["class_id"], last["label"]):
        found = client.get(body["cam"]["url"], params={"class": wanted, "format": "json"}).json()
        assert found["class_id"] == last["class_id"]


def test_etag(client: TestClient) -> None:
    url = predict(client)["cam"]["url"]
    first = client.get(url)
    etag = first.headers["etag"]
    assert client.get(url).headers["etag"] == etag
    assert client.get(url, params={"alpha": 0.1}).headers["etag"] != etag
    for tag in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(url, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    assert client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


def test_cached_to_the_end_of_its_life(client: TestClient) -> None:
    control = client.get(predict(client)["cam"]["url"]).headers["cache-control"]
    privacy, age, immutable = control.split(", ")
    assert (privacy, immutable) == ("private", "immutable")
    assert 590 <= int(age.removeprefix("max-age=")) <= 600


@pytest.mark.parametrize("query", ["", "?format=json", "?legend=true&format=jpeg"])
def test_head_is_get_without_a_body(client: TestClient, query: str) -> None:
    url = predict(client)["cam"]["url"] + query
    head, get = client.head(url), client.get(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-type", "content-length"):
        assert head.headers[name] == get.headers[name]
    assert client.head(url, headers={"If-None-Match": get.headers["etag"]}).status_code == 304
    assert client.head("/cam/" + "a" * 22).status_code == 404


def test_delete(client: TestClient) -> None:
    first, other = predict(client), predict(client, seed=1)
    url = first["cam"]["url"]
    removed = client.delete(url)
    assert (removed.status_code, removed.content) == (204, b"")
    for method in ("GET", "DELETE"):
        problem(client.request(method, url), 404, "not-found")
    assert client.get(other["cam"]["url"]).is_success
    counted = client.get("/metrics").text
    assert 'camcal_cam_store_evictions_total{reason="deleted"} 1.0' in counted
    assert "camcal_cam_store_entries 1.0" in counted


def test_store_that_cannot_delete_says_so(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    url = predict(client)["cam"]["url"]

    async def delete(key: str) -> bool:
        raise ConnectionError("the worker has ended")

    client.app.state.runtime.store.delete = delete  # type: ignore[attr-defined]  # any ASGI app
    problem(client.delete(url), 500, "internal")
    assert "could not delete a heatmap: the worker has ended" in caplog.text
    assert 'camcal_cam_store_failures_total{operation="delete"} 1.0' in client.get("/metrics").text
    assert client.get(url).is_success


@pytest.mark.parametrize("id", ["abc", "a" * 22, "a" * 23, "..%2F..%2Fetc%2Fpasswd", "%00"])
def test_unknown_or_malformed_id(client: TestClient, id: str) -> None:
    problem(client.get(f"/cam/{id}"), 404, "not-found")
    problem(client.delete(f"/cam/{id}"), 404, "not-found")


def test_expired_id(client_factory: ClientFactory) -> None:
    client = client_factory(cam_ttl_s=0.05)
    url = predict(client)["cam"]["url"]
    wait_for(lambda: client.get(url).status_code == 404)
    assert "it has expired after 0.05 s (CAMCAL_CAM_TTL_S)" in problem(client.get(url), 404, "not-found")


def test_evicted_id(client_factory: ClientFactory) -> None:
    client = client_factory(cam_max_bytes=8000)
    urls = [predict(client, "top_k=1", seed)["cam"]["url"] for seed in range(12)]
    problem(client.get(urls[0]), 404, "not-found")
    assert client.get(urls[-1]).status_code == 200


@pytest.mark.parametrize("wanted", ["nope", "11", "-1", "", "٣", "9" * 500])
def test_class_without_a_map(client: TestClient, wanted: str) -> None:
    body = predict(client, "top_k=1")
    detail = problem(client.get(body["cam"]["url"], params={"class": wanted}), 422, "invalid-parameter")
    assert f"this prediction has heatmaps of {body['predictions'][0]['class_id']} (" in detail
    assert "larger top_k or with cam_classes" in detail


def test_class_beyond_the_top_k(client: TestClient, bundle: Bundle) -> None:
    body = predict(client, "top_k=1&logits=all")
    best = body["predictions"][0]["class_id"]
    by_index, by_label = [k for k in range(10) if k != best][-2:]
    label = bundle.manifest.classes[by_label].name
    for prior in ("balanced", "train"):
        query = f"top_k=1&prior={prior}&cam_classes={by_index}&cam_classes={label}&cam_classes={by_index}"
        more = predict(client, query)
        assert [p["class_id"] for p in more["predictions"]] == more["cam"]["classes"][:1]
        assert more["cam"]["classes"][1:] == [by_index, by_label]
        for k in (by_index, by_label):
            found = client.get(more["cam"]["url"], params={"class": k, "format": "json"}).json()
            assert found["score"] == pytest.approx(body["calibrated_logits"][k], rel=1e-4, abs=1e-4)
            assert found["sum"] == pytest.approx(found["score"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("wanted", ["nope", "10", "-1", ""])
def test_cam_classes_unknown(client: TestClient, wanted: str) -> None:
    response = client.post("/predict", params={"cam_classes": wanted}, content=png(), headers=RAW)
    detail = problem(response, 422, "invalid-parameter")
    if wanted != "10":  # the label of no digit
        assert detail.startswith(f"cam_classes: unknown class {wanted!r}; expected an index from 0 to 9")


def test_cam_classes_without_cam(client: TestClient) -> None:
    response = client.post("/predict?cam=false&cam_classes=1", content=png(), headers=RAW)
    assert "cam is false" in problem(response, 422, "invalid-parameter")


def test_versus_is_the_difference_of_two_classes(client: TestClient) -> None:
    body = predict(client)
    first, second = body["predictions"][:2]
    for calibrated, score in ((True, "calibrated_logit"), (False, "logit")):
        params = {"class": first["class_id"], "calibrated": calibrated, "format": "json"}
        found = client.get(body["cam"]["url"], params=params | {"versus": second["label"]}).json()
        assert found["versus"] == {"class_id": second["class_id"], "label": second["label"]}
        assert found["score"] == pytest.approx(first[score] - second[score])
        size = np.abs(found["contributions"]).sum()
        assert np.sum(found["contributions"]) == pytest.approx(found["score"], rel=1e-4, abs=1e-5 * size)
        assert client.get(body["cam"]["url"], params=params).json()["versus"] is None


def test_versus_itself(client: TestClient) -> None:
    body = predict(client)
    detail = problem(client.get(f"{body['cam']['url']}?versus={body['cam']['classes'][0]}"), 422, "invalid-parameter")
    assert "the same class as shown; choose another class" in detail


def test_legend_needs_room(client: TestClient) -> None:
    response = client.get(f"{predict(client)['cam']['url']}?legend=true&size=191")
    assert problem(response, 422, "invalid-parameter") == "size is 191; a legend needs at least 192"


def pixels(client: TestClient, url: str, **params: object) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(client.get(url, params=params).content)) as image:
        return np.asarray(image.convert("RGB"))


def test_signed_is_the_default_of_versus_and_coolwarm(client: TestClient) -> None:
    body = predict(client)
    url, (one, other, *_) = body["cam"]["url"], body["cam"]["classes"]

    def same(one: dict[str, object], other: dict[str, object]) -> bool:
        return bool((pixels(client, url, **one) == pixels(client, url, **other)).all())

    versus: dict[str, object] = {"class": one, "versus": other}
    assert same(versus, versus | {"signed": True, "colormap": "coolwarm"})
    assert same({"colormap": "coolwarm"}, {"signed": True})
    assert same({}, {"signed": False, "colormap": "turbo"})
    assert not same({"signed": True, "colormap": "turbo"}, {})
    assert not same(versus, versus | {"signed": False})


def test_common_scale_shows_weaker_classes_weaker(client: TestClient) -> None:
    body = predict(client)
    url, classes = body["cam"]["url"], body["cam"]["classes"]

    def peaks(scale: str) -> list[int]:
        params = {"overlay": False, "colormap": "gray", "signed": True, "scale": scale}  # gray at zero is 127
        return [int(np.abs(pixels(client, url, **params, **{"class": k}).astype(int) - 127).max()) for k in classes]

    own, common = peaks("map"), peaks("image")
    assert min(own) >= 120
    assert max(common) >= 120
    assert min(common) < 110
    assert all(c <= o + 1 for c, o in zip(common, own, strict=True))


def test_store_that_fails_is_a_lost_heatmap(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        async def put(self, key: str, value: bytes, ttl_s: float) -> None:
            raise ConnectionError

        async def get(self, key: str) -> bytes | None:
            raise ConnectionError

        async def close(self) -> None: ...

    url = predict(client)["cam"]["url"]
    runtime = client.app.state.runtime  # type: ignore[attr-defined]  # any ASGI app
    for holder in (runtime, runtime.predictor):
        monkeypatch.setattr(holder, "store", Broken())
    problem(client.get(url), 404, "not-found")
    assert predict(client)["cam"] is None
    text = client.get("/metrics").text
    assert 'camcal_cam_store_failures_total{operation="get"} 1.0' in text
    assert 'camcal_cam_store_failures_total{operation="put"} 1.0' in text


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_grey_photograph_has_a_heatmap_in_colour(client: TestClient, bundle: Bundle, format: str) -> None:
    side = bundle.manifest.preprocessing.input_size  # square: the file is kept as it came
    url = predict(client, size=(side, side), kind=("JPEG", "L"))["cam"]["url"]
    drawn = client.get(url, params={"format": format, "alpha": 1})
    assert drawn.status_code == 200, drawn.text
    with Image.open(io.BytesIO(drawn.content)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert np.ptp(pixels, axis=2).max() > 50


def test_drawing_says_how_long_it_took(client: TestClient) -> None:
    drawn = client.get(predict(client)["cam"]["url"])
    assert 0 < float(drawn.headers["server-timing"].removeprefix("render;dur=")) < 5000


def test_too_many_drawings_are_refused(client_factory: ClientFactory) -> None:
    client = client_factory(queue_limit=1)
    url = predict(client)["cam"]["url"]
    with client.app.state.runtime.drawings.ticket("one") as ticket:  # type: ignore[attr-defined]  # any ASGI app
        ticket.join()
        refused = client.get(url)
        assert "1 requests are waiting; the limit is 1" in problem(refused, 429, "queue-full")
        assert refused.headers["retry-after"] == "1"
        assert predict(client)["predictions"]  # predictions have a queue of their own
    assert client.get(url).status_code == 200


@pytest.fixture(scope="module")
def shared(session: Session) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(bundle=session.bundle.path, max_batch=session.max_batch), session)) as client:
        yield client


OPTIONS = st.fixed_dictionaries(
    {"format": st.sampled_from(["png", "webp", "jpeg"]), "size": st.integers(16, 1024)},
    optional={
        "calibrated": st.booleans(),
        "overlay": st.booleans(),
        "signed": st.booleans(),
        "scale": st.sampled_from(["map", "image"]),
        "colormap": st.sampled_from(list(COLORMAPS)),
        "alpha": st.floats(0, 1),
        "legend": st.booleans(),
    },
)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    kind=st.tuples(st.just("JPEG"), st.sampled_from(["L", "RGB", "CMYK"]))
    | st.tuples(st.just("PNG"), st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])),
    prior=st.sampled_from(["balanced", "train"]),
    top_k=st.integers(1, 10),
    others=st.lists(st.integers(0, 9), max_size=3),
    options=OPTIONS,
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_map_is_exact_and_every_picture_as_asked(
    shared: TestClient,
    seed: int,
    shape: tuple[int, int],
    kind: tuple[str, str],
    prior: str,
    top_k: int,
    others: list[int],
    options: dict[str, Any],
    data: st.DataObject,
) -> None:
    query = urlencode({"top_k": top_k, "prior": prior, "logits": "all", "cam_classes": others}, doseq=True)
    body = predict(shared, query, seed, shape, kind)
    url, kept = body["cam"]["url"], body["cam"]["classes"]
    assert set(kept) == {p["class_id"] for p in body["predictions"]} | set(others)
    choice: dict[str, Any] = {"class": data.draw(st.sampled_from(kept), label="class")}
    rivals = [k for k in kept if k != choice["class"]]
    contrast = data.draw(st.booleans(), label="contrast")
    if rivals and contrast:
        choice["versus"] = data.draw(st.sampled_from(rivals), label="versus")

    for calibrated, scores in ((True, body["calibrated_logits"]), (False, body["logits"])):
        numbers = shared.get(url, params=choice | {"calibrated": calibrated, "format": "json"}).json()
        score = scores[choice["class"]] - (scores[choice["versus"]] if "versus" in choice else 0)
        contributions = np.array(numbers["contributions"])
        # A score near 0 is a difference of large contributions: then their size is the scale.
        assert contributions.sum() == pytest.approx(score, rel=1e-4, abs=1e-5 * np.abs(contributions).sum())
        assert numbers["score"] == pytest.approx(score, rel=1e-6, abs=1e-5)

    response = shared.get(url, params=choice | options)
    if options.get("legend") and options["size"] < MIN_SIZE:
        assert problem(response, 422, "invalid-parameter").endswith(f"a legend needs at least {MIN_SIZE}")
        return
    assert response.status_code == 200, response.text
    with Image.open(io.BytesIO(response.content)) as image:
        image.load()
        assert image.format == options["format"].upper()
        assert max(image.size) == options["size"]
        if not options.get("legend"):
            assert image.size == fit((1, 1), options["size"])  # this model sees the central square


@pytest.mark.parametrize("size", [(60, 40), (30, 60)])
def test_letterboxed_image(
    client_factory: ClientFactory, bundle: Bundle, tmp_path: Path, size: tuple[int, int]
) -> None:
    rule = bundle.manifest.preprocessing.model_copy(update={"fit": "letterbox"})
    boxed = changed(bundle, tmp_path / "boxed", preprocessing=rule.model_dump(), map_shift=0.0)
    client = client_factory(Session(boxed, device="cpu", threads=1))
    body = predict(client, "logits=all", size=size)
    pixels = rule.apply(picture(0, size))[None].tolist()
    tensor = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": pixels}
    answer = client.post(f"/v2/models/{bundle.manifest.name}/infer", json={"inputs": [tensor]}).json()
    (logits,) = (output["data"] for output in answer["outputs"] if output["name"] == "logits")
    np.testing.assert_allclose(body["logits"], logits, rtol=1e-3, atol=1e-3)

    numbers = client.get(body["cam"]["url"], params={"format": "json"}).json()
    contributions = np.array(numbers["contributions"], dtype=np.float32)
    assert contributions.shape == (8, 8) and contributions.sum() == pytest.approx(numbers["score"], rel=1e-4, abs=1e-4)
    left, top, right, bottom = numbers["window"]
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=0.05)
    response = client.get(body["cam"]["url"], params={"size": 240, "overlay": False})
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.size == fit(size, 240)
        drawn = np.asarray(image.convert("RGB")).astype(int)
    # What is drawn is that part of the whole grid.
    whole = levels(contributions, positive_scale(contributions), (480, 480))
    edges = [round(60 * edge) for edge in numbers["window"]]
    part = Image.fromarray(whole[edges[1] : edges[3], edges[0] : edges[2]])
    expected = COLORMAPS[DEFAULT][np.asarray(part.resize(image.size, Image.Resampling.BILINEAR))]
    assert np.abs(drawn - expected).mean() < 4


def test_maps_of_both_views_are_exact(client_factory: ClientFactory, digits_run: RunFolder, tmp_path: Path) -> None:
    folder, console = RunFolder(tmp_path / "run"), Console(file=io.StringIO())
    shutil.copytree(digits_run.path, folder.path)
    run = pipeline.open_run(folder, console, ["calibrate.views=flip"])
    pipeline.calibrate_run(run)
    pipeline.evaluate_run(run)
    bundle = pipeline.export_run(run)
    client = client_factory(Session(bundle, device="cpu", threads=1))
    image = picture(0, (32, 32))
    maps = []
    for shown in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        body = client.post("/predict?logits=all", content=encoded(shown), headers=RAW).json()
        assert body["predictions"][0]["calibrated_logit"] == pytest.approx(max(body["calibrated_logits"]), rel=1e-5)
        for calibrated in (True, False):
            parameters: dict[str, Any] = {"class": 3, "calibrated": calibrated, "format": "json"}
            if 3 not in body["cam"]["classes"]:
                parameters["class"] = body["cam"]["classes"][0]
            numbers = client.get(body["cam"]["url"], params=parameters).json()
            assert numbers["sum"] == pytest.approx(numbers["score"], rel=1e-4, abs=1e-4)
        maps.append(np.array(numbers["contributions"]))
        shift = bundle.manifest.map_shift
        assert numbers["window"] == pytest.approx([0, shift, 8, 8 + shift])
    np.testing.assert_allclose(maps[1][:, ::-1], maps[0], rtol=1e-3, atol=1e-4)
