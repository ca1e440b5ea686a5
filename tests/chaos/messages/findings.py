"""What the hostile messages of one piece led to."""

from collections import Counter
from dataclasses import dataclass, field

MAX_FAULTS = 20
ANSWER, SESSION, OTHERS, PROCESS = "answer", "session", "others", "process"
"""Sorts of faults: a wrong answer, a wrong session, disturbed streams or probes, processes that end or leak."""


@dataclass
class Findings:
    """Counts and faults, in the form that a results file keeps."""

    counts: Counter[str] = field(default_factory=Counter)
    """Answers, by RPC and status"""
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)
    """Faults, by sort"""
    growth_mib: dict[str, float] = field(default_factory=dict)
    """The largest growth of a process of that name"""
    slowest_probe_s: float = 0.0
    num_probes: int = 0

    def note(self, sort: str, fault: str) -> None:
        self.wrong[sort] += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)
            print(f"{sort}: {fault}", flush=True)
