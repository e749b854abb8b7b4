#!/usr/bin/env bash
# Installs the content of the image into a virtual environment. The Dockerfile and tests/container/test_image_install.py use it.
#
#   container/install.sh VENV dependencies [options of uv pip install]   installs the libraries, at the versions of requirements.lock
#   container/install.sh VENV wheel FOLDER                              builds the package as a wheel in FOLDER
#   container/install.sh VENV package FOLDER                            installs the wheel of FOLDER
#
# VARIANT is cpu (torch from PyTorch's index of builds without CUDA) or cuda (torch from the package index).
# PYPI_INDEX and TORCH_INDEX name mirrors if the public indexes cannot be reached; by default, uv uses the public indexes.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 step=$2
shift 2
variant=${VARIANT:-cpu}
packages=() torch=(--torch-backend cpu)
[ -z "${PYPI_INDEX:-}" ] || packages=(--index-url "$PYPI_INDEX")
[ -z "${TORCH_INDEX:-}" ] || torch=(--index-url "$TORCH_INDEX")
extras=(--extra ray --extra offline --extra onnx)
export UV_LINK_MODE=copy PYC_INVALIDATION_MODE=UNCHECKED_HASH  # file times have no meaning in an image
export UV_SYSTEM_CERTS=1  # uses the certificate authority of a plant if the base image has one

# uv compares every package with the hashes of the lock
install() {
    uv pip install --python "$venv/bin/python" --constraint requirements.lock "$@"
}

dependencies() {
    case $variant in
    cuda) ;;
    # torch is installed first and alone, so that its index provides no other package; the next step finds it installed
    # the lock has the hashes of the CUDA builds, so these builds are only as trustworthy as the index of torch
    cpu) install --no-verify-hashes --no-deps "${torch[@]}" torch torchvision "$@" ;;
    *)
        echo "VARIANT=$variant: expected cpu or cuda" >&2
        exit 1
        ;;
    esac
    install "${packages[@]}" --compile-bytecode --requirements pyproject.toml "${extras[@]}" "$@"
    if [ "$variant" = cpu ] && uv pip freeze --python "$venv/bin/python" | grep -E '^(nvidia|cuda)-'; then
        echo "VARIANT=cpu, but the CUDA libraries above came along: TORCH_INDEX has no build of torch without them" >&2
        exit 1
    fi
}

wheel() {
    python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$1" .
}

package() {
    python -m pip --python "$venv/bin/python" install --quiet --no-cache-dir --no-index --no-deps "$1"/focus_ray-*.whl
    python -m pip --python "$venv/bin/python" check
}

"$step" "$@"
