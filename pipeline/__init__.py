"""A trained model in use: loading, prompts, initial latents, sampling and decoding."""
