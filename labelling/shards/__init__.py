"""The records of stage 1, shard by shard."""
