"""The HTTP gateway: OpenAI's API over a scheduler service. It holds no state of requests, and is only a client of the
gRPC API, so any number of gateways may stand before one scheduler.
"""
