import re
from pathlib import Path

import pytest

from darkmatter import params, plugin, recipe
from darkmatter.training import PretrainConfig

ROOT = Path(__file__).parent.parent


def tree() -> dict:
    return params.read(ROOT / "params.yaml")


def test_params_yaml_of_the_repository_is_valid() -> None:
    recipe.check(tree())


def test_unknown_section_is_refused_with_the_list_and_a_hint(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text().replace("\npretrain:", "\npretrian:")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(
        params.ParamsError, match=r"'pretrian' is unknown. Did you mean 'pretrain'.*Known: source, ingest"
    ):
        params.read(tmp_path / "params.yaml")


def test_missing_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("source: {uri: 'builtin:mnist'}\n")
    with pytest.raises(params.ParamsError, match="section 'ingest' is missing"):
        params.read(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(params.ParamsError, match=r"params\.yaml"):
        params.read(tmp_path / "params.yaml")


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(params.ParamsError, match="does not exist"):
        params.read(tmp_path / "params.yaml")


def test_unknown_method_is_refused_with_what_there_is() -> None:
    wrong = {**tree(), "objective": {"name": "simcrl"}}
    with pytest.raises(
        params.ParamsError, match=r"objective\.name: there is no 'simcrl'.*Did you mean 'simclr'.*vicreg"
    ):
        recipe.check(wrong)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("pretrain", {"learning_rat": 0.1}, r"pretrain: key 'learning_rat' is unknown. Did you mean 'learning_rate'"),
        ("pretrain", {"epochs": "many"}, r"pretrain\.epochs: .*'many'"),
        ("pretrain", {"epochs": 0}, r"pretrain\.epochs: .*greater than 0"),
        ("pretrain", {"learning_rate": float("nan")}, r"pretrain\.learning_rate"),
        ("objective", {"simclr": {"temprature": 1.0}}, r"objective\.simclr: key 'temprature' is unknown"),
        ("objective", {"vicreg": {"projector": []}}, r"objective\.vicreg\.projector"),
        ("objective", {"moko": {}}, r"objective: there is no 'moko'"),
        ("evaluate", {"few_shots": {}}, r"evaluate: there is no 'few_shots'.*few_shot"),
        ("evaluate", {"seed": "a"}, r"evaluate\.seed"),
        ("source", {"uri": "s4:bucket"}, r"source\.uri: there is no 's4'.*builtin, folder"),
        ("source", {"uri": "nothing"}, r"source\.uri: 'nothing' has no scheme"),
        ("source", {"uri": "builtin:cifar"}, r"there is no builtin 'cifar'"),
        ("source", {"uri": "folder:/does/not/exist"}, r"'/does/not/exist' is not a folder"),
        ("backbone", {"name": "timm", "timm": {"model": "resnet17"}}, r"no model 'resnet17'.*resnet18"),
        ("ingest", {"val_fraction": 0.5, "test_fraction": 0.5}, r"leave nothing to train on"),
        ("place", {"wokers": 2}, r"place: key 'wokers' is unknown. Did you mean 'workers'"),
        ("augment", {"channels": 2}, r"augment\.channels"),
    ],
)
def test_wrong_settings_are_refused_by_name(section: str, change: dict, message: str) -> None:
    right = tree()
    with pytest.raises(params.ParamsError, match=message):
        recipe.check({**right, section: {**right[section], **change}})


def test_configs_are_frozen_and_do_not_convert() -> None:
    config = PretrainConfig(**tree()["pretrain"])
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 3
    with pytest.raises(ValueError, match="epochs"):
        PretrainConfig(**{**tree()["pretrain"], "epochs": "3"})


def test_plugins_are_the_files_of_the_folder() -> None:
    files = (ROOT / "components/darkmatter/objectives").glob("[!_]*.py")
    assert plugin.names("objectives") == sorted(file.stem for file in files)


def test_small_views_for_a_method_that_takes_none_are_refused() -> None:
    right = tree()
    views = {"name": "glyphs", "glyphs": {"local_views": 2}}
    with pytest.raises(params.ParamsError, match=r"local_views: objective simclr takes whole views only; set it to 0"):
        recipe.check({**right, "augment": {**right["augment"], "views": views}})
    recipe.check({**right, "augment": {**right["augment"], "views": views}, "objective": {"name": "swav"}})


@pytest.mark.parametrize(
    ("model", "size", "scale", "wrong"),
    [
        ("vit_tiny_patch16_224", 100, 0.5, 100),
        ("vit_tiny_patch16_224", 96, 3 / 7, 41),
        ("mixer_s32_224", 96, 0.5, 96),
        ("vit_tiny_patch16_224", 96, 0.5, None),
        ("resnet10t", 50, 0.3, None),
    ],
)
def test_sizes_that_the_backbone_does_not_take_are_refused(
    model: str, size: int, scale: float, wrong: int | None
) -> None:
    right = tree()
    views = {"name": "natural", "natural": {"local_views": 2, "local_scale": scale}}
    augment = {**right["augment"], "views": views, "image_size": size}
    changed = {
        **right, "augment": augment, "backbone": {"name": "timm", "timm": {"model": model}}, "objective": {"name": "dino"},
    }  # fmt: skip
    if wrong is None:
        recipe.check(changed)
    else:
        with pytest.raises(params.ParamsError, match=f"takes no images of {wrong} pixels .*change augment.image_size"):
            recipe.check(changed)


def test_a_file_of_the_place_wins_and_all_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "cluster.yaml"
    other.write_text("storage: s3://bucket/checkpoints\nworkers: [2, 4]\n")
    plain = params.read(ROOT / "params.yaml")
    monkeypatch.setenv("DARKMATTER_PLACE", str(other))
    moved = params.read(ROOT / "params.yaml")
    assert moved == {**plain, "place": {**plain["place"], "storage": "s3://bucket/checkpoints", "workers": [2, 4]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wokers: 2", "key 'wokers' is unknown. Did you mean 'workers'"),
        ("- 2", "must hold keys of the section place"),
        ("a: [", "is not valid YAML"),
        (None, "does not exist; DARKMATTER_PLACE names it"),
    ],
)
def test_a_wrong_file_of_the_place_is_named(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "cluster.yaml").write_text(text)
    monkeypatch.setenv("DARKMATTER_PLACE", str(tmp_path / "cluster.yaml"))
    with pytest.raises(params.ParamsError, match=re.escape(message)):
        params.read(ROOT / "params.yaml")
