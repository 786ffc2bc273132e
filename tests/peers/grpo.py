"""Steps of GRPO with the trainer of TRL, on a CPU: a peer of `autodidact bench grpo`, with the same prompts, numbers of answers,
lengths, loss and learning rate. Rewards alternate in a group, so that every answer has an advantage.

Reads the prompts as JSON from the first line of standard input, then one line for each round. Answers with one line of JSON each:
modes and their answers per second, of one step each. The first line that it writes names the versions.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

# The trainer prints, and standard output is for the figures.
figures = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

os.environ["TQDM_DISABLE"] = "1"

try:
    import datasets
    import torch
    import transformers
    import trl
except ImportError as error:
    print(json.dumps({"error": f"the peer needs {error.name}: pip install trl gguf"}), file=figures, flush=True)
    sys.exit(0)

# Parts of the answers of a step whose gradients are added.
NUM_PARTS = 8


def say(value):
    print(json.dumps(value), file=figures, flush=True)


def trainer(args, prompts, dtype):
    path = pathlib.Path(args.model)
    place, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).to(dtype)
    # The weights of a GGUF file are whole when they are read.
    model.is_quantized = False
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    assert [tokenizer(text, add_special_tokens=False).input_ids for text in texts] == prompts, "other tokens"
    num_answers = len(prompts) * args.answers
    settings = trl.GRPOConfig(
        # Nothing is saved.
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        # All answers are decoded together, but their activations are not all in memory at one time.
        per_device_train_batch_size=num_answers // NUM_PARTS,
        gradient_accumulation_steps=NUM_PARTS,
        num_generations=args.answers,
        max_completion_length=args.answer_tokens,
        # Answers do not end by themselves, here and in the peer.
        generation_kwargs={"min_new_tokens": args.answer_tokens},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        max_steps=1_000_000,
        shuffle_dataset=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(index % 2 == 0) for index in range(len(completions))],
        args=settings,
        # Without a fingerprint its table is pickled, which fails with some versions of pyarrow.
        train_dataset=datasets.Dataset(datasets.table.InMemoryTable.from_pydict({"prompt": texts}), fingerprint="0"),
        processing_class=tokenizer,
    )


class Gate(transformers.TrainerCallback):
    """Holds every step of a trainer until it is asked for, and measures it: answers, rewards and the update."""

    def __init__(self):
        self.may_begin, self.is_done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_begin(self, args, state, control, **kwargs):
        self.may_begin.acquire()
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.begun
        self.is_done.release()

    def step(self):
        self.may_begin.release()
        self.is_done.acquire()
        return self.seconds


def start(trainer, num_threads):
    gate = Gate()
    trainer.add_callback(gate)

    def train():
        # Of this thread.
        torch.set_num_threads(num_threads)
        try:
            trainer.train()
        finally:
            os._exit(1)

    threading.Thread(target=train, daemon=True).start()
    return gate


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--answer-tokens", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True, help="to each problem")
    parser.add_argument("--learning-rate", type=float, required=True)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    prompts = json.loads(sys.stdin.readline())
    num_answers = len(prompts) * args.answers
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16}
    gates = {name: start(trainer(args, prompts, dtype), args.threads) for name, dtype in dtypes.items()}
    say({"version": f"{trl.__version__}, transformers {transformers.__version__}, PyTorch {torch.__version__}"})
    for _ in sys.stdin:
        say([[name, num_answers / gate.step()] for name, gate in gates.items()])
    # Its threads wait for another step.
    os._exit(0)


if __name__ == "__main__":
    main()
