"""The rules of the house. Each names what to do when it fails."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import darkmatter
from conftest import script
from darkmatter import lineage, params, plugin

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "components" / "darkmatter"
PLUGIN_FOLDERS = ("sources", "augmentations", "backbones", "objectives", "evaluations")
STAGES = tuple(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])

#: Every option there is. To add one is a decision: add it here with a reason in the commit.
OPTIONS = ROOT / "tests" / "options.json"


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "darkmatter.")
    # The embedder is no module of the library: MLflow runs its copy beside a file that is only there.
    return ["darkmatter", *sorted(one.name for one in found if one.name != "darkmatter.registry._embedder")]


def test_layers_import_downwards_only() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_only_cluster_imports_ray() -> None:
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "pipelines").glob("*.py")):
        if path != PACKAGE / "cluster.py":
            assert not re.search(r"^\s*(import|from) ray\b", path.read_text(), re.MULTILINE), f"{path} imports ray"


_IMPORT_PROBE = """
import json, os, sys, logging, random, warnings
before = (dict(os.environ), sorted(os.listdir(".")), os.getcwd())
handlers = list(logging.getLogger().handlers)
random.seed(0); state = random.getstate()
import {module}
assert (dict(os.environ), sorted(os.listdir(".")), os.getcwd()) == before, "environment or folder changed"
assert logging.getLogger().handlers == handlers, "a log handler was set"
assert random.getstate() == state, "the random state changed"
"""


def test_importing_any_module_has_no_effect(tmp_path: Path) -> None:
    # torch, OpenCV and matplotlib touch the environment by themselves when first imported; they come first.
    probe = "import torch, numpy, cv2, PIL.Image, pydantic, jaxtyping, jinja2, tqdm\n"
    probe += "".join(_IMPORT_PROBE.format(module=module) for module in modules())
    run = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_module_imports_ray_or_mlflow_when_imported() -> None:
    """They take seconds to import; stages that do not use them must not wait."""
    probe = "import sys\n" + "".join(f"import {module}\n" for module in modules())
    probe += "slow = {'ray', 'mlflow', 'timm', 'pandas', 'matplotlib'} & set(sys.modules); assert not slow, slow"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def choices() -> list[dict[str, str]]:
    """The default plugins, and each other one in its turn."""
    defaults = {"augment.views.name": "glyphs", "backbone.name": "small_conv", "objective.name": "simclr"}
    folders = {"augment.views.name": "augmentations", "backbone.name": "backbones", "objective.name": "objectives"}
    changes = [{key: name} for key, folder in folders.items() for name in plugin.names(folder)]
    return [defaults, *({**defaults, **change} for change in changes if not change.items() <= defaults.items())]


@pytest.mark.parametrize("names", choices(), ids=lambda names: "-".join(names.values()))
@pytest.mark.parametrize("stage", STAGES)
def test_deps_of_each_stage_cover_the_code_it_imports(stage: str, names: dict[str, str]) -> None:
    text = (ROOT / "dvc.yaml").read_text()
    for key, name in names.items():
        text = text.replace("${" + key + "}", name)
    declared = yaml.safe_load(text)["stages"][stage]["deps"]
    covered = [ROOT / dep for dep in declared]
    scripts = [ROOT / "pipelines" / f"{stage}.py", *(path for path in covered if path.suffix == ".py")]
    needed = {path for script in scripts for path in lineage.imported_files(script)} | {scripts[0]}
    for path in needed:
        assert any(path == dep or dep in path.parents for dep in covered), (
            f"dvc.yaml: stage {stage} lacks the dep {path.relative_to(ROOT)}; without it DVC skips the stage when it changes"
        )


def test_plugins_of_a_stage_are_deps_where_they_are_loaded() -> None:
    """A stage whose code loads plugins of a folder by name must depend on the chosen one (or on the folder)."""
    text = (ROOT / "dvc.yaml").read_text()
    loads = {
        "augment": ["augmentations"],
        "pretrain": ["augmentations", "backbones", "objectives"],
        "evaluate": ["augmentations", "backbones", "objectives", "evaluations"],
        "register": ["backbones", "objectives"],
        "ingest": ["sources"],
    }
    for stage, folders in loads.items():
        deps = yaml.safe_load(text)["stages"][stage]["deps"]
        for folder in folders:
            assert any(re.fullmatch(rf"components/darkmatter/{folder}(/\$\{{.*\}}\.py)?", dep) for dep in deps), (
                stage,
                folder,
            )


def test_compiled_files_are_no_dependency() -> None:
    """DVC hashes whole folders of code; with __pycache__ in them, importing a module would rerun stages."""
    assert "__pycache__" in (ROOT / ".dvcignore").read_text().splitlines()


def test_every_section_of_params_is_a_param_of_some_stage_except_place() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    read = {str(key).split(".")[0] for stage in stages.values() for key in stage["params"] if isinstance(key, str)}
    assert read == set(params.SECTIONS) - {"place"}


def configs() -> dict[str, type[params.Config]]:
    found = {}
    for name in modules():
        for value in vars(importlib.import_module(name)).values():
            if (
                isinstance(value, type)
                and issubclass(value, params.Config)
                and value.__module__ == name != "darkmatter.params"
            ):
                found[f"{name.removeprefix('darkmatter.')}.{value.__name__}"] = value
    return found


def test_every_option_is_read_by_the_code() -> None:
    """An option that nothing reads is a promise that nobody keeps."""
    attributes: set[str] = set()
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "pipelines").glob("*.py")):
        attributes.update(
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        )
    for owner, config in configs().items():
        for option in config.model_fields:
            assert option in attributes, f"{owner}.{option} is read nowhere: delete it or use it"


def test_option_names_are_the_known_ones() -> None:
    known = json.loads(OPTIONS.read_text())
    actual = {owner: sorted(config.model_fields) for owner, config in sorted(configs().items())}
    assert actual == known, "an option came or went; if that is meant, change tests/options.json and say why"


def test_every_option_is_explained_where_it_stands() -> None:
    for owner, config in configs().items():
        source = Path(sys.modules[config.__module__].__file__ or "").read_text()
        tree = next(
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef) and node.name == config.__name__
        )
        for field, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{owner}.{ast.unparse(field.target)} has no docstring under it"


def test_page_of_params_is_not_stale() -> None:
    assert script("docs/generate.py").page() == (ROOT / "docs" / "params.md").read_text(), "run `make docs`"


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_a_plugin_is_one_file(folder: str) -> None:
    """Nothing outside a plugin's own file, its tests, its options and its documents may name it."""
    allowed = {"params.yaml", "dvc.lock"}
    for name in plugin.names(folder):
        for path in (*PACKAGE.rglob("*.py"), ROOT / "dvc.yaml", *(ROOT / "pipelines").glob("*.py")):
            if path == PACKAGE / folder / f"{name}.py" or path.name in allowed:
                continue
            imported = re.search(rf"\b{folder}(\.| import .*\b){name}\b", path.read_text())
            assert not imported, f"{path.relative_to(ROOT)} names the plugin {folder}/{name}.py"


def test_readme_and_package_agree_on_the_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{darkmatter.__version__}"' in project


def test_lock_has_no_index_host_and_pins_everything() -> None:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.match(r"^[a-z0-9._-]+(\[[a-z0-9,._-]+\])?={2,3}[^ ]+( ;.*)?$", line, re.IGNORECASE), line
        assert "://" not in line, line
