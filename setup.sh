#!/bin/sh
# Makes .venv with all that the notebooks need. `make` calls it; a second call finds all done and
# needs no network. PYTHON names the interpreter to use (3.11, 3.12 or 3.13).
set -eu
cd "$(dirname "$0")"

# What the environment is made from; when one of these changes, it is installed anew.
stamp=.venv/.installed-$(cat requirements.txt pyproject.toml | cksum | tr ' ' '-')

fail() {
    echo "$1" >&2
    exit 1
}

is_root_on_debian() {
    [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null
}

# install_packages WHAT DEBIAN FEDORA MACOS [OLDER_DEBIAN]: installs Debian's packages, or says how.
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

# Prints the first interpreter of a fitting version.
find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if [ -e "$stamp" ] && java_is_new_enough; then
    exit 0
fi

java_is_new_enough || {
    # Debian 13 has 21 but not 17, Debian 12 the reverse.
    install_packages "Java 17 or 21" openjdk-21-jre-headless java-21-openjdk-headless openjdk@21 \
        openjdk-17-jre-headless
    java_is_new_enough || fail "Java 17 or 21 is needed: JAVA_HOME or PATH leads to another version."
}

python=$(find_python) || {
    install_packages "Python 3.11, 3.12 or 3.13" "python3 python3-venv" python3.13 python@3.13
    python=$(find_python) || fail "Python 3.11, 3.12 or 3.13 is needed; name it with PYTHON=..."
}

"$python" -c 'import ensurepip, venv' 2> /dev/null || {
    install_packages "Python's venv" python3-venv python3 python@3.13
}

echo "making .venv with $("$python" --version) ..." >&2
"$python" -m venv --clear .venv
echo "installing requirements.txt (about 2 GB with TensorFlow and Spark, some minutes) ..." >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
echo "fetching the jars of Kafka and of Spark's Kafka connector ..." >&2
.venv/bin/python -c 'from helpers import broker, spark; broker.fetch(); spark.fetch()'
touch "$stamp"
