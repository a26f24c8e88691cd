# Sourced by the other scripts. `make_venv NAME EXTRA` makes .venv-NAME with this project and one of its extras, and
# puts it first on PATH. It is made again when pyproject.toml changes.
#
# PYTHON chooses the interpreter. TORCH is what pip installs as torch: the default is the build that the tests run on.

make_venv() {
    local folder=".venv-$1" extra="$2" python="${PYTHON:-python3}" torch="${TORCH:-torch==2.13.0}" stamp
    stamp="$(cat pyproject.toml <(echo "$extra $torch $("$python" --version)") | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "making $folder (once; torch and its needs are the most of it)"
        rm -rf "$folder"
        "$python" -m venv "$folder"
        "$folder/bin/pip" install -q --disable-pip-version-check "$torch"
        "$folder/bin/pip" install -q --disable-pip-version-check -e ".[$extra]"
        echo "$stamp" >"$folder/stamp"
    fi
    PATH="$PWD/$folder/bin:$PATH"
}
