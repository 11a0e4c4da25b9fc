# Prepare the Python environment of the other scripts. They source this file and call
#     prepare_environment requirements.txt [more requirement files]
# with paths relative to the repository root. Afterwards `python` is the one of that environment,
# with the pinned requirements and this repository installed.
#
# An active virtual environment is used; otherwise .venv in the repository root, created if missing.
# pip runs only if a requirement file has changed since it last succeeded in that environment.

prepare_environment() {
    local root file
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [[ -z ${VIRTUAL_ENV:-} ]]; then
        VIRTUAL_ENV=$root/.venv
        if [[ ! -f $VIRTUAL_ENV/.complete ]]; then  # an interrupted creation is repeated
            _make_environment "$VIRTUAL_ENV" || return
        fi
    fi
    if [[ ! -x $VIRTUAL_ENV/bin/python ]]; then
        echo "environment: no $VIRTUAL_ENV/bin/python; deactivate that environment" >&2
        return 2
    fi
    export VIRTUAL_ENV PATH=$VIRTUAL_ENV/bin:$PATH
    unset PYTHONHOME
    for file in "$@"; do
        _install_once "$file" "$root/$file" --requirement "$root/$file" || return
    done
    # Without build isolation no network is needed: setuptools is among the requirements.
    _install_once alpaca_rlhf "$root/setup.py" \
        --no-deps --no-build-isolation --editable "$root" || return
}

_make_environment() {
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "environment: the pinned requirements need python3 3.11 or newer on PATH" >&2
        return 2
    fi
    echo "environment: creating $1"
    python3 -m venv "$1" && touch "$1/.complete"
}

# _install_once NAME FILE PIP-ARGUMENTS...: run pip unless the stamp holds the same arguments.
_install_once() {
    local name=$1 file=$2 stamp hash
    shift 2
    stamp=$VIRTUAL_ENV/.installed-$(printf %s "$name" | tr -c 'A-Za-z0-9_.\n' -)
    hash=$({ printf '%s\0' "$@"; cat "$file"; } | sha256sum) || return
    if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then
        return 0
    fi
    echo "environment: installing $name"
    "$VIRTUAL_ENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || return
    printf '%s\n' "$hash" >"$stamp"
}
