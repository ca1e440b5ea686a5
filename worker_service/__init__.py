"""The worker service: computes the steps it is told to, in order. Queues nothing and decides nothing."""
