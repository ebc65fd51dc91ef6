#!/bin/sh
# Installs the Debian packages that are missing. Prints what it does, asks nothing, and does nothing when all is
# there. Works as root or through sudo; says what to install where it can do neither.
set -eu

packages="g++ cmake ninja-build pkg-config git ca-certificates python3 python3-pip
libcli11-dev libfmt-dev libspdlog-dev nlohmann-json3-dev libsqlite3-dev libzstd-dev libxxhash-dev libpcre2-dev
libutf8proc-dev libtbb-dev libhwy-dev libgtest-dev libgmock-dev libbenchmark-dev
libegl1 libgl1-mesa-dri libgl-dev libopengl-dev libx11-dev libxext-dev libxrandr-dev libxinerama-dev libxcursor-dev libxi-dev
fonts-inter fonts-jetbrains-mono fontconfig"

if ! command -v dpkg-query >/dev/null 2>&1; then
  echo "bootstrap: this is no Debian system. Install the equivalents of these packages, then run cmake yourself:"
  echo "$packages"
  exit 0
fi

missing=""
for package in $packages; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ]; then
  run=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
  run="sudo"
elif command -v sudo >/dev/null 2>&1 && [ -t 0 ]; then
  run="sudo"
else
  echo "bootstrap: packages are missing, and this user is not root and cannot use sudo. Have an administrator run:"
  echo "  apt-get install --no-install-recommends$missing"
  exit 2
fi

echo "bootstrap: installing$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { $run apt-get update -qq && $run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >"$log" 2>&1; then
  cat "$log"
  echo "bootstrap: apt-get failed, see above; expected the packages of Debian 12:$missing"
  exit 2
fi
echo "bootstrap: done"
