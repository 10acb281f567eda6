"""The model card: what a version is, for whom, how good, and where it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from darkmatter.model import ModelSpec
from darkmatter.registry import RegisterConfig
from darkmatter.registry.export import Difference


def write(
    spec: ModelSpec,
    scores: Mapping[str, Any],
    lineage: Mapping[str, Any],
    programs: Mapping[str, Any],
    differences: Sequence[Difference],
    features: int,
    config: RegisterConfig,
) -> str:
    """The card in Markdown.

    Args:
        spec: of the model.
        scores: what evaluate wrote.
        lineage: what stands in lineage.json of the version.
        programs: what stands in programs.json.
        differences: of the programs.
        features: of an embedding.
        config: the section `register`, with what only a person can say.
    """
    words = config.card
    few_shot = "\n".join(
        f"| {protocol} | "
        + " | ".join(_cell(row.get(subject)) for subject in ("pretrained", "untrained", "pixels", "champion"))
        + " |"
        for protocol, row in scores.get("few_shot", {}).items()
        if "skipped" not in row
    )
    energy = (
        '`params={"output": "energy"}` gives the energy of each `image` and `other`, low where they belong together.'
        if programs["energy"]
        else f"It gives no energy of pairs: {programs['no_energy']}."
    )
    versions = ", ".join(f"{name} {version}" for name, version in lineage["versions"].items())
    return f"""# {config.model}

A backbone ({spec.backbone["name"]}, {features} features) pretrained without labels by {spec.objective["name"]} on \
{lineage["training_samples"]} images, for {lineage["steps"]} steps.

## Intended use

{words.intended_use.strip()}

`mlflow.pyfunc.load_model("models:/{config.model}@champion").predict(pandas.DataFrame({{"image": [file_bytes]}}))`
gives an (N, {features}) float32 array. Images are shrunk to {spec.images.image_size} pixels on the short side, the centre is
cut out, {"grey" if spec.images.channels == 1 else "colour"}. {energy}

## How not to use it

{words.not_for.strip()}

## Data

{words.data.strip()}

Source `{words.written_for}`; {lineage["training_samples"]} images without their labels; manifest {lineage["training_data"]}.

## How trained

Objective {spec.objective["name"]}, views {spec.views["name"]}, seed {lineage["seed"]}, {lineage["steps"]} steps, {versions}.
All settings are in records/params.yaml.

## How good

Accuracy on the test split, which no other stage reads, with 95% intervals, the same episodes for all; by nearest centroid
unless the row says logistic regression:

| | pretrained | untrained | pixels | champion before |
| --- | --- | --- | --- | --- |
{few_shot or "| no labels | | | | |"}

Energy margin (AUROC, 0.5 is collapse): {_cell(scores["energy_margin"]["auroc"]["pretrained"], percent=False)}.
Dimensions in use (RankMe): {scores["rankme"]["rankme"]["pretrained"]["mean"]:.1f} of {features}.

Measured with pooling `backbone`. Largest difference of what a version runs from the network that
was evaluated, on real images:
{"; ".join(f"{one.program} {one.largest:.1e} (largest number {one.scale:.3g})" for one in differences)}.

## Licence

{words.licence.strip()}

## Where it comes from

- commit {lineage["git_commit"]}, files of code and params that differ from it: {", ".join(lineage["uncommitted"]) or "none"}
- training data {lineage["training_data"]}
- training run {lineage["fingerprint"]}
- weights {lineage["weights_sha256"]}
"""


def for_hub(card: str, licence: str) -> str:
    """The same with the header that the Hugging Face hub reads."""
    return f"---\nlicense: {licence.strip().lower()}\npipeline_tag: image-feature-extraction\n---\n\n{card}"


def _cell(score: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    if score is None:
        return ""
    mean, half = score["mean"], score["ci95"] or 0.0
    return f"{100 * mean:.1f} ± {100 * half:.1f} %" if percent else f"{mean:.4f} ± {half:.4f}"
