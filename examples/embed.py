# /// script
# requires-python = ">=3.11"
# dependencies = ["mlflow==3.17.2", "torch>=2.11", "numpy", "pandas", "pillow", "jaxtyping", "simplejpeg"]
# ///
"""How alike are these images, to the champion? `python examples/embed.py a.png b.jpg`.

The registry is MLFLOW_TRACKING_URI, or mlflow.db in this folder.
"""

import sys
from pathlib import Path

import mlflow
import pandas


def main(paths: list[str]) -> None:
    model = mlflow.pyfunc.load_model("models:/darkmatter-backbone@champion")
    images = pandas.DataFrame({"image": [Path(path).read_bytes() for path in paths]})
    embeddings = model.predict(images, params={"normalize": True})  # (N, D) float32 of unit length
    for path, similarities in zip(paths, embeddings @ embeddings.T, strict=True):
        print(path, " ".join(f"{value:6.3f}" for value in similarities))


if __name__ == "__main__":
    main(sys.argv[1:])
