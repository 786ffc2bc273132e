"""One answer of a pretrained model with llama.cpp: a peer of `autodidact bench decode --model --batch 1`, for the same prompt and
as many new tokens.

A GGUF file is measured as it is, and with its weights as F32. Build llama.cpp for this processor, which is the default of
`pip install llama-cpp-python` from source.

Reads the prompts as JSON from the first line of standard input, then one line for each round. Answers with one line of JSON each:
modes and their new tokens per second. The first line that it writes names the version.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

try:
    import gguf
    import llama_cpp
except ImportError as error:
    print(json.dumps({"error": f"the peer needs {error.name}: pip install llama-cpp-python gguf"}))
    sys.exit(0)


def write_f32(source, target):
    """Copies a GGUF file, its weights as F32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1].tolist()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--answer-tokens", type=int, required=True)
    args = parser.parse_args()
    source = pathlib.Path(args.model)
    [prompt] = json.loads(sys.stdin.readline())
    if source.suffix != ".gguf":
        print(json.dumps({"error": f"llama.cpp: expected a GGUF file as --model, got {source}"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = os.path.join(folder, "f32.gguf")
        write_f32(source, whole)
        num_positions = len(prompt) + args.answer_tokens

        def load(path):
            threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
            # Without a map of the file its weights are read before the first round.
            return llama_cpp.Llama(str(path), n_ctx=num_positions, use_mmap=False, verbose=False, seed=0, **threads)

        modes = {"F32": load(whole)}
        modes[source.stem.rsplit(".", 1)[-1] + ", the file as it is"] = load(source)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for _ in sys.stdin:
        rates = {}
        for name, model in modes.items():
            model.reset()
            start = time.perf_counter()
            tokens = model.generate(prompt, temp=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
            # Answers do not end by themselves, here and in the peer.
            for _ in range(args.answer_tokens):
                next(tokens)
            rates[name] = args.answer_tokens / (time.perf_counter() - start)
        print(json.dumps(list(rates.items())), flush=True)


if __name__ == "__main__":
    main()
