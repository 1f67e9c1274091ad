import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from camcal.__main__ import app
from camcal.training.recipe import Recipe, RecipeError, reference


def test_every_key_is_described() -> None:
    fields = {key: field for key, field in Recipe.model_fields.items() if key not in reference.sections()}
    for section, kind in reference.sections().items():
        fields |= {f"{section}.{key}": field for key, field in kind.model_fields.items()}
    assert len(fields) > 80
    for key, field in fields.items():
        assert field.description and field.description.endswith("."), key


def test_the_page_has_a_row_for_every_key() -> None:
    page = reference.markdown()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| \S", page, flags=re.MULTILINE)
    keys = [key for kind in reference.sections().values() for key in kind.model_fields]
    assert rows == ["name", "seed", *keys]
    assert "| `gamma` | number ≥ 0 | `2.0` | γ of the focal loss" in page
    assert "Only with `loss.name` = `focal`. |" in page
    assert "| `prior` | list of number or table | not set |" in page


def test_a_key_a_section_and_the_sections_are_explained() -> None:
    assert (
        reference.text("fit.epochs")
        == "fit.epochs\n    integer ≥ 1; required\n    How often the training images are gone through."
    )
    assert reference.text("seed").startswith("seed\n    integer ≥ 0, < 2147483648; default: 0\n")
    section = reference.text("loss", width=60)
    assert all(f"loss.{key}\n" in section for key in ("name", "gamma", "branch_ranks"))
    assert max(map(len, section.splitlines())) <= 60
    assert "calibrate  The steps after training" in reference.text()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("loss.gama", "no recipe key 'loss.gama'; did you mean 'loss.gamma'?"),
        ("zebra", "no recipe key 'zebra'; camcal recipe lists the sections"),
    ],
)
def test_an_unknown_key_is_named(wanted: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        reference.text(wanted)
    assert str(error.value) == message


def test_the_command_prints_the_reference() -> None:
    assert CliRunner().invoke(app, ["recipe", "--markdown"]).output == reference.markdown()
    assert "γ of the focal loss" in CliRunner().invoke(app, ["recipe", "loss.gamma"]).output
    result = CliRunner().invoke(app, ["recipe", "loss.gama"])
    assert result.exit_code == 2 and "did you mean 'loss.gamma'?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--help"], "camcal recipe"),
        (["recipe", "loss.gamma"], "focal loss"),
        (["train", "digits", "--out", "x", "--set", "fit.epoch=3"], "did you mean 'epochs'?"),
        (["train", "photos", "--out", "x", "--set", "data.root=.", "--set", "fit.epoch=3"], "did you mean 'epochs'?"),
        (["train", "digits", "--out", "x", "--set", "loss.gamma=3"], "it has no effect"),
    ],
)
def test_help_and_mistakes_need_no_torch(arguments: list[str], words: str) -> None:
    # None in sys.modules makes Python's own import raise ModuleNotFoundError.
    block = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm')))\n"
    start = f"from camcal.__main__ import main\nsys.argv = ['camcal', *{arguments!r}]\nmain()\n"
    wide = os.environ | {"COLUMNS": "200"}
    ended = subprocess.run([sys.executable, "-c", block + start], capture_output=True, text=True, timeout=60, env=wide)
    assert words in ended.stdout + ended.stderr, ended.stderr
