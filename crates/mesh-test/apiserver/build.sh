#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds a Go module of the tests once for each state of it, and prints where the program is.
#
# build.sh [--find] [MODULE [PACKAGE]]: the directory of a module beside this script's, `apiserver`
# if none is given, and what of it is built. Who comes while another one builds waits for it. The
# programs are kept below MESH_TEST_CACHE, else below the user's cache, so that a checkout made anew
# has them at once. --find builds nothing, and fails if the program is not there.
#
# MESH_TEST_KUBERNETES=v1.36.4 takes the servers of that release instead of those of go.mod, with the
# dependencies that it names itself.
set -eu
find=
if [ "${1:-}" = --find ]; then
    find=yes
    shift
fi
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
module=${1:-apiserver}
cd "$here/$module"

cache=${MESH_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mesh-rs}
release=
[ "$module" = apiserver ] && release=${MESH_TEST_KUBERNETES:-}
state=$(cat ./*.go go.mod go.sum 2>/dev/null | sha256sum | cut -c 1-16)
program=$cache/$module-$state${release:+-$release}
if [ -n "$find" ]; then
    [ -x "$program" ] && echo "$program"
    exit
fi
# Another module, or another release of it, may be under way for minutes.
if [ -x "$program" ]; then
    echo "$program"
    exit
fi
mkdir -p "$cache"

exec 9>"$cache/$module.lock"
flock 9
if [ ! -x "$program" ]; then
    PATH=$PATH:/usr/local/go/bin
    command -v go >/dev/null || {
        echo "$here/$module needs Go 1.24 or later to be built: no go in PATH or /usr/local/go/bin" >&2
        exit 1
    }
    if [ -n "$release" ]; then
        theirs=$(go mod download -json "k8s.io/kubernetes@$release" | sed -n 's/.*"GoMod": "\(.*\)",*/\1/p')
        mkdir -p "$cache/$release"
        cp main.go "$cache/$release"
        cd "$cache/$release"
        # Its staging directories are modules of the same release; the Go settings are its own.
        {
            printf 'module mesh.rs/apiserver\n\ngo 1.24.0\n\n'
            grep '^godebug' "$theirs" || true
            printf 'require k8s.io/kubernetes %s\n' "$release"
            sed -n 's/^\tgo.etcd.io\/etcd\/client\/v3 \(v[0-9.]*\).*/require go.etcd.io\/etcd\/server\/v3 \1/p' "$theirs"
            sed -n "s/^[[:space:]]*\(k8s.io\/[a-z0-9-]*\) => \.\/staging.*/replace \1 => \1 v0${release#v1}/p" "$theirs"
        } >go.mod
        GOTOOLCHAIN=local GOFLAGS=-mod=mod go list -deps . >/dev/null
    fi
    # The servers tell their version from the linker's values alone.
    version=${release:-$(sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\)$/\1/p' go.mod)}
    set -- "${2:-.}"
    flags="-s -w"
    if [ -n "$version" ]; then
        minor=${version#v1.}
        flags="$flags -X k8s.io/component-base/version.gitVersion=$version"
        flags="$flags -X k8s.io/component-base/version.gitMajor=1"
        flags="$flags -X k8s.io/component-base/version.gitMinor=${minor%%.*}"
        flags="$flags -X k8s.io/component-base/version.gitTreeState=clean"
        flags="$flags -X k8s.io/client-go/pkg/version.gitVersion=$version"
    fi
    CGO_ENABLED=0 GOTOOLCHAIN=local go build -mod=readonly -buildvcs=false -trimpath \
        -ldflags "$flags" -o "$program.$$" "$1" >&2
    mv "$program.$$" "$program"
fi
echo "$program"
