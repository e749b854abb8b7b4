# Fits a model to synthetic parts and inspects an image with the service. Does nothing if it has run before.
set -euo pipefail
cd "$(mktemp --directory)"
certificate=/home/focus/certificates/tls.crt
if focus-ray registry list s3://plant/registry press gear | grep --quiet production; then
    echo "s3://plant/registry has a model of press/gear already"
else
    focus-ray samples parts
    focus-ray ingest parts s3://plant/parts
    mkdir job
    focus-ray submit --address http://ray-head:8265 --team press --working-dir job train quickstart data.uri=s3://plant/parts storage=s3://plant/runs name=example
    focus-ray registry publish s3://plant/registry s3://plant/runs/example --team press --alias production
    until wget -q --ca-certificate="$certificate" -O /dev/null https://proxy:8443/readyz; do sleep 1; done
    for image in parts/gear/test/*/000.png; do
        echo "$image"
        wget -q --ca-certificate="$certificate" -O - --header "Authorization: Bearer $(cat /home/focus/secrets/press.token)" --header "Content-Type: image/png" \
            --post-file "$image" https://proxy:8443/v1/press/gear/inspect
        echo
    done
fi
echo "https://127.0.0.1:8443 has the service's page; its token: docker compose exec service cat /home/focus/secrets/press.token"
