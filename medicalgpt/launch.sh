# shellcheck shell=bash
# Sourced by the launchers: torchrun with as many processes as there are GPUs. See launch.py.
torchrun() {
    python -m medicalgpt.launch "$@"
}
