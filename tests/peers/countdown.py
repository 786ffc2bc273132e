"""Countdown with three numbers, learned from random weights by hindsight: the plain PyTorch script that stands beside
`deploy/configs/countdown.toml`. `tests/peers/narrow.py` runs the two in turn.

An iteration samples 1,024 answers to random problems, relabels each with the value that it reaches, keeps the newest 30,000 in
a replay buffer, and does 4 updates of 256. As many weights as the preset `nano`, the same rules: every number is used once,
results of steps are filled in, illegal choices are masked in play and in the loss, exam problems are never trained on.

Prints one line of JSON at each time asked for: the seconds spent (start-up and exams left out) and the share of the exam that
is solved greedily.
"""

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F

NUM_INTEGERS = 100
VOCABULARY = NUM_INTEGERS + 4
ADD, SUBTRACT, MULTIPLY, DIVIDE = range(NUM_INTEGERS, VOCABULARY)
PAIRS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 2, 0]])  # larger operand, smaller operand, what is left
# Target, three numbers, a, operator, b, result, a of the second step: four choices, each predicted from the row before it. What
# the second step combines is no choice any more, only how.
LENGTH, CHOICE_ROWS = 9, [3, 4, 5, 8]


class Block(torch.nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = torch.nn.RMSNorm(width), torch.nn.RMSNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.up = torch.nn.Linear(width, 4 * width, bias=False)
        self.down = torch.nn.Linear(4 * width, width, bias=False)

    def forward(self, x, cache):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat((cache["k"], k), 2), torch.cat((cache["v"], v), 2)
            cache["k"], cache["v"] = k, v
        past = k.shape[2] - length
        mask = torch.ones(length, k.shape[2], dtype=torch.bool).tril(past)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Policy(torch.nn.Module):
    def __init__(self, width=64, num_layers=3, num_heads=4):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, width)
        self.positions = torch.nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = torch.nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = torch.nn.RMSNorm(width)
        self.head = torch.nn.Linear(width, VOCABULARY, bias=False)
        torch.nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens, caches=None, past=0):
        x = self.embed(tokens) + self.positions[past : past + tokens.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[index])
        return self.head(self.norm(x))


def apply(larger, smaller):
    """Results of the four operators, 0 where the rules forbid one. `larger`, `smaller`: `[...]`; returns `[..., 4]`."""
    quotient = torch.where(larger % smaller == 0, larger // smaller, 0)
    results = torch.stack((larger + smaller, larger - smaller, larger * smaller, quotient), -1)
    return torch.where((results >= 1) & (results < NUM_INTEGERS), results, 0)


def tokens_mask(tokens, legal):
    """Vocabulary masks with those `tokens` `[B, n]` that are `legal` `[B, n]`; returns `[B, V]`."""
    mask = torch.zeros(tokens.shape[0], VOCABULARY)
    return mask.scatter_add_(1, tokens, legal.float()) > 0


def choose(logits, mask, greedy):
    logits = logits.masked_fill(~mask, -math.inf)
    if greedy:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)


@torch.no_grad()
def play(policy, targets, numbers, greedy=False):
    """Answers problems. `targets`: `[B]`; `numbers`: `[B, 3]`, descending.

    Returns inputs `[B, LENGTH]`, choices `[B, 4]`, their masks `[B, 4, V]` and the values reached `[B]`.
    """
    caches = [{} for _ in policy.blocks]
    prompt = torch.cat((targets[:, None], numbers), 1)
    larger, smaller, left = (numbers[:, PAIRS[:, column]] for column in range(3))
    results = apply(larger, smaller)  # [B, 3 pairs, 4 operators]
    operators = torch.arange(ADD, DIVIDE + 1).expand(len(targets), 4)
    masks, choices = [], []

    def take(logits, mask):
        masks.append(mask)
        choices.append(choose(logits, mask, greedy))
        return choices[-1]

    a = take(policy(prompt, caches)[:, -1], tokens_mask(larger, results.gt(0).any(2)))
    legal = results.gt(0) & (larger == a[:, None])[:, :, None]
    operator = take(policy(a[:, None], caches, 4)[:, -1], tokens_mask(operators, legal.any(1)))
    legal = legal.gather(2, (operator - ADD)[:, None, None].expand(-1, 3, 1)).squeeze(2)
    b = take(policy(operator[:, None], caches, 5)[:, -1], tokens_mask(smaller, legal))
    pair = (legal & (smaller == b[:, None])).float().argmax(1, keepdim=True)
    result = results.flatten(1).gather(1, pair * 4 + (operator - ADD)[:, None]).squeeze(1)
    rest = left.gather(1, pair).squeeze(1)
    larger, smaller = torch.maximum(result, rest), torch.minimum(result, rest)
    results = apply(larger, smaller)
    middle = torch.stack((b, result, larger), 1)
    last = take(policy(middle, caches, 6)[:, -1], tokens_mask(operators, results > 0))
    reached = results.gather(1, (last - ADD)[:, None]).squeeze(1)
    inputs = torch.cat((prompt, a[:, None], operator[:, None], middle), 1)
    return inputs, torch.stack(choices, 1), torch.stack(masks, 1), reached


def code(targets, numbers):
    """One integer a problem."""
    return ((targets * 100 + numbers[:, 0]) * 100 + numbers[:, 1]) * 100 + numbers[:, 2]


def draw(count):
    """Random problems, solvable or not: hindsight finds what an answer does solve."""
    return torch.randint(10, 100, (count,)), torch.randint(1, 26, (count, 3)).sort(1, descending=True).values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exam", required=True, help="problems as JSON lines: 1,000 to sit, and more that are not trained on")
    parser.add_argument("--at", type=float, nargs="+", default=[10, 20, 30, 60, 140, 180], help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    problems = [json.loads(line) for line in open(args.exam)]
    numbers = torch.tensor([sorted(problem["numbers"], reverse=True) for problem in problems])
    targets = torch.tensor([problem["target"] for problem in problems])
    forbidden = code(targets, numbers)
    exam = targets[:1000], numbers[:1000]
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    replay, size, at = None, 0, 0
    spent, times, num_iterations = 0.0, sorted(args.at), 0
    num_parameters = sum(parameter.numel() for parameter in policy.parameters())
    while times:
        start = time.perf_counter()
        inputs, choices, masks, reached = play(policy, *draw(1024))
        inputs[:, 0] = reached
        keep = (reached >= 10) & ~torch.isin(code(reached, inputs[:, 1:4]), forbidden)
        rows = [part[keep] for part in (inputs, choices, masks)]
        if replay is None:
            replay = [torch.zeros((30_000, *part.shape[1:]), dtype=part.dtype) for part in rows]
        places = (at + torch.arange(len(rows[0]))) % 30_000
        for buffer, part in zip(replay, rows):
            buffer[places] = part
        at, size = (at + len(places)) % 30_000, min(size + len(places), 30_000)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (num_iterations + 1) / 20)
        for _ in range(4):
            drawn = torch.randint(size, (256,))
            inputs, choices, masks = (buffer[drawn] for buffer in replay)
            logits = policy(inputs)[:, CHOICE_ROWS].masked_fill(~masks, -math.inf)
            loss = F.cross_entropy(logits.flatten(0, 1), choices.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        num_iterations += 1
        spent += time.perf_counter() - start
        while times and spent >= times[0]:
            *_, reached = play(policy, *exam, greedy=True)
            solved = (reached == exam[0]).float().mean().item()
            row = {"seconds": round(spent, 2), "solved": solved, "iterations": num_iterations, "loss": loss.item()}
            print(json.dumps({**row, "num_parameters": num_parameters}), flush=True)
            times.pop(0)


if __name__ == "__main__":
    main()
