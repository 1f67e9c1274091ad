from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from camcal.__main__ import app
from camcal.models.bundle import MODEL_FILE, REPORT_FILE, Bundle
from camcal.service.heatmaps.sheet import TILE
from camcal.service.http.app import create_app
from camcal.service.http.app import openapi as document
from camcal.service.keys import ApiKey, Keyring
from camcal.service.settings import Settings
from tests.service import hostile
from tests.service.conftest import TestClient, png

ROOT = Path(__file__).parents[3]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them in a subfolder, and a file that is not an image."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(0))
    (folder / "b.PNG").write_bytes(png(1))
    (folder / "below" / "a.png").write_bytes(png(2))
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_traces_without_the_sdk_are_an_error(bundle: Bundle) -> None:
    block = "import sys\nsys.modules['opentelemetry.sdk'] = None\nfrom camcal.__main__ import app\napp()\n"
    command = [sys.executable, "-c", block, "serve", "--bundle", str(bundle.path), "--port", "0"]
    environment = os.environ | {"CAMCAL_OTEL": "true"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: CAMCAL_OTEL needs the OpenTelemetry SDK, which is not installed: pip install 'camcal[otel]'"
    ]


def test_table(bundle: Bundle, folder: Path) -> None:
    result = run("predict", folder / "a.png", "--bundle", bundle.path, "--top-k", 3)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 4
    assert len(re.findall(r"\d+\.\d%", result.stdout)) == 6


def test_csv(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert run("predict", folder, "--bundle", bundle.path, "--out", out, "--top-k", 2).exit_code == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["file"]).name, row["rank"]) for row in rows] == [
        (name, rank) for name in ("a.png", "b.PNG", "a.png") for rank in ("1", "2")
    ]
    assert 0 < float(rows[0]["calibrated_probability"]) <= 1


def test_jsonl_equals_the_response_of_the_service(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run("predict", folder, "--bundle", bundle.path, "--out", out, "--prior", "train").exit_code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    with TestClient(create_app(Settings(bundle=bundle.path, max_batch=2))) as client:
        served = client.post("/predict?prior=train", files={"image": png(0)}).json()
    for offline, online in zip(lines[0]["predictions"], served["predictions"], strict=True):
        assert offline["label"] == online["label"]
        assert offline["calibrated_probability"] == pytest.approx(online["calibrated_probability"], rel=1e-3)


def test_one_heatmap(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "heat.png"
    assert run("predict", folder / "a.png", "--bundle", bundle.path, "--cam", target).exit_code == 0
    with Image.open(target) as image:
        assert max(image.size) == 512


def test_many_heatmaps(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "heat" / "maps"
    assert run("predict", folder, "--bundle", bundle.path, "--cam", target, "--prior", "train").exit_code == 0
    assert sorted(file.name for file in target.iterdir()) == ["a.png-2.png", "a.png.png", "b.PNG.png"]


def test_folder_with_one_image_writes_a_folder_of_heatmaps(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "maps"
    assert run("predict", folder / "below", "--bundle", bundle.path, "--cam", target).exit_code == 0
    assert [file.name for file in target.iterdir()] == ["a.png.png"]


def test_no_heatmap_is_written_over_an_image(bundle: Bundle, folder: Path) -> None:
    image, other = folder / "a.png", folder / "a.png.png"
    other.write_bytes(png(5))
    before = image.read_bytes(), other.read_bytes()
    result = run("predict", image, "--bundle", bundle.path, "--cam", folder / "below" / ".." / "a.png")
    assert result.exit_code == 2 and "a.png, the input image; expected another file" in result.stderr
    assert run("predict", image, other, "--bundle", bundle.path, "--cam", folder).exit_code == 0
    assert (image.read_bytes(), other.read_bytes()) == before
    assert {"a.png-2.png", "a.png.png.png"} <= {file.name for file in folder.iterdir()}


def test_grid(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    result = run("predict", folder / "a.png", "--bundle", bundle.path, "--cam", target, "--grid", "--top-k", 1)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    with Image.open(target) as image:
        width, height = image.size
    assert width > 4 * TILE
    assert TILE < height < 2 * TILE


def test_text_in_a_bundle_cannot_control_the_terminal(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    evil = Path(shutil.copytree(bundle.path, tmp_path / "evil"))
    manifest = json.loads((evil / "manifest.json").read_text())
    manifest["figures"] = {"\x1b]0;title\x07\r\nerror: forged": 1}
    (evil / "manifest.json").write_text(json.dumps(manifest))
    for arguments in (["predict", folder, "--bundle", evil], ["inspect", evil], ["inspect", evil, "--json"]):
        result = run(*arguments)
        assert all(line.isprintable() for line in result.output.split("\n"))
        assert not re.search("^error: forged", result.output, flags=re.MULTILINE)


def test_file_name_cannot_control_the_terminal(bundle: Bundle, folder: Path) -> None:
    image = (folder / "a.png").rename(folder / "a\x1b[2J\nb.png")
    result = run("predict", image, "--bundle", bundle.path, "--top-k", 3)
    assert result.exit_code == 0, result.output
    assert all(line.isprintable() for line in result.stdout.split("\n"))
    assert "a\\u001b[2J\\u000ab.png" in result.stdout
    assert len(result.stdout.splitlines()) == 4


def test_file_names_cannot_forge_an_error(bundle: Bundle, folder: Path) -> None:
    (folder / "x\nerror: forged\x1b[2J.png").write_bytes(b"nope")
    result = run("predict", folder, "--bundle", bundle.path)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 2
    result = run("predict", folder / "no\nerror: forged\x1b[2J.png", "--bundle", bundle.path)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "\x1b" not in result.stderr


def test_new_key(tmp_path: Path) -> None:
    result = run("key", "new", "mobile", "--routes", "predict, cam", "--rate", 5)
    assert result.exit_code == 0, result.output
    file = tmp_path / "keys.toml"
    file.write_text(result.stdout)
    (key,) = re.findall("camcal_.*", result.stderr)
    assert key not in result.stdout
    assert Keyring(path=file).find(key) == ApiKey("mobile", frozenset({"predict", "cam"}), 5.0)
    assert len(set(re.findall("camcal_.*", run("key", "new", "mobile").stderr)) | {key}) == 2


@pytest.mark.parametrize("arguments", [["a b"], ["default"], ["a", "--routes", "cams"], ["a", "--rate", "-1"]])
def test_invalid_new_key(arguments: list[str]) -> None:
    result = run("key", "new", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and "camcal_" not in result.stderr


def test_bad_image_is_reported_and_the_rest_predicted(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (folder / "a.png").write_bytes(b"nope")
    out = tmp_path / "out.jsonl"
    result = run("predict", folder, folder / "notes.txt", "--bundle", bundle.path, "--out", out)
    assert result.exit_code == 1
    assert len(out.read_text().splitlines()) == 2
    assert f"{folder / 'a.png'}: the file begins with the bytes 6e 6f 70 65" in result.stderr
    assert f"{folder / 'notes.txt'}: " in result.stderr
    assert "2 of 4 images failed" in result.stderr


def test_only_bad_images(bundle: Bundle, folder: Path) -> None:
    result = run("predict", folder / "notes.txt", "--bundle", bundle.path)
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nothing.png"], "error: nothing.png does not exist"),
        (["predict", "{empty}"], "contains no images (.jpg, .jpeg, .png, .webp, .gif, .bmp)"),
        (["predict", "{image}", "--bundle", "nowhere"], "error: no bundle at nowhere"),
        (
            ["predict", "{image}", "--bundle", "{bundle}", "--prior", "odd"],
            "error: prior is 'odd'; the model has balanced and train",
        ),
        (["predict", "{image}", "--bundle", "{bundle}", "--top-k", "11"], "error: top_k is 11; the model has 10"),
        (["predict", "{image}", "--bundle", "{bundle}", "--out", "a.txt"], "expected a .csv or .jsonl file"),
        (["predict", "{image}", "--bundle", "{bundle}", "--out", "none/a.csv"], "none/a.csv: No such file"),
        (["predict", "{image}", "--bundle", "{bundle}", "--cam", "a.bmp"], "expected a .png file"),
        (
            ["predict", "{image}", "{image}", "--bundle", "{bundle}", "--cam", "a.png"],
            "expected a folder, because there may",
        ),
        (["predict", "{image}", "--bundle", "{bundle}", "--grid"], "--grid needs --cam; add --cam FILE.png"),
        (["inspect", "nowhere"], "error: no bundle at nowhere"),
        (["serve", "--bundle", "nowhere"], "error: no bundle at nowhere"),
        (["serve", "--port", "70000"], "error: CAMCAL_PORT is '70000': it should be less than"),
        (["serve", "--device", "tpu"], "error: CAMCAL_DEVICE is 'tpu': it should be 'auto', 'cpu' or 'cuda'"),
        (["serve", "--bundle", "{bundle}", "--device", "cuda"], "built without CUDA: pip install 'camcal[gpu]'"),
    ],
)
def test_user_error_is_one_sentence(bundle: Bundle, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    places = {"empty": tmp_path / "empty", "image": tmp_path / "a.png", "bundle": bundle.path}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_inspect(bundle: Bundle) -> None:
    result = run("inspect", bundle.path)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{bundle.manifest.name} {bundle.manifest.version}")
    assert "checksums verified" in result.stdout
    few = json.loads((bundle.path / "report.json").read_text())["by_predicted_group"]["calibrated"]["few"]
    figures = f"mean confidence {few['confidence']:.1%}, accuracy {few['accuracy']:.1%}"
    assert re.search(f"predicted few +{re.escape(figures)}\n", result.stdout)
    as_json = run("inspect", bundle.path, "--json")
    assert json.loads(as_json.stdout) == json.loads(bundle.manifest.model_dump_json())


@pytest.mark.parametrize(
    ("groups", "field"),
    [
        (3, "by_predicted_group"),
        ({"calibrated": [1]}, "by_predicted_group.calibrated"),
        ({"calibrated": {"few": {"ece": "low"}}}, "few.ece"),
    ],
)
def test_inspect_refuses_a_report_of_the_wrong_type(bundle: Bundle, tmp_path: Path, groups: object, field: str) -> None:
    def change(folder: Path) -> None:
        report = json.loads((folder / REPORT_FILE).read_text())
        (folder / REPORT_FILE).write_text(json.dumps(report | {"by_predicted_group": groups}))
        hostile.reseal(folder)

    result = run("inspect", hostile.make(bundle.path, tmp_path / "bundle", change))
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "report.json: " in result.stderr and f"{field}: Input should be " in result.stderr


@pytest.mark.parametrize("command", ["inspect", "serve"])
def test_changed_byte_is_an_error(bundle: Bundle, tmp_path: Path, command: str) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(bundle.path, changed)
    data = bytearray((changed / MODEL_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (changed / MODEL_FILE).write_bytes(data)
    result = run(command, changed) if command == "inspect" else run(command, "--bundle", changed)
    assert result.exit_code == 2
    assert "was changed" in result.stderr


def test_openapi() -> None:
    assert yaml.safe_load(run("openapi").stdout) == document(create_app())


def test_command_line_loads_no_heavy_modules() -> None:
    code = "import sys, camcal.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"fastapi", "onnxruntime", "numpy", "PIL", "pydantic", "torch"} & set(loaded.split())


def test_module_runs() -> None:
    command = [sys.executable, "-m", "camcal", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("serve", "predict", "inspect"))
    assert "openapi" not in shown


def test_missing_onnxruntime_is_one_sentence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for module in ("camcal.service.engine.session", "camcal.service.engine.model"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    result = run("serve", "--bundle", bundle.path)
    assert result.exit_code == 2
    assert "pip install 'camcal[cpu]'" in result.stderr


def test_add_canary(bundle: Bundle, tmp_path: Path) -> None:
    folder = hostile.make(bundle.path, tmp_path / "bundle", hostile.reseal)
    assert f"none; add one with `camcal add-canary {folder}`" in run("inspect", folder).stdout
    added = run("add-canary", folder)
    assert added.exit_code == 0 and "outputs on 4 test images" in added.stdout
    assert Bundle.load(folder).canary == bundle.canary
    assert "outputs on 4 test images" in run("inspect", folder).stdout
    refused = run("add-canary", hostile.make(bundle.path, tmp_path / "other", hostile.not_finite))
    assert refused.exit_code == 2 and "logits is not finite" in refused.stderr
