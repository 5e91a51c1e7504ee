# shellcheck shell=bash
# What the other scripts share: messages, and getting what a bare Debian lacks. Sourced, not run.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
binary=${CARGO_TARGET_DIR:-$root/target}/release/ingot

say() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif has sudo && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        fail "this needs root, and sudo would ask for a password. Run yourself, then try again: $*"
    fi
}

has_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null && return 0
    # No pipe into grep -q: under pipefail its early end would look like a failure.
    [[ $(ldconfig -p 2>/dev/null) == *libclang* ]]
}

# Installs the Debian packages that are missing, and says what each is for.
need_packages() {
    local missing=()
    want() {
        missing+=("$1")
        say "missing: $1 ($2)"
    }
    has cmake || want cmake "builds llama.cpp"
    { has c++ && has make; } || want build-essential "compiles llama.cpp and SQLite"
    has_libclang || want libclang-dev "reads llama.cpp's headers for the Rust bindings"
    has clang || want clang "has the compiler headers that libclang needs"
    has pkg-config || want pkg-config "finds libraries for the build"
    has git || want git "tells the build its revision"
    if has python3; then
        python3 -m pip --version >/dev/null 2>&1 || want python3-pip "gets the default model"
        python3 -c 'import venv, ensurepip' 2>/dev/null || want python3-venv "runs the client tests"
    fi
    install_missing
}

# The browser in which the tests look at reports.
need_browser() {
    has chromium || has chromium-browser || has google-chrome && return 0
    # Without a font a page has no text.
    local missing=(chromium fonts-liberation)
    say "missing: chromium (opens the reports in the tests)"
    install_missing
}

# Installs the packages in `missing`.
install_missing() {
    [ "${#missing[@]}" -eq 0 ] && return 0
    has apt-get || fail "please install these with your package manager: ${missing[*]}"
    say "installing: ${missing[*]}"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

need_rust() {
    # rustup installs it there, but only new shells have it in their PATH.
    has cargo || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH=$HOME/.cargo/bin:$PATH
    has cargo || fail "Rust is missing: install it with rustup, then run this again."
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    found=$(cd "$root" && rustc --version | cut -d' ' -f2)
    if [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n1)" != "$wanted" ]; then
        fail "Rust $wanted or newer is needed, and this is $found: run \`rustup update stable\`."
    fi
}

need_python() {
    has python3 || fail "Python 3 is missing: on Debian, apt-get install python3."
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        fail "Python 3.9 or newer is needed, and this is $(python3 --version)."
}

need_node() {
    has node && has npm ||
        fail "Node.js with npm is missing: on Debian, apt-get install nodejs npm. The tests use it."
}

# The source package of llama-cpp-python, which ships llama.cpp's own test files: prints where it is.
# Needs a Python with pip: INGOT_TEST_PYTHON, or .cache/venv.
llama_version=0.3.36
llama_source() (
    archive=$root/.cache/llama_cpp_python-$llama_version.tar.gz
    python=${INGOT_TEST_PYTHON:-$root/.cache/venv/bin/python}
    if [ ! -f "$archive" ]; then
        has "$python" || [ -x "$python" ] || fail "no Python at $python: set INGOT_TEST_PYTHON."
        mkdir -p "$root/.cache"
        work=$(mktemp -d "$root/.cache/source.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        say "downloading the source package llama-cpp-python $llama_version (77 MB)"
        for attempt in 1 2 3; do
            # pip asks the package for its metadata, and for that gets its build tools; nothing is
            # built.
            "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
                --no-binary llama-cpp-python --dest "$work" \
                "llama-cpp-python==$llama_version" >&2 && break
            [ "$attempt" -lt 3 ] || fail "llama-cpp-python $llama_version could not be downloaded."
            sleep 2
        done
        mv "$work/${archive##*/}" "$archive"
    fi
    echo "$archive"
)

build() {
    say "building the release binary (the first time takes some minutes)"
    (cd "$root" && cargo build --release --locked)
}
