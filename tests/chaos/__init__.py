"""A harness that tries to make Tandem lose something: docs/reliability.md says what is tried, and what came of it.

`part.py` says what a part is, `parts.py` lists them, each in a module of its own. The short form of each runs in `make
test`, the long one in `make test-slow`, the full one in `make chaos`, which keeps what it found in
benchmarks/results/chaos.
"""
