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
import peft
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
        hf, sft, dpo, adapter = folder / "hf", folder / "sft.jsonl", folder / "dpo.jsonl", folder / "adapter"
        tables = {"sft": folder / "sft.parquet", "dpo": folder / "dpo.parquet"}
        has_adapter = "[model.adapter]" in (args.run / "config.toml").read_text()
        call("export", args.run, "--hf", hf, "--sft", sft, "--dpo", dpo, *(["--adapter", adapter] if has_adapter else []))
        call("export", args.run, "--sft", tables["sft"], "--dpo", tables["dpo"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
        model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        right = datasets.load_dataset("json", data_files=str(sft), split="train")
        pairs = datasets.load_dataset("json", data_files=str(dpo), split="train")
        assert {"prompt", "completion"} <= set(right.column_names), right.column_names
        assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names), pairs.column_names
        for rows, table in [(right, tables["sft"]), (pairs, tables["dpo"])]:
            read = datasets.load_dataset("parquet", data_files=str(table), split="train")
            assert read.to_list() == rows.to_list(), f"{table.name} holds other rows than the JSON lines"
        print(f"datasets: {len(right)} right answers, {len(pairs)} pairs, the same as JSON lines and as Parquet")

        if has_adapter:
            base = pathlib.Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
            where = dict(gguf_file=base.name) if base.is_file() else {}
            frozen = transformers.AutoModelForCausalLM.from_pretrained(base.parent if where else base, dtype=torch.float32, **where)
            adapted = peft.PeftModel.from_pretrained(frozen, adapter)
            inputs = tokenizer.apply_chat_template(right[0]["prompt"], return_tensors="pt", return_dict=True)
            with torch.no_grad():
                difference = (adapted(**inputs).logits - model(**inputs).logits).abs().max().item()
            assert difference < 1e-3, f"the adapter with peft differs from the merged one by {difference} in a logit"
            print(f"peft: logits of the adapter differ from those of the merged model by {difference:.1g} at most")
        num_equal = 0
        for row in list(right)[:: max(len(right) // 12, 1)]:
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
        assert num_equal > 5, f"only {num_equal} answers were compared"
        print(f"transformers: {num_equal} greedy answers, all as autodidact gives them")


if __name__ == "__main__":
    main()
