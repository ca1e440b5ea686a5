"""A harness that tries to make Tandem lose something: docs/reliability.md says what is tried, and what came of it.

`harness` says what a part is, lists the parts, keeps their results and makes the table of them. `support` has what
several parts use: engines to disturb, and clients that hold each answer against the truth. Each other folder is a part.
The short form of each part runs in `make test`, the long one in `make test-slow`, and the full one in `make chaos`,
which keeps what it found in benchmarks/results/chaos.
"""
