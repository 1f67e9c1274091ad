"""The documents: links, names of things that exist, blocks that are marked, and pages that are made from the code."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from camcal.__main__ import app
from camcal.service.metrics import Metrics
from camcal.service.settings import SECRETS, Settings
from camcal.training.experiments.sweep import load_table
from camcal.training.recipe import Recipe, load_recipe, parse_recipe
from docs.generated import MARKER, PARTS, on_page_markdown
from tests.benchmarks import training
from tests.benchmarks.heatmaps import report as heatmaps
from tests.benchmarks.serving import report as serving
from tests.documents import COMMANDS, ROOT, Block, blocks, documents, make_targets, prose

DOCUMENTS = documents()
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)

OWN_FOLDERS = ("docs", "tests", "models", "training", "service", "docker", "src", "requirements", "examples")


# Links


def anchors(document: Path) -> set[str]:
    """Ids of the headings, as the site and code hosts make them; of a page of the site with its generated part."""
    text = prose(document)
    if ROOT / "docs" in document.parents:
        text = on_page_markdown(text)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(re.sub(r"[\s]", "-", words))
    return found


def links(document: Path) -> Iterator[str]:
    """Where the links and pictures of a document lead."""
    yield from re.findall(r"\]\(([^()\s]+)\)", prose(document))


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if ROOT / "docs" in document.parents:
            assert ROOT / "docs" in target.parents, f"{link} leaves the site"
        if anchor:
            assert anchor in anchors(target), link


def test_menu_has_every_page() -> None:
    def leaves(menu: Any) -> Iterator[str]:
        if isinstance(menu, str):
            yield menu
        else:
            for item in menu.values() if isinstance(menu, dict) else menu:
                yield from leaves(item)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(leaves(site["nav"])) == [str(page.relative_to(ROOT / "docs")) for page in PAGES]


# Names of things that exist


def code(document: Path) -> str:
    """All that a document sets as code: spans and blocks."""
    return "\n".join(re.findall(r"`([^`\n]+)`", prose(document)) + [block.text for block in blocks(document)])


@each_document
def test_settings_exist(document: Path) -> None:
    exist = {f"CAMCAL_{name.upper()}" for name in Settings.model_fields}
    exist |= {f"CAMCAL_{name.upper()}_FILE" for name in SECRETS}
    others = {"CAMCAL_LISTS"}  # of a test
    assert set(re.findall(r"\bCAMCAL_[A-Z0-9_]+[A-Z0-9]\b", document.read_text())) <= exist | others


def metrics() -> set[str]:
    exist = set(re.findall(r"^# TYPE (camcal_\w+)", Metrics().render().decode(), flags=re.MULTILINE))
    return {name for name in exist if not name.endswith("_created")}  # the client library's own companions


@each_document
def test_metrics_exist(document: Path) -> None:
    assert set(re.findall(r"\bcamcal_\w+", document.read_text())) <= metrics()


def test_alerts_name_only_metrics_that_exist() -> None:
    rules = [r for group in yaml.safe_load((ROOT / "docker/alerts.yml").read_text())["groups"] for r in group["rules"]]
    named = {name for rule in rules for name in re.findall(r"\bcamcal_\w+", rule["expr"])}
    assert named
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= metrics()


def recipe_keys() -> set[str]:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        f"{name}.{key}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, BaseModel)
        for key in section.model_fields
    }


@each_document
def test_recipe_keys_exist(document: Path) -> None:
    sections = "|".join({key.partition(".")[0] for key in recipe_keys()})
    named = set(re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+)\b(?![./])", code(document)))
    assert named - {"model.onnx"} <= recipe_keys()


@each_document
def test_paths_exist(document: Path) -> None:
    for path in re.findall(r"`([\w./*-]+)`", prose(document)):
        if path.split("/")[0] in OWN_FOLDERS and "/" in path and not re.search(r"\b[A-Z]{4,}\b", path):
            assert any(ROOT.glob(path.rstrip("/"))), path


def test_documents_named_in_code_exist() -> None:
    folders = ("models", "training", "service", "src", "docker", "tests", ".github")
    files = [
        file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".toml", ".yml")
    ]
    for file in [*files, ROOT / "docker" / "Dockerfile", ROOT / "Makefile", ROOT / "compose.yaml"]:
        for named in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", file.read_text()):
            assert (ROOT / named).exists(), f"{file}: {named}"


@each_document
def test_python_names_exist(document: Path) -> None:
    text = document.read_text()
    for name in re.findall(r"(?:`|^::: )(camcal(?:\.\w+)+)(?:`|$)", text, flags=re.MULTILINE):
        module, _, rest = name, "", ""
        while True:
            try:
                found = import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                rest = f"{last}.{rest}".strip(".")
        for attribute in filter(None, rest.split(".")):
            found = getattr(found, attribute)


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs/explanation/security.md").read_text()
    named = {name for row in re.findall(r"^\|.*\|$", text, re.MULTILINE) for name in re.findall(r"`(test_\w+)`", row)}
    sources = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py")]
    exist = {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}
    assert len(named) > 30
    assert named <= exist


@each_document
def test_make_targets_exist(document: Path) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+(?:-[a-z]+)*)\b", document.read_text(), flags=re.MULTILINE))
    assert named <= make_targets()


def test_every_target_is_in_the_table_for_contributors() -> None:
    rows = re.findall(r"^\| `make(?: ([a-z-]+))?\b", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert make_targets() - {"help", "clean"} <= set(rows)


# Blocks


def test_every_block_says_its_language() -> None:
    assert [str(block) for block in BLOCKS if not block.language] == []


def test_every_command_block_is_run_or_says_why_not() -> None:
    marked = [block for block in BLOCKS if block.language in COMMANDS]
    assert len(marked) > 20
    assert [str(block) for block in marked if block.marker in (None, "output")] == []


def test_markers_are_of_the_right_blocks() -> None:
    for block in BLOCKS:
        accepted = {*COMMANDS} if block.marker != "output" else {"text"}
        assert block.marker is None or block.language in accepted, str(block)


def commands() -> Iterator[tuple[Block, list[str]]]:
    """Each `camcal …` of the blocks, as words."""
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.replace("(", " ").replace(")", " "), comments=True)
                if "camcal" in words and "docker" not in words:
                    yield block, words[words.index("camcal") + 1 :]


def test_commands_and_options_exist() -> None:
    checked = 0
    for block, words in commands():
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not getattr(command, "commands", {}) or words[0].startswith("-"), f"{block}: no command {words[0]}"
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-") and word != "-"} <= options, str(block)
        checked += 1
    assert checked > 20


@each_document
def test_commands_in_sentences_exist(document: Path) -> None:
    known: Any = typer.main.get_command(app)
    named = re.findall(r"`camcal ([a-z][a-z-]*)\b", document.read_text())
    assert set(named) <= set(known.commands)


def test_toml_blocks_are_recipes_or_tables(tmp_path: Path) -> None:
    found = [block for block in BLOCKS if block.language == "toml"]
    assert found
    for block in found:
        if "row" in (raw := tomllib.loads(block.text)):
            (tmp_path / "table.toml").write_text(block.text)
            assert load_table(tmp_path / "table.toml", ["cifar100=PATH"], "", ())
        else:
            assert parse_recipe(raw, str(block))


def test_recipe_shown_is_the_one_that_ships() -> None:
    (shown,) = (block.text for block in BLOCKS if block.language == "toml" and "photos-from-scratch" in block.text)
    assert parse_recipe(tomllib.loads(shown), "shown") == load_recipe(
        "photos-from-scratch", ["data.root=my-photographs"]
    )


def test_json_blocks_are_json() -> None:
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.text)


# Pages made from the code


def test_every_generated_part_has_its_page() -> None:
    used = [name for page in PAGES for name in MARKER.findall(page.read_text())]
    assert sorted(used) == sorted(PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_tables_of_generated_parts_are_whole(name: str) -> None:
    """Each row has as many cells as the header of its table."""
    width = 0
    for line in PARTS[name]().splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = line.count("|")
        width = width or cells
        assert cells == width, line


@pytest.mark.parametrize(
    ("name", "markdown"),
    [("serving", serving.markdown), ("training-speed", training.markdown), ("heatmaps", heatmaps.markdown)],
)
def test_measured_pages_are_made_from_their_figures(name: str, markdown: Callable[[Any], str]) -> None:
    page = ROOT / "docs" / "benchmarks" / name
    figures = json.loads(page.with_suffix(".json").read_text())
    assert page.with_suffix(".md").read_text() == markdown(figures)


def test_every_setting_is_on_its_page() -> None:
    rows = re.findall(
        r"^\| `(CAMCAL_\w+)` \| .* \| (?:true, false|\S.*) \| \S.* \|$", PARTS["settings"](), re.MULTILINE
    )
    assert rows == [f"CAMCAL_{name.upper()}" for name in Settings.model_fields]


def test_every_metric_is_on_its_page() -> None:
    assert set(re.findall(r"^\| `(camcal_\w+)` \| \w+ \|.*\| \S.* \|$", PARTS["metrics"](), re.MULTILINE)) == metrics()


def test_every_route_is_on_its_page() -> None:
    paths = yaml.safe_load((ROOT / "openapi.yaml").read_text())["paths"]
    expected = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert re.findall(r"^## `(.*)`$", PARTS["routes"](), re.MULTILINE) == expected


def test_every_command_and_recipe_key_is_on_its_page() -> None:
    known: Any = typer.main.get_command(app)
    shown = PARTS["command_line"]()
    assert {name for name, command in known.commands.items() if not command.hidden} <= set(
        re.findall(r"^## camcal ([\w-]+)$", shown, re.MULTILINE)
    )
    keys = set(re.findall(r"^\| `(?:\w+\.)?(\w+)`", PARTS["recipe"](), re.MULTILINE))
    assert {key.partition(".")[2] for key in recipe_keys()} <= keys
