#!/bin/sh
# mmdebstrap's hook: kernel.sh ROOT SUITE OUTPUT puts the newest cloud kernel of SUITE at OUTPUT and
# its modules into ROOT. The package is unpacked, not installed: an initrd would be made otherwise.
set -eu
root=$1 suite=$2 output=$3
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"
package=$(apt-cache -o APT::Default-Release="$suite" depends linux-image-cloud-amd64 |
    awk '/Depends: linux-image/ { print $2; exit }')
apt-get -o APT::Sandbox::User=root download -t "$suite" "$package"
dpkg-deb -x ./*.deb unpacked
cp -a unpacked/lib/modules "$root/usr/lib/"
chroot "$root" depmod "$(ls unpacked/lib/modules)"
cp unpacked/boot/vmlinuz-* "$output"
printf 'kernel: %s\n' "$package"
