#!/bin/sh
# Checks the files in deploy/ as far as possible without a container engine, a cluster or a network. Needs the binary, to
# create keys and to check arguments.
set -eu
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-$PWD/target}"
tools="$target/tools"
export PATH="$tools/deploy/bin:$tools/nats/bin:$tools/prometheus/usr/bin:$target/release:$PATH" PYTHONPATH="$tools/deploy"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check() {
    echo "\$ $*"
    "$@" || { echo "tests/deploy.sh: this check failed: $*" >&2; exit 1; }
}

check hadolint deploy/Dockerfile
check docker-compose --file deploy/compose.yaml config --quiet
check docker-compose --file deploy/compose.yaml --file deploy/compose.gpu.yaml config --quiet
check yamllint --strict --config-data '{extends: default, rules: {line-length: {max: 120}, document-start: disable}}' deploy
check kubernetes-validate --strict --quiet deploy/k8s/*.yaml deploy/k8s/gpu/*.yaml

check promtool check config deploy/prometheus/prometheus.yml
check promtool test rules deploy/prometheus/rules_test.yml
# Debian's promtool has no pod discovery, so this checks the rest of that file.
cp deploy/prometheus/rules.yml "$scratch"
check python3 tests/deploy.py without-discovery deploy/prometheus/kubernetes.yml "$scratch/kubernetes.yml"
check promtool check config "$scratch/kubernetes.yml"

# Checks the config of the cluster's NATS servers, with keys created as in docs/deploy.md. Their folder is /etc/nats.
check autodidact keys init "$scratch/keys" --actors 2 --verifiers 1 --host nats
check python3 tests/deploy.py nats-config deploy/k8s/nats.yaml "$scratch"
check env POD_NAME=nats-0 nats-server -t --config "$scratch/nats.conf"

check python3 tests/deploy.py arguments deploy/compose.yaml deploy/compose.gpu.yaml deploy/k8s/*.yaml deploy/k8s/gpu/*.yaml
check python3 tests/deploy.py metrics deploy/prometheus/rules.yml docs/metrics.md

# A new run begins; an existing run resumes.
mkdir "$scratch/bin" "$scratch/run"
printf '#!/bin/sh\necho "$*"\n' >"$scratch/bin/autodidact"
chmod +x "$scratch/bin/autodidact"
expect() {
    found=$(PATH="$scratch/bin:$PATH" sh deploy/begin-or-resume.sh learner "$scratch/run" "smoke --steps 3" --run a)
    [ "$found" = "$1" ] || { echo "deploy/begin-or-resume.sh: expected '$1', got '$found'" >&2; exit 1; }
}
expect "learner smoke --steps 3 --run-dir $scratch/run --run a"
touch "$scratch/run/config.toml"
expect "learner --resume --run-dir $scratch/run --run a"
