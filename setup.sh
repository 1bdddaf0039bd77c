#!/bin/sh
# Creates .venv with everything that the notebooks need. `make` calls this script; if .venv is
# complete, it does nothing and needs no network. PYTHON names the interpreter to use (3.11,
# 3.12 or 3.13). With arguments, passes them to `uv pip install`, for .venv.
set -eu
cd "$(dirname "$0")"

# Settings of a user or a site would otherwise lead pip and uv to another environment.
export PIP_USER=0 UV_SYSTEM_PYTHON=0 UV_PYTHON="$PWD/.venv"

# The name depends on the files that define the environment: if one changes, .venv is rebuilt.
stamp=.venv/.installed-$(cat requirements.txt pyproject.toml | cksum | tr ' ' '-')

fail() {
    echo "$1" >&2
    exit 1
}

is_root_on_debian() {
    [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null
}

# install_packages WHAT DEBIAN FEDORA MACOS [OLDER_DEBIAN]: installs packages as root on Debian;
# elsewhere fails with a message that lists the commands.
install_packages() {
    if is_root_on_debian; then
        export DEBIAN_FRONTEND=noninteractive
        echo "installing $2 ..." >&2
        # shellcheck disable=SC2086  # several packages
        { apt-get update && { apt-get install -y $2 || apt-get install -y ${5:-$2}; }; } > /dev/null
    else
        fail "$1 is needed. Install it and call make again:
  Debian, Ubuntu:  sudo apt-get install $2${5:+ (or $5)}
  Fedora:          sudo dnf install $3
  macOS:           brew install $4"
    fi
}

java_is_new_enough() {
    java=${JAVA_HOME:+$JAVA_HOME/bin/}java
    major=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1) || return 1
    [ "${major:-0}" -ge 17 ]
}

# Prints the first interpreter with a supported version.
find_python() {
    for candidate in "${PYTHON:-python3}" ${PYTHON:-python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# uv caches downloads in the home folder; if that isn't writable, in .venv.
choose_cache() {
    caches=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
    cache=${UV_CACHE_DIR:-${caches:-$PWD/.venv}/uv}
    if ! mkdir -p "$cache" 2> /dev/null || [ ! -w "$cache" ]; then
        cache=$PWD/.venv/uv
    fi
    export UV_CACHE_DIR="$cache"
}

# uv ignores pip's settings, so a mirror that is configured for pip, in any of its files or in its
# variable, is passed to it. The last line of the list is the one that counts.
pass_index() {
    index=$(.venv/bin/python -m pip config list 2> /dev/null |
        sed -n -E "s/^(global|install|:env:)\.index-url='(.*)'$/\2/p" | sed -n '$p')
    [ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
}

if [ $# -gt 0 ]; then
    choose_cache
    pass_index
    VIRTUAL_ENV=$PWD/.venv exec .venv/bin/uv pip install --quiet "$@"
fi

# The stamp holds the folder's path, which .venv contains: a moved or copied one is rebuilt. Earlier
# versions of this script left it empty.
is_of_this_folder() {
    [ -e "$stamp" ] && { [ ! -s "$stamp" ] || [ "$(cat "$stamp")" -ef . ]; }
}

if is_of_this_folder && java_is_new_enough; then
    exit 0
fi

java_is_new_enough || {
    [ -z "${JAVA_HOME:-}" ] ||
        fail "JAVA_HOME is $JAVA_HOME, which has no Java 17 or newer: correct it, or unset it."
    # Debian 13 has no 17, and Debian 12 no 21.
    install_packages "Java 17 or 21" openjdk-21-jre-headless java-21-openjdk-headless \
        'openjdk@21 && export JAVA_HOME="$(brew --prefix openjdk@21)"' openjdk-17-jre-headless
    java_is_new_enough || fail "Java 17 or 21 is needed: PATH leads to another version."
}

python=$(find_python) || {
    [ -z "${PYTHON:-}" ] || fail "PYTHON is $PYTHON, which is not Python 3.11, 3.12 or 3.13."
    install_packages "Python 3.11, 3.12 or 3.13" "python3 python3-venv" python3.13 python@3.13
    python=$(find_python) || fail "Python 3.11, 3.12 or 3.13 is needed; name it with PYTHON=..."
}

"$python" -c 'import ensurepip, venv' 2> /dev/null || {
    install_packages "Python's venv" python3-venv python3 python@3.13
}

echo "creating .venv with $("$python" --version) ..." >&2
"$python" -m venv --clear .venv
# uv, in the version in requirements.txt, installs the rest: it downloads in parallel, and links
# cached packages into the next environment.
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    "$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' requirements.txt)"
choose_cache
pass_index
echo "installing requirements.txt (about 2 GB with TensorFlow and Spark, a minute or more) ..." >&2
# Compiled files start all programs faster: TensorFlow is imported in 5 s instead of 12. Otherwise the
# first import would compile them, or each one where PYTHONDONTWRITEBYTECODE is set.
.venv/bin/uv pip install --quiet --python .venv --compile-bytecode -r requirements.txt --editable .
.venv/bin/python -m compileall -q helpers examples > /dev/null 2>&1 || true  # the folder may be read-only
echo "fetching the jars of Kafka and of Spark's Kafka connector, and speeding up their start ..." >&2
.venv/bin/python -m helpers.broker.archive
.venv/bin/python -m helpers.spark
pwd -P > "$stamp"
