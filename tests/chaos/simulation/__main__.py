"""`python -m tests.chaos.simulation SEED`: replays the simulated world of one seed, and says what broke and when."""

import argparse
import sys

from tests.chaos.simulation.part import simulate


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    given = parser.parse_args(arguments)
    world = simulate(given.seed)
    print(f"{world.num_steps} steps, {len(world.calls)} calls, {world.seconds:.3f} virtual seconds")
    for event, count in sorted(world.events.items()):
        print(f"{count:6} {event}")
    print("\n".join(world.failures) or "nothing broke")
    return 1 if world.failures else 0


if __name__ == "__main__":
    sys.exit(main())
