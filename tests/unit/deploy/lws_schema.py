"""What LeaderWorkerSet's API (leaderworkerset.x-k8s.io/v1) says of the fields that deploy/kubernetes uses.

From api/leaderworkerset/v1/leaderworkerset_types.go of kubernetes-sigs/lws. Pod templates are Kubernetes' own.
"""

from typing import Any

COUNT = {"type": "integer", "minimum": 1}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMA = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata={"type": "object"},
    spec=closed(
        ["leaderWorkerTemplate"],
        replicas=COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=closed(
            ["workerTemplate"],
            leaderTemplate={"type": "object"},
            workerTemplate={"type": "object"},
            size=COUNT,
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        ),
    ),
)
