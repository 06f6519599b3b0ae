#!/usr/bin/env bash
# Builds the image of Dockerfile with buildah, which needs no Docker engine and no privileged daemon.
#
#   deploy/image.sh [NAME] [further arguments for buildah build, such as --build-arg TORCH_INDEX=...]
#
# BASE_IMAGE=<image> names the base image, as in Dockerfile. BASE_IMAGE=debootstrap builds a base image from Debian's mirror, with
# the certificates that this machine trusts. The script also does this if the image registry can't be reached.
# STORAGE=<folder> keeps images and layers in that folder instead of buildah's default.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-ddpm}
shift || true
buildah=(buildah)
if [ -n "${STORAGE:-}" ]; then
  buildah+=(--root "$STORAGE/images" --runroot "$STORAGE/run")
fi

for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || {
    echo "image: $tool is not installed; run: apt-get install buildah debootstrap" >&2
    exit 2
  }
done

base=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}
if [ "$base" != debootstrap ] && ! "${buildah[@]}" pull --quiet --retry 0 "$base" >/dev/null 2>&1; then
  if ! "${buildah[@]}" pull --quiet --retry 0 "docker.io/library/$base" >/dev/null 2>&1; then
    echo "image: $base can't be pulled; building a base image from Debian's mirror with debootstrap instead"
    base=debootstrap
  fi
fi
if [ "$base" = debootstrap ]; then
  base=localhost/ddpm-base
  if ! "${buildah[@]}" inspect --type image "$base" >/dev/null 2>&1; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >"$root.log" 2>&1 || {
      tail -n 5 "$root.log" >&2
      exit 1
    }
    rm -rf "$root.log" "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add --quiet "$container" "$root" / >/dev/null
    "${buildah[@]}" config --cmd /bin/bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    "${buildah[@]}" commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$root"
    trap - EXIT
  fi
fi

# --format docker keeps HEALTHCHECK, which the OCI format lacks. Isolation by chroot also works inside a container.
"${buildah[@]}" build --isolation chroot --format docker --layers --build-arg "BASE_IMAGE=$base" \
  --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" --tag "$name" "$@" .
