"""Adapter folders of Hugging Face PEFT, read and written: adapter_config.json and adapter_model.safetensors."""
