# Creates the first token of the service once, in a volume that the example can read.
set -euo pipefail
umask 077
cd /home/focus/secrets
if [ ! -s press.token ]; then
    focus-ray token create tokens.yaml --team press --note compose >press.token
fi
focus-ray token list tokens.yaml
