"""A program that calls LLM as nano-vllm's example.py and then its bench.py do, with only the import changed.

    python tests/e2e/nano_vllm_programs.py MODEL_FOLDER

What differs is the size: the embedded model has a context of 2048 tokens and a vocabulary of 1024. Both programs make
an LLM of their own; here one serves both, with the settings of both.
"""

import sys
import time
from random import randint, seed

from transformers import AutoTokenizer

from tandem import LLM, SamplingParams


def example(path: str, llm: LLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    params = SamplingParams(temperature=0.6, max_tokens=32)
    questions = ["introduce yourself", "list all prime numbers within 100"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")


def bench(llm: LLM) -> None:
    seed(0)
    prompts = [[randint(0, 1000) for _ in range(randint(20, 100))] for _ in range(32)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(2, 20)) for _ in prompts]
    llm.generate(["Benchmark: "], SamplingParams())
    started = time.time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    total_tokens = sum(each.max_tokens for each in params)
    assert [len(output["token_ids"]) for output in outputs] == [each.max_tokens for each in params]
    print(f"Total: {total_tokens}tok, Throughput: {total_tokens / (time.time() - started):.2f}tok/s")


if __name__ == "__main__":
    made = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, tensor_parallel_size=1, gpu_memory_utilization=0.8)
    example(sys.argv[1], made)
    bench(made)
