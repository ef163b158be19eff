#!/usr/bin/env bash
# Runs the whole suite under each interpreter: tests/pythons.sh python3.10 python3.12
#
# Each gets a fresh virtual environment and a copy of the checkout, with the versions of constraints.txt. One line an
# interpreter, the closing line of pytest; where a step failed, what it wrote is in the file named beside it.
# With LOWEST=yes the lowest versions of the dependencies that pyproject.toml allows take the place of those.
# PYTEST_ARGS takes the place of the whole suite: PYTEST_ARGS="-q tests/test_flow.py" tests/pythons.sh python3.10
set -uo pipefail
[ $# -gt 0 ] || { echo "usage: tests/pythons.sh INTERPRETER..." >&2; exit 2; }
checkout=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
status=0 number=0

lowest() { # the lower bounds of the dependencies, as constraints
    sed -n '/^dependencies/,/^]/s/^ *"\([a-z0-9-]*\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml
}

under() { # INTERPRETER FOLDER
    "$1" -m venv "$2/venv" || return
    mkdir "$2/checkout"
    git -C "$checkout" ls-files -z --cached --others --exclude-standard |
        (cd "$checkout" && while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done) |
        tar -C "$checkout" --null -T - -c | tar -C "$2/checkout" -x || return
    cd "$2/checkout" || return
    local versions=constraints.txt
    [ "${LOWEST:-}" != yes ] || { versions=$2/lowest.txt && lowest >"$versions"; }
    "$2/venv/bin/python" -m pip install -q -c "$versions" -e ".[test]" || return
    # shellcheck disable=SC2086
    "$2/venv/bin/python" -m pytest ${PYTEST_ARGS:--q -n auto --dist worksteal}
}

for interpreter in "$@"; do
    folder=$place/$(basename "$interpreter")-$((++number))
    mkdir "$folder"
    if (under "$interpreter" "$folder") >"$folder/log" 2>&1; then
        echo "$interpreter: $(tail -n 1 "$folder/log")"
        rm -rf "$folder"
    else
        status=1
        echo "$interpreter: $(tail -n 1 "$folder/log") ($folder/log)"
        rm -rf "$folder/venv" "$folder/checkout"
    fi
done
rmdir "$place" 2>/dev/null
exit $status
