#!/usr/bin/env bash
# pod.sh submit RULE THREADS MEGABYTES GPUS SCRIPT  starts a pod that runs Snakemake's job script, and prints its name
# pod.sh status POD                                 prints running, success or failed, and removes what has ended
# pod.sh cancel POD…
set -euo pipefail

image=${UNRAVELLING_IMAGE:-python:3.12}   # has bash, git, and the Python that .venv was made with
claim=${UNRAVELLING_CLAIM:-unravelling}   # the volume
mount=${UNRAVELLING_MOUNT:-/unravelling}  # where every pod, and whoever starts Snakemake, sees it

case $1 in
submit)
  name=unravelling-$2-$(date +%s)-$RANDOM
  kubectl create --filename - >/dev/null <<POD
apiVersion: v1
kind: Pod
metadata: {name: $name, labels: {app: unravelling}}
spec:
  restartPolicy: Never
  volumes: [{name: shared, persistentVolumeClaim: {claimName: $claim}}]
  containers:
  - name: job
    image: $image
    command: [bash, "${6//\"/\\\"}"]
    workingDir: "${PWD//\"/\\\"}"
    env: [{name: UNRAVELLING_DATA, value: "${UNRAVELLING_DATA:-}"}]
    volumeMounts: [{name: shared, mountPath: $mount}]
    resources: {requests: {cpu: $3, memory: ${4}M}, limits: {nvidia.com/gpu: $5}}
POD
  echo "$name"
  ;;
status)
  case $(kubectl get pod "$2" --output 'jsonpath={.status.phase}') in
  Succeeded) echo success && kubectl delete pod "$2" --wait=false >/dev/null ;;
  Failed) echo failed && kubectl delete pod "$2" --wait=false >/dev/null ;;
  *) echo running ;;
  esac
  ;;
cancel) kubectl delete pod "${@:2}" --wait=false >/dev/null ;;
esac
