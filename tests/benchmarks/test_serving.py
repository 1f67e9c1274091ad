import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camcal.service.http.multipart import parse_form
from tests.benchmarks.serving import photos, report, rounds, servers, summary
from tests.benchmarks.serving.load import FAILED, Load, body_of, requests_of
from tests.benchmarks.serving.servers import Server, ServerError

BIN = Path(sys.executable).parent
BUSY_MS = 5  # of the stand-in for camcal, for each request: at most 200 a second
TRIVIAL = Server(
    name="camcal",
    command=lambda _, __, port: [sys.executable, "-m", "tests.benchmarks.serving.trivial", str(port), str(BUSY_MS)],
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    photos.write_photos(folder / "photos", count=6)
    return folder


@pytest.fixture
def bench(work: Path, monkeypatch: pytest.MonkeyPatch) -> rounds.Bench:
    """The harness with a server that does nothing in camcal's place."""
    monkeypatch.setattr(rounds, "SERVERS", {"camcal": TRIVIAL})
    monkeypatch.setattr(rounds, "SKIP_S", 0.1)
    monkeypatch.setattr(rounds, "WARM_UP_S", 0.1)
    return rounds.Bench(work, BIN, ["camcal"])


def test_photographs_are_jpegs_of_the_usual_size_and_the_same_every_time(work: Path, tmp_path: Path) -> None:
    paths = photos.write_photos(tmp_path, count=6)
    assert [path.read_bytes() for path in paths] == [p.read_bytes() for p in sorted((work / "photos").glob("*.jpg"))]
    assert len({path.read_bytes() for path in paths}) == 6
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (500, 375)
    assert 45_000 < np.mean([path.stat().st_size for path in paths]) < 70_000


def test_a_closed_loop_counts_what_ended_in_its_stretch() -> None:
    records = [(0.0, 0.5, 200), (0.9, 0.2, 200), (1.0, 0.4, 200), (1.5, 0.1, 503), (1.6, 0.3, 200), (2.9, 0.2, 200)]
    found = summary.closed_loop(records, skip_s=1.0, seconds=2.0)
    assert found["requests"] == 4 and found["rate"] == pytest.approx(1.5) and found["errors"] == {"503": 1}
    assert found["p50_ms"] == pytest.approx(300) and found["max_ms"] == pytest.approx(400)
    assert found["p99_ms"] == pytest.approx(300 + 0.98 * 100)  # linear between the order statistics 2 and 3 of 3


def test_the_rate_of_a_closed_loop_does_not_depend_on_where_its_batches_fall() -> None:
    # Batches of 8, one after another, of 0.9 s each: 8.9 a second, though 2 or 3 of them end in any 2 seconds.
    records = [(0.9 * batch, 0.9, 200) for batch in range(5) for _ in range(8)]
    for skip_s in (0.85, 0.95):
        found = summary.closed_loop(records, skip_s, seconds=2.0)
        assert found["requests"] in (16, 24) and found["rate"] == pytest.approx(8 / 0.9)


def test_an_open_loop_counts_what_was_due_in_its_stretch_however_late_it_ended() -> None:
    found = summary.open_loop([(0.5, 9.0, 200), (1.5, 9.0, 200), (1.6, 30.0, FAILED)], skip_s=1.0, seconds=1.0)
    assert found["rate"] == 1.0 and found["p50_ms"] == 9000 and found["errors"] == {"no answer": 1}


def test_nothing_answered_gives_no_latencies() -> None:
    found = summary.closed_loop([(0.0, 0.1, 500)], skip_s=0, seconds=1)
    assert found["rate"] == 0 and found["p99_ms"] is None and found["errors"] == {"500": 1}


def test_spread_and_ratio_over_rounds() -> None:
    assert summary.spread([3.0, None, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert summary.spread([None]) is None
    # Round by round 2, 3 and 4, although the medians of both series would give 2.
    assert summary.ratio([20.0, 30.0, 4.0], [10.0, 10.0, 1.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert summary.ratio([1.0, None, 1.0], [0.0, 1.0, None]) is None


def test_overload_by_hand() -> None:
    records = [(0.0, 0.1, 200), (0.1, 0.2, 429), (0.2, 0.9, 504), (0.3, 2.5, FAILED), (1.9, 0.2, 200), (1.0, 0.1, 200)]
    found = summary.overload(records, seconds=2.0)
    assert found == {
        "offered": 3.0,
        "goodput": 1.0,  # the answer at 2.1 s came too late
        "refused": 1,
        "server_errors": 1,
        "unanswered": 1,
        "slowest_s": 2.5,
    }
    with pytest.raises(ValueError, match="no requests were sent"):
        summary.overload([], seconds=1)


@pytest.mark.parametrize("form", ["raw", "multipart"])
def test_every_request_carries_its_photograph(work: Path, form: str) -> None:
    load = Load.model_validate({"port": 1, "path": "/p", "photos": work / "photos", "form": form, "seconds": 1})
    for path, request in zip(sorted(load.photos.glob("*.jpg")), requests_of(load), strict=True):
        head, _, body = request.partition(b"\r\n\r\n")
        kind, sent = body_of(load.form, load.field, path.read_bytes())
        assert sent == body and f"Content-Type: {kind}\r\n".encode() in head
        assert f"Content-Length: {len(body)}".encode() in head
        image = body if form == "raw" else parse_form(kind, body, max_parts=1)[0].data
        assert image == path.read_bytes()


def test_the_harness_measures_and_stops_a_server(
    bench: rounds.Bench, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[servers.Running] = []
    rates: list[float] = []
    serve = bench._serve

    def remember(up: servers.Running, plan: rounds.Plan, same_rate: float, last: bool) -> dict[str, Any]:
        started.append(up)
        assert servers.processes(up.mark)
        rates.append(same_rate)
        return serve(up, plan, 50, last)  # what a ceiling without BUSY_MS would ask for is too much

    monkeypatch.setattr(bench, "_serve", remember)
    plan = rounds.Plan(bundle=digits_bundle, clients=[1, 32], rounds=1, seconds=0.5, overload_s=0.5)
    (measured,) = bench.measure(plan)
    (entry,) = measured["rounds"]
    found = entry["servers"]["camcal"]
    assert found["top1"] == [0] * 6
    assert 0 < found["ready_s"] < 30 and 10 < found["memory_mb"] < 200
    for figures in found["closed"].values():
        assert 10 < figures["rate"] < 220 and figures["errors"] == {}
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"]
    assert found["closed"]["32"]["p50_ms"] > 32 * BUSY_MS * 0.9
    assert found["open"]["rate"] == pytest.approx(found["open"]["offered"], rel=0.5)  # Poisson
    assert found["same"]["rate"] == pytest.approx(50, rel=0.6) and found["same"]["offered"] == 50
    assert rates == [0.6 * entry["ceiling"]["best"]]
    assert found["overload"]["offered"] > 2 * found["overload"]["peak"] > 1.5 * found["overload"]["goodput"]
    assert found["overload"]["slowest_s"] > 0.5  # it refuses nobody, so its queue grows
    assert found["overload"]["unanswered"] == found["overload"]["server_errors"] == 0
    ceiling = entry["ceiling"]
    assert ceiling["best"] == max(ceiling[way] for way in ("pipelined", "parallel", "parallel_batches")) > 0
    assert measured["bundle"]["classes"] == 10
    assert servers.processes(started[0].mark) == []

    results = {"hardware": {"cores": 2, "cpu": "x"}, "decoder": "camcal", "generator": {"rate": 1.0, "cpu_us": 1.0}}
    model = measured | {"date": "2026-01-01", "minutes": 1.0, "commit": "0f0f", "failed": {"ray": "no such package"}}
    page = report.markdown(results | {"models": {"shipped": model}})
    assert "## digits: resnet8 at 32², 10 classes" in page
    assert f"| camcal, one worker per core | {found['closed']['1']['rate']:.0f} |" in page
    assert "2026-01-01, at 0f0f, 1 rounds, 1 minutes." in page
    assert "- Ray Serve, HAProxy failed: no such package" in page
    assert "camcal, one worker per core: overload" in page and "requests/s offered" in page
    loops = (f"{found[step]['p50_ms']:.0f} / {found[step]['p99_ms']:.0f}" for step in ("open", "same"))
    assert " | ".join(loops) + " |" in page
    memory = f"{found['memory_mb']:.2f}"
    assert f"| memory, MB | {memory} ({memory}–{memory}) | ≤ 300 |" in page


def test_statuses_that_are_not_200_are_errors(bench: rounds.Bench) -> None:
    photo = next(bench.photos.glob("*.jpg")).read_bytes()
    with servers.running(TRIVIAL, BIN, Path(), photo, bench.work / "log") as up:
        outcome = bench.send(up, clients=3, seconds=60, count=30, path="/predict?status=429")
        assert [status for _, _, status in outcome.records] == [429] * 30
        assert 0 < outcome.cpu_s <= 2 * outcome.wall_s
        open_loop = bench.send(up, rate=100, seconds=1)
        assert len(open_loop.records) == pytest.approx(100, abs=40)  # Poisson: a standard deviation of 10
        assert {status for _, _, status in open_loop.records} == {200}
        gone = dataclasses.replace(up, port=1)
    refused = bench.send(gone, clients=1, seconds=60, count=3)
    assert [status for _, _, status in refused.records] == [FAILED] * 3


def test_a_server_that_does_not_start_is_reported_with_its_last_words(work: Path) -> None:
    broken = Server(name="broken", command=lambda *_: [sys.executable, "-c", "raise SystemExit('no model here')"])
    with pytest.raises(ServerError, match="broken gave no prediction .* no model here"):
        with servers.running(broken, BIN, Path(), b"", work / "broken.log"):
            pass


def test_memory_growth_is_counted_from_the_first_tenth(bench: rounds.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "CAMCAL", TRIVIAL)
    plan = rounds.Plan(bundle=Path(), clients=[], rounds=1, seconds=1, overload_s=0)
    found = bench.growth(plan, 200)
    assert [s["requests"] for s in found["samples"]] == list(range(10, 201, 10))
    assert found["growth"] == found["samples"][-1]["memory_mb"] / found["samples"][1]["memory_mb"] - 1


def test_an_environment_that_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "REQUIREMENTS", tmp_path)
    (tmp_path / "peer.txt").write_text("no such requirement\n")
    with pytest.raises(ServerError, match="-m pip install failed: .*[Ii]nvalid requirement"):
        servers.install("peer", tmp_path / "environments")
    (tmp_path / "peer.txt").write_text("# nothing\n")
    bin_ = servers.install("peer", tmp_path / "environments")
    assert (bin_ / "python").exists()
    (bin_ / "kept").touch()
    assert (servers.install("peer", tmp_path / "environments") / "kept").exists()


def test_every_peer_is_pinned_with_hashes_and_without_an_index() -> None:
    for name in set(servers.SERVERS) - set(servers.OURS):
        pins = (servers.REQUIREMENTS / f"{name}.txt").read_text()
        required = [line for line in pins.splitlines() if line and not line.startswith((" ", "#"))]
        assert required and all("==" in line for line in required)
        assert pins.count("--hash=sha256:") >= len(required)
        assert "://" not in pins and "--index" not in pins
