"""`POST /predict`, good and bad, through HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from camcal.models.bundle import Bundle
from camcal.service.engine.session import Session
from camcal.service.http import body
from tests.service.conftest import ClientFactory, TestClient, encoded, picture, png
from tests.service.engine.test_session import changed

RAW = {"Content-Type": "image/png"}


def problem(response: Any, status: int, kind: str) -> str:
    """The detail of a problem, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["type"]) == (status, f"urn:camcal:error:{kind}")
    assert body["title"]
    for leak in ("Traceback", 'File "', "/service/"):
        assert leak not in response.text
    return str(body["detail"])


def test_form_and_raw_body_agree(client: TestClient) -> None:
    form = client.post("/predict", files={"image": ("a.png", png(), "image/png")})
    raw = client.post("/predict", content=png(), headers=RAW)
    assert form.status_code == raw.status_code == 200
    assert form.json()["predictions"] == raw.json()["predictions"]
    assert form.json()["id"] != raw.json()["id"]


def test_answer(client: TestClient, bundle: Bundle) -> None:
    body = client.post("/predict", content=png(), headers=RAW).json()
    assert list(body) == ["id", "model", "prior", "probability_prior", "predictions", "cam", "image"]
    assert body["model"] == {"name": bundle.manifest.name, "version": bundle.manifest.version}
    assert (body["prior"], body["probability_prior"]) == ("balanced", "train")
    assert body["image"] == {"width": 60, "height": 40}
    assert len(body["predictions"]) == 5
    assert list(body["predictions"][0]) == [
        "class_id",
        "label",
        "group",
        "train_count",
        "logit",
        "probability",
        "calibrated_logit",
        "calibrated_probability",
    ]
    shares = [p["calibrated_probability"] for p in body["predictions"]]
    assert shares == sorted(shares, reverse=True)
    assert body["cam"]["url"] == f"/cam/{body['id']}"
    assert body["cam"]["classes"] == [p["class_id"] for p in body["predictions"]]
    assert body["cam"]["grid"] == list(bundle.manifest.grid)
    assert body["cam"]["expires_at"].endswith("+00:00")


def test_server_timing(client: TestClient) -> None:
    response = client.post("/predict", content=png(), headers=RAW)
    names = [part.split(";dur=")[0] for part in response.headers["server-timing"].split(", ")]
    assert names == ["decode", "queue", "inference", "post"]


def test_logits_all(client: TestClient) -> None:
    for prior in ("balanced", "train"):
        body = client.post("/predict", params={"logits": "all", "prior": prior}, content=png(), headers=RAW).json()
        for name in ("logit", "calibrated_logit"):
            assert len(body[f"{name}s"]) == 10
        for name in ("probabilities", "calibrated_probabilities"):
            assert sum(body[name]) == pytest.approx(1, rel=1e-5)
        for p in body["predictions"]:
            assert p["calibrated_probability"] == pytest.approx(body["calibrated_probabilities"][p["class_id"]])
            assert p["logit"] == pytest.approx(body["logits"][p["class_id"]])


def test_top_k_all_and_without_cam(client: TestClient) -> None:
    body = client.post("/predict?top_k=10&cam=false", content=png(), headers=RAW).json()
    assert sorted(p["class_id"] for p in body["predictions"]) == list(range(10))
    assert body["cam"] is None


def test_train_prior_without_cam_agrees_with_it(client: TestClient) -> None:
    answers = [
        client.post(f"/predict?top_k=3&prior=train&cam={cam}", content=png(5), headers=RAW).json()
        for cam in ("true", "false")
    ]
    assert answers[0]["predictions"] == answers[1]["predictions"]


def test_root_path_is_in_the_url(client: TestClient) -> None:
    behind_a_proxy = TestClient(client.app, root_path="/vision")
    behind_a_proxy.portal = client.portal  # the event loop in which the app was started
    body = behind_a_proxy.post("/predict", content=png(), headers=RAW).json()
    assert body["cam"]["url"] == f"/vision/cam/{body['id']}"


def test_given_prior(client_factory: ClientFactory, bundle: Bundle, tmp_path: Path) -> None:
    wanted = [0.91] + [0.01] * 9
    client = client_factory(Session(changed(bundle, tmp_path / "b", prior=wanted), threads=1))
    assert client.get("/model").json()["calibration"]["priors"] == ["balanced", "train", "given"]
    balanced, given = (
        client.post(f"/predict?logits=all&prior={prior}", content=png(), headers=RAW).json()
        for prior in ("balanced", "given")
    )
    expected = [p * share for p, share in zip(balanced["calibrated_probabilities"], wanted, strict=True)]
    assert given["prior"] == "given"
    assert given["calibrated_probabilities"] == pytest.approx([p / sum(expected) for p in expected], rel=1e-4)


@pytest.mark.parametrize(
    "query", ["top_k=0", "top_k=11", "top_k=x", "cam=7", "logits=some", "prior=uniform", "prior=given"]
)
def test_bad_parameter(client: TestClient, query: str) -> None:
    response = client.post(f"/predict?{query}", content=png(), headers=RAW)
    name = query.partition("=")[0]
    assert problem(response, 422, "invalid-parameter").startswith(f"{name} is ")
    (error,) = response.json()["errors"]
    assert (error["in"], error["field"]) == ("query", name)


def test_not_an_image(client: TestClient) -> None:
    detail = problem(client.post("/predict", content=b"hello", headers=RAW), 415, "unsupported-format")
    assert "expected a JPEG, PNG, WebP, GIF or BMP image" in detail
    problem(client.post("/predict", files={"image": b"hello"}), 415, "unsupported-format")


def test_truncated_jpeg(client: TestClient) -> None:
    data = encoded(picture(), "JPEG")
    response = client.post("/predict", content=data[: len(data) // 2], headers={"Content-Type": "image/jpeg"})
    assert "damaged or truncated" in problem(response, 422, "undecodable-image")


def test_empty_body(client: TestClient) -> None:
    assert "is empty" in problem(client.post("/predict", content=b"", headers=RAW), 400, "malformed-request")
    problem(client.post("/predict", files={"image": ("a.png", b"")}), 400, "malformed-request")


def test_wrong_content_type(client: TestClient) -> None:
    for headers, said in (({}, "there is no content type"), ({"Content-Type": "text/plain"}, "'text/plain'")):
        detail = problem(client.post("/predict", content=png(), headers=headers), 415, "unsupported-format")
        assert said in detail
        assert "multipart/form-data with the field `image`" in detail
    problem(client.post("/predict", json={"image": "x"}), 415, "unsupported-format")


def test_wrong_field(client: TestClient) -> None:
    response = client.post("/predict", files={"picture": png(), "other": png()})
    detail = problem(response, 400, "malformed-request")
    assert detail == "expected a file in the field 'image'; the form has 'picture', 'other'"
    assert response.json()["errors"][0]["field"] == "image"


def test_two_images(client: TestClient) -> None:
    response = client.post("/predict", files=[("image", png()), ("image", png())])
    assert "the form has 2" in problem(response, 400, "malformed-request")


def multipart(body: bytes, boundary: str = "x") -> dict[str, Any]:
    return {"content": body, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


def test_image_as_text_field(client: TestClient) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nhello\r\n--x--\r\n'
    detail = problem(client.post("/predict", **multipart(body)), 400, "malformed-request")
    assert "send it as a file" in detail


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"--x",
        b"--x--\r\n",
        b"--x\r\n\r\n",
        b"--x\r\nContent-Disposition: form-data\r\n\r\nhello\r\n--x--\r\n",
        b"--x\r\nbad header\r\n\r\nhello\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nhal',
        b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\n1\r\n--x--\r\n',
    ],
)
def test_broken_form(client: TestClient, body: bytes) -> None:
    assert client.post("/predict", **multipart(body)).status_code == 400


def test_form_without_boundary(client: TestClient) -> None:
    response = client.post("/predict", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert "boundary" in problem(response, 400, "malformed-request")


def test_form_with_too_many_parts(client: TestClient) -> None:
    response = client.post("/predict", files=[(f"f{i}", png()) for i in range(30)])
    assert "more than 16 parts; the limit is 1 images and 15 other fields" in problem(
        response, 400, "malformed-request"
    )


def test_too_many_bytes(client_factory: ClientFactory) -> None:
    client = client_factory(max_bytes=1000)
    large = bytes(1001)
    for response in (
        client.post("/predict", content=large, headers=RAW),
        client.post("/predict", content=iter([large[:600], large[600:]]), headers=RAW),  # no Content-Length
        client.post("/predict", files={"image": large}),
        client.post("/predict", files={"image": bytes(200_000)}),
    ):
        assert "the limit of 1000 bytes (CAMCAL_MAX_BYTES)" in problem(response, 413, "too-large")


def test_parameters_may_be_fields_of_the_form(client: TestClient) -> None:
    options = {"top_k": "2", "prior": "train", "logits": "all", "cam_classes": ["9", "one"]}
    in_query = client.post("/predict", files={"image": png()}, params=options).json()
    in_form = client.post("/predict", files={"image": png()}, data=options).json()
    for answer in (in_query, in_form):
        del answer["id"], answer["cam"]["url"], answer["cam"]["expires_at"]
    assert in_form == in_query
    assert (in_form["prior"], len(in_form["predictions"])) == ("train", 2)
    assert {1, 9} <= set(in_form["cam"]["classes"])
    mixed = client.post("/predict?top_k=3&prior=train", files={"image": png()}, data={"cam": "false", "top_k": "3"})
    assert (mixed.json()["cam"], len(mixed.json()["predictions"])) == (None, 3)


@pytest.mark.parametrize(
    ("query", "fields", "field", "said"),
    [
        ("", {"top_k": "banana"}, "top_k", "top_k is 'banana': it should be a valid integer"),
        ("", {"top_k": "0"}, "top_k", "top_k is '0': it should be greater than or equal to 1"),
        ("", {"top_k": "11"}, "top_k", "top_k is 11; the model has 10 classes"),
        ("", {"prior": "mine"}, "prior", "prior is 'mine': it should be"),
        ("", {"cam_classes": "nothing"}, "cam_classes", "unknown class 'nothing'"),
        ("", {"cam": "false", "cam_classes": "1"}, "cam_classes", "cam_classes needs heatmaps, but cam is false"),
        ("", {"topk": "3"}, "topk", "'topk' is not a field of this form; it accepts image for the image, and top_k,"),
        ("", {"prior": ["train", "balanced"]}, "prior", "the form has the field prior twice"),
        ("?top_k=5", {"top_k": "3"}, "top_k", "top_k is 5 in the query and 3 in the form; send it once"),
        ("?cam_classes=1", {"cam_classes": "2"}, "cam_classes", "['1'] in the query and ['2'] in the form"),
        ("", {"cam_classes": "x" * 1025}, "cam_classes", "cam_classes has 1025 bytes; the limit is 1024"),
        ("", {"cam_classes": b"\xff"}, "cam_classes", "cam_classes is not text in UTF-8"),
    ],
)
@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_bad_field_of_the_form(
    client: TestClient, path: str, query: str, fields: dict[str, Any], field: str, said: str
) -> None:
    response = client.post(path + query, files={"image": png()}, data=fields)
    assert said in problem(response, 422, "invalid-parameter")
    (error,) = response.json()["errors"]
    assert (error["in"], error["field"].partition(".")[0]) == ("body", field)


def test_other_fields_of_the_form_are_refused(client: TestClient) -> None:
    response = client.post("/predict", files={"image": png(), "top_k": ("top_k.txt", b"3")})
    assert "top_k is a file; send it as text" in problem(response, 422, "invalid-parameter")
    response = client.post("/predict", files={"image": png(), "thumbnail": png()})
    assert "'thumbnail' is not a field of this form" in problem(response, 422, "invalid-parameter")
    response = client.post("/predict", files={"image": png()}, data={"cam_classes": ["1"] * 20})
    assert "the limit is 1 images and 15 other fields" in problem(response, 400, "malformed-request")


def test_a_large_form_is_searched_in_a_thread(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "QUICK_BYTES", 100)
    response = client.post("/predict", files={"image": png()}, data={"top_k": "2"})
    assert len(response.json()["predictions"]) == 2


def test_too_many_pixels(client_factory: ClientFactory) -> None:
    response = client_factory(max_pixels=1000).post("/predict", content=png(), headers=RAW)
    assert "is 60×40 px; the limit is 0.001 Mpx" in problem(response, 413, "too-large")


def test_no_room_for_bytes(client_factory: ClientFactory) -> None:
    image = png()
    client = client_factory(queue_bytes=len(image) + 9, client_share=1)
    with client.app.state.runtime.admission.ticket("another") as ticket:  # type: ignore[attr-defined]  # any ASGI app
        ticket.reserve(10)
        response = client.post("/predict", content=image, headers=RAW)
        assert "CAMCAL_QUEUE_BYTES" in problem(response, 429, "queue-full")
        assert response.headers["retry-after"] == "1"
        assert response.headers["connection"] == "close"  # it may still be sent
    assert 'camcal_rejected_total{reason="queue_bytes"} 1.0' in client.get("/metrics").text
    assert client.post("/predict", content=image, headers=RAW).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_could_never_fit(client_factory: ClientFactory, chunked: bool) -> None:
    image = png()
    client = client_factory(queue_bytes=len(image), client_share=0.9)
    content = iter([image[:10], image[10:]]) if chunked else image
    response = client.post("/predict", content=content, headers=RAW)
    assert "CAMCAL_CLIENT_SHARE of CAMCAL_QUEUE_BYTES" in problem(response, 413, "too-large")


@pytest.mark.skipif(sys.platform != "linux", reason="the process for large images needs Linux")
def test_a_large_image_gets_the_same_answer(client_factory: ClientFactory) -> None:
    ordinary, large = client_factory(), client_factory(decode_bytes=100)  # less than any image needs
    expected, found = (client.post("/predict", content=png(), headers=RAW).json() for client in (ordinary, large))
    assert {**found, "id": 0, "cam": 0} == {**expected, "id": 0, "cam": 0}
    assert large.get(found["cam"]["url"]).content == ordinary.get(expected["cam"]["url"]).content
    many = large.post("/predict/batch", files=[("image", png()), ("image", b"no image"), ("image", png())]).json()
    assert [result.get("status", 200) for result in many["results"]] == [200, 415, 200]
    late = large.post("/predict", content=png(), headers=RAW | {"X-Request-Timeout-Ms": "1"})
    problem(late, 504, "deadline-passed")


def test_store_without_room_costs_only_the_map(client_factory: ClientFactory) -> None:
    client = client_factory(cam_max_bytes=100)
    response = client.post("/predict", content=png(), headers=RAW)
    assert response.status_code == 200
    assert response.json()["cam"] is None
    assert 'camcal_cam_store_failures_total{operation="put"} 1.0' in client.get("/metrics").text
