# Two hosts with a network of their own each, joined by a virtual cable: 10.77.0.1 (v0) and 10.77.0.2 (v1).
#
#   unshare --user --map-root-user --net --uts --pid --fork --kill-child --mount-proc sh two_namespaces.sh COMMAND0 COMMAND1
set -e
hostname host0
ip link set lo up
ip link add v0 type veth peer name v1
unshare --net --uts sleep 300 &
other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link set v1 netns $other
ip addr add 10.77.0.1/24 dev v0
ip link set v0 up
on_host1="nsenter --target $other --net --uts"
$on_host1 sh -c 'hostname host1; ip link set lo up; ip addr add 10.77.0.2/24 dev v1; ip link set v1 up'
GLOO_SOCKET_IFNAME=v1 $on_host1 sh -c "$2" &
second=$!
GLOO_SOCKET_IFNAME=v0 sh -c "$1"
wait $second
kill $other
