"""Makes tiny random checkpoints of every family and the reference values of policy/tests/reference.rs, with Hugging Face
transformers: `python3 reference.py`, by hand, in a folder with torch and transformers 5 on the path. Run it again only if a family
is added: other versions of torch draw other weights.

`python3 reference.py --smollm2 FILE.gguf` makes smollm2.json from the real model instead, and `python3 reference.py --peft` an
adapter of the checkpoint `llama` and its reference values, with PEFT 0.21.
"""
import copy
import json
import pathlib
import shutil
import sys

import torch
import transformers

HERE = pathlib.Path(__file__).parent
SMALL = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, head_dim=16, bos_token_id=1, pad_token_id=None)
WIDE = dict(SMALL, num_attention_heads=2, num_key_value_heads=1)
del WIDE["head_dim"]

FAMILIES = {
    "llama": transformers.LlamaConfig(
        **WIDE, rms_norm_eps=1e-5, eos_token_id=[2, 3], tie_word_embeddings=False,
        rope_parameters=dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32)),
    "smollm2": transformers.LlamaConfig(
        **SMALL, rms_norm_eps=1e-5, eos_token_id=2, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
    "smollm3": transformers.SmolLM3Config(
        **WIDE, rms_norm_eps=1e-6, eos_token_id=2, tie_word_embeddings=True, no_rope_layers=[1, 0, 1], use_sliding_window=False,
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "qwen2": transformers.Qwen2Config(
        **WIDE, rms_norm_eps=1e-6, eos_token_id=2, tie_word_embeddings=False, use_sliding_window=True, sliding_window=5,
        max_window_layers=1, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "qwen3": transformers.Qwen3Config(
        **SMALL, rms_norm_eps=1e-6, eos_token_id=2, tie_word_embeddings=True, attention_bias=False, use_sliding_window=False,
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "mistral": transformers.MistralConfig(
        **SMALL, rms_norm_eps=1e-5, eos_token_id=2, tie_word_embeddings=False, sliding_window=7,
        rope_parameters=dict(rope_type="default", rope_theta=500.0)),
}

PROMPTS = [
    "The capital of France is", "def fibonacci(n):\n    ", "2 + 2 =", "Once upon a time, in a land far away,",
    "Water boils at a temperature of", "The opposite of hot is", "import numpy as np\n", "Q: What is 7 times 8?\nA:",
    "Roses are red, violets are", "The quick brown fox jumps over the lazy", "In 1969, humans first", "SELECT * FROM",
    "To be, or not to be,", "E = mc", "The first ten prime numbers are 2, 3, 5, 7, 11,", "My favourite colour is",
    "La vie est", "\u65e5\u672c\u306e\u9996\u90fd\u306f", "\U0001f600 \U0001f680 emoji", "    indented\n\tand tabbed\n\n",
]


def rounded(values, digits=6):
    return [float(f"%.{digits}g" % value) for value in values.flatten().tolist()]


def tiny():
    for number, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(number)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                # Far from their initial values, so that a tensor that is left out or swapped shows.
                tensor.copy_(torch.randn_like(tensor) * (0.3 if tensor.ndim == 2 else 0.2) + (0.0 if "bias" in key or
                                                                                             tensor.ndim == 2 else 1.0))
                tensor.copy_(tensor.bfloat16().float())
        model.eval()
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        # A copy: the frequencies of rotary embedding would lose their precision as well.
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(0, config.vocab_size, (1, 24))
        logits = model(tokens).logits
        logprobs = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        logprobs.mean().backward()
        gradients = {key: tensor.grad for key, tensor in model.named_parameters()}
        (HERE / f"{name}.json").write_text(json.dumps({
            "tokens": tokens[0].tolist(),
            "logits": rounded(logits[0]),
            "logprobs": rounded(logprobs),
            # Of the mean log-probability of all tokens after the first: the norm of each tensor's gradient, and its sum with
            # the signs + - + - ... of its elements.
            "gradients": {key: [float("%.7g" % grad.norm()), float("%.7g" % (grad.flatten() * signs(grad)).sum())]
                          for key, grad in gradients.items()},
        }) + "\n")


def signs(tensor):
    return 1 - 2 * (torch.arange(tensor.numel()) % 2).float()


def smollm2(path):
    path = pathlib.Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    cases = []
    for text in PROMPTS:
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(tokens).logits[0, -1]
            greedy = model.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        cases.append({
            "tokens": tokens[0].tolist(),
            # Every 97th logit after the last token, and log(sum(exp)) of all.
            "logits": rounded(logits[::97]),
            "log_sum_exp": float("%.7g" % logits.logsumexp(-1)),
            "greedy": greedy[0, tokens.shape[1]:].tolist(),
        })
    (HERE / "smollm2-135m.json").write_text(json.dumps(cases) + "\n")


def adapter():
    import peft

    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "llama", dtype=torch.float32, attn_implementation="eager")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    for key, tensor in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(tensor, std=0.3)
    folder = HERE / "llama-lora"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "llama"
    # PEFT writes a set.
    settings["target_modules"] = modules
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 24))
    logits = model(tokens).logits
    logprobs = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    logprobs.mean().backward()
    gradients = {key.replace(".default", ""): tensor.grad for key, tensor in model.named_parameters() if tensor.requires_grad}
    (HERE / "llama-lora.json").write_text(json.dumps({
        "tokens": tokens[0].tolist(),
        "logits": rounded(logits[0]),
        "logprobs": rounded(logprobs),
        "gradients": {key: [float("%.7g" % grad.norm()), float("%.7g" % (grad.flatten() * signs(grad)).sum())]
                      for key, grad in gradients.items()},
    }) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--smollm2"]:
        smollm2(sys.argv[2])
    elif sys.argv[1:2] == ["--peft"]:
        adapter()
    else:
        tiny()
