#!/bin/sh
# Starts the service on a free port and has schemathesis try every route of its OpenAPI document.
#
# FUZZ_EXAMPLES: how many requests it makes up for each route at most. Model control is left out: it would unload the
# models that the other routes are tried on. A time limit of a minute replaces the ones it would make up, since 1 ms is
# a legitimate way to a 504.
set -eu

python=${PYTHON:-.venv/bin/python}
log=$(mktemp)
"$python" -m app serve --port 0 2> "$log" &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" || true; rm -f "$log"' EXIT

address=
for _ in $(seq 300); do
    address=$(sed -nE 's#.*(http://[0-9.]+:[0-9]+).*#\1#p' "$log" | head -n 1)
    if [ -n "$address" ] && "$python" -c "import httpx; httpx.get('$address/readyz').raise_for_status()" 2> /dev/null; then
        break
    fi
    sleep 0.2
done

SCHEMATHESIS_HOOKS=tests.schemathesis_hooks PYTHONPATH=. "$python" -m schemathesis.cli run "$address/openapi.json" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,unsupported_method \
    --max-examples "${FUZZ_EXAMPLES:-50}" --phases examples,coverage,fuzzing --continue-on-failure \
    --header 'X-Request-Timeout-Ms: 60000' --exclude-path-regex '/(load|unload|rollback)$'
"$python" -c "import httpx; print(httpx.get('$address/readyz').raise_for_status().text)"
