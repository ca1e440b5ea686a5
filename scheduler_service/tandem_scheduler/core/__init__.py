"""The pure scheduler: events in, step plans out. No grpc, asyncio, protobuf, threads or clock."""
