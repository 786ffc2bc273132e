"""SmolLM2 135M learns sums, reversing letters and countdown by hindsight: the plain PyTorch script that stands beside
`deploy/configs/smollm2.toml`, for the same problems, exams and questions.

    pip install torch transformers gguf zstandard
    autodidact model get smollm2-135m
    python3 tests/peers/smollm2.py PATH/SmolLM2-135M-Instruct.Q4_1.gguf --minutes 7

A step samples 8 answers to each of 30 problems with `generate`, in which only the characters of the task's answers are allowed,
and makes one update on each 60 of the answers that are right, or right for another problem that is then asked instead. AdamW in
F32 at a learning rate of 3e-5. Prints one line of JSON a step, and at the end the share of 200 dev problems of each exam that is
solved greedily, with the limit on characters and without. Start-up and exams are on no clock.
"""

import argparse
import ast
import json
import operator
import pathlib
import random
import string
import time

import torch
import transformers
import zstandard

EXAMS = pathlib.Path(__file__).resolve().parents[2] / "domains/exams"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Sum:
    exam, characters, max_tokens = "arithmetic-sum", string.digits, 4

    def draw(self, rng):
        pair = [rng.randint(10, 99), rng.randint(0, 99)]
        rng.shuffle(pair)
        return tuple(pair)

    def read(self, row):
        return tuple(int(number) for number in row["expression"].split(" + "))

    def question(self, problem):
        return f"Reply with the number only. What is {problem[0]} + {problem[1]}?"

    def is_right(self, problem, answer):
        return answer == str(sum(problem))

    def hindsight(self, problem, answer):
        """Keeps one number."""
        if not answer.isdigit() or (len(answer) > 1 and answer[0] == "0"):
            return None
        for kept in problem:
            other = int(answer) - kept
            if 0 <= other <= 99 and max(kept, other) > 9:
                return (kept, other)
        return None


class Reverse:
    exam, characters, max_tokens = "strings-reverse", string.ascii_lowercase + " ", 11

    def draw(self, rng):
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 5)))

    def read(self, row):
        return row["word"]

    def question(self, problem):
        return f"Reply with the letters only. Reverse the letters: {' '.join(problem)}"

    def is_right(self, problem, answer):
        return answer == " ".join(reversed(problem))

    def hindsight(self, problem, answer):
        letters = answer.split(" ")
        if all(len(letter) == 1 for letter in letters) and 3 <= len(letters) <= 5:
            return "".join(reversed(letters))
        return None


class Countdown:
    exam, characters, max_tokens = "countdown-3", string.digits + "+-*/() ", 24

    def draw(self, rng):
        while True:
            numbers = [rng.randint(1, 25) for _ in range(3)]
            a, b, c = rng.sample(numbers, 3)
            first, second = (rng.choice("+-*/") for _ in range(2))
            target = value(rng.choice([f"({a} {first} {b}) {second} {c}", f"{c} {second} ({a} {first} {b})"]))
            if target is not None and 10 <= target <= 99:
                return tuple(numbers), target

    def read(self, row):
        return tuple(row["numbers"]), row["target"]

    def question(self, problem):
        (*first, last), target = problem
        return ("Reply with an expression only. Every intermediate result must be a positive integer up to 99. With + - * / and "
                f"parentheses, and each number exactly once, make {target} from {', '.join(map(str, first))} and {last}.")

    def is_right(self, problem, answer):
        return self.hindsight(problem, answer) == problem

    def hindsight(self, problem, answer):
        used = "".join(character if character.isdigit() else " " for character in answer).split()
        found = value(answer) if sorted(used) == sorted(map(str, problem[0])) else None
        return (problem[0], found) if found is not None and 10 <= found <= 99 else None


def value(text):
    """Returns the value of an expression whose intermediate results are whole and from 1 to 99; None for any other text."""
    def walk(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
            return None
        left, right = walk(node.left), walk(node.right)
        if left is None or right is None:
            return None
        result = OPERATORS[type(node.op)](left, right)
        return int(result) if result == int(result) and 1 <= result <= 99 else None
    try:
        return walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        return None


class Limit(transformers.LogitsProcessor):
    """Allows some tokens alone."""

    def __init__(self, allowed, size):
        self.mask = torch.full((size,), -torch.inf)
        self.mask[allowed] = 0.0

    def __call__(self, tokens, logits):
        return logits + self.mask


class Model:
    def __init__(self, path):
        folder, name = str(path.parent), path.name
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, padding_side="left")
        self.network = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        self.special = set(self.tokenizer.all_special_ids)
        self.texts = texts
        self.limits = {}

    def prompt(self, question):
        chat = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def limit(self, characters):
        if characters not in self.limits:
            fits = [token for token, text in enumerate(self.texts)
                    if token not in self.special and text and set(text) <= set(characters)]
            self.limits[characters] = Limit(fits + [self.end], self.network.config.vocab_size)
        return [self.limits[characters]]

    def answers(self, task, problems, is_limited, **options):
        inputs = self.tokenizer([self.prompt(task.question(problem)) for problem in problems], return_tensors="pt", padding=True,
                                add_special_tokens=False)
        limit = self.limit(task.characters) if is_limited else []
        self.network.eval()
        with torch.no_grad():
            out = self.network.generate(**inputs, max_new_tokens=task.max_tokens, eos_token_id=self.end, pad_token_id=self.end,
                                        logits_processor=transformers.LogitsProcessorList(limit), **options)
        replies = out[:, inputs.input_ids.shape[1]:]
        # An answer that did not end is none.
        return [self.tokenizer.decode(reply[: reply.tolist().index(self.end)]) if self.end in reply else None for reply in replies]

    def loss(self, examples):
        """The mean cross-entropy of the answers' tokens, end tokens included; their gradients are added up."""
        rows = []
        for prompt, answer in examples:
            prompt, answer = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
            rows.append((prompt, answer + [self.end]))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        num_tokens, total = sum(len(answer) for _, answer in rows), 0.0
        for start in range(0, len(rows), 20):
            part = rows[start:start + 20]
            longest = max(len(prompt) + len(answer) for prompt, answer in part)
            tokens = torch.full((len(part), longest), self.end)
            labels = torch.full((len(part), longest), -100)
            for row, (prompt, answer) in enumerate(part):
                tokens[row, :len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                labels[row, len(prompt):len(prompt) + len(answer)] = torch.tensor(answer)
            hidden = self.network.model(tokens).last_hidden_state[:, :-1]
            counted = labels[:, 1:] != -100
            logits = self.network.lm_head(hidden[counted])
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][counted], reduction="sum") / num_tokens
            loss.backward()
            total += loss.item()
        return total


def exam_of(task):
    """Returns the test problems, and then the 200 dev problems."""
    lines = zstandard.open(EXAMS / f"{task.exam}.jsonl.zst", "rt").read().splitlines()
    return [task.read(json.loads(line)) for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, model, tasks = random.Random(args.seed), Model(args.model), [Sum(), Reverse(), Countdown()]
    exams = [exam_of(task) for task in tasks]
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=args.learning_rate, weight_decay=0.0)
    started, step = time.monotonic(), 0
    while time.monotonic() - started < 60 * args.minutes:
        step += 1
        examples, solved = [], {}
        for task, exam in zip(tasks, exams):
            problems = []
            while len(problems) < 10:
                problem = task.draw(rng)
                problems += [problem] if problem not in exam else []
            problems = [problem for problem in problems for _ in range(8)]
            right = 0
            for problem, answer in zip(problems, model.answers(task, problems, True, do_sample=True, top_k=0, top_p=1.0)):
                if answer is None:
                    continue
                right += task.is_right(problem, answer)
                settled = problem if task.is_right(problem, answer) else task.hindsight(problem, answer)
                if settled is not None and settled not in exam:
                    examples.append((model.prompt(task.question(settled)), answer))
            solved[task.exam] = right / len(problems)
        rng.shuffle(examples)
        model.network.train()
        losses = []
        for start in range(0, len(examples), 60):
            losses.append(model.loss(examples[start:start + 60]))
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        row = dict(step=step, seconds=round(time.monotonic() - started, 1), solved=solved, examples=len(examples), losses=losses)
        print(json.dumps(row), flush=True)
    for task, exam in zip(tasks, exams):
        scores, exam = {}, exam[-200:]
        for is_limited in (True, False):
            answers = []
            for start in range(0, 200, 50):
                answers += model.answers(task, exam[start:start + 50], is_limited, do_sample=False)
            right = sum(answer is not None and task.is_right(problem, answer.strip()) for problem, answer in zip(exam, answers))
            scores["limited" if is_limited else "free"] = right / 200
        print(json.dumps({"exam": task.exam, **scores}), flush=True)


if __name__ == "__main__":
    main()
