#!/usr/bin/env bash
# Makes the RayJob of one night and waits for its end, so that "Forbid" of the CronJob forbids a second one until then.
#
# The RayJob is called as the Job is: a pod that is started again finds the run of the one before it and waits for that.
# Exit status: 0 it succeeded, 1 it failed (the Job fails), 75 Kubernetes did not answer (the Job starts another pod).
set -euo pipefail

: "${RUN_NAME:?the name of the Job}" "${RUN_FOLDER:=/run/darkmatter}" "${LOOK_EVERY:=30}"

try_again() {
  echo "create-run: $1" >&2
  exit 75
}

status_of() {  # of a field of the RayJob's status; empty while it has none
  kubectl get rayjobs.ray.io "$RUN_NAME" --output "jsonpath={.status.$1}"
}

made="$(mktemp)"
kubectl kustomize "$RUN_FOLDER" | sed "s/^  name: darkmatter-run$/  name: $RUN_NAME/" > "$made"
if ! answer="$(kubectl create --filename "$made" 2>&1)"; then
  [[ "$answer" == *AlreadyExists* ]] || try_again "the run was not made: $answer"
fi
echo "create-run: $answer"

misses=0
while true; do
  if deployment="$(status_of jobDeploymentStatus)"; then
    misses=0
  elif (( ++misses > 20 )); then
    try_again "no answer for twenty looks"
  fi
  case "$deployment" in
    Complete | Failed) break ;;
  esac
  sleep "$LOOK_EVERY"
done

job="$(status_of jobStatus)" || try_again "no answer"
message="$(status_of message)" || try_again "no answer"
echo "create-run: $RUN_NAME ended: $deployment, job ${job:-never started}. $message"
[[ "$deployment" == Complete && "$job" == SUCCEEDED ]]
