"""infra/places: keys of the section `place`, and nothing that a run's result depends on."""

from pathlib import Path

import pytest
import yaml
from rendered import INFRA, ROOT, rayjob

from darkmatter import cluster, params

PLACES = sorted((INFRA / "places").glob("*.yaml"))


def place(path: Path) -> cluster.PlaceConfig:
    base = yaml.safe_load((ROOT / "params.yaml").read_text())["place"]
    return params.parse(cluster.PlaceConfig, {**base, **yaml.safe_load(path.read_text())}, where="place")


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.name)
def test_a_place_is_a_section_place_whose_storage_outlasts_a_job(path: Path) -> None:
    found = place(path)
    for address in (found.storage, found.features):
        assert address.startswith("s3://"), "of a job's clone nothing is left"


def test_each_run_on_kubernetes_names_a_place_that_is_here() -> None:
    for overlay, name in (("small", "cluster"), ("gpu-nightly", "gpu"), ("gpu-kueue", "gpu")):
        words = rayjob(overlay)["spec"]["entrypoint"].split()
        assert words[words.index("--place") + 1] == f"infra/places/{name}.yaml"
        assert (ROOT / words[words.index("--place") + 1]).exists()


def test_caches_are_where_a_pod_may_write() -> None:
    for path in PLACES:
        text = yaml.safe_load(path.read_text())
        assert text.get("cache", "/cache/shards").startswith("/cache/")
        assert text.get("cache_gibibytes", 50) <= 55, "of the 60 GiB that the pod's volume has"


def test_the_batch_of_params_can_be_shared_by_every_number_of_workers_of_a_place() -> None:
    batch = yaml.safe_load((ROOT / "params.yaml").read_text())["pretrain"]["batch_size"]
    for path in PLACES:
        least, most = place(path).worker_range
        odd = [workers for workers in range(least, most + 1) if batch % workers]
        assert odd == [], f"{path.name}: a batch of {batch} cannot be shared by {odd}"
