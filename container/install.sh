#!/usr/bin/env bash
# What the image holds, into a virtual environment: the Dockerfile's steps, and those of tests/container/test_image_install.py.
#
#   container/install.sh VENV dependencies [uv pip install's options]   the libraries, at the versions of requirements.lock
#   container/install.sh VENV wheel FOLDER                              the package as a wheel, into FOLDER
#   container/install.sh VENV package FOLDER                            the wheel of FOLDER
#
# VARIANT is cpu (torch from PyTorch's index of builds without CUDA) or cuda (torch as the package index has it).
# PYPI_INDEX and TORCH_INDEX name mirrors, where the public indexes cannot be reached; else uv knows both indexes.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 step=$2
shift 2
variant=${VARIANT:-cpu}
packages=() torch=(--torch-backend cpu)
[ -z "${PYPI_INDEX:-}" ] || packages=(--index-url "$PYPI_INDEX")
[ -z "${TORCH_INDEX:-}" ] || torch=(--index-url "$TORCH_INDEX")
extras=(--extra ray --extra offline --extra onnx)
export UV_LINK_MODE=copy PYC_INVALIDATION_MODE=UNCHECKED_HASH  # a file's time says nothing in an image
export UV_SYSTEM_CERTS=1  # a plant's own authority, where the base image has it

# uv compares every package with the hashes of the lock
install() {
    uv pip install --python "$venv/bin/python" --constraint requirements.lock "$@"
}

dependencies() {
    case $variant in
    cuda) ;;
    # first and alone, so that the index of torch answers for nothing else; what follows finds the two there, at the locked versions
    # the lock has the hashes of the other builds: what comes here is as trustworthy as that index
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
