"""What a caller's API key says of its generate requests: whose cached prefixes they share, and their priorities."""

from dataclasses import replace

from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_shared.rpc.authorizer import CALLER


def for_caller(params: GenerationParams) -> GenerationParams:
    """The request as the caller of this call may make it. Raises PermissionDenied for a priority that its key does not
    allow.
    """
    key = CALLER.get()
    if key is None:
        return params
    key.check_priority(params.priority)
    return replace(params, caller_salt=key.cache_salt)
