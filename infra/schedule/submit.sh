#!/usr/bin/env bash
# Sends one run to a Ray cluster, prints what it prints and ends as it ends: 0 a champion, a candidate or nothing new, 3 the gate
# refused, 75 try again, else failed. What cron, systemd and GitHub Actions call.
#
# From the environment: REPOSITORY and RAY_API_SERVER_ADDRESS; REF, BRANCH, PLACE, TRIES and PAUSE if they differ from below.
# The token: RAY_AUTH_TOKEN_PATH, or RAY_AUTH_TOKEN.
set -euo pipefail

: "${REPOSITORY:?what git clone takes}" "${RAY_API_SERVER_ADDRESS:?http://HOST:8265}"
: "${REF:=main}" "${BRANCH:=runs/nightly}" "${PLACE:=infra/places/cluster.yaml}" "${TRIES:=3}" "${PAUSE:=300}"
: "${PYTHON:=python}"
export RAY_AUTH_MODE=token

for (( try = 1; ; try++ )); do
  status=0
  "$PYTHON" -m darkmatter.jobs submit --repository "$REPOSITORY" --ref "$REF" --branch "$BRANCH" --place "$PLACE" || status=$?
  if (( status != 75 || try >= TRIES )); then
    exit "$status"
  fi
  echo "submit: the run asks for another try; $try of $TRIES done, the next in $PAUSE s" >&2
  sleep "$PAUSE"
done
