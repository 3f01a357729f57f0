#!/usr/bin/env bash
# Builds the serving image with buildah, runs its own command as its own user and asks it for answers.
#
# Needs buildah, curl and root or a user namespace; no engine, and no registry where BASE_IMAGE is local.
#
#   BASE_IMAGE          the Dockerfile's argument (default: its own)
#   TORCH_REQUIREMENT   the Dockerfile's argument (default: its own)
#   BUILDAH_FLAGS       flags for both building and running: --isolation chroot, --volume …
#   BUILDAH_GLOBAL      flags before the subcommand: --storage-driver vfs
#   IMAGE               name of the image (hourglass); it stays
#   BUILD=no            try the image that is there already
#   PORT                free port on the loopback interface, which the container shares (18000)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

IMAGE="${IMAGE:-hourglass}"
PORT="${PORT:-18000}"
read -ra global <<< "${BUILDAH_GLOBAL:-}"
read -ra flags <<< "${BUILDAH_FLAGS:-}"
address="http://127.0.0.1:$PORT"
scratch="$(mktemp -d)"
container=""
server=""

finish() {
    if [[ -n "$server" ]]; then kill -- "-$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
    if [[ -n "$container" ]]; then buildah "${global[@]}" rm "$container" > /dev/null; fi
    rm -rf "$scratch"
}
trap finish EXIT

inside() { buildah "${global[@]}" run "${flags[@]}" "$container" -- "$@"; }

arguments=()
for name in BASE_IMAGE TORCH_REQUIREMENT; do
    if [[ -n "${!name:-}" ]]; then arguments+=(--build-arg "$name=${!name}"); fi
done
if [[ "${BUILD:-yes}" != no ]]; then
    # Docker's format, because OCI's has no health check.
    buildah "${global[@]}" bud "${flags[@]}" --format docker --layers=false "${arguments[@]}" --tag "$IMAGE" .
fi

container="$(buildah "${global[@]}" from --pull-never "$IMAGE")"
mapfile -t command < <(buildah "${global[@]}" inspect --format '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' "$container" | sed '/^$/d')

echo
echo "image:   $(buildah "${global[@]}" images --format '{{.Name}}:{{.Tag}} {{.Size}}' "$IMAGE")"
echo "command: ${command[*]}"
echo "user:    $(inside id)"
echo "torch:   $(inside python -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda)')"
inside python -c '
import importlib.util, os
present = [name for name in ("sklearn", "torchvision", "training", "triton", "pip") if importlib.util.find_spec(name)]
assert not present, f"the serving image carries {present}"
assert os.getuid() != 0, "the image runs as root"
'
echo "absent:  sklearn, torchvision, training, triton, pip"

# A group of its own, so that finish ends the server and not only buildah.
set -m
buildah "${global[@]}" run "${flags[@]}" --env "HOURGLASS_PORT=$PORT" "$container" -- "${command[@]}" \
    > "$scratch/log" 2>&1 < /dev/null &
server=$!
set +m
ready=""
for _ in $(seq 120); do
    if curl --silent --fail --output "$scratch/ready" "$address/readyz"; then ready=yes; break; fi
    if ! kill -0 "$server" 2>/dev/null; then break; fi
    sleep 1
done
if [[ -z "$ready" ]]; then
    echo "not ready; the log:" >&2
    cat "$scratch/log" >&2
    exit 1
fi
picture="$(find examples -name '*.png' | sort | head -n 1)"
echo "GET /readyz: $(head -c 300 "$scratch/ready")"
curl --silent --show-error --fail-with-body --form "file=@$picture" "$address/reconstruct" > "$scratch/answer"
echo "POST /reconstruct with $picture: $(head -c 120 "$scratch/answer") … $(tail -c 80 "$scratch/answer")"
curl --silent --show-error --fail --form "file=@$picture" --header 'Accept: image/png' "$address/reconstruct" \
    --output "$scratch/answer.png" --write-out 'as a picture: %{http_code} %{content_type} %{size_download} bytes\n'

# The health check is read from the image and run inside it, as an engine would.
mapfile -t health < <(buildah "${global[@]}" inspect --format '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' \
    "$container" | sed '/^$/d')
buildah "${global[@]}" run "${flags[@]}" --env "HOURGLASS_PORT=$PORT" "$container" -- "${health[@]:1}" < /dev/null
echo "health check: passed"
