"""Answers of a pretrained model with `generate` of transformers, which has a key-value cache: a peer of `autodidact bench decode
--model`, for the same prompts and as many new tokens.

Reads the prompts as JSON from the first line of standard input, then one line for each round. Answers with one line of JSON each:
modes and their new tokens per second. The first line that it writes names the versions.
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ["TQDM_DISABLE"] = "1"

try:
    import torch
    import transformers
except ImportError as error:
    print(json.dumps({"error": f"the peer needs {error.name}: pip install torch transformers gguf"}))
    sys.exit(0)


def load(path, dtype):
    path = pathlib.Path(path)
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.to(dtype).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--answer-tokens", type=int, required=True)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    prompts = json.loads(sys.stdin.readline())
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Answers do not end by themselves, here and in the peer.
    settings = transformers.GenerationConfig(
        max_new_tokens=args.answer_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
    )
    modes = {"f32": load(args.model, torch.float32), "bf16": load(args.model, torch.bfloat16)}
    for model in modes.values():
        model.generation_config = settings
    version = f"{transformers.__version__}, PyTorch {torch.__version__}"
    print(json.dumps({"version": version}), flush=True)
    for _ in sys.stdin:
        rates = {}
        for name, model in modes.items():
            start = time.perf_counter()
            with torch.inference_mode():
                answers = model.generate(tokens, attention_mask=mask, generation_config=settings)
            seconds = time.perf_counter() - start
            assert answers.shape[1] == longest + args.answer_tokens, "an answer ended early"
            rates[name] = len(prompts) * args.answer_tokens / seconds
        print(json.dumps(list(rates.items())), flush=True)


if __name__ == "__main__":
    main()
