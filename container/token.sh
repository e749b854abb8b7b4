# The service's first token, once, in a volume that it shares with the example.
set -euo pipefail
umask 077
cd /home/focus/secrets
if [ ! -s press.token ]; then
    focus-ray token create tokens.yaml --team press --note compose >press.token
fi
focus-ray token list tokens.yaml
