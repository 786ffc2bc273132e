"""Runs `deploy/configs/countdown.toml` on three numbers alone and the plain script `countdown.py` beside it, in turn, seed by
seed, on the same cores, and prints the share of the exam countdown-3 that each solves greedily, by seconds of training.

Needs PyTorch and zstandard (`pip install torch zstandard`) and `cargo build --release`. Start-up and exams are on neither clock:
the plain script stops its clock for exams, autodidact's run sits none, and its checkpoints are scored afterwards.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import zstandard

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMES = [10, 20, 30, 60, 140, 180]
NARROW = ['domains=[{name="countdown",share=1.0,levels=[{level=2,weight=1.0}]}]', "exams.names=[]"]


def peer(args, folder, seed):
    command = [sys.executable, ROOT / "tests/peers/countdown.py", "--exam", folder / "exam.jsonl", "--seed", seed]
    command += ["--threads", args.threads, "--at", *TIMES]
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return [100 * json.loads(line)["solved"] for line in done.stdout.splitlines()]


def ours(args, folder, seed):
    run = folder / f"run-{seed}"
    command = [args.binary, "train", ROOT / "deploy/configs/countdown.toml", "--seed", seed, "--run-dir", run]
    command += ["--minutes", TIMES[-1] / 60, "--json", "--set", f"local.threads={args.threads}"]
    local = ["local.checkpoint_every=2", "local.keep_checkpoints=1000"]
    for assignment in NARROW + local + args.set:
        command += ["--set", assignment]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = {row["step"]: row["elapsed_s"] for row in rows if "elapsed_s" in row}
    names = (path.name for path in (run / "checkpoints").iterdir())
    checkpoints = sorted(int(name.split("_")[1]) for name in names)
    scores = []
    for seconds in TIMES:
        # The last one of the run is a little late where the last step is.
        step = max(step for step in checkpoints if step and steps[step] <= seconds + 1)
        command = [args.binary, "eval", run / f"checkpoints/step_{step:08}", "--exam", "countdown-3", "--json", "--samples", "1"]
        done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
        scores.append(100 * json.loads(done.stdout)["scores"]["trained"]["greedy_pass_at_1"]["mean"])
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "target/release/autodidact"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="a key of autodidact's config")
    args = parser.parse_args()
    table = {"plain script": [], "autodidact": []}
    print("seconds          ", *(f"{seconds:5}" for seconds in TIMES), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        # 1,000 problems of the test set, then those of the dev set.
        with (ROOT / "domains/exams/countdown-3.jsonl.zst").open("rb") as packed:
            (folder / "exam.jsonl").write_bytes(zstandard.ZstdDecompressor().stream_reader(packed).read())
        for seed in args.seeds:
            for name, run in (("plain script", peer), ("autodidact", ours)):
                table[name].append(run(args, folder, seed))
                print(f"{name:12} {seed:4}", *(f"{score:5.1f}" for score in table[name][-1]), flush=True)
    for name, rows in table.items():
        print(f"{name:12}  mid", *(f"{statistics.median(column):5.1f}" for column in zip(*rows)), flush=True)


if __name__ == "__main__":
    main()
