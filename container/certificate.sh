#!/usr/bin/env bash
# certificate.sh FOLDER: creates a self-signed certificate of this machine for serve/nginx.conf. Keeps an existing certificate.
set -euo pipefail
umask 077
cd "$1"
if [ ! -s tls.crt ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 365 -subj /CN=localhost \
        -addext subjectAltName=DNS:localhost,DNS:proxy,IP:127.0.0.1 -keyout tls.key -out tls.new
    mv tls.new tls.crt  # last, so that both files exist once tls.crt exists
fi
openssl x509 -in tls.crt -noout -subject -enddate -fingerprint -sha256
