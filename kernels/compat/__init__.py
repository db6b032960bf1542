"""Other people's signatures, thin: `compat.flash_attn` and `compat.transformers`."""
