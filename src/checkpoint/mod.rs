//! Bytes on disk: safetensors, shards, the hub, made-up weights.
