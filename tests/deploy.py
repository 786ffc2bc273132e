"""What tests/deploy.sh asks of the files in deploy/ and no validator does. Needs PyYAML."""

import pathlib
import re
import subprocess
import sys

import yaml


def load(path):
    return [document for document in yaml.safe_load_all(pathlib.Path(path).read_text()) if document]


def without_discovery(source, target):
    """Copies a Prometheus config, without how it finds pods."""
    [config] = load(source)
    for job in config["scrape_configs"]:
        roles = [found["role"] for found in job.pop("kubernetes_sd_configs")]
        assert roles == ["pod"], f"{source}: expected the discovery of pods, got {roles}"
    pathlib.Path(target).write_text(yaml.safe_dump(config))


def nats_config(source, folder):
    """Writes the servers' config for a folder that is not /etc/nats."""
    [config_map] = [document for document in load(source) if document["kind"] == "ConfigMap"]
    config = config_map["data"]["nats.conf"].replace("/etc/nats/", f"{folder}/")
    pathlib.Path(folder, "nats.conf").write_text(config)


def commands(path):
    """Gives the words after the entry point of every container that runs the program."""
    for document in load(path):
        if "services" in document:
            for service in document["services"].values():
                if service["image"].startswith("autodidact:"):
                    yield service.get("entrypoint", []) + service["command"]
        elif document["kind"] in ("StatefulSet", "Deployment", "Job"):
            for container in document["spec"]["template"]["spec"]["containers"]:
                if container["image"].startswith("autodidact:"):
                    yield container.get("command", []) + container["args"]


def arguments(*paths):
    """Compares options in files with what the program takes, and tries what a new run is made of."""
    num_commands = 0
    for path in paths:
        for words in commands(path):
            num_commands += 1
            if words[0] == "begin-or-resume.sh":
                _, role, run_dir, new_run, *words = words
                # A build without the feature has no such device; that it refuses it is tested elsewhere.
                new_run = re.sub(r"--set (learner|actor)\.device=cuda", "", new_run)
                # That its preset runs is tested elsewhere too: there is no such model here.
                new_run = re.sub(r"qwen3-0\.6b(.*) --set model\.base=\S+", r"smoke\1", new_run)
                expect_runs([role, *new_run.split(), "--run-dir", run_dir, *words, "--dry-run"])
            else:
                role, *words = words
            known = set(re.findall(r"--[a-z-]+", expect_runs([role, "--help"])))
            used = {word.split("=")[0] for word in words if word.startswith("--")}
            assert used <= known, f"{path}: `autodidact {role}` does not take {sorted(used - known)}"
    assert num_commands > 0, f"expected containers that run the program in {paths}"


def expect_runs(words):
    done = subprocess.run(["autodidact", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"autodidact {' '.join(words)}: {done.stderr}"
    return done.stdout


def metrics(rules, documentation):
    """Expects a row in the documentation for every metric that an alert reads."""
    used = set(re.findall(r"autodidact_[a-z_]+", " ".join(
        rule["expr"] for group in load(rules)[0]["groups"] for rule in group["rules"])))
    known = set(re.findall(r"^\| `(autodidact_[a-z_]+)", pathlib.Path(documentation).read_text(), re.MULTILINE))
    assert used and used <= known, f"{rules}: no rows in {documentation} for {sorted(used - known)}"


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    try:
        {
            "without-discovery": without_discovery,
            "nats-config": nats_config,
            "arguments": arguments,
            "metrics": metrics,
        }[command](*paths)
    except AssertionError as error:
        sys.exit(str(error))
