# Starts the inspection service on a private Ray, with a fixed metrics port for Prometheus.
set -euo pipefail
ray start --head --port=6379 --num-cpus=2 --metrics-export-port=8080 --object-store-memory=200000000
exec focus-ray serve /etc/focus-ray/service.yaml --host 0.0.0.0
