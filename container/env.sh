#!/usr/bin/env bash
# Writes .env for compose.yaml: .env.example with a random secret for each empty name. Keeps an existing .env.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e .env ]; then
    echo ".env is there already: remove it for new secrets" >&2
    exit 0
fi
umask 077
while IFS= read -r line; do
    case $line in
    *=) echo "$line$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" ;;
    *) echo "$line" ;;
    esac
done <.env.example >.env
echo "wrote .env: keep it, the volumes are read with it" >&2
