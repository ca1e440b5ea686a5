"""What a caller's API key says of its generate requests: whose cached prefixes they share, and their priorities."""

from dataclasses import replace

from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_shared.rpc.authorizer import CALLER


def for_caller(params: GenerationParams) -> GenerationParams:
    """The request as the caller of this call may make it. One without a priority gets the nearest to 0 that its key
    allows. Raises PermissionDenied for a priority that the key does not allow.
    """
    key = CALLER.get()
    if key is None:
        return params
    priority = params.priority
    if priority is None:
        priority = min(max(0, key.min_priority), key.max_priority)
    key.check_priority(priority)
    return replace(params, priority=priority, caller_salt=key.cache_salt)
