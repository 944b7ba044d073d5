"""What runs models: samplers in process and behind servers, decoding, scoring, LoRA training."""
