#!/bin/sh
# The data path's tests against the compiled copy: the same tests through both ways.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
out=.cache/compiled
status=0
$python tools/compile.py "$out" || status=$?
[ "$status" = 3 ] && exit 0 # no compiler: there is nothing to test
[ "$status" = 0 ] || exit "$status"
rm -rf "$out/tests"
cp -r tests "$out/tests"
for folder in docs manifests examples local injector cli tools; do ln -sfn "../../$folder" "$out/$folder"; done
cd "$out"
exec timeout 600 ../../.venv/bin/python -m pytest -q -p no:cacheprovider tests/proxy tests/policy tests/scenarios "$@"
