# For stages that want a tool which a machine may lack: `want COMMAND PACKAGE...` installs the Debian packages when it can and
# says why it can not; true when the command is there afterwards.
want() {
    local command=$1 log
    shift
    command -v "$command" >/dev/null && return 0
    if ! command -v apt-get >/dev/null; then
        echo "no $command here, and no apt-get to install it"
        return 1
    fi
    if [ "$(id -u)" != 0 ]; then
        echo "no $command here, and installing $* needs root"
        return 1
    fi
    log=$(mktemp)
    # stages run side by side: one apt-get at a time; a mirror that does not answer must not hold everything up
    if ! (flock 9 && export DEBIAN_FRONTEND=noninteractive && options="-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20" &&
        timeout 300 apt-get $options update && timeout 600 apt-get $options install -y "$@") >"$log" 2>&1 9>"${CI_WORK:-/tmp}/apt.lock"; then
        echo "apt-get could not install $*: $(tail -n 1 "$log")"
    fi
    rm -f "$log"
    command -v "$command" >/dev/null
}
