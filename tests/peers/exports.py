"""Loads what `autodidact export` writes with the programs that it is for: transformers, datasets and, for runs with an adapter,
peft. Fails if one of them reads something else than the run holds.

    pip install torch transformers datasets peft
    autodidact train smollm2 --steps 5 --run-dir RUN
    python3 tests/peers/exports.py RUN

The greedy answers that transformers gives with the folder, without a constraint, must be those of `autodidact solve`.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import datasets
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--binary", default=str(ROOT / "target/release/autodidact"))
    args = parser.parse_args()

    def call(*words):
        done = subprocess.run([args.binary, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        hf, sft, dpo = folder / "hf", folder / "sft.jsonl", folder / "dpo.jsonl"
        call("export", args.run, "--hf", hf, "--sft", sft, "--dpo", dpo)
        tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
        model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        right = datasets.load_dataset("json", data_files=str(sft), split="train")
        pairs = datasets.load_dataset("json", data_files=str(dpo), split="train")
        assert {"prompt", "completion"} <= set(right.column_names), right.column_names
        assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names), pairs.column_names
        print(f"datasets: {len(right)} right answers, {len(pairs)} pairs")

        num_equal = 0
        for row in list(right)[:: max(len(right) // 16, 1)]:
            options = ["--domain", row["domain"], "--samples", 1, "--constrain", "none", "--json"]
            ours = json.loads(call("solve", args.run, row["problem"], *options))
            inputs = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
            theirs = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
            # Otherwise it is a sampled answer.
            if ours["solved_by_sample"] in (0, None):
                assert ours["answer"] == theirs, f"{row['problem']}: transformers {theirs!r}, autodidact {ours['answer']!r}"
                num_equal += 1
        print(f"transformers: {num_equal} greedy answers, all as autodidact gives them")


if __name__ == "__main__":
    main()
