# Sourced by the others: where the server is, where the suites are, and a bound on the time of each.
set -u
usage="usage: SUITES=FOLDER $0 URL [MORE OPTIONS OF THE SUITE]   (FOLDER as made by prepare.sh, URL like http://127.0.0.1:8080)"
URL=${1:?$usage}
SUITES=$(realpath "${SUITES:?$usage}")
MODEL=${MODEL:-local}      # any name, if the server has --alias '*'
shift
HOST=${URL#*://}
PORT=${HOST##*:}
here=$(cd "$(dirname "$0")" && pwd)
bounded() { timeout -k 10 "${LIMIT:-900}" "$@"; }
export PYTHONDONTWRITEBYTECODE=1 NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
