"""The network of `policy` in PyTorch, as fast as its stock operations make it: the peer of `autodidact bench`.

Reads one line from standard input for each round and answers with one line of JSON: modes and their tokens per second.
The first line that it writes names the version. Run by `autodidact bench train --peer` and `autodidact bench decode --peer`.
"""

import argparse
import contextlib
import json
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print(json.dumps({"error": "the peer needs PyTorch: pip install torch"}))
    sys.exit(0)


class Block(torch.nn.Module):
    def __init__(self, d_model, num_heads, ff_dim):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = torch.nn.Parameter(torch.ones(d_model))
        self.qkv = torch.nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = torch.nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = torch.nn.Parameter(torch.ones(d_model))
        self.gate_up = torch.nn.Linear(d_model, 2 * ff_dim, bias=False)
        self.down = torch.nn.Linear(ff_dim, d_model, bias=False)

    def forward(self, x, cosines, sines, cache, position):
        batch, length, d_model = x.shape
        qkv = self.qkv(F.rms_norm(x, (d_model,), self.attention_norm, 1e-6))
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        if cache is not None:
            keys, values = cache
            keys[:, :, position : position + length] = k
            values[:, :, position : position + length] = v
            k, v = keys[:, :, : position + length], values[:, :, : position + length]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, d_model))
        gate, up = self.gate_up(F.rms_norm(x, (d_model,), self.mlp_norm, 1e-6)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Network(torch.nn.Module):
    def __init__(self, vocabulary_size, max_positions, d_model, num_layers, num_heads, ff_dim):
        super().__init__()
        self.d_model = d_model
        self.embed = torch.nn.Embedding(vocabulary_size, d_model)
        self.blocks = torch.nn.ModuleList(Block(d_model, num_heads, ff_dim) for _ in range(num_layers))
        self.norm = torch.nn.Parameter(torch.ones(d_model))
        self.head = torch.nn.Linear(d_model, vocabulary_size, bias=False)
        half = d_model // num_heads // 2
        angles = torch.arange(max_positions)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def forward(self, tokens, caches=None, position=0):
        x = self.embed(tokens)
        rows = slice(position, position + tokens.shape[1])
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            x = block(x, self.cosines[rows], self.sines[rows], cache, position)
        if caches is not None:
            x = x[:, -1:]
        return self.head(F.rms_norm(x, (self.d_model,), self.norm, 1e-6))


def rotate(x, cosines, sines):
    low, high = x.chunk(2, -1)
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1)


def make_train(args, network):
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(args.vocabulary_size, (args.batch, args.positions))
    targets = torch.randint(args.vocabulary_size, (args.batch, args.positions))

    def run(forward, precision):
        optimizer.zero_grad(set_to_none=True)
        with precision():
            loss = F.cross_entropy(forward(tokens).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        return args.batch * args.positions

    return run


def make_decode(args, network):
    prompt = torch.arange(args.prompt).repeat(args.batch, 1) % args.vocabulary_size
    shape = (args.batch, args.num_heads, args.positions, args.d_model // args.num_heads)

    @torch.no_grad()
    def run(forward, precision):
        with precision():
            dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
            caches = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in network.blocks]
            tokens, position = prompt, 0
            for _ in range(args.positions - args.prompt):
                logits = forward(tokens, caches, position)[:, -1].float()
                position += tokens.shape[1]
                tokens = torch.multinomial(F.softmax(logits, -1), 1)
        return args.batch * (args.positions - args.prompt)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "decode"])
    shape = ["vocabulary-size", "positions", "prompt", "d-model", "num-layers", "num-heads", "ff-dim"]
    for name in [*shape, "batch", "threads"]:
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    network = Network(args.vocabulary_size, args.positions, args.d_model, args.num_layers, args.num_heads, args.ff_dim)
    run = (make_train if args.what == "train" else make_decode)(args, network)
    # One compiled program for every length of the cache.
    compiled = torch.compile(network, dynamic=args.what == "decode" or None)
    bf16 = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    modes = {
        "eager f32": (network, contextlib.nullcontext),
        "compiled f32": (compiled, contextlib.nullcontext),
        "eager bf16": (network, bf16),
        "compiled bf16": (compiled, bf16),
    }
    print(json.dumps({"version": torch.__version__}), flush=True)
    for _ in sys.stdin:
        rates = {}
        for name, (forward, precision) in modes.items():
            start = time.perf_counter()
            num_tokens = run(forward, precision)
            rates[name] = num_tokens / (time.perf_counter() - start)
            if name == "eager bf16" and rates[name] < rates["eager f32"] / 3:
                # A processor that has no such instructions: ten minutes of what nobody would use.
                del rates[name]
                modes = {name: modes[name] for name in rates}
                break
        print(json.dumps(list(rates.items())), flush=True)


if __name__ == "__main__":
    main()
