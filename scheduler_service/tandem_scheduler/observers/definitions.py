"""The scheduler service's metrics. Those that vLLM has too have its names, meanings and labels, and its buckets among
theirs. A metric of requests counts calls, however many choices they ask for, unless its text says otherwise.
"""

from tandem_scheduler.engine_interface import TOKEN_GAP_BUCKETS_S
from tandem_shared.metrics.exposition import Metric

_LATENCY_S = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
_STEP_S = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0),
    *(2.0, 5.0, 10.0, 30.0, 60.0),
)
_WIRE_S = (
    *(0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0),
)
_RECOVERY_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_BYTES = tuple(float(4**power) for power in range(2, 13))
_TOKENS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))
_TOKENS_OF_A_STEP = (1.0, *(float(2**power) for power in range(3, 15)))
_SMALL_COUNTS = (1.0, 2.0, 5.0, 10.0, 20.0)

# vLLM's

RUNNING = Metric("num_requests_running", "gauge", "Sequences that have a row in the worker's batch.")
WAITING = Metric("num_requests_waiting", "gauge", "Sequences that wait for a row, for the first time or again.")
KV_CACHE_USAGE = Metric("kv_cache_usage_perc", "gauge", "Share of the KV blocks that sequences use, 0 to 1.")
CACHE_CONFIG = Metric(
    "cache_config_info",
    "gauge",
    "Always 1; the labels say how the KV cache is set up.",
    ("block_size", "num_gpu_blocks", "enable_prefix_caching"),
)
PREFIX_CACHE_QUERIES = Metric(
    "prefix_cache_queries", "counter", "Prompt tokens that were looked for in the prefix cache, at first admissions."
)
PREFIX_CACHE_HITS = Metric("prefix_cache_hits", "counter", "Those of them that it had.")
PREEMPTIONS = Metric("num_preemptions", "counter", "Sequences that lost their row so that another could go on.")
PROMPT_TOKENS = Metric("prompt_tokens", "counter", "Prompt tokens of sequences that were admitted, cached ones too.")
PROMPT_TOKENS_CACHED = Metric("prompt_tokens_cached", "counter", "The same as prefix_cache_hits.")
GENERATION_TOKENS = Metric(
    "generation_tokens", "counter", "Output tokens. Those past a stop string count too, as they were generated."
)
ITERATION_TOKENS = Metric(
    "iteration_tokens_total", "histogram", "Tokens that a step computes.", buckets=_TOKENS_OF_A_STEP
)
REQUEST_SUCCESS = Metric(
    "request_success", "counter", "Choices of requests that have ended, by the reason.", ("finished_reason",)
)
TIME_TO_FIRST_TOKEN = Metric(
    "time_to_first_token_seconds",
    "histogram",
    "From the call's arrival at the front end to the first token of any choice.",
    buckets=_FIRST_TOKEN_S,
)
INTER_TOKEN_LATENCY = Metric(
    "inter_token_latency_seconds",
    "histogram",
    "From a choice's token to its next, at the front end.",
    buckets=TOKEN_GAP_BUCKETS_S,
)
TIME_PER_OUTPUT_TOKEN = Metric(
    "request_time_per_output_token_seconds",
    "histogram",
    "A request's time from its first token to its end, for each token of its longest choice after the first.",
    buckets=TOKEN_GAP_BUCKETS_S,
)
E2E_LATENCY = Metric(
    "e2e_request_latency_seconds",
    "histogram",
    "From the call's arrival at the front end to the end of its last choice.",
    buckets=_LATENCY_S,
)
QUEUE_TIME = Metric(
    "request_queue_time_seconds",
    "histogram",
    "From a request's arrival at the engine to the admission of its first choice.",
    buckets=_LATENCY_S,
)
PREFILL_TIME = Metric("request_prefill_time_seconds", "histogram", "From then to its first token.", buckets=_LATENCY_S)
DECODE_TIME = Metric(
    "request_decode_time_seconds", "histogram", "From then to the end of its last choice.", buckets=_LATENCY_S
)
INFERENCE_TIME = Metric(
    "request_inference_time_seconds", "histogram", "Prefill and decode together.", buckets=_LATENCY_S
)
REQUEST_PROMPT_TOKENS = Metric(
    "request_prompt_tokens", "histogram", "Prompt tokens of a request that has ended.", buckets=_TOKENS
)
REQUEST_COMPUTED_TOKENS = Metric(
    "request_prefill_kv_computed_tokens",
    "histogram",
    "Those of them that no choice found in the prefix cache, of all choices.",
    buckets=_TOKENS,
)
REQUEST_GENERATION_TOKENS = Metric(
    "request_generation_tokens",
    "histogram",
    "Output tokens of each choice of a request that has ended, as its client gets them.",
    buckets=_TOKENS,
)
REQUEST_MAX_GENERATION_TOKENS = Metric(
    "request_max_num_generation_tokens", "histogram", "Output tokens of a request's longest choice.", buckets=_TOKENS
)
REQUEST_PARAMS_N = Metric(
    "request_params_n", "histogram", "The number of choices that a request asks for.", buckets=_SMALL_COUNTS
)
REQUEST_PARAMS_MAX_TOKENS = Metric(
    "request_params_max_tokens", "histogram", "The most output tokens that a request asks for.", buckets=_TOKENS
)

# Tandem's own

REQUESTS_REFUSED = Metric(
    "requests_refused",
    "counter",
    "Generating calls that were refused before any choice of theirs waited, by the reason in the error's details.",
    ("reason",),
)
OVERSHOOT_TOKENS = Metric(
    "overshoot_tokens", "counter", "Tokens that were computed past the end of their sequence, and dropped."
)
KV_BLOCKS = Metric("kv_blocks", "gauge", "KV blocks by what they are: free, cached or used.", ("state",))
STEPS = Metric("steps", "counter", "Step plans that were made.")
PLANS_IN_FLIGHT = Metric("plans_in_flight", "gauge", "Plans that have no result yet.")
STEP_TIME = Metric(
    "step_time_seconds",
    "histogram",
    "How long the worker was at a step, by its clock: from the plan, or the end of the step before, to the tokens.",
    buckets=_STEP_S,
)
GPU_TIME = Metric("gpu_time_seconds", "counter", "Time in which the GPU was at steps, by its clock. 0 on a CPU.")
GPU_IDLE = Metric(
    "gpu_idle_seconds",
    "counter",
    "Time for which the GPU idled before steps whose plan was made while another was in flight. 0 on a CPU.",
)
WIRE_TIME = Metric(
    "wire_time_seconds",
    "histogram",
    "Of the time from a plan to its result, that in which the worker had neither: encoding, both ways, decoding.",
    buckets=_WIRE_S,
)
PLAN_BYTES = Metric("plan_bytes", "histogram", "The size of a step plan on the wire.", buckets=_BYTES)
WORKER_UP = Metric("worker_up", "gauge", "1 while the scheduler has a session with a worker, else 0.")
WORKER_LOSSES = Metric("worker_losses", "counter", "Sessions with a worker that have ended.")
WORKER_RECOVERY = Metric(
    "worker_recovery_seconds",
    "histogram",
    "From the loss of a worker to the next session with one.",
    buckets=_RECOVERY_S,
)
DRAINING = Metric("draining", "gauge", "1 while the scheduler refuses new requests, else 0.")

SCHEDULER_METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
