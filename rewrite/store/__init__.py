"""Live models and pretrained models on disk: safetensors alone, written whole or not at all."""
