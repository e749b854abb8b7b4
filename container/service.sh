# The inspection service on a Ray of its own, whose metrics have a port that Prometheus knows.
set -euo pipefail
ray start --head --port=6379 --num-cpus=2 --metrics-export-port=8080 --object-store-memory=200000000
exec focus-ray serve /etc/focus-ray/service.yaml --host 0.0.0.0
