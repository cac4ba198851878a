# shellcheck shell=bash
# Sourced by run_demo.sh and run_tests.sh from the project's root: .venv with the requirements, made once.

if [ ! -x .venv/bin/python ]; then
    echo "Making .venv …"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $("${PYTHON:-python3}" --version) is too old; install Python 3.11 or newer, or set PYTHON=/path/to/it" >&2
        exit 2
    }
    "${PYTHON:-python3}" -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate
if ! cmp -s requirements.txt .venv/requirements.installed; then
    echo "Installing requirements.txt (a few minutes the first time) …"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.installed
fi
