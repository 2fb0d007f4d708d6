"""All that talks to Redis or to the picture store. The gateway uses `gateway_side`, a worker `worker_side`."""
