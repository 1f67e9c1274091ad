from pathlib import Path

import pytest

from camcal.training.recipe import RecipeError, load_recipe, parse_recipe

MINIMAL = 'name = "r"\n[data]\nsource = "digits"\n[fit]\nepochs = 3\n'


def _recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_overrides_are_toml_values_or_bare_words(tmp_path: Path) -> None:
    path = _recipe(tmp_path, MINIMAL)
    recipe = load_recipe(
        path, ["fit.lr=0.5", "model.head=linear", "augment.area=[0.5, 1]", "seed=7", "model.learn_scalar=false"]
    )
    assert (recipe.fit.lr, recipe.model.head, recipe.augment.area) == (0.5, "linear", (0.5, 1.0))
    assert recipe.seed == 7 and not recipe.model.learn_scalar


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "epoch = 3", r"unknown key 'fit.epoch'; did you mean 'epochs'\?; accepted here: epochs, least"),
        (MINIMAL + "[modle]\nhead = 'linear'", r"unknown key 'modle'; did you mean 'model'\?"),
        (MINIMAL + "lr = 'fast'", r"'fit.lr': Input should be a valid number.*\(found 'fast'\)"),
        (MINIMAL + "lr = -1", r"'fit.lr': Input should be greater than 0 \(found -1\)"),
        ("name = 'r'\n[fit]\nepochs = 1", "'data' is missing"),
        ("name = ", "recipe.toml is not valid TOML"),
        (MINIMAL + "[augment]\narea = [1, 0.5]", r"'augment': area must be a range \[low, high\]"),
        (MINIMAL + "[loss]\nname = 'ldam'\n[model]\nhead = 'linear'", "loss.name = 'ldam' needs a normalised head"),
        (
            MINIMAL + "[calibrate]\nrescale = 'tau'",
            "recipe.toml: calibrate.rescale = 'tau' is for model.head = 'linear'",
        ),
        (
            MINIMAL + "[calibrate]\nmethod = 'shrunk'\npenalty = 0",
            "calibrate.penalty must be above 0 with calibrate.method = 'shrunk'",
        ),
        (
            MINIMAL + "[model]\nbackbone = 'resnet33'",
            "unknown backbone 'resnet33'; known: resnet8, resnet20",
        ),
        (
            MINIMAL + "[loss]\nsmoothing_tail = 0.3",
            "smoothing_tail must be at most smoothing, that of the most frequent class: got 0.3 and 0",
        ),
        (MINIMAL + "[loss]\nbranch_ranks = [7, 3]", r"branch_ranks must be two ranks in order, got \[7, 3\]"),
        (
            "name='r'\n[fit]\nepochs=1\n[data]\nsource='cifar10'",
            "source 'cifar10' needs data.root: pass --set data.root",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(_recipe(tmp_path, text))


def test_a_weight_normalised_head_starts_with_a_scalar_of_one_unless_told_otherwise(tmp_path: Path) -> None:
    path = _recipe(tmp_path, MINIMAL)
    assert load_recipe(path, ["model.head=weight"]).model.scalar == 1
    assert load_recipe(path, ["model.head=weight", "model.scalar=3"]).model.scalar == 3
    assert load_recipe(path, ["model.head=cosnorm"]).model.scalar == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.epochs", "is not of the form section.key=value"),
        ("name.x=1", "'name' is not a section"),
        ("fit.epoch=1", r"did you mean 'epochs'\?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(_recipe(tmp_path, MINIMAL), [override])


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="no recipe 'digit': give a TOML file or one of: .*digits"):
        load_recipe("digit")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["fit.epochs=40", "fit.milestones=[20, 40]"],
            "must be before the last epoch, .*: 40 is not with epochs = 40",
        ),
        (
            ["loss.weights=grw", "loss.reweight_from=0.8", "fit.epochs=4"],
            "reweight_from = 0.8 has no effect with fit.epo",
        ),
        (["loss.weights=grw", "loss.reweight_from=1"], "'loss.reweight_from': Input should be less than 1"),
        (["calibrate.spread=0"], "'calibrate.spread': Input should be greater than or equal to 0.001"),
        (["calibrate.exponent=400"], "'calibrate.exponent': Input should be less than or equal to 10"),
        (["calibrate.prior=hello"], "'calibrate.prior': must be a list of numbers .* or a table .*found 'hello'"),
        (["data.input_size=224"], "must be at most that: got 224 and 32"),
        (["data.fit=letterbox", "data.resize=64"], "input_size must be the same as resize: got 32 and 64"),
        (["data.source=list", "data.fit=letterbox", "augment.area=[0.5, 1]"], "'letterbox' would not fill up"),
        (["data.std=[0.2, 0, 0.2]"], r"std must be positive, got \[0.2, 0.0, 0.2\]"),
        (
            ["data.std=[70, 68, 71]"],
            r"are for values from 0 to 1, .*: got \[0.485, 0.456, 0.406\] and \[70.0, 68.0, 71.0",
        ),
        (["data.mean=[125, 123, 114]"], "mean and std are for values from 0 to 1"),
        (["fit.epochs=40", "fit.milestones=[-5]"], "'fit.milestones.0': Input should be greater than 0"),
        (["fit.epochs=40", "fit.milestones=[20, 20]"], r"must increase, got \[20.0, 20.0\]"),
        (
            ["fit.optimizer=adamw"],
            "optimizer = 'adamw' needs a rate below 0.1, such as lr = 0.001: lr is 0.1",
        ),
        (["fit.frozen_stages=1"], "stages can only be frozen with pretrained weights"),
        (["fit.lora=4"], "fit.lora adapts pretrained weights: set model.weights, such as model.weights = 'hub'"),
        (["augment.shift=32"], "augment.shift must be below data.input_size = 32, .*, got 32"),
        (["data.mean=[1, 2]"], r"'data.mean' has too few values \(found \[1, 2\]\)"),
        (["data.source=list", "augment.area=[0.5, 1.1]"], "augment.area must be at most 1 with data.source = 'list'"),
    ],
)
def test_what_would_silently_do_something_else_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    more = ["data.root=.", "data.train_list=a", "data.test_list=b"] if "data.source=list" in overrides else []
    with pytest.raises(RecipeError, match=message):
        load_recipe(_recipe(tmp_path, MINIMAL), [*overrides, *more])
    load_recipe(_recipe(tmp_path, MINIMAL), ["loss.weights=grw", "loss.reweight_from=0.8", "fit.epochs=5"])


def test_a_teacher_with_another_head_starts_with_the_scalar_of_that(tmp_path: Path) -> None:
    taught_by = ['distill.set=["model.head=weight"]', "distill.weight=0.5"]
    for given, wanted in (([], 1.0), (["model.scalar=30"], 30.0)):
        teaching = load_recipe(_recipe(tmp_path, MINIMAL), [*taught_by, *given]).teaching()
        assert [each.model.scalar for each in teaching] == [wanted]


def test_a_weight_normalised_student_leaves_its_scalar_of_one_to_itself(tmp_path: Path) -> None:
    changes = ["model.head=weight", 'distill.set=["model.head=cosine"]', "distill.weight=0.5"]
    (teacher,) = load_recipe(_recipe(tmp_path, MINIMAL), changes).teaching()
    assert (teacher.model.head, teacher.model.scalar) == ("cosine", 16.0)


def test_one_value_of_a_table_that_was_not_given_can_be_set(tmp_path: Path) -> None:
    raw = load_recipe(_recipe(tmp_path, MINIMAL)).model_dump(mode="json")
    assert raw["calibrate"]["prior"] is None
    assert parse_recipe(raw, "x", ["calibrate.prior.zero=2"]).calibrate.prior == {"zero": 2.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.split_file", '"split.csv"'),
        ("model.weights", '"IMAGENET1K_V1"'),
        ("loss.branch_ranks", "[3, 7]"),
        ("calibrate.penalty", "10.0"),
        ("calibrate.prior", "{0 = 2.0}"),
    ],
)
def test_none_takes_back_what_a_recipe_says(tmp_path: Path, key: str, value: str) -> None:
    section, name = key.split(".")
    path, given = _recipe(tmp_path, MINIMAL), f"{key}={value}"
    assert getattr(getattr(load_recipe(path, [given]), section), name) is not None
    assert getattr(getattr(load_recipe(path, [given, f"{key}=none"]), section), name) is None


def test_none_is_no_value_of_a_key_that_must_have_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'fit.lr': Input should be a valid number.*found 'none'"):
        load_recipe(_recipe(tmp_path, MINIMAL), ["fit.lr=none"])
    assert load_recipe(_recipe(tmp_path, MINIMAL), ["augment.policy=none"]).augment.policy == "none"


def test_small_sets_are_gone_through_more_often(tmp_path: Path) -> None:
    recipe = load_recipe(
        _recipe(tmp_path, MINIMAL), ["fit.epochs=8", "fit.head_epochs=3", "fit.least_steps=500", "fit.batch_size=64"]
    )
    small, large = recipe.for_images(255), recipe.for_images(6400)  # 4 and 100 batches in an epoch
    assert (small.fit.epochs, small.fit.head_epochs) == (125, 125)
    assert (large.fit.epochs, large.fit.head_epochs) == (8, 5)
    assert small.for_images(255) == small
