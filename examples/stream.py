"""Streams several prompts at once from a running server: python examples/stream.py [HOST:PORT]"""

import sys
from concurrent.futures import ThreadPoolExecutor

from tandem import SamplingParams, TandemClient

PROMPTS = ["ROMEO:\n", "JULIET:\n", "KING RICHARD III:\n"]


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
    with TandemClient(address) as client, ThreadPoolExecutor() as pool:

        def generate(prompt: str) -> str:
            deltas = client.generate_stream(prompt, SamplingParams(max_tokens=48))
            return prompt + "".join(delta.text_delta for delta in deltas)

        print("\n\n".join(pool.map(generate, PROMPTS)))


if __name__ == "__main__":
    main()
