#!/usr/bin/env bash
# From a bare machine to a served model: installs what is missing, builds, gets the default model and
# serves it on 127.0.0.1:8000. Arguments go to `ingot serve`.
#
#   scripts/start.sh [ARGUMENTS of ingot serve]
#   scripts/start.sh --check [ARGUMENTS]   on a free port: asks one question, prints the answer, stops
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

check=false
if [ "${1:-}" = --check ]; then
    check=true
    shift
    set -- --port 0 "$@"
fi

need_python
need_packages
need_rust
build

# The server writes its address to standard output once it listens; its log goes to standard error.
exec 3< <(exec "$binary" serve "$@")
server=$!
stop() { kill -TERM "$server" 2>/dev/null || true; }
trap stop EXIT
trap 'stop; wait "$server" 2>/dev/null; exit 130' INT
trap 'stop; wait "$server" 2>/dev/null; exit 143' TERM

url=
while read -r line <&3; do
    printf '%s\n' "$line"
    if [[ $line =~ http://(\[[0-9a-f:]+\]|[0-9.]+):[0-9]+ ]]; then
        url=${BASH_REMATCH[0]/0.0.0.0/127.0.0.1}
        break
    fi
done
[ -n "$url" ] || { wait "$server" || true; fail "the server ended before it listened; see above."; }

if $check; then
    # What else it prints must not fill the pipe.
    cat <&3 >/dev/null &
    python3 "$root/scripts/ask.py" "$url"
    say "stopping"
    stop
    wait "$server" || fail "the server ended with status $? instead of 0."
    trap - EXIT
    say "the check passed"
else
    python3 "$root/scripts/ask.py" "$url" --curl &
    cat <&3 &
    wait "$server"
fi
